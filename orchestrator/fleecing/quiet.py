"""Holding a run's jobs still while QEMU's graph of nodes is changed.

Every change of the graph (a node added, deleted or reopened, a device moved) makes QEMU wait for all requests in
flight, with the guest's I/O held back meanwhile (block/graph-lock.c, bdrv_graph_wrlock). A job that writes to a
slow target has seconds of requests in flight: without this, releasing one disk while another one copied stalled
the guest for as long (seen: 16 s). A paused job has none, and pausing it holds nobody back.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from orchestrator.errors import CommandTimeout, ConnectionLost
from orchestrator.qemu import commands
from orchestrator.qemu.monitor import Monitor

log = structlog.get_logger(__name__)

REQUERY_SECONDS = 1.0
RECONNECT_SECONDS = 60.0
MOVING = ("created", "running", "ready")


class Quiet:
    """The jobs of one run that may have requests in flight; one change of the graph at a time."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._lock = asyncio.Lock()
        self.jobs: set[str] = set()

    @contextlib.asynccontextmanager
    async def changing_graph(self) -> AsyncIterator[None]:
        """Wait until no job has requests in flight, keep it so for the block, then let them go on.

        Raises MonitorError. After cancellation the jobs stay paused.
        """
        async with self._lock:
            held = sorted(self.jobs)
            if not held:
                yield
                return
            try:
                await self._hold(held)
                yield
            except asyncio.CancelledError:
                raise  # the run is being undone: its jobs are cancelled next
            except BaseException:
                await self._let_go_on(held)
                raise
            else:
                await self._let_go_on(held)

    async def _hold(self, held: list[str]) -> None:
        with self._monitor.subscribe("JOB_STATUS_CHANGE") as events:
            # A job that has just ended refuses; the query below tells.
            await self._monitor.pipeline([commands.pause_job(job) for job in held])
            while await self._moving(held):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REQUERY_SECONDS):
                        await events.next()

    async def _let_go_on(self, held: list[str]) -> None:
        """A job that stayed paused would never end: insist, also over a lost connection."""
        while True:
            try:
                await self._monitor.pipeline([commands.resume_job(job) for job in held])
            except CommandTimeout:
                log.warning("vm.silent", jobs=held)
            except ConnectionLost:
                await self._monitor.reconnect(deadline_seconds=RECONNECT_SECONDS)
            else:
                return

    async def _moving(self, held: list[str]) -> bool:
        states = {job["id"]: job["status"] for job in await self._monitor.execute(commands.QUERY_JOBS)}
        return any(states.get(job) in MOVING for job in held)
