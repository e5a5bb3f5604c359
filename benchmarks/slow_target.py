"""A backup target, or a fleecing storage, that is slow for QEMU, on any machine: QEMU's own throttle filter.

The product is used as it is. Only its connection to QEMU is wrapped: when it adds the qcow2 node of a target (of
a fleecing image: the node of its grant), a throttle node is put between that and the file, and taken out again
when the product deletes the file's node.
Each disk has its share of the limit: QEMU 10.0 aborts now and then when nodes in different iothreads share one
throttle group and one of them is drained (`throttle_group_restart_queue: Assertion !timer_pending`).
"""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.fleecing.names import FILE, GRANT, TARGET, TARGET_FILE, role_of
from orchestrator.qemu import qmp
from orchestrator.qemu.commands import Command, blockdev_add, blockdev_del
from orchestrator.qemu.monitor import DEADLINE_SECONDS, Monitor


@dataclass(frozen=True, slots=True)
class Place:
    """Where a throttle node goes: between which of a disk's nodes, by role, and in which groups, by disk."""

    above: str
    below: str
    group: str


IN_TARGET = Place(TARGET, TARGET_FILE, "slow-target")
IN_FLEECING = Place(GRANT, FILE, "slow-fleecing")


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
    """Puts a throttle node at each of some places."""

    def __init__(self, inner: qmp.QmpMonitor, places: Sequence[Place] = (IN_TARGET,)) -> None:
        super().__init__(inner)
        self._above = {place.above: place for place in places}
        self._below = {place.below for place in places}

    async def pipeline(
        self, commands: Sequence[Command], *, deadline_seconds: float = DEADLINE_SECONDS
    ) -> list[Any]:
        sent: list[Command] = []
        own: set[int] = set()
        for command in commands:
            node = str(command.arguments.get("node-name", ""))
            if command.name == "blockdev-add" and (place := self._above.get(role_of(node))):
                own.add(len(sent))
                below = command.arguments["file"]
                sent.append(blockdev_add(_throttle(below, place)))
                sent.append(blockdev_add({**command.arguments, "file": _name(below)}))
            elif command.name == "blockdev-reopen" and role_of(_reopened(command)) in self._above:
                options = command.arguments["options"][0]
                changed = {**options, "file": _name(options["file"])}
                sent.append(Command(command.name, {"options": [changed]}))
            elif command.name == "blockdev-del" and role_of(node) in self._below:
                own.add(len(sent))
                sent += [blockdev_del(_name(node)), command]
            else:
                sent.append(command)
        replies = await self._inner.pipeline(sent, deadline_seconds=deadline_seconds)
        return [reply for place, reply in enumerate(replies) if place not in own]


@contextlib.asynccontextmanager
async def connect(path: Path, *, vm: str, places: Sequence[Place] = (IN_TARGET,)) -> AsyncIterator[Monitor]:
    """Like `qmp.connect`, to a VM that was started with `qemu_arguments` for these places."""
    async with qmp.connect(path, vm=vm) as monitor:
        yield SlowTargetMonitor(monitor, places)


def qemu_arguments(bytes_per_second: int, *, disks: int, place: Place = IN_TARGET) -> list[str]:
    """What QEMU is started with: the limit, shared out among the disks that a run backs up. 0: none."""
    share = bytes_per_second // disks
    limits = [
        f"throttle-group,id={group(number, place)},x-bps-write={share},x-bps-write-max={share}"
        for number in range(disks)
    ]
    return [argument for limit in limits for argument in ("-object", limit)]


def group(number: int, place: Place = IN_TARGET) -> str:
    """The throttle group of a run's disk of that number."""
    return f"{place.group}-{number}"


def limited(bytes_per_second: int, *, disks: int, place: Place = IN_TARGET) -> list[Command]:
    """What sets the limit anew, at once. 0: none."""
    share = bytes_per_second // disks
    limits = {"bps-write": share, "bps-write-max": share}
    return [
        Command("qom-set", {"path": f"/objects/{group(number, place)}", "property": "limits", "value": limits})
        for number in range(disks)
    ]


def _throttle(file: str, place: Place) -> dict[str, Any]:
    number = int(file.split("-")[-2])  # see orchestrator.fleecing.names
    return {"driver": "throttle", "node-name": _name(file), "throttle-group": group(number, place), "file": file}


def _name(file: str) -> str:
    """The throttle node's name: not one of the product's, or it would clean it away itself."""
    return "slow-" + file.removeprefix("vmf-")


def _reopened(command: Command) -> str:
    return str(command.arguments["options"][0]["node-name"])
