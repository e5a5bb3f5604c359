"""Doing a plan's faults to a bed, one after the other, and looking at what comes of each.

What goes wrong is noted in the report and the campaign goes on, with a guest that is started anew if one was lost.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from tests.faults.bed import Bed, Machine
from tests.faults.daemon import Daemon
from tests.faults.inflictor import Inflictor
from tests.faults.plan import Fault
from tests.faults.report import Report
from tests.faults.witness import Witness

RUNS_AGAIN_SECONDS = 20.0
READY_SECONDS = 30.0


class Campaign:
    """Does faults to `bed` and counts in `report`."""

    def __init__(
        self, bed: Bed, report: Report, *, stop_seconds: float, say: Callable[[str], None] = print
    ) -> None:
        self._bed = bed
        self._report = report
        self._say = say
        self._witness = Witness(bed, report, say)
        self._inflictor = Inflictor(bed, self._witness, stop_seconds=stop_seconds)
        self._fresh = False
        """Whether nobody has looked yet at what the daemon's start has put right."""

    async def run(self, faults: Sequence[Fault]) -> None:
        """All of them, and a last look at everything."""
        begun = time.monotonic()
        for number, fault in enumerate(faults):
            left = (time.monotonic() - begun) / max(number, 1) * (len(faults) - number)
            self._say(f"{number + 1} of {len(faults)}, {left / 60:.0f} min left: {fault}")
            await self._round(fault)
            self._report.seconds = time.monotonic() - begun
        with self._witness.noting("the end"):
            await self._recovered(await self._daemon(), exactly=True)
            await self._stop()
            await self._tidied_alone()
        self._report.seconds = time.monotonic() - begun

    async def _round(self, fault: Fault) -> None:
        """See what the last one left, do this one."""
        self._report.count(fault)
        with self._witness.noting(fault):
            if fault.alone and self._bed.daemon_is_dead:
                await self._tidied_alone()
            daemon = await self._daemon()
            if not fault.at_once:
                await self._recovered(daemon, exactly=fault.exactly)
            await self._inflictor.do(fault)
        await self._witness.look_at_guests(fault)

    async def _daemon(self) -> Daemon:
        """The one that lives, or a new one."""
        if self._bed.daemon is None or self._bed.daemon_is_dead:
            return await self._started(idle=False)
        return self._bed.daemon

    async def _started(self, *, idle: bool) -> Daemon:
        """A new daemon, which first of all lets guests run."""
        paused = [machine for machine in self._bed.machines if await machine.is_paused()]
        self._report.left_paused += len(paused)
        for machine in self._bed.machines:
            machine.records = await machine.count_records()
        daemon = await self._bed.start(idle=idle)
        self._fresh = True
        for machine in paused:
            await self._runs_again(daemon, machine)
        return daemon

    async def _runs_again(self, daemon: Daemon, machine: Machine) -> None:
        try:
            async with asyncio.timeout(RUNS_AGAIN_SECONDS):
                while await machine.is_paused():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            await machine.guest.resume()
            self._witness.guest_error("the last kill", f"{machine.name} was left paused")
        self._report.paused_seconds.append(daemon.seconds())

    async def _recovered(self, daemon: Daemon, *, exactly: bool) -> None:
        """The daemon is ready, nothing of dead runs is left, and the next backups are right."""
        await self._ready(daemon)
        await self._witness.nothing_is_left(self._bed.of_dead_runs, "of dead runs")
        fresh, self._fresh = self._fresh, False
        if fresh:
            self._report.tidy_seconds.append(daemon.seconds())
        await self._witness.no_orphans()
        async with asyncio.TaskGroup() as group:
            for machine in self._bed.machines:
                group.create_task(self._witness.backed_up(daemon, machine, exactly=exactly, fresh=fresh))

    async def _tidied_alone(self) -> None:
        """A daemon that makes no backups leaves nothing at all, and ends when it is told to."""
        daemon = await self._started(idle=True)
        try:
            await self._ready(daemon)
            await self._witness.nothing_is_left(self._bed.anything, "at all")
            self._report.tidy_seconds.append(daemon.seconds())
            await self._witness.no_orphans()
        finally:
            self._fresh = False
            await self._stop()

    async def _ready(self, daemon: Daemon) -> None:
        await daemon.until(lambda: daemon.of("daemon.ready"), "daemon.ready", deadline_seconds=READY_SECONDS)
        if self._bed.damaged:
            self._bed.damaged = False
            await daemon.until(lambda: daemon.of("journal.damaged"), "journal.damaged")

    async def _stop(self) -> None:
        daemon = self._bed.daemon
        assert daemon is not None
        await self._bed.stop()
        self._witness.count_runs(daemon)
