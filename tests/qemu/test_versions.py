"""The same on the oldest QEMU that we support, on the one that most tests run with, and on the newest one.

They take different ways: QEMU before 9.1 is paused for the point in time and cannot extend a grant, later ones are
not paused. With an iothread, what is fine on one of them aborts another one, and the guest dies with it. That may
take tens of rounds, which `make soak` makes.
"""

import asyncio
import shutil
from pathlib import Path

import pytest

from orchestrator.model import Kind, Phase
from tests.guest import sequence
from tests.guest.versions import QEMUS, qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.hooks import At
from tests.qemu.host import FLEECED, SLOWLY, Host, assert_succeeded
from tests.qemu.under_way import UnderWay

PAUSED = FIXED_GRANT = ("7.2",)
REGION_BYTES = 96 * MIB
"""What is written of a disk: of the larger one that is more than half of what its fleecing image gets first."""
EVERYWHERE = 6000
"""The guest's records are scattered: so many of them reach all that is written of both disks, ..."""
OVERWRITING = 2000
"""... so many of them some clusters."""
GROWN = "disk-vda"


@pytest.mark.parametrize("version", QEMUS)
async def test_a_full_backup_and_an_incremental_one(version: str, tmp_path: Path) -> None:
    """With iothreads: without them, each QEMU is tested elsewhere."""
    disks = [
        DiskSpec("vda", 320 * MIB, iothread=True),
        DiskSpec("vdb", 32 * MIB, format="raw", iothread=True),
    ]
    workload = Workload("sequence", region_bytes=REGION_BYTES)
    async with GuestVm(tmp_path / "vm", disks, workload, qemu=qemu(version)) as vm:
        await vm.wait_ready()
        await vm.wait_writes(EVERYWHERE)
        jobs_may_start = asyncio.Event()
        host = Host(tmp_path, vm, connect=At("blockdev-backup", jobs_may_start.wait))
        await full_backup(host, jobs_may_start, grows=version not in FIXED_GRANT)
        pauses = len(vm.pauses_seconds())
        await incremental_backup(host, grows=version not in FIXED_GRANT)
        assert (len(vm.pauses_seconds()) > pauses) == (version in PAUSED)
    shutil.rmtree(tmp_path)


async def full_backup(host: Host, jobs_may_start: asyncio.Event, *, grows: bool) -> None:
    """It begins while the guest is paused by us: its disks are copied from outside at that very moment."""
    await host.vm.pause()
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.until(lambda: under_way.phase is Phase.COPYING, "the point in time")
        moment = await host.copies()
        await host.vm.resume()
        await host.vm.wait_writes(OVERWRITING)
        jobs_may_start.set()
        await overwriting(host, under_way, grows=grows)
        await under_way.hurry()
    assert_succeeded(under_way.result)
    assert under_way.result.kind is Kind.FULL
    await host.assert_restores(moment)
    await host.assert_as_before()


async def incremental_backup(host: Host, *, grows: bool) -> None:
    """It begins while the guest runs: the order of the guest's writes proves it to be one moment."""
    vm = host.vm
    at_least = await vm.writes() // len(vm.disks) - 2
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        await overwriting(host, under_way, grows=grows)
        await under_way.hurry()
    assert_succeeded(under_way.result)
    assert under_way.result.kind is Kind.INCREMENTAL
    assert under_way.result.pause_ms is not None
    writes = under_way.result.guest_writes
    assert writes is not None
    assert writes.count >= OVERWRITING
    assert writes.mean_ms is not None
    assert writes.before_ms is not None
    restored = await host.restored()
    paths = [restored[disk.id] for disk in vm.disks]
    verdict = await asyncio.to_thread(
        sequence.check, paths, run=vm.run, region_bytes=REGION_BYTES, at_least=at_least
    )
    assert verdict.problems == []
    shutil.rmtree(host.folder / "restored")
    await host.assert_as_before()


async def overwriting(host: Host, under_way: UnderWay, *, grows: bool) -> None:
    """The guest goes on, until its fleecing image was extended where QEMU can do that."""
    await host.vm.wait_writes(OVERWRITING)
    if grows:
        await under_way.until(lambda: len(grants(under_way)) > 1, "a larger grant")
    else:
        assert len(grants(under_way)) == 1


def grants(under_way: UnderWay) -> set[int]:
    """What the larger disk's fleecing image was granted, one after the other."""
    seen = (disk for progress in under_way.progress for disk in progress.disks)
    return {disk.grant_bytes for disk in seen if disk.disk == GROWN and disk.grant_bytes}
