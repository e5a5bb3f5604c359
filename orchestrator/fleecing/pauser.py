"""Stopping a guest for a few commands, and never leaving it stopped. For QEMU before 9.1 only (see `graph`)."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog

from orchestrator.errors import StateError
from orchestrator.qemu import commands
from orchestrator.qemu.commands import Command
from orchestrator.qemu.monitor import Event, EventStream, Monitor, raise_first
from orchestrator.state.journal import Act, Intent, Journal, Promise

log = structlog.get_logger(__name__)

PAUSE_EVENT_SECONDS = 5.0
RECONNECT_SECONDS = 20.0


class Pauser:
    """Sends commands between `stop` and `cont`, all at once, so that `cont` follows whatever happens to us.

    Nearly: if the connection is lost on the way, QEMU may have taken the first of them only. Then nobody knows:
    `make_good` asks; and if we die, too, whoever reads the journal does (`go_on`).
    """

    def __init__(self, monitor: Monitor, path: Path, journal: Journal, *, vm: str, run: str) -> None:
        self._monitor = monitor
        self._path = path
        self._journal = journal
        self._vm = vm
        self._run = run
        self._cut_off: Intent | None = None

    async def run(self, paused: Sequence[Command], *, unentered: bool = False) -> tuple[list[Any], float | None]:
        """The replies, and for how many milliseconds by QEMU's clock the guest was paused.

        None if it was not running before; then it is not continued either. `unentered`: pause it even where the
        journal cannot be written, since what is to be taken out must not stay. Raises MonitorError, StateError.
        """
        if not await self._is_running():
            return await self._monitor.pipeline(paused), None
        promise = self._promise()
        try:
            intent = await promise.enter()
        except StateError as error:
            if not unentered:
                raise
            log.warning("journal.unusable", error=str(error))
            intent = Intent(0, promise.act, promise.vm, promise.run, promise.subject)
        with self._monitor.subscribe("STOP", "RESUME") as events:
            self._cut_off = intent
            pausing = [commands.QUERY_STATUS, commands.STOP, *paused, commands.CONT]
            before, stopped, *replies, continued = await self._monitor.pipeline(pausing)
            raise_first([before, stopped, continued])
            await self._is_good(intent)
            if not before["running"]:  # somebody else stopped it, right after we had asked
                await self._monitor.execute(commands.STOP)
            return replies, await _paused_ms(events)

    async def make_good(self) -> None:
        """Continue a guest that was left paused. May be called at any time and again.

        Raises MonitorError, StateError.
        """
        if self._cut_off is not None:
            await self._monitor.reconnect(deadline_seconds=RECONNECT_SECONDS)
            await go_on(self._monitor, self._cut_off)
            await self._is_good(self._cut_off)

    async def go_on_unless_known(self) -> None:
        """Continue the paused guest of a QEMU with leftovers of ours, if the journal that would know why is lost.

        Raises MonitorError.
        """
        status = (await self._monitor.execute(commands.QUERY_STATUS))["status"]
        if self._journal.lost and status == "paused":
            await self._monitor.execute(commands.CONT)
            log.warning("guest.continued")

    def _promise(self) -> Promise:
        subject = f"{self._monitor.process} {self._path}"
        return Promise(self._journal, Act.PAUSE, self._vm, self._run, subject)

    async def _is_running(self) -> bool:
        return bool((await self._monitor.execute(commands.QUERY_STATUS))["running"])

    async def _is_good(self, intent: Intent) -> None:
        self._cut_off = None
        try:
            await self._promise().settled(intent)
        except StateError as error:  # it is settled by whoever can write the journal again
            log.warning("journal.unusable", error=str(error))


def monitor_of(intent: Intent) -> Path:
    """Where a paused guest's QEMU can be reached."""
    return Path(intent.subject.partition(" ")[2])


async def go_on(monitor: Monitor, intent: Intent) -> None:
    """Continue a guest that a pause may have left paused. Raises MonitorError; may be called again."""
    if intent.subject.partition(" ")[0] != monitor.process:  # that guest is gone
        return
    if (await monitor.execute(commands.QUERY_STATUS))["status"] == "paused":
        await monitor.execute(commands.CONT)
        log.warning("guest.continued")


async def _paused_ms(events: EventStream) -> float | None:
    """By QEMU's clock; None if it did not say."""
    try:
        async with asyncio.timeout(PAUSE_EVENT_SECONDS):
            stop = await _next(events, "STOP")
            resume = await _next(events, "RESUME")
    except TimeoutError:
        return None
    return (resume.timestamp - stop.timestamp) * 1000


async def _next(events: EventStream, name: str) -> Event:
    while True:
        event = await events.next()
        if event.name == name:
            return event
