"""One vmfleece a state_dir: a lock that the kernel gives back when its holder dies.

The file says who holds it, for people only. It may say what is not so any more: by whom it was held last, for the
moment that the next holder needs to enter itself. So nobody is named who is not the process that wrote it, which
is told by when that was started: a process's id may be given to another one after its death.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.errors import StateError

LONGEST_BYTES = 1000


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
            raise StateError(
                f"another vmfleece{_holder(descriptor)} is using state_dir {state_dir}",
                hint="wait until it has ended; a daemon does what commands ask if both have the same run_dir",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _ourselves(), 0)
        yield
    finally:
        os.close(descriptor)


def _ourselves() -> bytes:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"process": os.getpid(), "born": _born(os.getpid()), "since": now}).encode() + b"\n"


def _holder(descriptor: int) -> str:
    """Who holds it and since when, as far as that is known."""
    try:
        said = json.loads(os.pread(descriptor, LONGEST_BYTES, 0))
        process, born, since = int(said["process"]), int(said["born"]), datetime.fromisoformat(said["since"])
        if _born(process) != born:
            return ""
    except (OSError, ValueError, TypeError, LookupError):  # it is about to enter itself, or we may not see it
        return ""
    return f" (process {process}, since {since.astimezone().isoformat(sep=' ')})"


def _born(process: int) -> int:
    """When a process was started, in ticks since the host was: `starttime` of proc(5). Raises OSError."""
    # Its second field is the program's name in brackets, which may hold anything.
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
