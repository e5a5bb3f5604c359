"""Whatever happens to whichever command of a run: the guest goes on, and nothing of ours stays anywhere."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from orchestrator.model import Fleecing, Outcome, RunResult
from orchestrator.qemu.commands import Command
from tests.component.fake_blocks import CLUSTER, Job
from tests.component.fake_monitor import Trouble
from tests.component.world import MIB, World, make_world

ENOUGH = 8
"""So many failures tell it all."""
CODES = {
    Trouble.REFUSED: {"qemu-refused", "leftovers", "target-write-failed"},
    Trouble.LOST_BEFORE: {"vm-gone"},
    Trouble.LOST_AFTER: {"vm-gone"},
    Trouble.KILLED: {"vm-gone", "vm-unreachable"},
    Trouble.TIMEOUT_DONE: {"vm-silent"},
    Trouble.TIMEOUT_LATE: {"vm-silent"},
    Trouble.TIMEOUT_NEVER: {"vm-silent"},
}


@dataclass(frozen=True)
class Shape:
    """A kind of run to be troubled."""

    name: str
    world: dict[str, Any] = field(default_factory=dict)
    fleecing: Fleecing = field(default_factory=lambda: Fleecing(storage="local"))
    bwlimit: int = 0
    growing: bool = False

    def make(self, folder: Path) -> World:
        world = make_world(folder, **self.world)
        world.qemu.pace = 2
        world.qemu.during_copy = self._growing_guest(world) if self.growing else _writing_guest(world)
        return world

    @staticmethod
    def _growing_guest(world: World) -> Callable[[Job], None]:
        written = 0

        def write(job: Job) -> None:
            nonlocal written
            if job.position % 4 == 0 and world.qemu.running and written < 40:
                written += 1
                last = len(world.first["vda"]) // CLUSTER
                world.qemu.guest_writes("vda", (last - written) * CLUSTER, b"new")

        return write


def _writing_guest(world: World) -> Callable[[Job], None]:
    def write(_job: Job) -> None:
        if world.qemu.running:
            for disk, content in world.first.items():
                world.qemu.guest_writes(disk, 0, b"new")
                world.qemu.guest_writes(disk, len(content) - 100, b"new")

    return write


SMALL = {"vda": 512 << 10, "vdb": 256 << 10}
SHAPES = [
    Shape("fleecing", {"disks": SMALL}, bwlimit=1 << 20),
    Shape("direct", {"disks": SMALL}, Fleecing(enabled=False)),
    Shape("without discard-source", {"disks": SMALL, "discard_source": False}),
    Shape("paused", {"disks": {"vda": 256 << 10}, "running": False}),
    Shape("growing", {"disks": {"vda": 4 * MIB, "vdb": 256 << 10}}, growing=True),
]


def _cases() -> list[Any]:
    found = []
    for shape, trouble in product(SHAPES, Trouble):
        found.append(pytest.param(shape, trouble, id=f"{shape.name}-{trouble.name}"))
    return found


@pytest.mark.usefixtures("quick_images", "small_grants")
@pytest.mark.parametrize(("shape", "trouble"), _cases())
async def test_any_command_in_trouble(shape: Shape, trouble: Trouble, tmp_path: Path, before: list[str]) -> None:
    world = shape.make(tmp_path)
    result = await _run(world, shape)
    assert result.outcome is Outcome.SUCCEEDED, result.error
    commands = list(world.qemu.executed)
    found = []
    every = 1 if isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop) else 3
    for index, command in enumerate(commands):
        if index % every:  # the other loop tries them all
            continue
        world = shape.make(tmp_path)
        world.troubles.at(index, trouble)
        wrong = await _what_is_wrong(world, shape, trouble, before)
        if wrong:
            found.append(f"{index}: {_words(command)}: {wrong}")
        if len(found) == ENOUGH:
            break
    if found:
        pytest.fail("\n".join(found), pytrace=False)


async def _run(world: World, shape: Shape) -> RunResult:
    return await world.back_up(fleecing=shape.fleecing, bwlimit=shape.bwlimit)


async def _what_is_wrong(world: World, shape: Shape, trouble: Trouble, before: list[str]) -> str:
    """What must not be after a run that had trouble, in words; empty if all is well."""
    status = world.qemu.status
    try:
        result = await _run(world, shape)
    except TimeoutError:
        return "the run hangs"
    try:
        if result.error is None:
            world.assert_copied(result.snapshot)
        else:
            # A guest that goes on writing while nobody extends the grant fills it.
            sensible = CODES[trouble] | ({"fleecing-full"} if shape.growing else set())
            assert result.error.code in sensible, result.error
            assert result.outcome is Outcome.FAILED
            assert result.snapshot is None
            await world.assert_nothing_is_listed()
        await world.assert_nothing_is_left(before, status=status)
    except AssertionError as wrong:
        return str(wrong).partition("\n")[0] + f" ({result.outcome}, {result.error and result.error.message})"
    return ""


def _words(command: Command) -> str:
    return f"{command.name} {dict(command.arguments)}"[:120]
