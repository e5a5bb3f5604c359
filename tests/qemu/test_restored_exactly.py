"""A snapshot is the disks' content at its moment, byte for byte, whatever the guest writes meanwhile.

The guest is paused when the backup begins, so that its disks can be copied from outside at that very moment. Then
it goes on and overwrites everything at full speed: first before the jobs start, so that all of each disk's old
data comes from the fleecing image (or the target), then while they copy.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from orchestrator.model import Fleecing, Phase
from tests.guest.vm import HISTOGRAM_NS, MIB, DiskSpec, GuestVm, Workload
from tests.qemu.hooks import At
from tests.qemu.host import DIRECT, FLEECED, SLOWLY, Host, assert_succeeded

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLOCK = 64 * 1024
ODD = MIB + 512
SMALL = 528 * 1024

MACHINES: dict[str, tuple[Sequence[DiskSpec], Workload]] = {
    "iothreads": (
        [
            DiskSpec("vda", 64 * MIB, iothread=True),
            DiskSpec("sda", 24 * MIB, bus="virtio-scsi", iothread=True, format="raw"),
            DiskSpec("nvme", SMALL, bus="nvme"),
            DiskSpec("vdb", ODD, format="raw", iothread=True),
        ],
        Workload("random"),
    ),
    "drives": (
        [
            DiskSpec("hda", 16 * MIB, bus="ide", format="raw"),
            DiskSpec("plain", SMALL, style="drive-if", with_id=False),
            DiskSpec("vda", 64 * MIB, style="drive", with_id=False),
            DiskSpec("sda", ODD, style="drive", bus="virtio-scsi"),
        ],
        Workload("random", sweep=True),
    ),
    "two": (
        [
            DiskSpec("nvme", 64 * MIB, bus="nvme", format="raw"),
            DiskSpec("vda", 8 * MIB, with_id=False),
        ],
        Workload("random", block_bytes=4096, sweep=True, region_bytes=4 * MIB),
    ),
    "one": ([DiskSpec("sda", ODD, bus="virtio-scsi")], Workload("random", block_bytes=512)),
}
WAYS: dict[str, tuple[Fleecing, str]] = {
    "fleecing": (FLEECED, "main"),
    "zstd": (FLEECED, "zstd"),
    "direct": (DIRECT, "main"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=MACHINES)
async def vm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuestVm]:
    folder = tmp_path_factory.mktemp("vm")
    disks, workload = MACHINES[request.param]
    async with GuestVm(folder, disks, workload) as guest:
        await guest.wait_ready()
        await guest.wait_writes(overwriting(guest))
        yield guest
    shutil.rmtree(folder)


def overwriting(vm: GuestVm) -> int:
    """Writes in which the guest reaches most of what it writes to."""
    region = vm.workload.region_bytes
    largest = max(min(disk.size_bytes, region or disk.size_bytes) for disk in vm.disks)
    return min(2500, len(vm.disks) * largest // vm.workload.block_bytes)


@pytest.mark.parametrize("way", WAYS)
async def test_a_backup_under_load_is_its_moment_byte_for_byte(vm: GuestVm, way: str, tmp_path: Path) -> None:
    fleecing, target = WAYS[way]
    jobs_may_start = asyncio.Event()
    host = Host(tmp_path, vm, connect=At("blockdev-backup", jobs_may_start.wait))
    await vm.pause()
    first = await vm.writes()
    async with host.backing_up(fleecing, target=target, bwlimit=SLOWLY) as under_way:
        await under_way.until(lambda: under_way.phase is Phase.COPYING, "the point in time")
        moment = await host.copies()
        await vm.resume()
        await vm.wait_writes(overwriting(vm))
        jobs_may_start.set()
        await vm.wait_writes(overwriting(vm))
        copying = await vm.writes()
        await under_way.hurry()
    result = under_way.result
    assert_succeeded(result)
    assert result.pause_ms is None
    for disk in result.disks:
        assert disk.copied_bytes == disk.size_bytes
        assert (disk.storage == "local") == fleecing.enabled
        assert not fleecing.enabled or disk.fleecing_peak_bytes > min(disk.size_bytes, 4 * MIB) // 2
    # Those to all disks, whatever bus they are on, by counters that no filter disturbs; and nothing else's.
    writes = result.guest_writes
    assert writes is not None
    assert copying - first <= writes.count <= await vm.writes() - first
    assert writes.mean_ms is not None
    assert writes.worst_ms is not None
    assert 0 < writes.mean_ms <= writes.worst_ms
    assert int(1e6 * (writes.p99_ms or 0)) in HISTOGRAM_NS
    assert writes.before_ms is None  # it was paused
    await host.assert_restores(moment, target)
    await host.assert_as_before()
    shutil.rmtree(tmp_path)
