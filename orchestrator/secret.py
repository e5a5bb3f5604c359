"""Secrets in files: one line that others cannot read. What is in them never reaches a message."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import VmfleeceError

Unusable = Callable[[str, str], VmfleeceError]
"""Makes the error of what is wrong with a file, and what to do."""


def credential(name: str) -> Path | None:
    """Return the file of a credential that systemd gave us; None if it gave us none of that name."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder) / name if folder else None
    return path if path is not None and path.exists() else None


def read_line(path: Path, unusable: Unusable, *, missing: str) -> str:
    """Return the line, without white space around it. Blocks.

    Raises what `unusable` makes; `missing` says what to do where there is no file.
    """
    try:
        status = path.stat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""  # a pipe would hold us up
    except FileNotFoundError as error:
        raise unusable(f"is not there: {path}", missing) from error
    except OSError as error:
        raise unusable(
            f"cannot be read: {path}: {error.strerror}", "give vmfleece the right to read it"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise unusable(f"is no regular file: {path}", "write the secret into one")
    if status.st_mode & stat.S_IROTH:
        raise unusable(f"can be read by others: {path}", f"chmod o-r {path}; others may know it by now")
    try:
        line = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise unusable(f"is not UTF-8: {path}", "write it as text") from None
    if not line:
        raise unusable(f"is empty: {path}", "write the secret into it")
    if "\n" in line:
        raise unusable(f"has more than one line: {path}", "leave only its one line")
    return line
