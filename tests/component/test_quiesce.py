"""Frozen file systems around the snapshot: a guest is never left frozen, whoever fails or dies."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import AgentError
from orchestrator.model import Consistency, Outcome, RunResult, Vm
from orchestrator.qemu import agent
from orchestrator.qemu.commands import Command
from orchestrator.run import quiesce
from orchestrator.state.journal import Act, Journal
from tests.component.fake_agent import FakeAgent
from tests.component.steps import Steps
from tests.component.world import SOCKET, World

Make = Callable[..., World]
FREEZE, THAW = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"
pytestmark = pytest.mark.usefixtures("quick_images")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "web01.qga"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "SYNC_SECONDS", 0.5)


@pytest.fixture
async def fake(path: Path) -> AsyncIterator[FakeAgent]:
    async with FakeAgent().serving(path) as made:
        yield made


@pytest.fixture(params=[True, False], ids=["QEMU 9.1 or later", "older QEMU"])
def world(make: Make, request: pytest.FixtureRequest) -> World:
    made = make(discard_source=request.param)
    made.options = replace(made.options, consistency=Consistency.FREEZE)
    return made


async def recover(journal: Journal) -> None:
    for intent in journal.open():
        with contextlib.suppress(AgentError):
            await quiesce.recover(intent, journal)


async def back_up(world: World, path: Path) -> RunResult:
    return await world.back_up(vm=Vm("web01", SOCKET, agent=path))


async def test_the_snapshot_is_made_while_the_guest_is_frozen(world: World, fake: FakeAgent, path: Path) -> None:
    frozen: dict[str, int] = {}

    def note(command: Command) -> None:
        frozen.setdefault(step_of(command), fake.frozen)

    world.qemu.before = note
    result = await back_up(world, path)
    assert result.outcome is Outcome.SUCCEEDED, result
    assert frozen["filters"] == 2
    assert frozen["jobs"] == 0
    assert world.fake_target.listed[0].details["frozen_file_systems"] == 2
    assert world.journal.open() == []


def step_of(command: Command) -> str:
    said = str(command.arguments)
    if command.name == "blockdev-reopen" or (command.name == "qom-set" and "cbw" in said):
        return "filters"
    return "jobs" if "blockdev-backup" in said else command.name


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (
            lambda fake: fake.errors.update({FREEZE: "a hook failed"}),
            "refused guest-fsfreeze-freeze: a hook failed",
        ),
        (lambda fake: setattr(fake, "file_systems", 0), "froze no file system"),
        (lambda fake: setattr(fake, "mute", True), "did not answer guest-sync-delimited"),
    ],
)
async def test_a_guest_that_cannot_be_frozen_is_backed_up_with_a_warning(
    make: Make, fake: FakeAgent, path: Path, trouble: Callable[[FakeAgent], None], said: str
) -> None:
    world = make()
    world.options = replace(world.options, consistency=Consistency.FREEZE)
    trouble(fake)
    result = await back_up(world, path)
    assert result.outcome is Outcome.WARNING, result
    (warning,) = result.warnings
    assert warning.startswith("the guest was not frozen for the snapshot: VM web01: its guest agent")
    assert said in warning
    assert fake.frozen == 0
    assert world.fake_target.listed[0].details["frozen_file_systems"] == 0
    assert world.journal.open() == []


async def test_without_an_agent_it_is_a_warning_too(world: World, path: Path) -> None:
    result = await back_up(world, path)
    assert result.outcome is Outcome.WARNING
    assert "no guest agent at" in result.warnings[0]


async def test_a_snapshot_that_takes_too_long_does_not_keep_the_guest_frozen(
    world: World, fake: FakeAgent, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiesce, "FROZEN_SECONDS", 0.2)
    async with quiesce.frozen(path, world.journal, vm="web01", run="1") as freeze:
        assert fake.frozen == 2
        await asyncio.sleep(0.5)
        assert fake.frozen == 0
    assert "was thawed after 0.2 s" in freeze.problem
    assert world.journal.open() == []


async def test_cancelled_at_any_step_the_guest_is_thawed(make: Make, fake: FakeAgent, path: Path) -> None:
    world = make(disks={"vda": 1 << 18})
    world.options = replace(world.options, consistency=Consistency.FREEZE)
    cancel_at = frozen = 0
    while True:
        steps = Steps(cancel_at)
        try:
            await steps.run(back_up(world, path))
        except asyncio.CancelledError:
            frozen += "freeze" in fake.done
        else:
            break
        assert fake.frozen == 0, cancel_at
        assert world.journal.open() == [], cancel_at
        fake.done.clear()
        cancel_at += 1
    assert frozen > 3


async def test_a_failing_snapshot_thaws_the_guest(world: World, fake: FakeAgent, path: Path) -> None:
    def fail(_command: Command) -> None:
        if fake.frozen:
            raise RuntimeError("the test wants it so")

    world.qemu.before = fail
    result = await back_up(world, path)
    assert result.outcome is Outcome.FAILED
    assert fake.frozen == 0


async def test_a_thaw_that_is_not_known_is_tried_again_until_it_is(
    world: World, fake: FakeAgent, path: Path
) -> None:
    fake.errors = {THAW: "not now"}
    result = await back_up(world, path)
    assert result.outcome is Outcome.WARNING
    assert result.warnings[0].startswith("the guest may still be frozen: VM web01: its guest agent refused")
    (left,) = world.journal.open()
    assert (left.act, left.vm, left.subject) == (Act.FREEZE, "web01", str(path))
    await recover(world.journal)
    assert world.journal.open() == [left]
    fake.errors = {}
    await recover(world.journal)
    assert fake.frozen == 0
    assert world.journal.open() == []


FREEZE_AND_WAIT = """
import asyncio, sys
from pathlib import Path
from orchestrator.run import quiesce
from orchestrator.state.journal import Journal

async def freeze():
    async with quiesce.frozen(Path(sys.argv[1]), Journal(Path(sys.argv[2])), vm="web01", run="1"):
        await asyncio.sleep(100)

asyncio.run(freeze())
"""


async def test_killed_while_it_is_frozen_the_next_start_thaws_it(
    fake: FakeAgent, path: Path, tmp_path: Path
) -> None:
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", FREEZE_AND_WAIT, str(path), str(tmp_path))
    while not fake.frozen:
        await asyncio.sleep(0.05)
    killed.kill()
    await killed.wait()
    await asyncio.sleep(0.1)
    assert fake.frozen == 2
    await recover(Journal(tmp_path))
    assert fake.frozen == 0
    assert Journal(tmp_path).open() == []


async def test_a_socket_that_cannot_be_reached_does_not_make_a_frozen_guest_forgotten(
    path: Path, tmp_path: Path
) -> None:
    path.symlink_to(path)  # any error but that nobody is there: no rights, no descriptors left
    journal = Journal(tmp_path)
    left = journal.intend(Act.FREEZE, vm="web01", run="1", subject=str(path))
    await recover(journal)
    assert journal.open() == [left]


async def test_what_a_vm_that_is_gone_had_frozen_is_forgotten(path: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.intend(Act.FREEZE, vm="web01", run="1", subject=str(path))
    await recover(journal)
    assert journal.open() == []
