"""Watching one disk's block job to its end.

Events wake us, query-jobs tells the truth: a lost connection or a silent QEMU does not fail a copy that goes on.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import structlog

from orchestrator.errors import CommandTimeout, ConnectionLost, CopyError
from orchestrator.qemu import commands, jobs
from orchestrator.qemu.monitor import EventStream, Monitor

log = structlog.get_logger(__name__)

PROGRESS_SECONDS = 1.0
RECONNECT_SECONDS = 60.0
SILENCE_SECONDS = 300.0


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
