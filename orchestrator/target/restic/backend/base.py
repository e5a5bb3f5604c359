"""The contract of a place that a repository's files lie in.

Files are written once and never changed: all but `config` are named by the SHA-256 of their content. What an
implementation promises:

- *visible at once or not at all*: whoever lists or reads never sees a part of a file, whatever died meanwhile;
- *durable*: once `save` has returned, the file survives power loss, and so does what was saved before it;
- *idempotent*: saving what is there already, and removing what is not, do no harm. So every call but
  `save(…, replace=False)` may be repeated when its outcome is unknown; after that one, read what is there;
- *fresh*: a file is listed and read as soon as `save` has returned, and not any more once `remove` has;
- files that are not the format's are never listed, and never removed unless a dead writer of ours left them.

All of it blocks, and may be called from several threads at once. Errors are BackendError (errors.py): FileMissing,
FileExists, Unreachable (after the implementation's own retries), else "target-full" or "target-unwritable".
"""

import abc
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

Content = bytes | bytearray | memoryview
PATIENCE = timedelta(minutes=5)
"""For so long a server that does not answer is asked again."""
_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Kind(StrEnum):
    """The folders of a repository."""

    KEYS = "keys"
    INDEX = "index"
    SNAPSHOTS = "snapshots"
    LOCKS = "locks"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class File:
    """A file's name: `config`, or a kind and an id of 32 bytes."""

    kind: Kind | None
    identity: bytes = b""

    @property
    def path(self) -> str:
        """Where it lies in the repository, with slashes."""
        if self.kind is None:
            return "config"
        name = self.identity.hex()
        return f"data/{name[:2]}/{name}" if self.kind is Kind.DATA else f"{self.kind}/{name}"

    def __str__(self) -> str:
        return self.path


CONFIG = File(None)


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that is there, and how long it is."""

    file: File
    size_bytes: int


class Backend(abc.ABC):
    """See the module for what it promises."""

    place: str
    """Where it is, for messages: a path or a URL, without secrets."""

    @abc.abstractmethod
    def create(self) -> None:
        """Make what must be there before the first file is saved. May be called again."""

    @abc.abstractmethod
    def save(self, file: File, content: Content, *, replace: bool = True) -> None:
        """Make a file. Unless `replace`, FileExists if there is one of that name, which stays as it is."""

    @abc.abstractmethod
    def read(self, file: File, *, offset: int = 0, length: int | None = None) -> bytes:
        """Return a file's content, or a part of it: less than `length` bytes only where the file ends."""

    @abc.abstractmethod
    def list(self, kind: Kind) -> Iterable[Stored]:
        """Return what is there of a kind, in no order. None if the repository is not there at all."""

    @abc.abstractmethod
    def remove(self, file: File) -> None:
        """Remove a file."""

    @abc.abstractmethod
    def clean(self) -> int:
        """Remove what dead writers of ours left half-written, and return how many files that were."""


def file_of(kind: Kind, name: str) -> File | None:
    """Return the file of a name without its folder, or None if it is not one of the format's."""
    return File(kind, bytes.fromhex(name)) if _ID.fullmatch(name) else None
