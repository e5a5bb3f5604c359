"""The same on the oldest QEMU that we support, on the one that most tests run with, and on the newest one.

They take different ways: QEMU before 9.1 is paused for the point in time and cannot extend a grant, later ones are
not paused. With an iothread, what is fine on one of them aborts another one, and the guest dies with it.
Not in CI yet: `sh tests/guest/qemus.sh`, then `pytest tests/soak/full_and_incremental.py`.
"""

import asyncio
from pathlib import Path

import pytest

from orchestrator.model import Kind, Phase
from tests.guest import sequence
from tests.guest.versions import QEMUS, qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.hooks import At
from tests.qemu.host import FLEECED, SLOWLY, Host, assert_succeeded

PAUSED = ("7.2",)
OVERWRITING = 2000
"""The guest's records are scattered: so many of them reach most clusters of both disks, but not all."""


@pytest.mark.parametrize("iothread", [False, True], ids=["plain", "iothreads"])
@pytest.mark.parametrize("version", QEMUS)
async def test_a_full_backup_and_an_incremental_one(version: str, iothread: bool, tmp_path: Path) -> None:
    disks = [
        DiskSpec("vda", 64 * MIB, iothread=iothread),
        DiskSpec("vdb", 32 * MIB, format="raw", iothread=iothread),
    ]
    async with GuestVm(tmp_path / "vm", disks, Workload("sequence"), qemu=qemu(version)) as vm:
        await vm.wait_ready()
        await vm.wait_writes(OVERWRITING)
        jobs_may_start = asyncio.Event()
        host = Host(tmp_path, vm, connect=At("blockdev-backup", jobs_may_start.wait))
        await full_backup(host, jobs_may_start)
        pauses = len(vm.pauses_seconds())
        await incremental_backup(host)
        assert (len(vm.pauses_seconds()) > pauses) == (version in PAUSED)


async def full_backup(host: Host, jobs_may_start: asyncio.Event) -> None:
    """It begins while the guest is paused by us: its disks are copied from outside at that very moment."""
    await host.vm.pause()
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.until(lambda: under_way.phase is Phase.COPYING, "the point in time")
        moment = await host.copies()
        await host.vm.resume()
        await host.vm.wait_writes(OVERWRITING)
        jobs_may_start.set()
        await host.vm.wait_writes(OVERWRITING)
        await under_way.hurry()
    assert_succeeded(under_way.result)
    assert under_way.result.kind is Kind.FULL
    await host.assert_restores(moment)
    await host.assert_as_before()


async def incremental_backup(host: Host) -> None:
    """It begins while the guest runs: the order of the guest's writes proves it to be one moment."""
    vm = host.vm
    at_least = await vm.writes() // len(vm.disks) - 2
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        await vm.wait_writes(OVERWRITING)
        await under_way.hurry()
    assert_succeeded(under_way.result)
    assert under_way.result.kind is Kind.INCREMENTAL
    assert under_way.result.pause_ms is not None
    restored = await host.restored()
    paths = [restored[disk.id] for disk in vm.disks]
    verdict = await asyncio.to_thread(sequence.check, paths, run=vm.run, at_least=at_least)
    assert verdict.problems == []
    await host.assert_as_before()
