"""A backup target that is slow for QEMU, on any machine: QEMU's own throttle filter in front of its file.

The product is used as it is. Only its connection to QEMU is wrapped: when it adds the qcow2 node of a target, a
throttle node is put between that and the file, and taken out again when the product deletes the file's node.
Each disk has its share of the limit: QEMU 10.0 aborts now and then when nodes in different iothreads share one
throttle group and one of them is drained (`throttle_group_restart_queue: Assertion !timer_pending`).
"""

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.fleecing.names import TARGET, TARGET_FILE, role_of
from orchestrator.qemu import qmp
from orchestrator.qemu.commands import Command, blockdev_add, blockdev_del
from orchestrator.qemu.monitor import DEADLINE_SECONDS, Monitor


class PassingMonitor(Monitor):
    """Passes everything on to a real one; `pipeline` is for those that change something."""

    def __init__(self, inner: qmp.QmpMonitor) -> None:
        super().__init__()
        self._inner = inner
        self._router = inner._router

    async def pass_descriptor(self, descriptor: int, *, opaque: str) -> int:
        return await self._inner.pass_descriptor(descriptor, opaque=opaque)

    async def lend_descriptor(self, descriptor: int, *, name: str) -> None:
        await self._inner.lend_descriptor(descriptor, name=name)

    @property
    def connected(self) -> bool:
        return self._inner.connected

    @property
    def process(self) -> str:
        return self._inner.process

    async def reconnect(self, *, deadline_seconds: float) -> None:
        await self._inner.reconnect(deadline_seconds=deadline_seconds)


class SlowTargetMonitor(PassingMonitor):
    """Puts a throttle node under each target."""

    async def pipeline(
        self, commands: Sequence[Command], *, deadline_seconds: float = DEADLINE_SECONDS
    ) -> list[Any]:
        sent: list[Command] = []
        own: set[int] = set()
        for command in commands:
            node = str(command.arguments.get("node-name", ""))
            if command.name == "blockdev-add" and role_of(node) == TARGET:
                own.add(len(sent))
                below = command.arguments["file"]
                sent.append(blockdev_add(_throttle(below)))
                sent.append(blockdev_add({**command.arguments, "file": _name(below)}))
            elif command.name == "blockdev-reopen" and role_of(_reopened(command)) == TARGET:
                options = command.arguments["options"][0]
                changed = {**options, "file": _name(options["file"])}
                sent.append(Command(command.name, {"options": [changed]}))
            elif command.name == "blockdev-del" and role_of(node) == TARGET_FILE:
                own.add(len(sent))
                sent += [blockdev_del(_name(node)), command]
            else:
                sent.append(command)
        replies = await self._inner.pipeline(sent, deadline_seconds=deadline_seconds)
        return [reply for place, reply in enumerate(replies) if place not in own]


@contextlib.asynccontextmanager
async def connect(path: Path, *, vm: str) -> AsyncIterator[Monitor]:
    """Like `qmp.connect`, to a VM that was started with `qemu_arguments`."""
    async with qmp.connect(path, vm=vm) as monitor:
        yield SlowTargetMonitor(monitor)


def qemu_arguments(bytes_per_second: int, *, disks: int) -> list[str]:
    """What QEMU is started with: the limit, shared out among the disks that a run backs up."""
    share = bytes_per_second // disks
    limits = [
        f"throttle-group,id={group(number)},x-bps-write={share},x-bps-write-max={share}" for number in range(disks)
    ]
    return [argument for limit in limits for argument in ("-object", limit)]


def group(number: int) -> str:
    """The throttle group of a run's disk of that number."""
    return f"slow-target-{number}"


def _throttle(file: str) -> dict[str, Any]:
    number = int(file.split("-")[-2])  # see orchestrator.fleecing.names
    return {"driver": "throttle", "node-name": _name(file), "throttle-group": group(number), "file": file}


def _name(file: str) -> str:
    """The throttle node's name: not one of the product's, or it would clean it away itself."""
    return "slow-" + file.removeprefix("vmf-")


def _reopened(command: Command) -> str:
    return str(command.arguments["options"][0]["node-name"])
