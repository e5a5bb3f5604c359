"""Taking a snapshot's folder away, and what keeps it from being taken away. Blocks; raises OSError.

A folder is renamed to `<time>.removed`, which takes it off the list, before anything in it is deleted: it is there
whole, or what is left of it is cleared by whoever comes next, as a `.partial` folder of a dead writer is.
Who waits for whom: `locks`.
"""

import fcntl
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import structlog

from orchestrator.errors import TargetError
from orchestrator.target import durable
from orchestrator.target.images import locks, manifest, merging, qcow2

log = structlog.get_logger(__name__)

PARTIAL = ".partial"
REMOVED = ".removed"
_LEFT = re.compile(r"\d{8}T\d{6}Z(\.partial|\.removed)")
"""What is called otherwise is somebody else's."""
PROTECTED = "protected"


@dataclass(frozen=True, slots=True)
class Stays:
    """Why a folder was not removed: protected, others (`needed_by`, by name) build on it, or it is in use."""

    protected: bool = False
    needed_by: tuple[str, ...] = ()


def is_listed(folder: Path) -> bool:
    """Whether a folder with a manifest is a snapshot, neither half-written nor half-removed."""
    return not folder.name.endswith((PARTIAL, REMOVED))


def is_protected(folder: Path) -> bool:
    """Whether the marker is there."""
    return (folder / PROTECTED).exists()


def protect(folder: Path, *, protected: bool) -> bool:
    """Put the marker there, or take it away, durably. False if the folder is gone."""
    with locks.settled(folder) as there:
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
    with locks.settled(folder) as there:
        if there:
            if is_protected(folder):
                return Stays(protected=True)
            merging.settle_locked(folder.parent, target=target)  # what it has merged is not built on any more
            try:
                lock = locks.locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def leftovers(vm_folder: Path) -> list[Path]:
    """What dead processes left of a VM's snapshots half-written or half-removed."""
    found = []
    for left in _unlisted(vm_folder):
        try:
            os.close(locks.locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except (BlockingIOError, FileNotFoundError):
            continue  # who writes or deletes it lives, or is done
        found.append(left)
    return found


def clear(vm_folder: Path, *, target: str) -> None:
    """Delete what dead processes left of a VM's snapshots half-written or half-removed, as far as it can be."""
    for left in _unlisted(vm_folder):
        try:
            if _delete(left, wait=False):
                log.info("draft.removed", target=target, path=str(left))
        except BlockingIOError:
            continue  # who writes or deletes it lives
        except OSError as error:
            log.warning("draft.unremovable", target=target, path=str(left), error=str(error))
    try:
        merging.settle(vm_folder, target=target)
    except OSError as error:
        log.warning("draft.unremovable", target=target, path=str(vm_folder), error=str(error))


def _unlisted(vm_folder: Path) -> list[Path]:
    return sorted(path for path in vm_folder.glob("*") if _LEFT.fullmatch(path.name) and path.is_dir())


def _delete(folder: Path, *, wait: bool = True) -> bool:
    """Delete a folder and say whether it was there; BlockingIOError if somebody has it and we must not wait."""
    try:
        lock = locks.locked(folder, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    try:
        shutil.rmtree(folder)
    finally:
        os.close(lock)
    return True


def _built_on(folder: Path) -> tuple[str, ...]:
    """The names of the VM's other folders whose images build on this one, oldest first."""
    others = (one for one in sorted(folder.parent.iterdir()) if one != folder and is_listed(one) and one.is_dir())
    return tuple(other.name for other in others if folder.name in _parents(other))


def _parents(folder: Path) -> set[str]:
    """The names of the folders that one's images build on, as its manifest says, and as they say.

    Where the manifest cannot be read, they can still be restored by hand; where a merge is not finished, they are
    still read through what they were built on. Only there must it be known what they say: else OSError.
    """
    try:
        parents = {one.rpartition("/")[2] for one in manifest.read(folder / manifest.NAME, target="").parents}
        certain = not any(folder.glob(f"*{merging.MERGED}"))
    except TargetError:
        parents, certain = set(), False
    for image in folder.glob("*.qcow2"):
        try:
            parents.add(PurePosixPath(qcow2.backing_name(image)).parent.name)
        except OSError:
            if not certain:
                raise
    return parents
