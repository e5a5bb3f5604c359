"""A copy that slows its guest's disk down gives way to it.

The disk can do so much, for the guest and for whoever copies it; the guest needs a tenth of that. Both backups are
of the same guest, one after the other: nothing here depends on how fast the machine is.
"""

from pathlib import Path

from orchestrator.model import GuestWrites, RunResult
from tests.guest import images
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.host import FLEECED, Host, assert_succeeded

DISK = DiskSpec("vda", 16 * MIB, format="raw", bytes_per_second=4 * MIB)
WORKLOAD = Workload("random", block_bytes=4096, rate=50, region_bytes=MIB)
BUDGET_MS = 15


async def test_a_copy_leaves_the_guest_what_it_needs_of_a_slow_disk(tmp_path: Path) -> None:
    vm = GuestVm(tmp_path / "vm", [DISK], WORKLOAD)
    vm.folder.mkdir()
    images.fill(vm.image_path(DISK.id), DISK.size_bytes)
    async with vm:
        await vm.wait_ready()
        await vm.wait_writes(2 * WORKLOAD.rate)
        without = await backed_up(Host(tmp_path / "without", vm))
        within = await backed_up(Host(tmp_path / "within", vm, more=f'latency_budget = "{BUDGET_MS}ms"'))
    assert without.slowed_seconds is None
    assert within.slowed_seconds is not None
    assert 0 < within.slowed_seconds <= within.duration_seconds
    free, kept = measured(without), measured(within)
    assert free.before_ms is not None
    assert free.mean_ms is not None
    assert kept.mean_ms is not None
    # The disk is what holds its writes up, not this machine.
    assert free.mean_ms > max(BUDGET_MS, 2 * free.before_ms)
    assert kept.mean_ms < free.mean_ms / 2


async def backed_up(host: Host) -> RunResult:
    async with host.backing_up(FLEECED) as under_way:
        pass
    assert_succeeded(under_way.result)
    await host.assert_as_before()
    return under_way.result


def measured(result: RunResult) -> GuestWrites:
    assert result.guest_writes is not None
    return result.guest_writes
