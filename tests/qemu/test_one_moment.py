"""A snapshot of several disks is one moment of the guest, which is never stopped for longer than it takes.

The guest writes numbered records to its disks in turn, at full speed and past the page cache: a record that is on
a later disk but not on an earlier one, a gap, or a stale cluster proves a backup broken (tests.guest.sequence).
"""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.guest import sequence
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.host import DIRECT, FLEECED, Host, assert_succeeded

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROUNDS = 3
MACHINES = {
    "two": [DiskSpec("vda", 16 * MIB, iothread=True), DiskSpec("vdb", 12 * MIB, format="raw", iothread=True)],
    "three": [
        DiskSpec("vda", 8 * MIB, format="raw"),
        DiskSpec("sda", 12 * MIB, bus="virtio-scsi", iothread=True),
        DiskSpec("nvme", 8 * MIB, bus="nvme"),
    ],
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=MACHINES)
async def vm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuestVm]:
    folder = tmp_path_factory.mktemp("vm")
    async with GuestVm(folder, MACHINES[request.param], Workload("sequence")) as guest:
        await guest.wait_ready()
        yield guest
    shutil.rmtree(folder)


async def records_on_all_disks(vm: GuestVm) -> int:
    """A number that is on all disks by now."""
    return await vm.writes() // len(vm.disks) - 2


async def checked(host: Host, *, at_least: int, swapped: bool = False) -> sequence.SequenceVerdict:
    """The newest snapshot against the order of the guest's writes."""
    restored = await host.restored()
    paths = [restored[disk.id] for disk in host.vm.disks]
    if swapped:
        paths.reverse()
    verdict = await asyncio.to_thread(sequence.check, paths, run=host.vm.run, at_least=at_least)
    shutil.rmtree(host.folder / "restored")
    return verdict


async def test_backups_with_fleecing_are_moments(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    last = 0
    for _ in range(ROUNDS):
        await vm.wait_writes(500)
        at_least = await records_on_all_disks(vm)
        assert at_least > last
        result = await host.back_up(FLEECED, bwlimit=16 * MIB)
        assert_succeeded(result)
        assert result.pause_ms is not None
        verdict = await checked(host, at_least=at_least)
        assert verdict.problems == []
        last = verdict.last[0]
        await host.assert_as_before()
    shutil.rmtree(tmp_path)


async def test_a_direct_backup_is_a_moment(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    at_least = await records_on_all_disks(vm)
    assert_succeeded(await host.back_up(DIRECT, bwlimit=16 * MIB))
    assert (await checked(host, at_least=at_least)).problems == []
    await host.assert_as_before()


async def test_mixed_up_disks_are_noticed(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    assert_succeeded(await host.back_up(FLEECED))
    assert (await checked(host, at_least=1)).ok
    assert not (await checked(host, at_least=1, swapped=True)).ok
    await host.assert_as_before()
