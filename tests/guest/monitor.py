"""The test bed's own QMP monitor: a second socket, so that the product's is never touched."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
)


class MonitorLostError(Exception):
    """QEMU does not answer: it has ended, or hangs."""


class PauseListener(EventListener):
    """Notes when the VM stopped and went on, by QEMU's own time stamps."""

    def __init__(self) -> None:
        super().__init__(names=("STOP", "RESUME"))
        self.pauses_seconds: list[float] = []
        self._stopped_at: float | None = None

    def accept(self, event: Message) -> bool:
        """Note the event; never queue it."""
        if event["event"] in {"STOP", "RESUME"}:
            stamp = cast("dict[str, int]", event["timestamp"])
            now = stamp["seconds"] + stamp["microseconds"] / 1e6
            if event["event"] == "STOP":
                self._stopped_at = now
            elif self._stopped_at is not None:
                self.pauses_seconds.append(now - self._stopped_at)
                self._stopped_at = None
        return False


class BedMonitor:
    """One connection; every call has a deadline."""

    def __init__(self) -> None:
        self.pauses = PauseListener()
        self._client = QMPClient("testbed")
        self._client.logger.setLevel(logging.CRITICAL)  # it logs each expected disconnect
        self._client.events.event_filter = lambda _: False  # or it keeps every event
        self._client.register_listener(self.pauses)

    async def connect(self, socket: Path, alive: Callable[[], bool], deadline_seconds: float) -> None:
        """Connect as soon as QEMU listens. Raises MonitorLostError or TimeoutError."""
        async with asyncio.timeout(deadline_seconds):
            while alive():
                with contextlib.suppress(ConnectError):
                    await self._client.connect(str(socket))
                    return
                await asyncio.sleep(0.01)
        raise MonitorLostError("QEMU ended before its monitor listened")

    async def execute(self, command: str, arguments: dict[str, Any] | None, deadline_seconds: float) -> Any:
        """Run a command. Raises qemu.qmp's ExecuteError, or MonitorLostError."""
        try:
            async with asyncio.timeout(deadline_seconds):
                return await self._client.execute(command, arguments)
        except TimeoutError as error:
            raise MonitorLostError(f"no reply to {command} in {deadline_seconds} s") from error
        except ExecuteError:
            raise
        except QMPError as error:
            raise MonitorLostError(f"{command}: the connection is lost") from error

    async def close(self) -> None:
        """Disconnect; QEMU may have gone already."""
        with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
            async with asyncio.timeout(3):
                await self._client.disconnect()
