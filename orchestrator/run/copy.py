"""Watching one disk's block job to its end, and saying why it failed.

Events wake us, query-jobs tells the truth: a lost connection or a silent QEMU does not fail a copy that goes on.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import structlog

from orchestrator.admission import estimate
from orchestrator.errors import (
    CommandTimeout,
    ConnectionLost,
    CopyError,
    FleecingError,
    TargetError,
    VmfleeceError,
)
from orchestrator.qemu import commands, jobs
from orchestrator.qemu.monitor import EventStream, Monitor
from orchestrator.units import format_size

log = structlog.get_logger(__name__)

PROGRESS_SECONDS = 1.0
RECONNECT_SECONDS = 60.0
SILENCE_SECONDS = 300.0
EXHAUSTED_MARGIN_BYTES = 2 << 20
"""A write that does not fit fails as a whole, so a full image ends up to one copy (1 MiB) below its grant."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that is over. `operation` is what failed first, `stopped` that the target was full."""

    state: jobs.JobState
    operation: str | None = None
    stopped: bool = False


class Watch:
    """One job, from before it is started until it has concluded. Enter it, start the job, then `run`."""

    def __init__(self, monitor: Monitor, job: str, on_progress: Callable[[jobs.JobState], None]) -> None:
        self._monitor = monitor
        self._state = jobs.JobState(job)
        self._on_progress = on_progress
        self._operation: str | None = None
        self._stopped = False
        self._subscriptions = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._events = self._subscriptions.enter_context(self._monitor.subscribe(*jobs.EVENTS))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._subscriptions.close()

    async def run(self) -> Ended:
        """Wait for the job's end. Raises MonitorError if QEMU is gone, or stays silent for too long.

        Cancellation leaves the job running; `graph.end_jobs` ends it.
        """
        while not await self._follow(self._events):
            # The connection was lost; the job was not.
            await self._monitor.reconnect(deadline_seconds=RECONNECT_SECONDS)
            self._subscriptions.close()
            self._events = self._subscriptions.enter_context(self._monitor.subscribe(*jobs.EVENTS))
        return Ended(self._state, self._operation, self._stopped)

    async def _follow(self, events: EventStream) -> bool:
        """Follow the job until it is over; False if the connection was lost before."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while not self._over:
            try:
                async with asyncio.timeout(PROGRESS_SECONDS):
                    event = await events.next()
                self._fold(event.name, event.data)
            except TimeoutError:
                try:
                    await self._requery()
                    for event in events.received():  # sent before the reply: they say what failed
                        self._fold(event.name, event.data)
                except CommandTimeout:
                    if loop.time() - heard > SILENCE_SECONDS:
                        raise
                    log.warning("vm.silent", jobs=[self._state.id])
                    continue
                except ConnectionLost:
                    return False
            except ConnectionLost:
                return False
            heard = loop.time()
            self._on_progress(self._state)
        return True

    @property
    def _over(self) -> bool:
        return self._state.finished or self._stopped

    def _fold(self, name: str, data: dict[str, object]) -> None:
        self._state = jobs.after_event(self._state, name, data)
        if name == "BLOCK_JOB_ERROR" and data["device"] == self._state.id:
            self._operation = self._operation or str(data["operation"])
            self._stopped = self._stopped or data["action"] == "stop"

    async def _requery(self) -> None:
        state = jobs.from_query(self._state, await self._monitor.execute(commands.QUERY_JOBS))
        if state is None:
            raise CopyError(
                f"QEMU does not know the job {self._state.id} any more",
                hint="back it up again: the VM was restarted, or somebody dismissed the job",
                code="vm-gone",
            )
        self._state = state
        if state.status == "paused":
            await self._ask_why_paused()

    async def _ask_why_paused(self) -> None:
        """A full target pauses the job, too; the event that said so may be lost with a connection."""
        for job in await self._monitor.execute(commands.QUERY_BLOCK_JOBS):
            if job["device"] == self._state.id and job["io-status"] == "nospace":
                self._stopped = True


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is known of a disk's old data when its job failed. Sizes in bytes; `storage` None: no fleecing."""

    disk: str
    storage: str | None
    high_water_bytes: int
    grant_bytes: int
    growth_refused: bool
    growable: bool
    storage_free_bytes: int
    cbw_timeout_seconds: int


def diagnose(ended: Ended, at: Circumstances) -> VmfleeceError:
    """Why a job failed, since QEMU's own "Permission denied" hides it. Pure."""
    said = ended.state.error or "cancelled"
    if ended.stopped:
        return TargetError(f"disk {at.disk}: the target is full", hint="free some space there", code="target-full")
    if ended.operation == "write":
        return TargetError(
            f"disk {at.disk}: writing to the target failed: {said}",
            hint="check the target's file system",
            code="target-write-failed",
        )
    if ended.operation != "read":
        return CopyError(
            f"disk {at.disk}: the copy ended before it was complete: {said}",
            hint="the guest is unharmed; back it up again, and look into QEMU's own log if that happens again",
        )
    if at.storage is None:
        return FleecingError(
            f"disk {at.disk}: the snapshot broke: old data could not be written to the target within"
            f" {at.cbw_timeout_seconds} s (cbw_timeout), or at all; QEMU says: {said}",
            hint="back up with fleecing, so that the guest's writes do not wait for the target",
            code="copy-timeout",
        )
    margin = min(EXHAUSTED_MARGIN_BYTES, at.grant_bytes // 4)
    if at.high_water_bytes + margin >= estimate.limit(at.grant_bytes):
        why = "it could not be extended in time"
        if not at.growable:
            why = "this QEMU (before 9.1) cannot extend it"
        elif at.growth_refused:
            why = "its storage has no more to give now"
        return FleecingError(
            f"disk {at.disk}: its fleecing image on storage {at.storage} was full:"
            f" {format_size(at.high_water_bytes)} of {format_size(at.grant_bytes)} granted; {why}",
            hint=f"the next run is granted more at first, if storage.{at.storage}.quota allows: raise it,"
            " or back up when the guest writes less",
            code="fleecing-full",
        )
    if at.storage_free_bytes < EXHAUSTED_MARGIN_BYTES:
        return FleecingError(
            f"disk {at.disk}: the file system of storage {at.storage} is full"
            f" ({format_size(at.storage_free_bytes)} free)",
            hint="others write there as well: raise its min_free, or lower its quota",
            code="storage-full",
        )
    return FleecingError(
        f"disk {at.disk}: the snapshot broke: copying old data to storage {at.storage} took longer than"
        f" {at.cbw_timeout_seconds} s (cbw_timeout; more than 4 s can overflow to less in QEMU), or the"
        f" storage or the disk itself has an I/O error; QEMU says: {said}",
        hint="check the host's log for I/O errors on that storage and on the disk",
        code="copy-timeout",
    )
