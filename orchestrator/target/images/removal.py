"""Taking a snapshot's folder away, and what keeps it from being taken away. Blocks; raises OSError.

A folder is renamed to `<time>.removed`, which takes it off the list, before anything in it is deleted: it is there
whole, or what is left of it is cleared by whoever comes next, as a `.partial` folder of a dead writer is.

Two locks, which the kernel gives back when their holder dies (flock):
- of the folder: a draft shares it for each folder that its images build on; whoever writes or deletes it has it alone.
- of its manifest: whoever protects or removes it has it alone, and never waits for the folder's lock meanwhile.
Whoever got one looks whether what was locked is still where it was.
"""

import contextlib
import fcntl
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import structlog

from orchestrator.errors import TargetError
from orchestrator.target import durable
from orchestrator.target.images import manifest

log = structlog.get_logger(__name__)

PARTIAL = ".partial"
REMOVED = ".removed"
PROTECTED = "protected"

_QCOW2_HEADER = struct.Struct(">4sIQI")
"""Magic, version, and where the backing file's name is; docs/interop/qcow2.rst of QEMU."""


@dataclass(frozen=True, slots=True)
class Stays:
    """Why a folder was not removed: it is protected, or the folders `needed_by`, or a draft, build on it."""

    protected: bool = False
    needed_by: tuple[str, ...] = ()


def is_listed(folder: Path) -> bool:
    """Whether a folder with a manifest is a snapshot, neither half-written nor half-removed."""
    return not folder.name.endswith((PARTIAL, REMOVED))


def is_protected(folder: Path) -> bool:
    """Whether the marker is there."""
    return (folder / PROTECTED).exists()


def hold(folder: Path) -> int | None:
    """Keep a folder from being removed for as long as the descriptor is open; None if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return _locked(folder, fcntl.LOCK_SH)
    return None


def protect(folder: Path, *, protected: bool) -> bool:
    """Put the marker there, or take it away, durably. False if the folder is gone."""
    with _settled(folder) as there:
        if there:
            if protected:
                (folder / PROTECTED).touch(mode=0o600)
                durable.sync(folder / PROTECTED)
            else:
                (folder / PROTECTED).unlink(missing_ok=True)
            durable.sync(folder)
        return there


def remove(folder: Path, *, target: str) -> Stays | None:
    """Take a folder off the list, durably, and then delete it. None: it is gone, or was already."""
    removed = folder.with_name(folder.name + REMOVED)
    with _settled(folder) as there:
        if there:
            if is_protected(folder):
                return Stays(protected=True)
            try:
                lock = _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Stays()
            try:
                if needed_by := _built_on(folder):
                    return Stays(needed_by=needed_by)
                _delete(removed, target=target)  # an older one of the same time: the rename wants the name
                folder.rename(removed)
                durable.sync(folder.parent)
            finally:
                os.close(lock)
    _delete(removed, target=target)
    clear(folder.parent, target=target)
    return None


def clear(vm_folder: Path, *, target: str) -> None:
    """Delete what dead processes left of a VM's snapshots half-written or half-removed."""
    for suffix in (PARTIAL, REMOVED):
        for left in vm_folder.glob(f"*{suffix}"):
            with contextlib.suppress(BlockingIOError):  # whoever writes or deletes it lives
                _delete(left, target=target, wait=False)


def _locked(path: Path, how: int) -> int:
    """A locked descriptor. Raises FileNotFoundError if it is gone, or was by the time we had the lock."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how)
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise FileNotFoundError(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _settled(folder: Path) -> Iterator[bool]:
    """Nobody else protects or removes the folder during the block, which is told whether it is there."""
    try:
        lock = _locked(folder / manifest.NAME, fcntl.LOCK_EX)
    except FileNotFoundError:
        yield False
        return
    try:
        yield True
    finally:
        os.close(lock)


def _delete(folder: Path, *, target: str, wait: bool = True) -> None:
    """Delete a folder, after whoever does so already; BlockingIOError if not to wait for them."""
    try:
        lock = _locked(folder, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return
    try:
        shutil.rmtree(folder)
    finally:
        os.close(lock)


def _built_on(folder: Path) -> tuple[str, ...]:
    """The names of the VM's other folders whose images build on this one, oldest first.

    Asked of a folder's manifest; of its images if that cannot be read: they can still be restored with qemu-img.
    """
    found = []
    for other in sorted(folder.parent.iterdir()):
        if other == folder or not is_listed(other) or not other.is_dir():
            continue
        try:
            parents = {parent.rpartition("/")[2] for parent in manifest.read(other / manifest.NAME, target="").parents}
        except TargetError:
            parents = {_backing_folder(image) for image in other.glob("*.qcow2")}
        if folder.name in parents:
            found.append(other.name)
    return tuple(found)


def _backing_folder(image: Path) -> str:
    """The name of the folder of the image's backing file; empty if it has none."""
    with image.open("rb") as file:
        header = file.read(_QCOW2_HEADER.size)
        if len(header) < _QCOW2_HEADER.size:
            return ""
        _magic, _version, offset, length = _QCOW2_HEADER.unpack(header)
        file.seek(offset)
        return PurePosixPath(os.fsdecode(file.read(length))).parent.name
