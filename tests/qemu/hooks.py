"""Acting at an exact place of a run: before, or after, the product sends a certain command to QEMU."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from benchmarks.slow_target import PassingMonitor
from orchestrator.qemu import qmp
from orchestrator.qemu.commands import Command
from orchestrator.qemu.monitor import DEADLINE_SECONDS, Monitor

Act = Callable[[], Awaitable[object]]


class HookedMonitor(PassingMonitor):
    """Passes everything on; acts once, before (or after) the first pipeline that holds the named command.

    What is done in a transaction is named, too: `blockdev-backup` is where the jobs start.
    """

    def __init__(self, inner: qmp.QmpMonitor, command: str, act: Act, *, after: bool) -> None:
        super().__init__(inner)
        self._command = command
        self._act = act
        self._after = after
        self._done = False

    async def pipeline(
        self, commands: Sequence[Command], *, deadline_seconds: float = DEADLINE_SECONDS
    ) -> list[Any]:
        hit = not self._done and any(self._command in _names(command) for command in commands)
        self._done = self._done or hit
        if hit and not self._after:
            await self._act()
        replies = await self._inner.pipeline(commands, deadline_seconds=deadline_seconds)
        if hit and self._after:
            await self._act()
        return replies


def _names(command: Command) -> list[str]:
    return [command.name, *(action["type"] for action in command.arguments.get("actions", []))]


class At:
    """How a VM is reached, like `qmp.connect`, with one act at one command."""

    def __init__(self, command: str, act: Act, *, after: bool = False) -> None:
        self._command = command
        self._act = act
        self._after = after

    def __call__(self, path: Path, *, vm: str) -> AbstractAsyncContextManager[Monitor]:
        return self._connect(path, vm)

    @contextlib.asynccontextmanager
    async def _connect(self, path: Path, vm: str) -> AsyncIterator[Monitor]:
        async with qmp.connect(path, vm=vm) as monitor:
            yield HookedMonitor(monitor, self._command, self._act, after=self._after)
