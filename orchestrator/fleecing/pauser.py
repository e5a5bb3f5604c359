"""Stopping a guest for a few commands, and never leaving it stopped. For QEMU before 9.1 only (see `graph`)."""

import asyncio
from collections.abc import Sequence
from typing import Any

from orchestrator.errors import CommandFailed
from orchestrator.qemu import commands
from orchestrator.qemu.commands import Command
from orchestrator.qemu.monitor import Event, EventStream, Monitor, raise_first

PAUSE_EVENT_SECONDS = 5.0


class Pauser:
    """Sends commands between `stop` and `cont`, all at once, so that `cont` follows whatever happens to us.

    If the connection is lost on the way, nobody knows which of them arrived: `make_good` asks.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._cut_off = False

    async def run(self, paused: Sequence[Command]) -> tuple[list[Any], float | None]:
        """The replies, and for how many milliseconds by QEMU's clock the guest was paused.

        None if it was not running before; then it is not continued either. Raises MonitorError.
        """
        if not (await self._monitor.execute(commands.QUERY_STATUS))["running"]:
            return await self._monitor.pipeline(paused), None
        with self._monitor.subscribe("STOP", "RESUME") as events:
            self._cut_off = True
            stopped, *replies, continued = await self._monitor.pipeline([commands.STOP, *paused, commands.CONT])
            self._cut_off = isinstance(continued, CommandFailed)
            raise_first([stopped, continued])
            async with asyncio.timeout(PAUSE_EVENT_SECONDS):
                stop = await _next(events, "STOP")
                resume = await _next(events, "RESUME")
        return replies, (resume.timestamp - stop.timestamp) * 1000

    async def make_good(self) -> None:
        """Continue a guest that was left paused. May be called at any time and again. Raises MonitorError."""
        if self._cut_off:
            status = await self._monitor.execute(commands.QUERY_STATUS)
            if status["status"] == "paused":
                await self._monitor.execute(commands.CONT)
            self._cut_off = False


async def _next(events: EventStream, name: str) -> Event:
    while True:
        event = await events.next()
        if event.name == name:
            return event
