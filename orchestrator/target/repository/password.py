"""The password of a repository: one line of a file that others cannot read, or systemd's credential.

restic is given the same file, so it is read as restic reads it: without white space around it. What is in it never
reaches a message.
"""

import os
from functools import partial
from pathlib import Path

from orchestrator.errors import TargetError
from orchestrator.secret import read_line


def read_password(name: str, password_file: Path | None) -> str:
    """Return the password of the target `name`. Blocks. Raises TargetError, code "password-file"."""
    path = password_path(name, password_file)
    making = f"(umask 077; openssl rand -base64 32 > {path})"
    missing = f"for a new repository, make one: {making}; for an old one, bring back its own"
    return read_line(path, partial(_unusable, name), missing=missing)


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
