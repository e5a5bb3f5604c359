"""What copies the disks of a run: one block job a disk, or one a window; and how they share its bandwidth."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from orchestrator.fleecing import boundary, graph, image, sink
from orchestrator.fleecing.boundary import Boundary
from orchestrator.fleecing.quiet import Quiet
from orchestrator.model import Discard, RunOptions
from orchestrator.qemu import commands, jobs
from orchestrator.qemu.capabilities import Capabilities
from orchestrator.qemu.monitor import Monitor
from orchestrator.run import copy, windows
from orchestrator.run.outcome import DiskRun


class Copying(Protocol):
    """What copies one disk."""

    async def run(self) -> copy.Ended:
        """Copy it, to its end or to a failure. Raises MonitorError."""
        ...


@dataclass(slots=True)
class Copies:
    """The copies of a run's `disks`. All together they copy `limit_bytes_per_second`; 0: as fast as they can."""

    monitor: Monitor
    quiet: Quiet
    options: RunOptions
    can: Capabilities
    disks: Sequence[DiskRun]
    pace: windows.Pace = field(default_factory=windows.Pace)
    limit_bytes_per_second: int = field(init=False)

    def __post_init__(self) -> None:
        self.limit_bytes_per_second = self.options.bwlimit_bytes_per_second

    def of(
        self, disk: DiskRun, watching: contextlib.ExitStack, on_progress: Callable[[jobs.JobState], None]
    ) -> Copying:
        """What will copy a disk; it hears of its jobs from now on."""
        if not disk.by_windows:
            self.quiet.jobs.add(disk.names.job)
            return watching.enter_context(copy.Watch(self.monitor, disk.names.job, on_progress))
        means = windows.Means(
            self.monitor,
            self.quiet,
            self.pace,
            job=partial(self._job, disk),
            held_bytes=partial(self._held_bytes, disk),
            on_move=disk.move,
        )
        start = Boundary(disk.plan.disk.size_bytes, boundary.WINDOW_BYTES)
        return windows.WindowCopy(disk.plan.disk.id, disk.names, start, means, on_progress)

    async def start_whole(self) -> None:
        """Start the jobs of the disks that one job copies, all at once. Raises MonitorError."""
        whole = [disk for disk in self.disks if not disk.by_windows]
        jobs = [self._job(disk, disk.names.job, disk.names.snapshot, disk.names.target) for disk in whole]
        if jobs:
            await self.monitor.execute(commands.start_backups(jobs))

    async def limit_to(self, bytes_per_second: int) -> None:
        """Have them copy so much at most from now on. Raises MonitorError."""
        self.limit_bytes_per_second = bytes_per_second
        await self._set_speeds()

    async def share_again(self) -> None:
        """Give the bandwidth to those that are still copied. Raises MonitorError."""
        if self.limit_bytes_per_second:
            await self._set_speeds()

    async def _set_speeds(self) -> None:
        """Tell the jobs that there are; one that ends at this moment refuses, or is gone: fine."""
        if going := [one for one in self.disks if one.copying and one.job]:
            await self.monitor.pipeline([commands.set_speed(one.job, self._speed(one)) for one in going])

    def _job(self, disk: DiskRun, job: str, source: str, target: str) -> dict[str, Any]:
        assert disk.sink is not None  # noqa: S101  it was attached
        disk.job = job
        return commands.backup_job(
            job,
            device=source,
            target=target,
            speed_bytes_per_second=self._speed(disk),
            # Without fleecing it would discard what it has just written to the target.
            discard_source=disk.file is not None and not disk.by_windows and self.can.discard_source,
            compress=disk.compress,
            requests=sink.requests(disk.sink, self.can),
            bitmap=graph.CHANGED if disk.incremental else None,
        )

    async def _held_bytes(self, disk: DiskRun) -> Mapping[int, int]:
        """How much old data the disk's windows hold, by number."""
        assert disk.file is not None  # noqa: S101  windows are fleeced
        held = await image.held(self.monitor, disk.names, disk.file, self.quiet)
        return boundary.by_window(held, boundary.WINDOW_BYTES)

    def _speed(self, disk: DiskRun) -> int:
        """What one disk may use of the run's bandwidth; 0: no limit.

        Disks that are copied by windows keep one pace, so the larger one gets more.
        """
        limit = self.limit_bytes_per_second
        left = [one for one in self.disks if one.copying]
        if any(one.by_windows for one in left):
            share = limit * disk.plan.disk.size_bytes // sum(one.plan.disk.size_bytes for one in left)
        else:
            share = limit // len(left)
        return max(1, share) if limit else 0


def by_windows(disk: DiskRun, options: RunOptions, can: Capabilities) -> bool:
    """Whether a disk is copied by windows. QEMU compresses what it writes to an image, but not to a part of it.

    An incremental copy is always one job: what it holds is what changed since the last one, at most.
    """
    if disk.plan.storage is None or disk.incremental:
        return False
    if options.discard is Discard.AUTO:
        return not can.discard_source and not disk.compress
    return options.discard is Discard.WINDOW
