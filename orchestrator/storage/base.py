"""The contract of a storage: a place where fleecing images live, with a quota.

A storage only knows its space and makes files; who may use how much of it is admission's business.
What an implementation promises:
- an image that it made disappears by itself once QEMU and we let go of it, whatever died;
- nobody but root and the QEMU that was given the descriptor can read it.
"""

import abc
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Space:
    """A storage's file system: what is free, and the floor below which vmfleece grants nothing."""

    free_bytes: int
    floor_bytes: int


class ImageFile(abc.ABC):
    """Where one fleecing image's bytes are; open until `close`."""

    @property
    @abc.abstractmethod
    def descriptor(self) -> int:
        """The open file, to be passed to QEMU."""

    @abc.abstractmethod
    def used_bytes(self) -> int:
        """The bytes it occupies right now; 0 once closed."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of it. May be called again."""


class Storage(abc.ABC):
    """See the module for what it promises."""

    name: str
    quota_bytes: int
    max_runs: int | None

    @abc.abstractmethod
    def prepare(self) -> None:
        """Make sure that images can be made here. Raises StorageError that says what is wrong."""

    @abc.abstractmethod
    def create(self) -> ImageFile:
        """An empty file for one fleecing image. Raises StorageError."""

    @abc.abstractmethod
    def space(self) -> Space:
        """Its file system right now. Raises StorageError."""

    @abc.abstractmethod
    def nearness(self, image: Path) -> int:
        """How close it is to a disk's image: 0 not at all, higher is closer (a common path counts more)."""
