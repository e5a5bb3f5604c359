"""The contract of a storage: a place where fleecing images live, with a quota.

A storage only knows its space and makes files; who may use how much of it is admission's business.
What an implementation promises:
- an image that it made disappears by itself once QEMU and we let go of it, whatever died;
- nobody but root and the QEMU that was given the descriptor can read it.

A storage of volumes (LVM-thin, ZFS) fits like this. `create` makes a thin volume of that name and length; the
descriptor is its opened block device, so its node in QEMU is a `host_device`; `extend` has nothing to do. What it
occupies and what is free are the pool's figures; both are asked at every admission decision, so they are kept and
refreshed aside. `close` removes the volume, and as one outlives those who die, `prepare` lists the volumes whose
names are ours and removes those that no process has open.
"""

import abc
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Space:
    """A storage's file system: what is free, and the floor below which vmfleece grants nothing."""

    free_bytes: int
    floor_bytes: int


class Feature(StrEnum):
    """What fleecing images use, and not every file system has."""

    NAMELESS_FILES = "files without a name"
    DESCRIPTOR_PASSING = "descriptor passing"
    SPARSE_FILES = "sparse files"
    HOLE_PUNCHING = "hole punching"


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that a storage cannot do. `required`: without it no image can be made there.

    `consequence` names the feature and says, to users, what its absence means.
    """

    feature: Feature
    required: bool
    consequence: str


class ImageFile(abc.ABC):
    """Where one fleecing image's bytes are; open until `close`."""

    @property
    @abc.abstractmethod
    def descriptor(self) -> int:
        """The open file, to be passed to QEMU."""

    @property
    @abc.abstractmethod
    def direct(self) -> bool:
        """Whether it must be written past the host's cache, so as not to occupy more than QEMU wrote to it."""

    @abc.abstractmethod
    def extend(self, length_bytes: int) -> None:
        """Make room for so many bytes without occupying them; what is written already stays.

        Called once qemu-img has made the image, because qemu-img cuts a file off. Raises StorageError.
        """

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
    lacks: tuple[Lack, ...] = ()
    """What `prepare` found lacking when it last looked; empty before."""

    @abc.abstractmethod
    def prepare(self) -> tuple[Lack, ...]:
        """Make sure that images can be made here; at start-up and before each run. Blocks.

        Returns what is lacking and can be done without. Raises StorageError that says what is wrong.
        """

    @abc.abstractmethod
    def create(self, name: str, length_bytes: int) -> ImageFile:
        """An empty file for one fleecing image that becomes so long at most. Raises StorageError.

        `name`, such as `vmf-1a2b3c4d-0`, is for a storage whose files need one. The file need not have its
        length before `extend`.
        """

    @abc.abstractmethod
    def space(self) -> Space:
        """Its file system right now. Called at every admission decision. Raises StorageError."""

    @abc.abstractmethod
    def nearness(self, image: Path) -> int:
        """How close it is to a disk's image: 0 not at all, higher is closer (a common path counts more)."""
