"""Runs that fail for a reason of their own: it is named, and the guest goes on as if nothing had been."""

import tempfile
from collections.abc import Callable

import pytest

from orchestrator.errors import TargetError
from orchestrator.fleecing.names import DiskNames
from orchestrator.model import Fleecing, Outcome
from orchestrator.qemu import commands
from orchestrator.qemu.commands import QUERY_BLOCK, QUERY_NODE_STATS, Command
from tests.component.fake_blocks import CLUSTER, Job
from tests.component.fake_monitor import Trouble
from tests.component.test_admission import logged
from tests.component.world import MIB, OTHER_RUN, RUN, SOCKET, STRANGER, World, failed_with

Make = Callable[..., World]
ENOSPC = "No space left on device"
EIO = "Input/output error"
DIRECT = Fleecing(enabled=False)


def at_half(world: World, act: Callable[[], object], *, disk: str = "vda") -> None:
    """Do something once, when the disk is half copied."""
    done = False

    def check(job: Job) -> None:
        nonlocal done
        number = [*world.first].index(disk)
        if not done and job.id == DiskNames(RUN, number).job and job.position * CLUSTER >= job.total // 2:
            done = True
            act()

    world.qemu.pace = 1
    world.qemu.during_copy = check


async def assert_undone(world: World, before: list[str], *, status: str = "running") -> None:
    await world.assert_nothing_is_left(before, status=status)
    await world.assert_nothing_is_listed()


# The target --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fleecing", [Fleecing(storage="local"), DIRECT], ids=["fleecing", "direct"])
async def test_a_full_target(make: Make, before: list[str], fleecing: Fleecing) -> None:
    world = make()
    at_half(world, lambda: setattr(world.qemu, "target_error", ENOSPC))
    result = await world.back_up(fleecing=fleecing)
    assert failed_with(result) == "target-full"
    await assert_undone(world, before)


async def test_a_full_target_while_the_connection_is_lost(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": 2 * MIB})

    def both() -> None:
        world.qemu.target_error = ENOSPC
        world.qemu.cut()

    at_half(world, both)
    assert failed_with(await world.back_up()) == "target-full"
    await assert_undone(world, before)


async def test_a_target_that_fails(make: Make, before: list[str]) -> None:
    world = make()
    at_half(world, lambda: setattr(world.qemu, "target_error", EIO))
    assert failed_with(await world.back_up()) == "target-write-failed"
    await assert_undone(world, before)


async def test_a_target_that_loses_what_was_written_last(make: Make, before: list[str]) -> None:
    world = make()
    world.qemu.flush_error = ENOSPC
    result = await world.back_up()
    assert failed_with(result) == "target-write-failed"
    assert result.error is not None
    assert ENOSPC in result.error.message
    await assert_undone(world, before)


@pytest.mark.parametrize("step", ["prepare", "begin", "add_disk", "seal", "commit"])
async def test_a_target_that_cannot(make: Make, before: list[str], step: str) -> None:
    world = make()

    def fail(name: str) -> None:
        if name == step:
            raise TargetError(f"no {step}", code="target-unwritable")

    world.fake_target.before = fail
    assert failed_with(await world.back_up()) == "target-unwritable"
    await assert_undone(world, before)


async def test_a_target_whose_draft_cannot_be_removed_is_a_warning(make: Make, before: list[str]) -> None:
    world = make()
    at_half(world, lambda: setattr(world.qemu, "target_error", EIO))

    def fail(name: str) -> None:
        if name == "abort":
            raise TargetError("no abort")

    world.fake_target.before = fail
    result = await world.back_up()
    assert failed_with(result) == "target-write-failed"
    assert result.warnings == ("could not undo: remove the unfinished snapshot",)
    world.fake_target.before = lambda _step: None
    for draft in list(world.fake_target.drafts):
        await draft.abort()
    await assert_undone(world, before)


# The snapshot ------------------------------------------------------------------------------------------------


async def test_a_snapshot_that_broke_with_space_left(make: Make, before: list[str]) -> None:
    world = make()
    at_half(world, lambda: world.qemu.break_snapshot("vda"))
    result = await world.back_up()
    assert failed_with(result) == "copy-timeout"
    assert result.retryable
    assert result.error is not None
    assert "storage local" in result.error.message
    await assert_undone(world, before)


async def test_a_direct_backups_snapshot_that_broke(make: Make, before: list[str]) -> None:
    world = make()
    at_half(world, lambda: world.qemu.break_snapshot("vda"))
    result = await world.back_up(fleecing=DIRECT)
    assert failed_with(result) == "copy-timeout"
    assert result.error is not None
    assert "fleecing" in result.error.hint
    await assert_undone(world, before)


async def test_a_snapshot_that_breaks_while_the_connection_is_lost(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": 2 * MIB})

    def both() -> None:
        world.qemu.break_snapshot("vda")
        world.qemu.cut()

    at_half(world, both)
    result = await world.back_up()
    assert failed_with(result) in ("copy-timeout", "copy-failed")
    await assert_undone(world, before)


async def test_the_other_disks_of_a_failing_run_are_given_back_too(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": MIB, "vdb": 4 * MIB, "vdc": 4 * MIB})
    at_half(world, lambda: world.qemu.break_snapshot("vda"))
    assert failed_with(await world.back_up()) == "copy-timeout"
    await assert_undone(world, before)


# Losing QEMU -------------------------------------------------------------------------------------------------


async def test_a_copy_goes_on_over_a_lost_connection(make: Make, before: list[str]) -> None:
    world = make()
    at_half(world, world.qemu.cut)
    result = await world.back_up()
    assert result.error is None, result.error
    world.assert_copied(result.snapshot)
    await world.assert_nothing_is_left(before)


async def test_a_copy_goes_on_while_qemu_cannot_be_reached(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": 2 * MIB})

    def shut_out() -> None:
        world.qemu.accepts = False
        world.qemu.cut()

    def let_in(job: Job) -> None:
        world.qemu.accepts = world.qemu.accepts or job.position * CLUSTER >= job.total - CLUSTER

    at_half(world, shut_out)
    check = world.qemu.during_copy
    world.qemu.during_copy = lambda job: (check(job), let_in(job))  # type: ignore[func-returns-value]
    result = await world.back_up()
    assert result.error is None, result.error
    world.assert_copied(result.snapshot)
    await world.assert_nothing_is_left(before)


async def test_a_copy_survives_connections_that_are_lost_at_once_again(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": 4 * MIB})

    def twice() -> None:
        world.qemu.cut()
        for _ in range(2):
            world.troubles.on("query-jobs", Trouble.LOST_BEFORE, also=lambda _command: copying(world))

    at_half(world, twice)
    result = await world.back_up()
    assert result.error is None, result.error
    world.assert_copied(result.snapshot)
    await world.assert_nothing_is_left(before)


def copying(world: World) -> bool:
    return any(job.status == "running" for job in world.qemu.jobs.values())


async def test_a_guest_that_is_shut_down(make: Make, before: list[str]) -> None:
    world = make()
    at_half(world, world.qemu.kill)
    result = await world.back_up()
    assert failed_with(result) in ("vm-gone", "vm-unreachable")
    assert result.retryable
    await assert_undone(world, before)


async def test_a_vm_that_cannot_be_reached(make: Make, before: list[str]) -> None:
    world = make()
    world.qemu.accepts = False
    result = await world.back_up()
    assert failed_with(result) == "vm-unreachable"
    assert result.retryable
    await assert_undone(world, before)


# Somebody else -----------------------------------------------------------------------------------------------


def leave(world: World, run: str) -> None:
    """Put into QEMU what a process that died during a run left there."""
    names = DiskNames(run, 0)
    own = world.qemu.devices["vda"].own_node
    null = {"driver": "null-co", "node-name": names.image}
    gate, gate_on_filter = (commands.gate_node(names.gate, file=file) for file in (own, names.cbw))
    for command in (
        commands.blockdev_add(null),
        commands.blockdev_add(gate),
        commands.set_drive(world.qemu.devices["vda"].path, names.gate),
        commands.blockdev_add(commands.cbw_node(names.cbw, file=own, target=names.image, timeout_seconds=10)),
        commands.reopen(gate_on_filter),
        commands.blockdev_add(commands.snapshot_access_node(names.snapshot, cbw=names.cbw)),
    ):
        world.qemu.user(command.name, **command.arguments)


async def test_leftovers_of_a_dead_run_of_ours_are_taken_out_first(make: Make, before: list[str]) -> None:
    world = make()
    leave(world, OTHER_RUN)
    result = await world.back_up()
    assert result.error is None, result.error
    world.assert_copied(result.snapshot)
    await world.assert_nothing_is_left(before)


async def test_a_target_that_is_lost_ends_the_run_at_once(make: Make, before: list[str]) -> None:
    world = make()
    world.qemu.automatic = False  # the jobs would never end by themselves

    def lose(command: Command) -> None:
        if command.name == "transaction" and "blockdev-backup" in str(command.arguments):
            world.fake_target.losing.set()

    world.qemu.before = lose
    result = await world.back_up()
    assert failed_with(result) == "target-gone"
    await world.assert_nothing_is_left(before)
    await world.assert_nothing_is_listed()


async def test_a_job_that_a_dead_run_of_ours_left(make: Make, before: list[str]) -> None:
    world = make()
    leave(world, OTHER_RUN)
    names = DiskNames(OTHER_RUN, 0)
    world.qemu.user("blockdev-add", **{"driver": "null-co", "node-name": names.target})
    world.qemu.automatic = False
    job = commands.backup_job(
        names.job,
        device=names.snapshot,
        target=names.target,
        speed_bytes_per_second=0,
        discard_source=True,
        compress=False,
    )
    world.qemu.user("blockdev-backup", **job)
    world.qemu.before = lambda command: command.name == "transaction" and setattr(world.qemu, "automatic", True)
    with logged() as logs:
        result = await world.back_up()
    assert result.error is None, result.error
    (found,) = [line for line in logs if line["event"] == "leftovers.found"]
    assert (found["of_run"], found["jobs"]) == (OTHER_RUN, [names.job])
    await world.assert_nothing_is_left(before)


async def test_descriptors_that_a_dead_run_of_ours_left(make: Make, before: list[str]) -> None:
    """It died between add-fd and blockdev-add; the descriptor keeps an image's space occupied."""
    world = make()
    async with world.host.connect(SOCKET, vm="web01") as monitor:
        with tempfile.TemporaryFile(dir=world.folder) as file:
            await monitor.pass_descriptor(file.fileno(), opaque=DiskNames(OTHER_RUN, 0).file)
    result = await world.back_up()
    assert result.error is None, result.error
    await world.assert_nothing_is_left(before)


async def test_a_strangers_run_is_left_alone(make: Make, before: list[str]) -> None:
    world = make()
    leave(world, STRANGER)
    there = set(world.qemu.nodes)
    result = await world.back_up()
    assert failed_with(result) == "foreign-run"
    assert result.error is not None
    assert STRANGER in result.error.message
    assert set(world.qemu.nodes) == there
    assert all(is_harmless(command) for command in world.qemu.executed)
    assert world.qemu.deaths == []
    await world.assert_nothing_is_listed()
    assert before


def is_harmless(command: Command) -> bool:
    return command.name.startswith(("query-", "x-debug-query"))


@pytest.mark.parametrize("what", ["job", "filter", "migration", "incoming"])
async def test_somebody_elses_work_is_left_alone(make: Make, before: list[str], what: str) -> None:
    world = make()
    code = {"job": "foreign-job", "filter": "foreign-filter"}.get(what, "vm-state")
    if what == "job":
        world.qemu.start_foreign_job("mirror-vda")
    elif what == "filter":
        own = world.qemu.devices["vda"].own_node
        world.qemu.user("blockdev-add", **{"driver": "mirror_top", "node-name": "#mirror", "file": own})
        world.qemu.devices["vda"].own_node = world.qemu.devices["vda"].node = "#mirror"
    elif what == "migration":
        world.qemu.migration = "active"
    else:
        world.qemu.status = "inmigrate"
    status = world.qemu.status
    result = await world.back_up()
    assert failed_with(result) == code
    assert result.retryable
    assert all(is_harmless(command) for command in world.qemu.executed)
    await assert_undone(world, before, status=status)


async def test_an_old_qemu_is_refused(make: Make, before: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    world = make()
    schema = world.qemu.user("query-qmp-schema")
    for entity in schema:
        entity["members"] = [one for one in entity.get("members", []) if one["name"] != "on-cbw-error"]
    monkeypatch.setattr(world.qemu, "_query_qmp_schema", lambda _arguments: schema)
    assert failed_with(await world.back_up()) == "qemu-too-old"
    assert all(is_harmless(command) for command in world.qemu.executed)
    await assert_undone(world, before)


async def test_no_disk_to_back_up(make: Make, before: list[str]) -> None:
    world = make()
    for device in world.qemu.devices.values():
        device.removable = True
    assert failed_with(await world.back_up()) == "no-disks"
    await assert_undone(world, before)


# Trouble with undoing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [one for one in Trouble if one is not Trouble.KILLED])
@pytest.mark.parametrize("command", ["query-jobs", "query-named-block-nodes", "blockdev-del", "query-fdsets"])
async def test_what_could_not_be_undone_is_undone_by_the_next_run(
    make: Make, before: list[str], command: str, trouble: Trouble
) -> None:
    world = make()
    at_half(world, lambda: world.qemu.break_snapshot("vda"))
    # A disk that is copied is asked for with query-blockstats, and then taken out; if that is refused, again.
    occasions = [QUERY_NODE_STATS, *([QUERY_BLOCK] if trouble is Trouble.REFUSED else [])]
    world.qemu.before = lambda asked: asked in occasions and world.troubles.on(command, trouble)
    result = await world.back_up(run=OTHER_RUN)
    world.qemu.before = lambda _command: None
    assert result.outcome is Outcome.FAILED
    assert world.qemu.running
    world.troubles.when.clear()
    world.qemu.during_copy = lambda _job: None
    result = await world.back_up()
    assert result.error is None, result.error
    world.assert_copied(result.snapshot)
    await world.assert_nothing_is_left(before)


# A user who pauses the VM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("discard_source", [True, False])
@pytest.mark.parametrize("moment", ["blockdev-add", "add-fd", "block-set-write-threshold", "transaction"])
async def test_a_vm_that_was_paused_meanwhile_stays_paused(
    make: Make, before: list[str], moment: str, discard_source: bool
) -> None:
    world = make(discard_source=discard_source)
    world.qemu.before = lambda command: command.name == moment and world.qemu.user("pause")
    result = await world.back_up()
    assert result.error is None or result.error.code != "bug", result.error
    if moment == "block-set-write-threshold" and not discard_source:
        assert world.qemu.running  # it is not said there
        return
    await world.assert_nothing_is_left(before, status="paused")


async def test_a_vm_that_is_paused_in_the_last_moment_is_no_bug(make: Make) -> None:
    """QEMU's `stop` then says nothing, and `cont` resumes: a race that nobody can win from outside."""
    world = make(discard_source=False)
    world.qemu.before = lambda command: command.name == "stop" and world.qemu.user("pause")
    result = await world.back_up()
    assert result.outcome is not Outcome.CANCELLED
    assert result.error is None or result.error.code != "bug", result.error
