"""Copying a disk window by window: what moves the boundary where QEMU's block job cannot.

    raw{offset, size} ── snapshot-access          one block job a window          raw{offset, size} ── target image

Once a window's job has succeeded, is dismissed and its nodes are gone, its range of the snapshot-access node is
discarded: not before, because what a job reports as progress may have holes, and a failed window must still be
readable to be tried again. Nothing else may be on the snapshot-access node meanwhile (see `graph`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import structlog

from orchestrator.fleecing.boundary import Boundary, Window, may_go_on
from orchestrator.fleecing.names import DiskNames
from orchestrator.fleecing.quiet import Quiet
from orchestrator.qemu import commands
from orchestrator.qemu.jobs import JobState
from orchestrator.qemu.monitor import Monitor, raise_first
from orchestrator.run.copy import RECONNECT_SECONDS, Ended, Watch

log = structlog.get_logger(__name__)

TRIES = 3
RETRY_SECONDS = 2.0


class Pace:
    """Keeps the disks of a run that are copied by windows at one pace."""

    def __init__(self) -> None:
        self._boundaries: dict[str, Boundary] = {}
        self._moved = asyncio.Event()

    def move(self, disk: str, boundary: Boundary) -> None:
        """Say how far a disk is."""
        self._boundaries[disk] = boundary
        self._moved.set()
        self._moved = asyncio.Event()

    async def turn(self, disk: str) -> None:
        """Wait until a disk may go on."""
        while not may_go_on(disk, self._boundaries):
            await self._moved.wait()


@dataclass(frozen=True, slots=True)
class Means:
    """What the windows of a disk are copied with.

    `job` makes the block job's arguments of its id, source and target; `held_bytes` asks how much old data each
    window holds, by number; `on_move` is told how far the disk is.
    """

    monitor: Monitor
    quiet: Quiet
    pace: Pace
    job: Callable[[str, str, str], dict[str, Any]]
    held_bytes: Callable[[], Awaitable[Mapping[int, int]]]
    on_move: Callable[[Boundary], None] = lambda _boundary: None


class WindowCopy:
    """One disk's copy, as `copy.Watch` is that of one job."""

    def __init__(
        self,
        disk: str,
        names: DiskNames,
        boundary: Boundary,
        means: Means,
        on_progress: Callable[[JobState], None],
    ) -> None:
        self._disk = disk
        self._names = names
        self._means = means
        self._on_progress = on_progress
        self._boundary = boundary
        means.pace.move(disk, boundary)

    async def run(self) -> Ended:
        """Copy all windows, or end with the first one that fails for good. Raises MonitorError.

        Cancellation leaves a job running; `graph.end_jobs` ends it.
        """
        tries = 0
        while (window := await self._next()) is not None:
            await self._means.pace.turn(self._disk)
            self._move(self._boundary.started(window))
            ended = await self._copy(window)
            if ended.state.succeeded:
                await self._take_away(window, discard=True)
                self._move(self._boundary.finished())
                tries = 0
                continue
            tries += 1
            if tries == TRIES or not may_be_tried_again(ended):
                return replace(ended, state=self._of_disk(ended.state))
            log.warning(
                "window.failed", disk=self._disk, offset_bytes=window.offset_bytes, error=ended.state.error
            )
            await self._take_away(window, discard=False)
            self._move(self._boundary.failed())
            await asyncio.sleep(RETRY_SECONDS)
        return Ended(self._of_disk(JobState(self._names.job, "concluded")))

    async def _next(self) -> Window | None:
        await self._means.monitor.reconnect(deadline_seconds=RECONNECT_SECONDS)
        held_bytes = await self._means.held_bytes()
        self._move(self._boundary.holding(held_bytes))
        return self._boundary.next(held_bytes)

    async def _copy(self, window: Window) -> Ended:
        names, quiet, monitor = self._names, self._means.quiet, self._means.monitor
        job = names.window_job(window.number)
        place = {"offset_bytes": window.offset_bytes, "size_bytes": window.size_bytes}
        with Watch(monitor, job, lambda state: self._on_progress(self._of_disk(state))) as watch:
            await monitor.reconnect(deadline_seconds=RECONNECT_SECONDS)
            async with quiet.changing_graph():
                starting = [
                    commands.blockdev_add(commands.window_node(names.source_window, file=names.snapshot, **place)),
                    commands.blockdev_add(commands.window_node(names.target_window, file=names.target, **place)),
                    commands.start_backups([self._means.job(job, names.source_window, names.target_window)]),
                ]
                raise_first(await monitor.pipeline(starting))
                quiet.jobs.add(job)
            ended = await watch.run()
        quiet.jobs.discard(job)
        return ended

    async def _take_away(self, window: Window, *, discard: bool) -> None:
        names, monitor = self._names, self._means.monitor
        ending = [
            commands.dismiss_job(names.window_job(window.number)),
            commands.blockdev_del(names.source_window),
            commands.blockdev_del(names.target_window),
        ]
        await monitor.reconnect(deadline_seconds=RECONNECT_SECONDS)
        async with self._means.quiet.changing_graph():
            raise_first(await monitor.pipeline(ending))
            if discard:  # only now that these are known to be gone
                await monitor.execute(
                    commands.discard(
                        names.snapshot, offset_bytes=window.offset_bytes, size_bytes=window.size_bytes
                    )
                )

    def _of_disk(self, state: JobState) -> JobState:
        """A window's job as if it were one of the whole disk."""
        return replace(
            state,
            current_bytes=self._boundary.done_bytes + state.current_bytes,
            total_bytes=self._boundary.disk_bytes,
        )

    def _move(self, boundary: Boundary) -> None:
        self._boundary = boundary
        self._means.pace.move(self._disk, boundary)
        self._means.on_move(boundary)


def may_be_tried_again(ended: Ended) -> bool:
    """Whether a failed window's data may still be there: what cannot be read once is lost."""
    return not (ended.stopped or ended.state.cancelled or ended.operation == "read")
