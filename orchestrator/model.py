"""What the layers tell each other: frozen data, no behaviour beyond simple questions.

Configuration comes in through `config` (pydantic) and leaves it as these classes; results leave a run as these
classes and are rendered by `cli`. Sizes are bytes, times are seconds unless a name says otherwise.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator import causes
from orchestrator.causes import Cause
from orchestrator.errors import VmfleeceError


class Consistency(StrEnum):
    """How a point in time over all disks is made; FREEZE: of file systems that the guest has frozen for it."""

    FREEZE = "freeze"
    PAUSE = "pause"
    NONE = "none"


class FleecingPolicy(StrEnum):
    """What to do where fleecing was asked for and cannot be had."""

    REQUIRE = "require"
    PREFER = "prefer"


class Discard(StrEnum):
    """What moves the copy-before-write boundary of a full copy.

    QEMU's block job as it copies; or we do after each window, for QEMU before 9.1, whose job cannot. Auto: the job
    where it can.
    """

    AUTO = "auto"
    JOB = "job"
    WINDOW = "window"


class Compression(StrEnum):
    """How the images target has QEMU compress what it writes."""

    NONE = "none"
    ZSTD = "zstd"


class Outcome(StrEnum):
    """How a run ended."""

    SUCCEEDED = "succeeded"
    WARNING = "warning"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Kind(StrEnum):
    """How much of the disks a run copied; a snapshot is complete either way."""

    FULL = "full"
    INCREMENTAL = "incremental"


@dataclass(frozen=True, slots=True)
class Vm:
    """A guest as configured. `extra_files` are stored with each snapshot.

    `latency_budget_seconds`: what its writes may take while it is backed up, on average; None: whatever they do.
    """

    name: str
    qmp: Path
    priority: int = 50
    exclude_disks: tuple[str, ...] = ()
    extra_files: tuple[Path, ...] = ()
    agent: Path | None = None
    latency_budget_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Fleecing:
    """Whether to fleece, and where. `storage` None: the one that holds the disk's own image."""

    enabled: bool = True
    storage: str | None = None
    policy: FleecingPolicy = FleecingPolicy.REQUIRE


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How one VM is to be backed up. `bwlimit_bytes_per_second` 0: no limit.

    `full`: whatever is there already. `full_every`: how many snapshots of a disk a chain has at most; 0: no limit.
    """

    target: str
    fleecing: Fleecing
    consistency: Consistency = Consistency.PAUSE
    cbw_timeout_seconds: int = 10
    bwlimit_bytes_per_second: int = 0
    job: str | None = None
    full: bool = False
    full_every: int = 0
    discard: Discard = Discard.AUTO


@dataclass(frozen=True, slots=True)
class Disk:
    """One block device of a VM, as QEMU describes it.

    `id` is the device's id (`vda`), `node` the node-name it is on, `device_path` the QOM path whose property
    `drive` puts it on another node, `node_driver` that node's driver (`qcow2`).
    `image` is the local file behind it, if there is one.
    `size_bytes` is the virtual size, always a multiple of 512. `keeps_bitmaps`: its image can hold dirty bitmaps,
    so that they outlast its QEMU.
    """

    id: str
    node: str
    device_path: str
    size_bytes: int
    node_driver: str
    image: str | None
    read_only: bool = False
    removable: bool = False
    empty: bool = False
    keeps_bitmaps: bool = False


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """An error as data: what `--json`, logs and history show. `cause` goes with the code."""

    code: str
    message: str
    hint: str = ""
    cause: Cause = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cause", causes.of(self.code))

    @staticmethod
    def of(error: VmfleeceError) -> "ErrorReport":
        """One that was raised, as data."""
        return ErrorReport(error.code, error.message, error.hint)


@dataclass(frozen=True, slots=True)
class MergeProgress:
    """How far it is that a snapshot is made to stand alone: of so many bytes, which are written and read back."""

    vm: str
    target: str
    snapshot: str
    done_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DiskResult:
    """One disk of a finished run. `storage` None: it was backed up without fleecing.

    `grant_bytes` is its last grant there, `fleecing_peak_bytes` what it held at its fullest.
    """

    disk: str
    size_bytes: int
    copied_bytes: int
    fleecing_peak_bytes: int
    storage: str | None
    grant_bytes: int = 0


@dataclass(frozen=True, slots=True)
class GuestWrites:
    """How long the guest's writes to a run's disks took, as QEMU measures them at its devices.

    `count` have ended since just before the snapshot, in `mean_ms`; `worst_ms` is the mean of the slowest second.
    `p99_ms` is known only where somebody has QEMU keep a histogram. `before_ms` is the mean of those before the
    snapshot, since the run began. None: not known, or there was no write.
    """

    count: int
    mean_ms: float | None
    worst_ms: float | None
    p99_ms: float | None
    before_ms: float | None


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run. `reason` says why it was full, `warnings` what the operator should know.

    `stored_bytes` is what its snapshot occupies on the target. `guest_writes` None: no snapshot was tried.
    `slowed_seconds` is how long its copies were slowed for the guest; None: the VM has no latency budget.
    """

    vm: str
    run: str
    outcome: Outcome
    snapshot: str | None
    kind: Kind
    reason: str
    started: datetime
    duration_seconds: float
    pause_ms: float | None
    disks: tuple[DiskResult, ...]
    warnings: tuple[str, ...] = ()
    error: ErrorReport | None = None
    stored_bytes: int | None = None
    guest_writes: GuestWrites | None = None
    slowed_seconds: float | None = None

    @property
    def retryable(self) -> bool:
        """Whether it failed of something that may pass."""
        return self.error is not None and self.error.cause.may_pass

    def as_json(self) -> dict[str, Any]:
        """The result as `backup --json` prints it and the catalogue keeps it."""
        return asdict(self) | {"started": self.started.isoformat()}


class Phase(StrEnum):
    """Where a run is."""

    QUEUED = "queued"
    PREPARING = "preparing"
    SNAPSHOTTING = "snapshotting"
    COPYING = "copying"
    COMMITTING = "committing"
    CLEANING = "cleaning"


class RunState(StrEnum):
    """Where a run is, or how it ended; `lost`: its vmfleece died, and what became of it is not known."""

    PLANNING = "planning"
    QUEUED = Phase.QUEUED.value
    PREPARING = Phase.PREPARING.value
    SNAPSHOTTING = Phase.SNAPSHOTTING.value
    COPYING = Phase.COPYING.value
    COMMITTING = Phase.COMMITTING.value
    CLEANING = Phase.CLEANING.value
    SUCCEEDED = Outcome.SUCCEEDED.value
    WARNING = Outcome.WARNING.value
    FAILED = Outcome.FAILED.value
    CANCELLED = Outcome.CANCELLED.value
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class DiskProgress:
    """How far one disk is. `fleecing_bytes` is what its fleecing image occupies right now.

    `strip` draws what is to be copied, which of an `incremental` disk is what has changed, from its beginning to
    its end: # backed up, > being copied, o held in fleecing, . waiting.
    """

    disk: str
    size_bytes: int
    copied_bytes: int
    fleecing_bytes: int
    grant_bytes: int
    incremental: bool = False
    strip: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; `waits_for` says why while it is queued.

    `recent_write_ms`: what the guest's writes took on average in each of the last seconds; None: there was none.
    `slowed_to_bytes_per_second`: what it copies at most, since they take too long; None: it is not slowed.
    """

    vm: str
    run: str
    phase: Phase
    disks: tuple[DiskProgress, ...] = ()
    waits_for: str = ""
    guest_writes: GuestWrites | None = None
    recent_write_ms: tuple[float | None, ...] = ()
    slowed_to_bytes_per_second: int | None = None


@dataclass(frozen=True, slots=True)
class Keep:
    """How many snapshots each rule keeps; 0: there is no such rule. No rule at all keeps everything."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    all: bool = False

    def rules(self) -> Iterator[tuple[str, int]]:
        """Those there are, in the order in which they are applied; none if everything is kept."""
        for rule in fields(self):
            count = getattr(self, rule.name)
            if rule.name != "all" and count > 0 and not self.all:
                yield rule.name, count
