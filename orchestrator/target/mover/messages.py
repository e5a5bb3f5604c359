"""What a run and its mover say to each other: a JSON object a line. Pure.

Requests have a number, and so do their answers.

    → {"number": 1, "ask": "open", "place": "/srv/backup", "opened": {…}, …}
    ← {"number": 1, "value": null}
    ← {"progress": {"vda": 4194304}}
    ← {"lost": {"kind": "LockLost", …}}
    ← {"number": 2, "error": {"kind": "Damaged", "code": …, "message": …, "hint": …}}

A request that comes with a descriptor says so ("descriptor": true); they are passed in the order of the requests.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import TargetError, VmfleeceError
from orchestrator.target.base import ParentUnusable
from orchestrator.target.restic import errors
from orchestrator.target.restic.access import Opened
from orchestrator.target.restic.config import RepositoryConfig
from orchestrator.target.restic.crypto import Key

Message = dict[str, Any]
_KINDS = {
    kind.__name__: kind
    for kind in (
        ParentUnusable,
        errors.Damaged,
        errors.OtherVersion,
        errors.WrongPassword,
        errors.NoRepository,
        errors.RepositoryLocked,
        errors.LockLost,
        errors.BackendError,
        errors.FileMissing,
        errors.FileExists,
        errors.Unreachable,
    )
}


@dataclass(frozen=True, slots=True)
class Sealed:
    """A disk whose content is whole: its size, and what the repository took for what was new of it."""

    size_bytes: int
    stored_bytes: int


def encode(message: Message) -> bytes:
    """A line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Lines:
    """Makes messages of what comes in pieces. Raises ValueError for what is none."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Message]:
        """Give the messages that are whole now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


def of_error(error: Exception) -> Message:
    """An error as a message; a bug is told by its class."""
    if isinstance(error, VmfleeceError):
        report = {"code": error.code, "message": error.message, "hint": error.hint}
        return {"kind": type(error).__name__, **report}
    return {"kind": "", "code": "bug", "message": f"{type(error).__name__}: {error}", "hint": ""}


def to_error(message: Message) -> TargetError:
    """The error that a message tells of: of the same class, so that it is retried and exits as it would here."""
    kind = _KINDS.get(message["kind"], TargetError)
    error = kind.__new__(kind)
    TargetError.__init__(error, message["message"], hint=message["hint"], code=message["code"])
    return error


def of_opened(opened: Opened) -> Message:
    """What opens a repository as a message: a secret."""
    key, config = opened.key, opened.config
    return {
        "encrypt": key.encrypt.hex(),
        "mac_k": key.mac_k.hex(),
        "mac_r": key.mac_r.hex(),
        "version": config.version,
        "id": config.identity.hex(),
        "polynomial": config.polynomial,
        "key_file": opened.key_file.hex(),
    }


def to_opened(message: Message) -> Opened:
    """What a message says of a repository."""
    encrypt, mac_k, mac_r = (bytes.fromhex(message[name]) for name in ("encrypt", "mac_k", "mac_r"))
    config = RepositoryConfig(message["version"], bytes.fromhex(message["id"]), message["polynomial"])
    return Opened(Key(encrypt=encrypt, mac_k=mac_k, mac_r=mac_r), config, bytes.fromhex(message["key_file"]))
