"""Fleecing images on real file systems: loop devices and memory, mounted for the test.

A file system that really lacks hole punching is ramfs. None that lacks O_TMPFILE can be mounted on every kernel:
tests/unit/test_storage.py puts the kernel's answer in its place.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.admission import estimate
from orchestrator.errors import StorageError
from orchestrator.fleecing import image
from orchestrator.fleecing.names import DiskNames
from orchestrator.qemu.commands import Command
from orchestrator.storage.base import Feature
from orchestrator.storage.directory import DirectoryStorage
from orchestrator.units import GIB, KIB, MIB, Share
from tests.component.rigs import RIGS

NAME = "vmf-1a2b3c4d-0"
DISK_BYTES = 1024 * GIB
WORST_CASE_BYTES = DISK_BYTES + GIB
"""A little more than a qcow2 image of the disk can become."""
FOR_ITSELF_BYTES = 4 * MIB
"""What a file system may take for its own trees and reserves, beside a file's data."""
METADATA_PART = 256
"""What admission allows for the file system's own metadata: this part of the data."""

MAKERS = {
    "ext4": ("mkfs.ext4", "-q"),
    "ext2": ("mkfs.ext2", "-q"),  # block by block, without extents: the most metadata for a file
    "xfs": ("mkfs.xfs", "-q"),
    "btrfs": ("mkfs.btrfs", "-q"),
}
IN_MEMORY = {"tmpfs": "size={size_mib}m,mode=700", "ramfs": "mode=700"}
KINDS = (*MAKERS, "tmpfs")


@contextlib.contextmanager
def mounted(folder: Path, kind: str, size_mib: int) -> Iterator[Path]:
    """A new file system of a kind for the block."""
    if os.geteuid() != 0:
        pytest.fail("needs root: mounts file systems")
    path, backing = folder / kind, folder / f"{kind}.img"
    path.mkdir(exist_ok=True)
    try:
        if kind in MAKERS:
            make_file_system(kind, backing, size_mib)
            mount("-o", "loop", "-t", kind, str(backing), str(path))
        else:
            mount("-t", kind, "-o", IN_MEMORY[kind].format(size_mib=size_mib), "vmfleece-test", str(path))
        try:
            shutil.rmtree(path / "lost+found", ignore_errors=True)
            yield path
        finally:
            unmount(path)
    finally:
        backing.unlink(missing_ok=True)


def make_file_system(kind: str, backing: Path, size_mib: int) -> None:
    program, *options = MAKERS[kind]
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.fail(f"{program} is missing: run tests/guest/install.sh once")
    with backing.open("wb") as file:
        file.truncate(size_mib * MIB)
    subprocess.run([found, *options, str(backing)], check=True, capture_output=True)


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"mount {' '.join(arguments)} failed, does this kernel have it? {done.stderr}")


def unmount(path: Path) -> None:
    done = subprocess.run(["umount", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
        pytest.fail(f"the test has left something open: {done.stderr}")


@pytest.fixture(scope="module", params=KINDS)
def file_system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One file system of each kind, which all tests share: each of them leaves it empty."""
    with mounted(tmp_path_factory.mktemp("file-systems"), request.param, 1024) as path:
        yield path


@pytest.fixture
def mount_one(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """Yield a function that mounts a file system of a kind, of so many MiB, for one test."""
    with contextlib.ExitStack() as stack:
        yield lambda kind, size_mib: stack.enter_context(mounted(tmp_path, kind, size_mib))


def storage_on(path: Path, *, min_free: Share | int = 0) -> DirectoryStorage:
    return DirectoryStorage("local", path / "fleecing", quota_bytes=GIB, min_free=min_free)


@pytest.fixture
def storage(file_system: Path) -> Iterator[DirectoryStorage]:
    storage = storage_on(file_system)
    storage.prepare()
    yield storage
    assert list(storage.path.iterdir()) == []
    storage.path.rmdir()


def run_on(descriptor: int, *command: str) -> str:
    """What one of QEMU's programs says about the image that is open."""
    argv = [*command, f"/dev/fd/{descriptor}"]
    done = subprocess.run(argv, pass_fds=[descriptor], check=True, capture_output=True, text=True)
    return done.stdout


def test_nothing_is_lacking_on_file_systems_that_hosts_have(storage: DirectoryStorage) -> None:
    assert storage.lacks == ()


async def test_an_image_of_a_large_disk_occupies_what_is_in_it(storage: DirectoryStorage) -> None:
    file = await image.create(storage, name=NAME, disk_bytes=DISK_BYTES, length_bytes=WORST_CASE_BYTES)
    try:
        assert list(storage.path.iterdir()) == []
        status = os.fstat(file.descriptor)
        assert (status.st_nlink, status.st_size) == (0, WORST_CASE_BYTES)
        assert (
            json.loads(run_on(file.descriptor, "qemu-img", "info", "--output=json"))["virtual-size"] == DISK_BYTES
        )
        empty_bytes = file.used_bytes()
        assert empty_bytes <= MIB

        run_on(file.descriptor, "qemu-io", "-f", "qcow2", "-d", "unmap", "-c", f"write {GIB} 8M")
        os.fsync(file.descriptor)
        assert 8 * MIB <= file.used_bytes() - empty_bytes <= 9 * MIB

        run_on(file.descriptor, "qemu-io", "-f", "qcow2", "-d", "unmap", "-c", f"discard {GIB} 4M")
        os.fsync(file.descriptor)
        assert 4 * MIB <= file.used_bytes() - empty_bytes <= 5 * MIB
        assert os.fstat(file.descriptor).st_size == WORST_CASE_BYTES
    finally:
        file.close()


def fill(storage: DirectoryStorage, order: list[int], *, sync_each: bool) -> tuple[int, int]:
    """Write 64 KiB clusters in this order to an image; what they hold and what it occupies, in bytes."""
    file = storage.create(NAME, WORST_CASE_BYTES)
    try:
        file.extend(WORST_CASE_BYTES)
        content = os.urandom(64 * KIB)
        for cluster in order:
            os.pwrite(file.descriptor, content, cluster * len(content))
            if sync_each:
                os.fdatasync(file.descriptor)
        os.fsync(file.descriptor)
        return len(order) * len(content), file.used_bytes()
    finally:
        file.close()


@pytest.mark.parametrize("sync_each", [False, True], ids=["at-once", "bit-by-bit"])
@pytest.mark.parametrize("take", [1, 2], ids=["all", "every-other"])
def test_metadata_fits_its_allowance(storage: DirectoryStorage, *, take: int, sync_each: bool) -> None:
    order = list(range(0, 1024 * take, take))  # 64 MiB
    random.Random(64).shuffle(order)  # noqa: S311
    data_bytes, used_bytes = fill(storage, order, sync_each=sync_each)
    assert data_bytes <= used_bytes <= data_bytes + data_bytes // METADATA_PART


async def test_no_image_takes_more_than_its_grant_whatever_is_written_and_discarded(
    storage: DirectoryStorage, tmp_path: Path
) -> None:
    """In a QEMU, with the nodes of a run. What it really takes is what the file system has less."""
    grant_bytes, names = 24 * MIB, DiskNames("1a2b3c4d", 0)
    cluster, many = 64 * KIB, 20 * MIB // (64 * KIB)
    os.sync()
    before = storage.space().free_bytes
    file = await image.create(storage, name=NAME, disk_bytes=DISK_BYTES, length_bytes=WORST_CASE_BYTES)
    try:
        async with RIGS["qemu"](tmp_path) as rig, rig.connect(rig.path) as monitor:

            async def act(*commands: str) -> None:
                await monitor.pipeline(
                    [
                        Command("human-monitor-command", {"command-line": f'qemu-io {names.image} "{command}"'})
                        for command in commands
                    ]
                )

            await image.attach(monitor, names, file, estimate.limit(grant_bytes), discards=True)
            for start in (0, GIB):
                # Written bit by bit, then eight clusters of each nine are given back: many holes.
                places = [start + at * cluster for at in range(many)]
                await act(*(f"write -q {at} {cluster}" for at in places))
                os.sync()
                taken = before - storage.space().free_bytes
                assert 16 * MIB < taken <= grant_bytes + FOR_ITSELF_BYTES
                await act(*(f"discard -q {at} {cluster}" for number, at in enumerate(places) if number % 9))
    finally:
        file.close()


def test_a_probe_leaves_nothing_behind(storage: DirectoryStorage) -> None:
    storage._probed = None
    before = storage.space().free_bytes
    storage.prepare()
    assert list(storage.path.iterdir()) == []
    # btrfs and XFS free what was deleted a little later, and it is less than this.
    assert storage.space().free_bytes >= before - MIB - 64 * KIB


def test_space_is_the_file_systems(storage: DirectoryStorage, file_system: Path) -> None:
    status = os.statvfs(file_system)
    total = status.f_blocks * status.f_frsize
    assert 800 * MIB <= total <= 1024 * MIB
    quarter = storage_on(file_system, min_free=Share(25)).space()
    fixed = storage_on(file_system, min_free=300 * MIB).space()
    assert (quarter.floor_bytes, fixed.floor_bytes) == (total // 4, 300 * MIB)
    assert quarter.free_bytes == fixed.free_bytes == storage.space().free_bytes <= total

    file = storage.create(NAME, GIB)
    try:
        file.extend(GIB)
        length_alone = storage.space().free_bytes
        os.posix_fallocate(file.descriptor, 0, 256 * MIB)
        os.fsync(file.descriptor)
        taken = length_alone - storage.space().free_bytes
        assert abs(taken - 256 * MIB) <= 16 * MIB  # btrfs estimates: what else it needs for itself changes
    finally:
        file.close()


# --- file systems of their own ---


def fill_up(path: Path) -> int:
    """Leave no room; what keeps it is the descriptor that is returned."""
    descriptor = os.open(path, os.O_TMPFILE | os.O_RDWR)
    at, step = 0, 1 << 30
    while step >= 4 * KIB:
        try:
            os.posix_fallocate(descriptor, at, step)
        except OSError:
            step //= 2
        else:
            at += step
    return descriptor


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_file_system_lacks_space_and_nothing_else(mount_one: Callable[[str, int], Path], kind: str) -> None:
    path = mount_one(kind, 32 if kind == "tmpfs" else 320)
    storage = storage_on(path)
    storage.path.mkdir()
    filler = fill_up(path)
    try:
        with pytest.raises(StorageError, match="No space left on device") as failed:
            storage.prepare()
        assert str(storage.path) in failed.value.message
        assert "is full" in failed.value.hint
        assert storage.lacks == ()
        assert list(storage.path.iterdir()) == []
    finally:
        os.close(filler)


def test_a_probe_needs_little_space(mount_one: Callable[[str, int], Path]) -> None:
    storage = storage_on(mount_one("tmpfs", 2))
    assert storage.prepare() == ()


async def test_without_hole_punching_an_image_only_grows(mount_one: Callable[[str, int], Path]) -> None:
    storage = storage_on(mount_one("ramfs", 0))
    [lack] = storage.prepare()
    assert (lack.feature, lack.required) == (Feature.HOLE_PUNCHING, False)
    file = await image.create(storage, name=NAME, disk_bytes=DISK_BYTES, length_bytes=WORST_CASE_BYTES)
    try:
        command = ("qemu-io", "-f", "qcow2", "-d", "unmap", "-c", "write 0 8M", "-c", "discard 0 8M")
        run_on(file.descriptor, *command)
        assert file.used_bytes() >= 8 * MIB
    finally:
        file.close()


def test_another_file_system_in_its_place_is_probed_anew(tmp_path: Path) -> None:
    path = tmp_path / "place"
    path.mkdir()
    storage = DirectoryStorage("local", path, quota_bytes=GIB, min_free=0)
    found = []
    for kind in ("tmpfs", "ramfs", "tmpfs"):
        with mounted(tmp_path, kind, 16):
            mount("--bind", str(tmp_path / kind), str(path))
            try:
                storage.prepare()
                found.append([lack.feature for lack in storage.lacks])
            finally:
                unmount(path)
    assert found == [[], [Feature.HOLE_PUNCHING], []]


def test_an_image_beyond_what_the_file_system_allows_is_refused(mount_one: Callable[[str, int], Path]) -> None:
    storage = storage_on(mount_one("ext4", 320))
    assert storage.prepare() == ()
    file = storage.create(NAME, 1 << 60)
    try:
        with pytest.raises(StorageError, match=rf"sparse file of {1 << 60} bytes: File too large"):
            file.extend(1 << 60)
    finally:
        file.close()
