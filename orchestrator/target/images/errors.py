"""What goes wrong with files and folders, said as a TargetError: what, where, and what can be done."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import TargetError, ToolError

FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
EMPTY_QCOW2_BYTES = 1 << 20


@contextlib.contextmanager
def explained(target: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a TargetError that says what and where."""
    try:
        yield
    except OSError as error:
        full = error.errno in FULL_ERRNOS
        raise TargetError(
            f"target {target}: {error.strerror}: {error.filename or path}",
            hint="free some space or prune old snapshots"
            if full
            else "make the path a folder that vmfleece may write to",
            code="target-full" if full else "target-unwritable",
        ) from error


def unwritten(error: ToolError, descriptor: int, *, target: str) -> TargetError:
    """Why a tool could not write an open file on a target."""
    status = os.fstatvfs(descriptor)
    full = status.f_bavail * status.f_frsize < EMPTY_QCOW2_BYTES
    return TargetError(
        f"target {target}: {error.message}",
        hint="free some space or prune old snapshots" if full else error.hint,
        code="target-full" if full else "target-unwritable",
    )
