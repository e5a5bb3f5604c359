"""The password of a repository: one line of a file that others cannot read, or systemd's credential.

restic is given the same file, so it is read as restic reads it: without white space around it. What is in it never
reaches a message.
"""

import os
import stat
from pathlib import Path

from orchestrator.errors import TargetError


def read_password(name: str, password_file: Path | None) -> str:
    """Return the password of the target `name`. Blocks. Raises TargetError, code "password-file"."""
    path = password_path(name, password_file)
    try:
        status = path.stat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""  # a pipe would hold us up
    except FileNotFoundError as error:
        making = f"(umask 077; openssl rand -base64 32 > {path})"
        hint = f"for a new repository, make one: {making}; for an old one, bring back its own"
        raise _unusable(name, f"is not there: {path}", hint) from error
    except OSError as error:
        hint = "give vmfleece the right to read it"
        raise _unusable(name, f"cannot be read: {path}: {error.strerror}", hint) from error
    if not stat.S_ISREG(status.st_mode):
        raise _unusable(name, f"is no regular file: {path}", "write the password into one")
    if status.st_mode & stat.S_IROTH:
        raise _unusable(name, f"can be read by others: {path}", f"chmod o-r {path}; others may know it by now")
    try:
        password = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise _unusable(name, f"is not UTF-8: {path}", "write the password as text") from None
    if not password:
        raise _unusable(name, f"is empty: {path}", "write the password into it")
    if "\n" in password:
        raise _unusable(name, f"has more than one line: {path}", "leave only the password's line")
    return password


def password_path(name: str, password_file: Path | None) -> Path:
    """Return where the password of the target `name` is. Raises TargetError, code "password-file"."""
    if password_file is not None:
        return password_file
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise TargetError(
            f"target {name} has no password_file, and there are no credentials of systemd's",
            hint=f"set target.{name}.password_file, or have LoadCredential={name}.password:… in the unit",
            code="password-file",
        )
    return Path(folder) / f"{name}.password"


def _unusable(name: str, problem: str, hint: str) -> TargetError:
    return TargetError(f"the password file of target {name} {problem}", hint=hint, code="password-file")
