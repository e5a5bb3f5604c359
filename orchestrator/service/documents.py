"""What is answered over the API, and printed by `--json`: frozen data, one class a document.

pydantic reads and writes them, and makes the API's description from them: a docstring here is read by users.
Sizes are bytes; times are ISO 8601 with a zone.
"""

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.fleecing.bitmaps import Bitmap
from orchestrator.model import ErrorReport, RunResult, RunState
from orchestrator.service.status import RunStatus, StorageStatus, WaitingStatus
from orchestrator.target.base import SnapshotDisk


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """Why something could not be answered; `code` is stable, `hint` says what can be done."""

    code: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class VmDisk:
    """A disk as its QEMU describes it."""

    disk: str
    size_bytes: int
    driver: str | None
    node: str | None
    image: str | None
    read_only: bool


@dataclass(frozen=True, slots=True)
class VmSummary:
    """A configured VM; `error` says why it cannot be reached."""

    vm: str
    reachable: bool
    status: str | None
    qemu: str | None
    disks: tuple[VmDisk, ...]
    priority: int
    error: ErrorReport | None


@dataclass(frozen=True, slots=True)
class Vms:
    """All configured VMs."""

    vms: tuple[VmSummary, ...]


@dataclass(frozen=True, slots=True)
class PlannedDisk:
    """A disk, and what a backup would do with it: `backup` is full, incremental, skipped, or null."""

    disk: str
    size_bytes: int
    driver: str | None
    node: str | None
    image: str | None
    read_only: bool
    backup: str | None
    reason: str
    storage: str | None
    first_grant_bytes: int
    bitmaps: tuple[Bitmap, ...]


@dataclass(frozen=True, slots=True)
class Features:
    """What its QEMU can do."""

    fleecing: bool
    discard_source: bool


@dataclass(frozen=True, slots=True)
class VmDetails:
    """One VM, and what a backup of it would do; `error` says why there would be none."""

    vm: str
    qmp: str
    status: str
    qemu: str
    features: Features
    disks: tuple[PlannedDisk, ...]
    warnings: tuple[str, ...]
    error: ErrorReport | None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run, under way or over."""

    run: str
    vm: str
    job: str | None
    state: RunState
    started: str
    duration_seconds: float | None = None
    snapshot: str | None = None
    kind: str | None = None
    copied_bytes: int | None = None
    error: ErrorReport | None = None


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs, the latest first."""

    runs: tuple[RunSummary, ...]


@dataclass(frozen=True, slots=True)
class RunDetails:
    """One run: `progress` while it is under way, `waiting` while it waits, `result` once it is over."""

    run: str
    vm: str
    job: str | None
    state: RunState
    started: str
    progress: RunStatus | None = None
    waiting: WaitingStatus | None = None
    result: RunResult | None = None


class Protected(StrEnum):
    """Whether a VM is backed up as its jobs promise; of several jobs, the worst.

    `due`: its turn has come, and its backup is about to begin, under way or waiting. `overdue`: its turn has come
    and nothing is being done about it, or the turn after it has come, too. `never`: there was no good backup yet.
    `unscheduled`: no job with a schedule backs it up.
    """

    PROTECTED = "protected"
    DUE = "due"
    OVERDUE = "overdue"
    NEVER = "never"
    UNSCHEDULED = "unscheduled"


@dataclass(frozen=True, slots=True)
class GoodRun:
    """A run that succeeded, and the snapshot that it left."""

    run: str
    job: str | None
    started: str
    snapshot: str | None


@dataclass(frozen=True, slots=True)
class RunFailure:
    """A run that did not succeed; `error` says why, as far as that is known."""

    run: str
    job: str | None
    started: str
    outcome: str
    error: ErrorReport | None


@dataclass(frozen=True, slots=True)
class JobProtection:
    """How a job keeps its promise to a VM: its last good run, and the first turn since then that is missing."""

    job: str
    state: Protected
    last: str | None
    missed: str | None
    next_due: str | None


@dataclass(frozen=True, slots=True)
class VmProtection:
    """How a VM is protected. `last` is its last good run, `failure` the last run if that failed since then."""

    vm: str
    state: Protected
    last: GoodRun | None
    jobs: tuple[JobProtection, ...]
    failure: RunFailure | None


@dataclass(frozen=True, slots=True)
class Protection:
    """All configured VMs, and when this was judged. The history is asked, not the targets."""

    now: str
    vms: tuple[VmProtection, ...]


@dataclass(frozen=True, slots=True)
class StorageHistory:
    """One storage: the most that was granted and used in each interval."""

    storage: str
    granted_bytes: tuple[int, ...]
    used_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class History:
    """Storages over time, as long as vmfleece runs: `at` is when each interval began, in seconds since 1970."""

    interval_seconds: int
    at: tuple[int, ...]
    storages: tuple[StorageHistory, ...]


@dataclass(frozen=True, slots=True)
class Queue:
    """The runs that wait, in the order in which they will be admitted."""

    queue: tuple[WaitingStatus, ...]


@dataclass(frozen=True, slots=True)
class Storages:
    """The storages of fleecing images."""

    storages: tuple[StorageStatus, ...]


@dataclass(frozen=True, slots=True)
class TargetSummary:
    """A target of backups; `error` says why it cannot be listed."""

    target: str
    driver: str
    place: str
    snapshots: int | None
    error: ErrorReport | None


@dataclass(frozen=True, slots=True)
class Targets:
    """All configured targets."""

    targets: tuple[TargetSummary, ...]


@dataclass(frozen=True, slots=True)
class SnapshotSummary:
    """What a successful run left on a target."""

    id: str
    target: str
    vm: str
    created: str
    kind: str
    stored_bytes: int
    protected: bool
    run: str | None
    job: str | None
    disks: tuple[SnapshotDisk, ...]


@dataclass(frozen=True, slots=True)
class Snapshots:
    """Snapshots on a target, by VM and oldest first."""

    snapshots: tuple[SnapshotSummary, ...]


@dataclass(frozen=True, slots=True)
class JobSummary:
    """A configured job; `next_due` is null if it is only started by hand."""

    job: str
    schedule: str | None
    next_due: str | None
    target: str
    vms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Jobs:
    """All configured jobs."""

    jobs: tuple[JobSummary, ...]


@dataclass(frozen=True, slots=True)
class RunOfVm:
    """A run by its id."""

    vm: str
    run: str


class Fate(StrEnum):
    """What becomes of a snapshot: it stays, stays and is made to stand alone, is removed, or that failed."""

    KEEP = "keep"
    MERGE = "merge"
    REMOVE = "remove"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class PrunedSnapshot:
    """What retention did with a snapshot, and why. In a dry run `fate` says what it would do."""

    snapshot: str
    vm: str
    target: str
    keep: bool
    fate: Fate
    reasons: tuple[str, ...]
    removed: bool
    merged: bool
    stored_bytes: int
    grown_bytes: int
    error: ErrorReport | None


class RequestState(StrEnum):
    """Whether what was asked for is done; `ended`: whatever came of it, `cancelled`: because somebody said so."""

    UNDER_WAY = "under-way"
    ENDED = "ended"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Request:
    """Runs, or retention, that were asked for over the API.

    `runs` are those begun so far, tries included; `results` come with the end, one a VM, and so does `pruned`, one
    a snapshot; `error` says why there are none.
    """

    request: str
    job: str | None
    vms: tuple[str, ...]
    state: RequestState
    started: str
    runs: tuple[RunOfVm, ...] = ()
    results: tuple[RunResult, ...] = ()
    pruned: tuple[PrunedSnapshot, ...] = ()
    error: ErrorReport | None = None


@dataclass(frozen=True, slots=True)
class RepairSummary:
    """What is left of a dead run, and what is done about it; `error` says why it could not be done."""

    act: str
    vm: str | None
    subject: str
    reason: str
    error: ErrorReport | None


@dataclass(frozen=True, slots=True)
class Cleanup:
    """All that is left of dead runs; in a dry run nothing was done about it."""

    dry_run: bool
    repairs: tuple[RepairSummary, ...]


@dataclass(frozen=True, slots=True)
class Health:
    """That it serves: a daemon, or a command that backs up in its own process."""

    status: str
    version: str
    daemon: bool
