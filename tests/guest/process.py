"""A QEMU process and the test bed's monitor to it: started, watched, ended and always reaped."""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.guest.monitor import BedMonitor, MonitorLostError


class QemuProcess:
    """One life of QEMU. It is killed by the kernel when the process that started it dies."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.monitor = BedMonitor()
        self.pid = process.pid
        self._process = process

    @classmethod
    async def start(cls, command: Sequence[str], *, stderr: Path) -> "QemuProcess":
        """Start QEMU; its output goes to a file."""
        with stderr.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *("setpriv", "--pdeathsig", "KILL", "--", *command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        return cls(process)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.returncode

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.returncode is None

    async def connect(self, socket: Path) -> None:
        """Connect the monitor. Raises MonitorLostError."""
        try:
            await self.monitor.connect(socket, lambda: self.alive, 20.0)
        except TimeoutError as error:
            raise MonitorLostError("no monitor within 20 s") from error

    async def execute(self, command: str, arguments: dict[str, Any] | None, deadline_seconds: float) -> Any:
        """Run a command. Raises ExecuteError, or MonitorLostError."""
        if not self.alive:
            raise MonitorLostError(f"{command}: QEMU has ended")
        return await self.monitor.execute(command, arguments, deadline_seconds)

    def kill(self) -> None:
        """Send SIGKILL to this very process; `end` reaps it."""
        if self.alive:
            self._process.kill()

    async def end(self) -> None:
        """End it by `quit`, else by SIGKILL to this very process, and reap it."""
        try:
            with contextlib.suppress(MonitorLostError, TimeoutError):
                await self.execute("quit", None, 3.0)
                async with asyncio.timeout(5):
                    await self._process.wait()
        finally:
            self.kill()
            await self._process.wait()
            await self.monitor.close()
