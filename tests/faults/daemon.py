"""`vmfleece daemon` as a process: started, listened to, killed."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.qemu.host import PROJECT

TICK_SECONDS = 0.01
Line = dict[str, Any]


class Daemon:
    """One life of it. It logs into a file of its own, and dies with the process that started it."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, started: float) -> None:
        self.log = log
        self.lines: list[Line] = []
        self.started = started
        """By `time.monotonic`."""
        self._process = process
        self._read_bytes = 0

    @classmethod
    async def start(cls, config: Path, log: Path) -> "Daemon":
        started = time.monotonic()
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *("setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-m", "orchestrator", "daemon"),
                cwd=PROJECT,
                env={**os.environ, "VMFLEECE_CONFIG": str(config)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        return cls(process, log, started)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def seconds(self) -> float:
        """How long ago it was started."""
        return time.monotonic() - self.started

    def read(self) -> list[Line]:
        """All that it has logged so far. Raises AssertionError at what is no log line, such as a traceback."""
        with self.log.open("rb") as file:
            file.seek(self._read_bytes)
            new, _, _ = file.read().rpartition(b"\n")
        if new:
            self._read_bytes += len(new) + 1
        for line in new.splitlines():
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                raise AssertionError(f"the daemon says: {self.log.read_text()[-3000:]}") from None
        return self.lines

    def of(self, event: str, **keys: object) -> list[Line]:
        """What it has logged of an event, with these keys."""
        return [
            line
            for line in self.read()
            if line["event"] == event and all(line.get(key) == value for key, value in keys.items())
        ]

    async def until(self, done: Callable[[], Any], what: str, *, deadline_seconds: float = 60.0) -> Any:
        """Wait for something that it brings about, and return that. Raises AssertionError."""
        try:
            async with asyncio.timeout(deadline_seconds):
                while not (found := done()):
                    assert self.alive, f"the daemon ended before {what}: {self.tail()}"
                    await asyncio.sleep(TICK_SECONDS)
        except TimeoutError:
            raise AssertionError(f"waited {deadline_seconds:g} s for {what}: {self.tail()}") from None
        return found

    async def logs(self, event: str, *, since: int = 0, deadline_seconds: float = 60.0, **keys: object) -> Line:
        """Wait for a line behind the first `since` of them."""

        def found() -> list[Line]:
            new = self.read()[since:]
            return [one for one in self.of(event, **keys) if any(one is line for line in new)]

        lines = await self.until(found, f"{event} {keys}", deadline_seconds=deadline_seconds)
        return dict(lines[0])

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-3000:]

    def children(self) -> set[int]:
        """The processes that it has started, and theirs."""
        return descendants(self.pid)

    def kill(self) -> None:
        """At once, from any thread. `ended` reaps it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Wait for its end."""
        return await self._process.wait()

    async def stop(self, *, deadline_seconds: float = 60.0) -> int:
        """SIGTERM; how it ended. Killed if it takes too long."""
        if self.alive:
            self._process.terminate()
        try:
            async with asyncio.timeout(deadline_seconds):
                return await self.ended()
        except TimeoutError:
            self.kill()
            await self.ended()
            raise AssertionError(f"no end {deadline_seconds:g} s after SIGTERM: {self.tail()}") from None


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and those that they have."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found |= {int(child), *descendants(int(child))}
    return found


def command_line(pid: int) -> str:
    """What a process was started as; "" if it is over."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
