"""A full and incremental backups of a guest that writes all the time, on each QEMU: each point, byte for byte."""

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from orchestrator.model import Kind, Phase
from tests.guest.versions import QEMUS, qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.hooks import At
from tests.qemu.host import FLEECED, SLOWLY, Host, assert_succeeded

pytestmark = pytest.mark.asyncio(loop_scope="module")

INCREMENTALS = {"7.2": 2, "10.0": 5, "11.1": 2}
DISKS = [
    DiskSpec("vda", 64 * MIB, iothread=True),
    DiskSpec("vdb", 32 * MIB, format="raw", iothread=True),
    DiskSpec("sda", MIB + 512, bus="virtio-scsi"),
]


@pytest_asyncio.fixture(loop_scope="module")
async def vm(version: str, tmp_path: Path) -> AsyncIterator[GuestVm]:
    folder = tmp_path / "vm"
    workload = Workload("random", region_bytes=16 * MIB)
    async with GuestVm(folder, DISKS, workload, qemu=qemu(version)) as guest:
        await guest.wait_ready()
        await guest.wait_writes(200)
        yield guest
    shutil.rmtree(folder)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("version", QEMUS)
async def test_a_full_and_incrementals_under_constant_writes(version: str, vm: GuestVm, tmp_path: Path) -> None:
    jobs_may_start = asyncio.Event()
    host = Host(tmp_path, vm, connect=At("blockdev-backup", jobs_may_start.wait))
    moments: dict[str, dict[str, str]] = {}
    kinds = []
    for _ in range(1 + INCREMENTALS[version]):
        jobs_may_start.clear()
        await vm.pause()
        async with host.backing_up(FLEECED, bwlimit=16 * SLOWLY) as under_way:
            await under_way.until(lambda: under_way.phase is Phase.COPYING, "the point in time")
            moment = await host.copies()
            await vm.resume()
            await vm.wait_writes(200)
            jobs_may_start.set()
            await vm.wait_writes(100)
            await under_way.hurry()
        result = under_way.result
        assert_succeeded(result)
        await host.assert_restores(moment)
        assert result.snapshot is not None
        moments[result.snapshot] = {disk: digest(path) for disk, path in moment.items()}
        kinds.append(result.kind)
        await host.assert_as_before()
    assert kinds == [Kind.FULL] + [Kind.INCREMENTAL] * INCREMENTALS[version]
    assert result.disks[0].copied_bytes < DISKS[0].size_bytes // 2
    for snapshot, disks in moments.items():  # each point, after all the others were written
        restored = await host.restored(snapshot=snapshot)
        assert {disk: digest(path) for disk, path in restored.items()} == disks
        shutil.rmtree(tmp_path / "restored")
