"""Taking a snapshot's folder away, and what keeps it from being taken away. Blocks; raises OSError.

A folder is renamed to `<time>.removed`, which takes it off the list, before anything in it is deleted: it is there
whole, or what is left of it is cleared by whoever comes next, as a `.partial` folder of a dead writer is.

Two locks, which the kernel gives back when their holder dies (flock):
- of a snapshot's folder: shared by drafts whose images build on it; exclusive while it is written or removed;
- of the VM's folder: exclusive while one of its snapshots is protected or taken off the list.
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
"""Magic, version, offset and length of the backing file's name (QEMU: docs/interop/qcow2.rst)."""
_QCOW2_MAGIC = b"QFI\xfb"
_LONGEST_BACKING_NAME_BYTES = 1023


@dataclass(frozen=True, slots=True)
class Stays:
    """Why a folder was not removed: it is protected, or others (`needed_by`, by name) or a draft build on it."""

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
    """Take a folder off the list, durably, and delete it. None: it is gone, or was already."""
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
                # Looked at with the lock: a draft that built on it is listed by now, or gone.
                if needed_by := _built_on(folder):
                    return Stays(needed_by=needed_by)
                _delete(removed)  # an older one of the same time, of which something is left
                folder.rename(removed)
                durable.sync(folder.parent)
            finally:
                os.close(lock)
    _delete(removed)
    clear(folder.parent, target=target)
    return None


def clear(vm_folder: Path, *, target: str) -> None:
    """Delete what dead processes left of a VM's snapshots half-written or half-removed, as far as it can be."""
    for left in (*vm_folder.glob(f"*{PARTIAL}"), *vm_folder.glob(f"*{REMOVED}")):
        try:
            if _delete(left, wait=False):
                log.info("draft.removed", target=target, path=str(left))
        except BlockingIOError:
            continue  # who writes or deletes it lives
        except OSError as error:
            log.warning("draft.unremovable", target=target, path=str(left), error=str(error))


def _locked(path: Path, how: int) -> int:
    """A locked descriptor of a folder. Raises FileNotFoundError if it is gone, or was when we got the lock."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
    """Nobody else protects or removes a snapshot of the VM for the block, which is told if this one is there."""
    try:
        lock = _locked(folder.parent, fcntl.LOCK_EX)
    except FileNotFoundError:
        yield False
        return
    try:
        yield folder.is_dir()
    finally:
        os.close(lock)


def _delete(folder: Path, *, wait: bool = True) -> bool:
    """Delete a folder and say whether it was there; BlockingIOError if somebody has it and we must not wait."""
    try:
        lock = _locked(folder, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    try:
        shutil.rmtree(folder)
    finally:
        os.close(lock)
    return True


def _built_on(folder: Path) -> tuple[str, ...]:
    """The names of the VM's other folders whose images build on this one, oldest first.

    A folder's manifest says so, or its images where that cannot be read: those can still be restored by hand.
    """
    found = []
    for other in sorted(folder.parent.iterdir()):
        if other == folder or not is_listed(other) or not other.is_dir():
            continue
        try:
            parents = {one.rpartition("/")[2] for one in manifest.read(other / manifest.NAME, target="").parents}
        except TargetError:
            parents = {_backing_folder(image) for image in other.glob("*.qcow2")}
        if folder.name in parents:
            found.append(other.name)
    return tuple(found)


def _backing_folder(image: Path) -> str:
    """The name of the folder that the image's backing file is in; empty if it has none."""
    with image.open("rb") as file:
        header = file.read(_QCOW2_HEADER.size)
        if len(header) < _QCOW2_HEADER.size:
            return ""
        magic, _version, offset, length = _QCOW2_HEADER.unpack(header)
        if (
            magic != _QCOW2_MAGIC
            or length > _LONGEST_BACKING_NAME_BYTES
            or offset > os.fstat(file.fileno()).st_size
        ):
            return ""
        file.seek(offset)
        return PurePosixPath(os.fsdecode(file.read(length))).parent.name
