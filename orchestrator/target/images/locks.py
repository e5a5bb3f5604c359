"""Locks of folders, which the kernel gives back when their holder dies (flock). Blocks; raises OSError.

- Of a snapshot's folder: shared by whoever reads its images (a restore, also of what builds on them) and by drafts
  whose images build on it; exclusive while it is written, changed or removed.
- Of the VM's folder: exclusive while one of its snapshots is protected, changed or taken off the list.
Who needs both takes the VM's first. Whoever got one looks whether what was locked is still where it was.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def hold(folder: Path) -> int | None:
    """Keep a snapshot as it is for as long as the descriptor is open; None if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return locked(folder, fcntl.LOCK_SH)
    return None


def locked(path: Path, how: int) -> int:
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
def alone(vm_folder: Path) -> Iterator[None]:
    """Nobody else protects, changes or removes a snapshot of the VM. Raises FileNotFoundError if it has none."""
    lock = locked(vm_folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def settled(folder: Path) -> Iterator[bool]:
    """As `alone` with the VM of a snapshot; the block is told if that is there."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone(folder.parent))
        except FileNotFoundError:
            yield False
        else:
            yield folder.is_dir()
