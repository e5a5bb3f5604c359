"""What happens when there is not enough space: for the old data, for the copy, or for both.

The guest must never notice; the run ends with its true reason; what was granted is enough or is extended.
"""

import asyncio
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from benchmarks import slow_target
from orchestrator.admission import estimate
from orchestrator.model import Phase
from orchestrator.qemu import qmp
from tests.guest import images
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.conftest import SmallFileSystem
from tests.qemu.hooks import At
from tests.qemu.host import DIRECT, FLEECED, SLOWLY, Host, assert_failed, assert_succeeded

pytestmark = pytest.mark.asyncio(loop_scope="module")

LARGE = DiskSpec("vda", 384 * MIB, format="raw", iothread=True)
SMALL = DiskSpec("vdb", 64 * MIB, iothread=True)
ONLY_LARGE = ["disk-vdb"]
ONLY_SMALL = ["disk-vda"]
TARGET_BYTES_PER_SECOND = 5_000_000
CLUSTER = 64 * 1024


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuestVm]:
    """A guest that overwrites its disks at full speed, a large one and one that fits its first grant."""
    folder = tmp_path_factory.mktemp("vm")
    guest = GuestVm(
        folder,
        [LARGE, SMALL],
        Workload("random", sweep=True),
        extra_args=slow_target.qemu_arguments(TARGET_BYTES_PER_SECOND, disks=1),
    )
    images.fill(guest.image_path("vda"), LARGE.size_bytes)
    async with guest:
        await guest.wait_ready()
        await guest.wait_writes(2 * SMALL.size_bytes // CLUSTER)
        yield guest
    shutil.rmtree(folder)


async def limit_target(vm: GuestVm, bytes_per_second: int) -> None:
    """Set what a slow target takes; 0: anything."""
    limits = {"bps-write": bytes_per_second, "bps-write-max": bytes_per_second}
    await vm.execute(
        "qom-set", {"path": f"/objects/{slow_target.group(0)}", "property": "limits", "value": limits}
    )


# --- fleecing images ---


async def test_a_full_fleecing_image_breaks_the_backup_not_the_guest(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm, quota="8MiB", exclude=ONLY_LARGE, connect=slow_target.connect)
    result = await host.back_up(FLEECED)
    assert_failed(result, "fleecing-full")
    assert result.retryable
    assert result.error is not None
    assert "disk-vda" in result.error.message
    assert "of 8.0 MiB granted" in result.error.message
    assert "no more to give" in result.error.message
    (disk,) = result.disks
    assert 4 * MIB < disk.fleecing_peak_bytes <= 8 * MIB
    assert await host.snapshots() == []
    await host.assert_as_before()


@pytest.mark.parametrize("slow", ["job", "target"])
async def test_grants_are_extended_while_the_guest_overwrites_the_disk(
    vm: GuestVm, tmp_path: Path, slow: str
) -> None:
    """Both are limited: how fast the job may go, or how fast the target takes what it writes."""
    limited = slow == "job"
    host = Host(tmp_path, vm, exclude=ONLY_LARGE, connect=qmp.connect if limited else slow_target.connect)
    await vm.pause()
    async with host.backing_up(FLEECED, bwlimit=SLOWLY if limited else 0) as under_way:
        await under_way.copying()
        moment = await host.copies()
        await vm.resume()
        await under_way.until(lambda: under_way.fleecing_bytes() > 330 * MIB, "330 MiB of old data")
        await limit_target(vm, 0)
        await under_way.hurry()
    await limit_target(vm, TARGET_BYTES_PER_SECOND)
    assert_succeeded(under_way.result)
    assert under_way.largest_grants()["disk-vda"] == estimate.worst_case(LARGE.size_bytes)
    await host.assert_restores({"vda": moment["vda"]})
    await host.assert_as_before()
    shutil.rmtree(tmp_path)


async def test_the_worst_case_fits_its_grant(vm: GuestVm, tmp_path: Path) -> None:
    """The whole disk is overwritten before a single byte of it has been copied."""
    jobs_may_start = asyncio.Event()
    host = Host(tmp_path, vm, exclude=ONLY_SMALL, connect=At("blockdev-backup", jobs_may_start.wait))
    await vm.pause()
    async with host.backing_up(FLEECED) as under_way:
        await under_way.until(lambda: under_way.phase is Phase.COPYING, "the point in time")
        moment = await host.copies()
        await vm.resume()
        await vm.wait_writes(2 * 2 * SMALL.size_bytes // CLUSTER)
        jobs_may_start.set()
    assert_succeeded(under_way.result)
    (disk,) = under_way.result.disks
    assert disk.fleecing_peak_bytes > SMALL.size_bytes
    assert under_way.largest_grants()["disk-vdb"] == estimate.worst_case(SMALL.size_bytes)
    await host.assert_restores({"vdb": moment["vdb"]})
    await host.assert_as_before()
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("size_bytes", [528 * 1024, MIB + 512, 16 * MIB, 513 * MIB])
async def test_the_worst_case_is_what_qemu_needs_and_no_less(size_bytes: int, tmp_path: Path) -> None:
    """Everything is written, in no order, into an image that is limited as grants are."""
    enough = estimate.worst_length(size_bytes)
    length = CLUSTER if size_bytes < 100 * MIB else 4 * MIB
    starts = list(range(0, size_bytes, length))
    random.Random(1).shuffle(starts)  # noqa: S311  (test data)
    writes = [f"write -q {start} {min(length, size_bytes - start)}" for start in starts]
    for limit, fits in ((enough, True), (enough - CLUSTER, False)):
        file = tmp_path / f"{limit}.qcow2"
        await images.create(file, "qcow2", size_bytes)
        with file.open("r+b") as opened:
            opened.truncate(enough)
        options = f"driver=qcow2,file.driver=raw,file.size={limit},file.file.driver=file,file.file.filename={file}"
        process = await asyncio.create_subprocess_exec(
            *("qemu-io", "--image-opts", options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate("\n".join([*writes, "quit\n"]).encode())
        assert (b"No space left on device" not in output) == fits, output[-500:]
        file.unlink()


async def test_a_full_file_system_of_the_storage_breaks_the_backup_not_the_guest(
    vm: GuestVm, tmp_path: Path, small_file_system: SmallFileSystem
) -> None:
    mount = small_file_system("fast", 64)
    storage = mount / "fleecing"
    # With a min_free the run would give way before (test_shared_storage).
    host = Host(tmp_path, vm, storage=storage, quota="48MiB", min_free="0", exclude=ONLY_LARGE)
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.until(lambda: under_way.phase is Phase.PREPARING, "the grant")
        # Somebody else fills it, now that it is granted.
        await asyncio.to_thread((mount / "others").write_bytes, bytes(50 * MIB))
    assert_failed(under_way.result, "storage-full")
    assert under_way.result.error is not None
    assert "storage local" in under_way.result.error.message
    await host.assert_as_before()
    (mount / "others").unlink()


async def test_a_storage_that_cannot_be_used_is_named(vm: GuestVm, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    host = Host(tmp_path, vm, storage=tmp_path / "file" / "fleecing")
    assert_failed(await host.back_up(FLEECED), "storage")
    await host.assert_as_before()


async def test_a_quota_that_can_never_be_enough_is_named(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm, quota="2MiB")
    assert_failed(await host.back_up(FLEECED), "quota-too-small")
    await host.assert_as_before()


# --- targets ---


async def test_a_full_target_breaks_the_backup_and_the_next_one_succeeds(
    vm: GuestVm, tmp_path: Path, small_file_system: SmallFileSystem
) -> None:
    target = small_file_system("backups", 24)
    host = Host(tmp_path, vm, target=target, exclude=ONLY_SMALL)
    result = await host.back_up(FLEECED)
    assert_failed(result, "target-full")
    assert await host.snapshots() == []
    await host.assert_as_before()
    assert list(target.iterdir()) == []
    small_file_system("backups", 200)
    assert_succeeded(await host.back_up(FLEECED))
    await host.assert_as_before()


async def test_a_full_target_without_fleecing_breaks_the_backup_not_the_guest(
    vm: GuestVm, tmp_path: Path, small_file_system: SmallFileSystem
) -> None:
    host = Host(tmp_path, vm, target=small_file_system("backups", 24), exclude=ONLY_SMALL)
    result = await host.back_up(DIRECT)
    # Whoever meets the end first: the job that copies, or the guest's write that saves its old data there.
    assert_failed(result, "target-full", "copy-timeout")
    assert await host.snapshots() == []
    await host.assert_as_before()


@pytest.mark.parametrize("target", ["file", "file/backups"])
async def test_a_target_that_cannot_be_written_is_named(vm: GuestVm, tmp_path: Path, target: str) -> None:
    (tmp_path / "file").touch()
    host = Host(tmp_path, vm, target=tmp_path / target)
    result = await host.back_up(FLEECED)
    assert_failed(result, "target-unwritable")
    await host.assert_as_before()
