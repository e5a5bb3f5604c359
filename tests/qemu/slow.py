"""A slow target, as in benchmarks.slow_target, but with a limit of its own for each disk.

QEMU 10.0 aborts now and then when nodes in different iothreads share one throttle group and one of them is drained
(`throttle_group_restart_queue: Assertion !timer_pending`): another member may have set its timer meanwhile.
"""

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import slow_target
from orchestrator.qemu import qmp
from orchestrator.qemu.commands import Command
from orchestrator.qemu.monitor import DEADLINE_SECONDS, Monitor


class _OwnGroups(Monitor):
    """Passes everything on; each throttle node gets the group of its disk's number in the run."""

    def __init__(self, inner: qmp.QmpMonitor) -> None:
        super().__init__()
        self._inner = inner
        self._router = inner._router

    async def pipeline(
        self, commands: Sequence[Command], *, deadline_seconds: float = DEADLINE_SECONDS
    ) -> list[Any]:
        return await self._inner.pipeline([_regrouped(one) for one in commands], deadline_seconds=deadline_seconds)

    async def pass_descriptor(self, descriptor: int, *, opaque: str) -> int:
        return await self._inner.pass_descriptor(descriptor, opaque=opaque)

    @property
    def connected(self) -> bool:
        return self._inner.connected

    async def reconnect(self, *, deadline_seconds: float) -> None:
        await self._inner.reconnect(deadline_seconds=deadline_seconds)


def _regrouped(command: Command) -> Command:
    if command.arguments.get("driver") != "throttle":
        return command
    number = int(str(command.arguments["node-name"]).split("-")[-2])
    return Command(command.name, {**command.arguments, "throttle-group": _group(number)})


@contextlib.asynccontextmanager
async def connect(path: Path, *, vm: str) -> AsyncIterator[Monitor]:
    """Like `qmp.connect`, to a VM that was started with `qemu_arguments`."""
    async with qmp.connect(path, vm=vm) as monitor:
        yield slow_target.SlowTargetMonitor(_OwnGroups(monitor))  # type: ignore[arg-type]  # all that it uses


def qemu_arguments(bytes_per_second: int, disks: int) -> list[str]:
    """What QEMU is started with: that limit, shared out among so many disks."""
    limit = bytes_per_second // disks
    return [
        argument
        for number in range(disks)
        for argument in (
            "-object",
            f"throttle-group,id={_group(number)},x-bps-write={limit},x-bps-write-max={limit}",
        )
    ]


def _group(number: int) -> str:
    return f"{slow_target.GROUP}-{number}"
