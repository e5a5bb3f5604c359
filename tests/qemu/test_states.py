"""VMs in other states than running, disks that are not backed up, and many backups of one VM."""

import shutil
import statistics
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.guest import images, sequence
from tests.guest.leftovers import leftovers
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.host import DIRECT, FLEECED, SLOWLY, VM, Host, assert_failed, assert_succeeded

pytestmark = pytest.mark.asyncio(loop_scope="module")

BACKUPS = 10


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuestVm]:
    """Two disks in iothreads, written to at full speed; a read-only one, and a CD-ROM drive without a medium."""
    folder = tmp_path_factory.mktemp("vm")
    disks = [
        DiskSpec("vda", 16 * MIB, iothread=True),
        DiskSpec("sda", 12 * MIB, bus="virtio-scsi", format="raw", iothread=True),
        DiskSpec("locked", MIB, readonly=True),
    ]
    async with GuestVm(folder, disks, Workload("sequence"), cdrom=True) as guest:
        await guest.wait_ready()
        await guest.wait_writes(2 * 4096)
        yield guest
    shutil.rmtree(folder)


async def test_a_vm_that_has_never_run_is_backed_up_and_runs_afterwards(tmp_path: Path) -> None:
    guest = GuestVm(
        tmp_path / "vm",
        [DiskSpec("vda", 4 * MIB, format="raw", iothread=True), DiskSpec("nvme", MIB, bus="nvme")],
        initially_paused=True,
    )
    guest.folder.mkdir()
    images.fill(guest.image_path("vda"), 4 * MIB)
    async with guest:
        host = Host(tmp_path, guest)
        moment = await host.copies()
        for fleecing in (FLEECED, DIRECT):
            result = await host.back_up(fleecing)
            assert_succeeded(result)
            assert result.pause_ms is None
            await host.assert_restores(moment)
            assert (await guest.execute("query-status"))["status"] == "prelaunch"
            await host.assert_as_before(writes=False)
        await guest.resume()
        await guest.wait_ready()
        await host.assert_as_before()


async def test_a_paused_vm_stays_paused(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    await vm.pause()
    moment = await host.copies()
    result = await host.back_up(FLEECED)
    assert_succeeded(result)
    assert result.pause_ms is None
    assert (await vm.execute("query-status"))["status"] == "paused"
    await host.assert_as_before(writes=False)
    moment.pop("locked")
    await host.assert_restores(moment)
    await vm.resume()
    await host.assert_as_before()


async def test_empty_read_only_and_excluded_disks_are_left_where_they_are(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm, exclude=["disk-sda"])
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        nodes = await vm.current_nodes()
        await under_way.hurry()
    assert_succeeded(under_way.result)
    assert [disk.disk for disk in under_way.result.disks] == ["disk-vda"]
    for disk in ("sda", "locked"):
        assert nodes[disk] == vm.first_nodes[disk]
    assert nodes["vda"] != vm.first_nodes["vda"]
    await host.assert_as_before()


async def test_a_vm_without_a_disk_to_back_up_is_refused(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm, exclude=["disk-sda", "disk-vda"])
    result = await host.back_up(FLEECED)
    assert_failed(result, "no-disks")
    assert result.error is not None
    for disk in ("disk-sda", "disk-vda", "locked", "cdrom0"):
        assert disk in result.error.message
    await host.assert_as_before()


async def test_ten_backups_in_a_row_under_load(vm: GuestVm, tmp_path: Path) -> None:
    """The guest writes without a break, through iothreads; the last snapshot of all is checked, too."""
    host = Host(tmp_path, vm)
    held_ms = []
    paused = len(vm.pauses_seconds())
    for _ in range(BACKUPS):
        result = await host.back_up(FLEECED)
        assert_succeeded(result)
        assert result.pause_ms is not None
        held_ms.append(result.pause_ms)
        assert vm.alive()
        assert await leftovers(vm) == []
        await vm.wait_writes(200)
    # A stop can lose an interrupt, and the disk then hangs: this QEMU's guest is never stopped.
    assert len(vm.pauses_seconds()) == paused
    await host.assert_as_before()
    snapshots = await host.snapshots()
    assert len(snapshots) == len({snapshot.id for snapshot in snapshots}) == BACKUPS
    last = 0
    for snapshot in snapshots:
        restored = await host.restored(snapshot=snapshot.id)
        verdict = sequence.check([restored["vda"], restored["sda"]], run=vm.run, at_least=last + 1)
        assert verdict.problems == []
        last = verdict.last[0]
    print(f"{VM} was held for {statistics.median(held_ms)} ms (median), {max(held_ms)} ms at most")  # noqa: T201
    shutil.rmtree(tmp_path)
