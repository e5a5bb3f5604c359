"""The contract of a target: a place where snapshots go and come back from.

    draft = await target.begin(…)      nothing is listed yet
    sink = await draft.add_disk(disk)  what QEMU is to write the disk's content into
    …QEMU copies…
    await draft.seal(disk)             the disk is complete and durable, its hash known
    await draft.commit(…)              all of it is listed, or nothing is
    await target.remove(snapshot)      it is not listed any more, and its space is free

What an implementation promises:
- after `commit` returned, the snapshot survives power loss; before, it is not listed, whatever happens;
- after `abort` nothing of the draft is left or listed; `commit` and `abort` may both be called again;
- what a dead process left half-written or half-removed is never listed, and is removed by a later `begin` or
  `remove` for the same VM; so is a merge that it began finished or undone;
- what is protected cannot be removed, whatever other processes on this host do at the same time; of what a
  snapshot or a draft builds on, and of what is being read, nothing that is needed goes.
Errors are TargetError. Cancelling any of it leaves a draft that `abort` removes; a removal or protection that has
begun is finished first.
"""

import abc
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.errors import TargetError
from orchestrator.model import Disk
from orchestrator.target.extra_files import ExtraFile

STAMP = "%Y%m%dT%H%M%SZ"
"""How a snapshot's id gives the time."""
_DISK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_TIME = re.compile(
    r"\d{4}-?\d\d-?\d\d(?:[T ](\d\d(?::?\d\d){0,2}(?:\.\d+)?)(?:Z|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII
)
OnBytes = Callable[[int, int], None]
"""Told how much is done, and of how much, in bytes."""
_RESTIC_ID = re.compile(r"[0-9a-f]{8,64}", re.ASCII)
_PRECISIONS = {0: timedelta(days=1), 2: timedelta(hours=1), 4: timedelta(minutes=1)}
"""What a time leaves open, by how many digits of the clock it gives."""


def untold(_done_bytes: int, _size_bytes: int) -> None:
    """Nobody wants to know."""


class HashOf(StrEnum):
    """What a disk's hash is of: its image as stored, or its content, as `sha256sum` prints it for a raw disk."""

    FILE = "file"
    CONTENT = "content"


@dataclass(frozen=True, slots=True)
class SnapshotDisk:
    """One disk of a snapshot. `parent` is the snapshot whose image of it its own builds on; None: it stands alone.

    `sha256` is that of its image as the target stores it, so that sealing takes as long as what was written is
    large, whatever the disk's size; or of the disk's whole content, as `sha256_of` says. None: the target knows
    the content by the hashes of its parts, and checks those.
    """

    disk: str
    size_bytes: int
    sha256: str | None
    stored_bytes: int
    parent: str | None = None
    sha256_of: HashOf = HashOf.FILE


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a successful run left on a target. `details` is what else was recorded about the run.

    `protected`: an operator said that it stays, whatever retention says.
    """

    id: str
    target: str
    vm: str
    created: datetime
    kind: str
    disks: tuple[SnapshotDisk, ...]
    details: dict[str, Any]
    protected: bool = False

    @property
    def parents(self) -> tuple[str, ...]:
        """The snapshots that its disks' images build on, each once."""
        return tuple(dict.fromkeys(disk.parent for disk in self.disks if disk.parent is not None))

    @property
    def stored_bytes(self) -> int:
        """What its own images occupy."""
        return sum(disk.stored_bytes for disk in self.disks)

    def disk(self, name: str) -> SnapshotDisk:
        """One of its disks. Raises TargetError that names those there are."""
        for disk in self.disks:
            if disk.disk == name:
                return disk
        names = ", ".join(disk.disk for disk in self.disks)
        raise TargetError(
            f"snapshot {self.id} has no disk {name!r}", hint=f"name one of its disks: {names}", code="no-disk"
        )


@dataclass(frozen=True, slots=True)
class FileSink:
    """A qcow2 file that QEMU writes one disk's content into.

    `descriptor` is an open file that stays open until the disk is sealed or the draft aborted; `compress` asks
    the block job to write compressed clusters.
    """

    descriptor: int
    compress: bool


@dataclass(frozen=True, slots=True)
class NbdSink:
    """An NBD server that QEMU writes one disk's content to, as the export of that name.

    `descriptor` is a connected socket that stays open until the disk is sealed or the draft aborted.
    """

    descriptor: int
    export: str


Sink = FileSink | NbdSink
"""What QEMU writes one disk's content into."""


class ParentUnusable(TargetError):
    """A disk cannot be built on what its parent has of it, so all of it has to be copied."""

    code = "parent-unusable"


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of reading a snapshot back: how much of how much, and what is damaged, for people."""

    checked_bytes: int
    total_bytes: int
    problems: tuple[str, ...]


class Draft(abc.ABC):
    """A snapshot being written. See the module for what it promises."""

    snapshot_id: str

    @abc.abstractmethod
    async def add_disk(self, disk: Disk, *, compressible: bool, parent: str | None = None) -> Sink:
        """A place for the disk's content; `compressible` False: QEMU writes parts of it twice (no compression).

        With a `parent`, a listed snapshot that has the disk, only what changed since it will be written; it cannot
        be removed from now on. ParentUnusable if it is not there any more, or cannot be built on.
        """

    @abc.abstractmethod
    async def why_unwritten(self, disk: Disk) -> TargetError | None:
        """Why QEMU could not write to a disk's sink, where the target knows better than QEMU; else None."""

    @abc.abstractmethod
    async def lost(self) -> NoReturn:
        """Raise TargetError as soon as nothing that is written can become a snapshot any more; wait until then."""

    @abc.abstractmethod
    async def cut_off(self) -> None:
        """Unless it was committed, have QEMU's requests to the sinks end now, with an error if need be.

        For a run that failed: QEMU lets go of a sink only once all its requests have been answered.
        """

    @abc.abstractmethod
    async def seal(self, disk: Disk) -> SnapshotDisk:
        """Make a completely written disk durable and read back its hash; QEMU must have closed it.

        It takes as long as reading what was written, whatever the disk's size.
        """

    @abc.abstractmethod
    async def commit(self, details: dict[str, Any], files: Sequence[ExtraFile] = ()) -> Snapshot:
        """Make the snapshot durable and listed."""

    @abc.abstractmethod
    async def abort(self) -> None:
        """Remove everything, unless it was committed."""


class Target(abc.ABC):
    """See the module for what it promises.

    `granule_bytes`: what it stores at once, so that it is of no use to know more exactly what changed.
    `reads_sinks`: whether QEMU can read what it wrote to a sink, as it must where it does not fleece.
    """

    name: str
    max_runs: int | None
    granule_bytes: int
    reads_sinks: bool

    @abc.abstractmethod
    async def prepare(self) -> None:
        """Make sure that snapshots can be written. Raises TargetError that says what is wrong."""

    @abc.abstractmethod
    async def begin(self, vm: str, started: datetime) -> Draft:
        """Start a snapshot of a VM."""

    @abc.abstractmethod
    async def snapshots(self, vm: str | None = None) -> list[Snapshot]:
        """What is listed, by VM and then oldest first."""

    @abc.abstractmethod
    async def look_up(self, wanted: str) -> Snapshot | None:
        """A snapshot by a name that only the target knows, also one that another program made; else None.

        Its disks may be called by paths. It is for reading only.
        """

    @abc.abstractmethod
    async def extract(self, snapshot: Snapshot, disk: str, *, to: Path, image_format: str) -> None:
        """Write a disk's content into the file or block device at `to`, as `raw` or `qcow2`; see that it is right.

        It is durable then. What the disk builds on is checked, too, and not changed or removed meanwhile.
        TargetError's code is "content-wrong" if what is there is not what was backed up, or something that it is
        made of is damaged or gone: it names the snapshot; "no-snapshot" if that is gone; "restore-path" if it
        cannot be written there.
        """

    @abc.abstractmethod
    async def extra_files(self, snapshot: Snapshot) -> list[ExtraFile]:
        """The files that were kept beside the disks. TargetError as `extract`."""

    @abc.abstractmethod
    def exported(
        self, snapshot: Snapshot, disks: Sequence[str], folder: Path
    ) -> AbstractAsyncContextManager[Mapping[str, str]]:
        """Serve disks to be read by NBD for the block, on unix sockets in `folder`. Gives their URIs, by disk.

        What they are read from is not changed or removed meanwhile. TargetError as `extract`, but what is damaged
        is an I/O error for the reader where it is not found before.
        """

    @abc.abstractmethod
    async def verify(self, snapshot: Snapshot, *, share: float) -> Verification:
        """Read back a snapshot, or about a `share` of it (0 to 1) chosen at random, and check all hashes.

        What is damaged is in the result. TargetError's code is "no-snapshot" if the snapshot is gone.
        """

    @abc.abstractmethod
    async def leftovers(self) -> list[str]:
        """What dead writers left half-written or half-removed, as people know it; what live ones have is none."""

    @abc.abstractmethod
    async def clear(self) -> None:
        """Remove it, as far as that can be done now."""

    @abc.abstractmethod
    async def remove(self, snapshot: Snapshot) -> None:
        """Take a snapshot off the list and free its space; nothing to do if it is gone.

        TargetError's code is "protected" if it is, "needed" if another one, or a draft, builds on it.
        """

    @abc.abstractmethod
    async def merge(self, snapshot: Snapshot, on_progress: OnBytes = untold) -> None:
        """Have a snapshot hold all of its content itself, durably; nothing to do if it does.

        It is the same for all that builds on it, and what it was built on is not needed for it any more. It takes
        as long, and as much space, as a full backup. TargetError's code is "no-snapshot" if it is gone, "needed"
        if it is in use, "target-full" if it might not fit, "content-wrong" if what it builds on is damaged; then,
        and if cancelled before it is published, nothing is changed. `on_progress` is called now and then, on the
        event loop.
        """

    @abc.abstractmethod
    async def protect(self, snapshot: Snapshot, *, protected: bool) -> Snapshot:
        """Protect a snapshot, or stop doing so, durably, and return it as it is now listed.

        TargetError's code is "no-snapshot" if it is gone.
        """


def snapshot_id(vm: str, created: datetime) -> str:
    """What a VM's snapshot of a moment is called."""
    return f"{vm}/{created.astimezone(UTC):{STAMP}}"


def check_disk_name(disk: Disk) -> None:
    """Raise TargetError unless a disk's id can be the name of a file."""
    if not _DISK_NAME.fullmatch(disk.id):
        raise TargetError(
            f"disk {disk.id!r} cannot be a file's name",
            hint="give the device an id of letters, digits, '_', '.' and '-'",
            code="disk-name",
        )


def gone(snapshot: str) -> TargetError:
    """The error that a snapshot is not there any more."""
    return TargetError(
        f"there is no snapshot {snapshot} any more",
        hint="choose another one: somebody removed it meanwhile",
        code="no-snapshot",
    )


def protected_error(snapshot: Snapshot) -> TargetError:
    """The error that a snapshot is not removed, since an operator said so."""
    return TargetError(
        f"snapshot {snapshot.id} is protected",
        hint=f"to remove it all the same: vmfleece snapshot protect {snapshot.id} --off",
        code="protected",
    )


def find(snapshots: Iterable[Snapshot], wanted: str) -> Snapshot:
    """The snapshot that an operator means: an id, `VM@latest`, `VM@TIME`, or restic's id. Raises TargetError.

    TIME is ISO 8601, local if it has no zone: the newest snapshot not later than it (to the precision given). Of
    restic's id, the first eight digits are enough.
    """
    known = list(snapshots)
    vm, at, when = wanted.partition("@")
    if _RESTIC_ID.fullmatch(wanted):
        candidates = [one for one in known if str(one.details.get("restic", "")).startswith(wanted)]
        if len({one.id for one in candidates}) > 1:
            raise TargetError(f"several snapshots begin with {wanted}", hint="give more of its digits")
    elif not at:
        candidates = [snapshot for snapshot in known if snapshot.id == wanted]
    else:
        candidates = [snapshot for snapshot in known if snapshot.vm == vm]
        if when != "latest":
            end = _end_of(when)
            candidates = [snapshot for snapshot in candidates if snapshot.created < end]
    if not candidates:
        names = sorted({snapshot.vm for snapshot in known})
        raise TargetError(
            f"no snapshot {wanted!r}",
            hint="give an id from `vmfleece snapshot list`, VM@latest or VM@2026-11-22T02:30;"
            f" there are snapshots of: {', '.join(names) or 'no VM'}",
            code="no-snapshot",
        )
    return max(candidates, key=lambda snapshot: snapshot.created)


def _end_of(when: str) -> datetime:
    """The first moment after a time that was given to the day, hour, minute or second."""
    try:
        written = _TIME.fullmatch(when)
        if written is None:
            raise ValueError(when)
        digits = re.sub(r"\D", "", (written[1] or "").partition(".")[0])
        precision = _PRECISIONS.get(len(digits), timedelta(seconds=1))
        return datetime.fromisoformat(when).astimezone(UTC) + precision
    except (ValueError, OverflowError) as error:
        raise TargetError(
            f"not a time: {when!r}", hint="write it as 2026-11-22, 2026-11-22T02:30 or …:00Z"
        ) from error
