"""What a run has come to: the facts that it gathers, and the progress, record and result made of them."""

import logging
from dataclasses import asdict, dataclass, field
from datetime import datetime

import structlog

from orchestrator import __version__
from orchestrator.fleecing.boundary import CELLS, Boundary, Cell, swept
from orchestrator.fleecing.names import DiskNames
from orchestrator.model import (
    DiskProgress,
    DiskResult,
    ErrorReport,
    Kind,
    Outcome,
    Phase,
    Progress,
    RunOptions,
    RunResult,
)
from orchestrator.run.impact import Impact
from orchestrator.run.particulars import Particulars
from orchestrator.run.plan import DiskPlan
from orchestrator.storage.base import ImageFile
from orchestrator.target.base import FileSink, Sink, Snapshot
from orchestrator.target.extra_files import ExtraFile

log = structlog.get_logger(__name__)

CANCELLED = "cancelled"
WAS_CANCELLED = ErrorReport(CANCELLED, "the run was cancelled")


@dataclass(slots=True)
class DiskRun:
    """One disk under way: `copying` until its copy has ended, `by_windows` or by one job; `job` is the latest.

    `boundary`: which windows are copied, None as long as none was.
    """

    plan: DiskPlan
    names: DiskNames
    file: ImageFile | None = None
    grant_bytes: int = 0
    to_copy_bytes: int = 0
    copied_bytes: int = 0
    fleecing_peak_bytes: int = 0
    sink: Sink | None = None
    by_windows: bool = False
    job: str = ""
    copying: bool = True
    boundary: Boundary | None = None

    def move(self, boundary: Boundary) -> None:
        """Its windows are so far now."""
        self.boundary = boundary

    @property
    def strip(self) -> str:
        """How far it is, drawn in cells: the disk, or of an incremental one what has changed."""
        if not self.copying and self.copied_bytes >= self.to_copy_bytes:
            return Cell.DONE * CELLS
        if self.boundary is not None:
            return self.boundary.strip()
        return swept(self.to_copy_bytes or self.plan.disk.size_bytes, self.copied_bytes)

    @property
    def compress(self) -> bool:
        """Whether QEMU compresses what it writes."""
        return isinstance(self.sink, FileSink) and self.sink.compress

    @property
    def incremental(self) -> bool:
        """Whether only what changed is copied."""
        return self.plan.kind is Kind.INCREMENTAL


@dataclass(slots=True)
class Facts:
    """What is known of a run so far."""

    disks: list[DiskRun] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    pause_ms: float | None = None
    frozen_file_systems: int = 0
    snapshot: Snapshot | None = None
    particulars: Particulars = field(default_factory=Particulars)
    files: list[ExtraFile] = field(default_factory=list)
    impact: Impact = field(default_factory=Impact)
    slowed_seconds: float | None = None
    slowed_to_bytes_per_second: int | None = None

    @property
    def rounded_pause_ms(self) -> float | None:
        """How long the guest was held, to the microsecond."""
        return round(self.pause_ms, 3) if self.pause_ms is not None else None

    @property
    def kind(self) -> Kind:
        """Incremental if any disk is."""
        incremental = any(disk.incremental for disk in self.disks)
        return Kind.INCREMENTAL if incremental else Kind.FULL

    @property
    def reason(self) -> str:
        """Why each disk was copied whole, or since when."""
        by_reason: dict[str, list[str]] = {}
        for disk in self.disks:
            by_reason.setdefault(disk.plan.reason, []).append(disk.plan.disk.id)
        return "; ".join(f"{', '.join(disks)}: {reason}" for reason, disks in by_reason.items())

    def progress(self, vm: str, run: str, phase: Phase) -> Progress:
        """How far it is."""
        disks = tuple(
            DiskProgress(
                disk=disk.plan.disk.id,
                size_bytes=disk.to_copy_bytes or disk.plan.disk.size_bytes,
                copied_bytes=disk.copied_bytes,
                fleecing_bytes=disk.file.used_bytes() if disk.file else 0,
                grant_bytes=disk.grant_bytes,
                incremental=disk.incremental,
                strip=disk.strip,
            )
            for disk in self.disks
        )
        return Progress(
            *(vm, run, phase, disks),
            guest_writes=self.impact.writes(),
            recent_write_ms=self.impact.recent_ms,
            slowed_to_bytes_per_second=self.slowed_to_bytes_per_second if phase is Phase.COPYING else None,
        )

    def details(self, run: str, options: RunOptions) -> dict[str, object]:
        """What the snapshot keeps about its run."""
        return {
            "run": run,
            "job": options.job,
            "kind": self.kind,
            "consistency": options.consistency,
            "frozen_file_systems": self.frozen_file_systems,
            "pause_ms": self.rounded_pause_ms,
            "vmfleece": __version__,
            "qemu": self.particulars.qemu,
            "extra_files": [file.described() for file in self.files],
            "disks": [
                {
                    "disk": disk.plan.disk.id,
                    "kind": disk.plan.kind,
                    "reason": disk.plan.reason,
                    "source": disk.plan.disk.image,
                    "source_driver": disk.plan.disk.node_driver,
                    "device": self.particulars.devices.get(disk.plan.disk.id, ""),
                    "storage": disk.plan.storage,
                    "fleecing_peak_bytes": disk.fleecing_peak_bytes,
                }
                for disk in self.disks
            ],
        }

    def result(
        self,
        vm: str,
        run: str,
        *,
        started: datetime,
        duration_seconds: float,
        error: ErrorReport | None,
    ) -> RunResult:
        """How it ended."""
        outcome = Outcome.WARNING if self.warnings else Outcome.SUCCEEDED
        if error is not None:
            outcome = Outcome.CANCELLED if error.code == CANCELLED else Outcome.FAILED
        return RunResult(
            vm=vm,
            run=run,
            outcome=outcome,
            snapshot=self.snapshot.id if self.snapshot else None,
            kind=self.kind,
            reason=self.reason,
            started=started,
            duration_seconds=round(duration_seconds, 3),
            pause_ms=self.rounded_pause_ms,
            disks=tuple(
                DiskResult(
                    disk=disk.plan.disk.id,
                    size_bytes=disk.plan.disk.size_bytes,
                    copied_bytes=disk.copied_bytes,
                    fleecing_peak_bytes=disk.fleecing_peak_bytes,
                    storage=disk.plan.storage,
                    grant_bytes=disk.grant_bytes,
                )
                for disk in self.disks
            ),
            warnings=tuple(self.warnings),
            error=error,
            stored_bytes=self.snapshot.stored_bytes if self.snapshot else None,
            guest_writes=self.impact.writes(),
            slowed_seconds=round(self.slowed_seconds, 3) if self.slowed_seconds is not None else None,
        )


def never_began(vm: str, run: str, options: RunOptions, started: datetime) -> RunResult:
    """The result, and the closing line, of a run that was cancelled before it began."""
    result = Facts().result(vm, run, started=started, duration_seconds=0.0, error=WAS_CANCELLED)
    log_result(result, job=options.job, target=options.target)
    return result


def log_result(result: RunResult, *, job: str | None, target: str | None) -> None:
    """The one closing line of a run: everything that a report needs."""
    level = logging.INFO if result.error is None else logging.ERROR
    log.log(
        level,
        "run.finished",
        outcome=result.outcome,
        snapshot=result.snapshot,
        kind=result.kind,
        reason=result.reason,
        job=job,
        target=target,
        duration_seconds=result.duration_seconds,
        pause_ms=result.pause_ms,
        guest_writes=asdict(result.guest_writes) if result.guest_writes else None,
        slowed_seconds=result.slowed_seconds,
        stored_bytes=result.stored_bytes,
        disks=[asdict(disk) for disk in result.disks],
        warnings=list(result.warnings),
        error=asdict(result.error) if result.error else None,
    )
