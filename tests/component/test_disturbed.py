"""A VM to which something happens while it is backed up: what makes the copy wrong ends the run, else nothing."""

from collections.abc import Callable

import pytest

from orchestrator.errors import StateError
from orchestrator.fleecing import pauser
from orchestrator.model import Outcome
from orchestrator.qemu.commands import Command
from orchestrator.run import vigil
from orchestrator.state.journal import Act, Journal
from tests.component.test_failing import assert_undone, at_half
from tests.component.world import MIB, RUN, SOCKET, World, failed_with

Make = Callable[..., World]
pytestmark = pytest.mark.usefixtures("quick_images")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vigil, "LOOK_SECONDS", 0.01)


@pytest.mark.parametrize("discard_source", [True, False], ids=["QEMU 9.1 or later", "older QEMU"])
@pytest.mark.parametrize("state", ["setup", "active", "device", "postcopy-active"])
async def test_a_migration_ends_the_run(make: Make, before: list[str], state: str, discard_source: bool) -> None:
    world = make(disks={"vda": 2 * MIB}, discard_source=discard_source)

    def migrate(_job: object) -> None:
        world.qemu.migration = state
        world.qemu.automatic = False  # nothing else ends it

    world.qemu.pace = 1
    world.qemu.during_copy = migrate
    result = await world.back_up()
    assert failed_with(result) == "vm-migrating"
    assert result.retryable
    await assert_undone(world, before)


async def test_a_migration_that_is_over_before_it_is_seen_ends_the_run(
    make: Make, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest has written elsewhere while the rest was copied."""
    monkeypatch.setattr(vigil, "LOOK_SECONDS", 1000.0)
    world = make(disks={"vda": 2 * MIB})

    def migrate() -> None:
        world.qemu.migration = "completed"
        world.qemu.status = "postmigrate"

    at_half(world, migrate)
    assert failed_with(await world.back_up()) == "vm-migrating"
    await assert_undone(world, before, status="postmigrate")


async def test_a_qemu_that_is_gone_once_all_is_copied_may_have_migrated(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": MIB})

    def end(command: Command) -> None:
        if command.name == "query-migrate" and world.progress and world.progress[-1].disks:
            world.qemu.kill()

    world.qemu.before = end
    assert failed_with(await world.back_up()) == "vm-gone"
    await assert_undone(world, before)


async def test_a_disk_that_is_unplugged_meanwhile_is_a_warning(make: Make) -> None:
    world = make()
    at_half(world, lambda: world.qemu.devices.pop("vdb"))
    result = await world.back_up()
    assert result.outcome is Outcome.WARNING, result
    assert result.warnings == ("disk vdb was unplugged meanwhile; the snapshot has it as it was",)
    world.assert_copied(result.snapshot)
    assert world.qemu.deaths == []
    assert world.qemu.ours() == []


async def test_a_disk_that_changes_while_the_backup_is_prepared(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": MIB})

    def resize(command: Command) -> None:
        if command.name == "block-set-write-threshold":
            world.qemu.grow("vda", 2 * MIB)

    world.qemu.before = resize
    result = await world.back_up()
    assert failed_with(result) == "disks-changed"
    assert result.retryable
    await assert_undone(world, before)
    world.qemu.before = lambda _command: None
    result = await world.back_up()
    assert result.error is None
    assert result.disks[0].size_bytes == 2 * MIB


# --- a guest that is paused for a moment (QEMU before 9.1) ---


@pytest.fixture
def unusable(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the journal's file system be full from now on."""

    def intend(*_given: object, **_more: object) -> None:
        raise StateError("cannot use journal.sqlite: database or disk is full", code="state-unusable")

    return lambda: monkeypatch.setattr(Journal, "intend", intend)


async def test_no_guest_is_paused_for_a_snapshot_that_cannot_be_entered(
    make: Make, before: list[str], unusable: Callable[[], None]
) -> None:
    world = make(disks={"vda": MIB}, discard_source=False)
    unusable()
    assert failed_with(await world.back_up()) == "state-unusable"
    stops = [command for command in world.qemu.executed if command.name == "stop"]
    assert len(stops) == 1  # to take out what was prepared, which must not stay
    await assert_undone(world, before)


async def test_what_is_in_qemu_is_taken_out_even_if_the_pause_cannot_be_entered(
    make: Make, before: list[str], unusable: Callable[[], None]
) -> None:
    world = make(disks={"vda": MIB}, discard_source=False)
    world.qemu.during_copy = lambda _job: unusable()
    result = await world.back_up()
    assert result.error is None, result.error
    assert world.journal.open() == []
    await world.assert_nothing_is_left(before)


async def test_a_guest_that_a_pause_left_paused_is_entered_until_it_goes_on(make: Make) -> None:
    """The connection is lost right behind `stop`, for good."""
    world = make(disks={"vda": MIB}, discard_source=False)

    def leave(command: Command) -> None:
        if command.name == "transaction":
            world.qemu.accepts = False
            world.qemu.cut()

    world.qemu.before = leave
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("orchestrator.run.backup.UNDO_RECONNECT_SECONDS", 0.05)
        assert failed_with(await world.back_up()) == "vm-gone"
    assert world.qemu.status == "paused"
    (left,) = world.journal.open()
    assert (left.act, left.vm, left.run) == (Act.PAUSE, "web01", RUN)
    assert pauser.monitor_of(left) == SOCKET
    world.qemu.accepts = True
    world.qemu.before = lambda _command: None
    async with world.host.connect(SOCKET, vm="web01") as monitor:
        await pauser.go_on(monitor, left)
        await pauser.go_on(monitor, left)
    assert world.qemu.running
