"""One vmfleece a state_dir: a lock that the kernel gives back when its holder dies."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import StateError


@contextlib.contextmanager
def owned(state_dir: Path) -> Iterator[None]:
    """Own state_dir for the block. Raises StateError if another process does, or if it cannot be used."""
    path = state_dir / "lock"
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(
            f"cannot use state_dir {state_dir}: {error.strerror}",
            hint="vmfleece must be able to write there: run it as root, or set daemon.state_dir",
            code="state-unusable",
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "unknown"
            raise StateError(
                f"another vmfleece (process {owner}) is using state_dir {state_dir}",
                hint="wait until it has ended; while the daemon runs, its jobs make the backups",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
