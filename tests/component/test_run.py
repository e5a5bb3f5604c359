"""Runs that succeed: what is copied, in which order QEMU is told what, and what the result says."""

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.model import Fleecing, FleecingPolicy, Outcome, Phase, RunResult, Vm
from orchestrator.qemu.commands import Command
from orchestrator.target.extra_files import ExtraFile
from tests.component.fake_blocks import CLUSTER, Job
from tests.component.fake_monitor import Trouble
from tests.component.fake_qemu import FakeQemu
from tests.component.world import MIB, RUN, SOCKET, World, failed_with

Make = Callable[..., World]
DIRECT = Fleecing(enabled=False)
AT_ANY_TIME = ("-target", "-tfile", "-wfrom", "-wto")
"""Nodes that no guest's write passes: they may go while it runs, on any QEMU."""


def succeeded(result: RunResult) -> RunResult:
    assert result.error is None, result.error
    return result


def overwrite(qemu: FakeQemu, disk: str, clusters: range) -> None:
    """Let the guest overwrite some clusters, if it still is on the filter."""
    for at in clusters:
        qemu.guest_writes(disk, at * CLUSTER + 100, b"new")


def writing_guest(world: World) -> Callable[[Job], None]:
    """A guest that overwrites both ends of its disks while they are copied."""

    def write(_job: Job) -> None:
        for disk, content in world.first.items():
            last = len(content) // CLUSTER
            overwrite(world.qemu, disk, range(3))
            overwrite(world.qemu, disk, range(last - 3, last))

    return write


def wire(world: World) -> list[str]:
    """What QEMU was told, without what only asks: names, with the node, device or job."""
    keys = ("node-name", "path", "id", "opaque")
    found = []
    for command in world.qemu.executed:
        if command.name.startswith(("query-", "x-debug")):
            continue
        options = command.arguments.get("options", ())
        if options:
            about = " ".join(f"{one['node-name']}={one['file']}" for one in options)
            found.append(f"{command.name} {about}")
            continue
        about = next((str(command.arguments[key]) for key in keys if key in command.arguments), "")
        found.append(f"{command.name} {about}".strip())
    return found


def between(commands: list[str], first: str, last: str) -> list[str]:
    return commands[commands.index(first) + 1 : commands.index(last)]


async def test_fleecing_copies_the_point_in_time_while_the_guest_writes(make: Make, before: list[str]) -> None:
    world = make()
    world.qemu.pace = 1
    world.qemu.during_copy = writing_guest(world)
    result = succeeded(await world.back_up())
    world.assert_copied(result.snapshot)
    assert all(world.qemu.content(disk) != content for disk, content in world.first.items())
    await world.assert_nothing_is_left(before)


async def test_what_the_result_says(make: Make) -> None:
    world = make()
    world.qemu.pace = 1
    world.qemu.during_copy = writing_guest(world)
    result = succeeded(await world.back_up())
    assert (result.vm, result.run, result.outcome) == ("web01", RUN, Outcome.SUCCEEDED)
    assert result.snapshot == "web01/0"
    assert result.pause_ms is not None
    assert 0 < result.pause_ms < 1000
    assert [(disk.disk, disk.size_bytes, disk.copied_bytes) for disk in result.disks] == [
        ("vda", 2 * MIB, 2 * MIB),
        ("vdb", MIB, MIB),
    ]
    assert all(disk.storage == "local" for disk in result.disks)
    assert all(6 * CLUSTER <= disk.fleecing_peak_bytes <= 2 * MIB for disk in result.disks)
    assert result.warnings == ()
    assert not result.retryable
    phases = [one.phase for one in world.progress]
    assert [*dict.fromkeys(phases)] == [*Phase][1:]
    assert phases == sorted(phases, key=[*Phase].index)


async def test_the_result_says_how_long_the_guests_writes_took(make: Make) -> None:
    world = make()

    def guest(command: Command) -> None:
        if command.name == "add-fd":  # before the snapshot
            overwrite(world.qemu, "vda", range(4))

    def copying(_job: Job) -> None:
        world.qemu.write_ns = 5_000_000
        overwrite(world.qemu, "vdb", range(2))

    world.qemu.before, world.qemu.during_copy, world.qemu.pace = guest, copying, 16
    writes = succeeded(await world.back_up()).guest_writes
    assert writes is not None
    assert (writes.before_ms, writes.mean_ms, writes.worst_ms, writes.p99_ms) == (1.0, 5.0, 5.0, None)
    assert writes.count > 0
    assert world.progress[-1].guest_writes == writes
    assert world.progress[-1].recent_write_ms == (5.0,)
    assert not [command for command in world.qemu.executed if "histogram" in command.name]


async def test_a_guest_whose_writes_cannot_be_asked_about_is_backed_up_all_the_same(make: Make) -> None:
    world = make()
    for _ in range(3):
        world.host.troubles.on("query-blockstats", Trouble.REFUSED, also=lambda it: not it.arguments)
    assert succeeded(await world.back_up()).guest_writes is None


async def test_the_snapshot_records_its_run(make: Make) -> None:
    world = make()
    succeeded(await world.back_up())
    (snapshot,) = await world.target.snapshots()
    assert snapshot.details["run"] == RUN
    assert snapshot.details["job"] == "nightly"
    assert [disk["disk"] for disk in snapshot.details["disks"]] == ["vda", "vdb"]


async def test_all_filters_go_in_at_once_while_the_guest_runs(make: Make) -> None:
    world = make()
    succeeded(await world.back_up())
    commands = wire(world)
    prefix = f"vmf-{RUN}"
    assert not {"stop", "cont"} & set(commands)
    first = commands.index(f"blockdev-add {prefix}-0-gate")
    assert commands[first : first + 10] == [
        f"blockdev-add {prefix}-0-gate",
        f"blockdev-add {prefix}-1-gate",
        "qom-set /machine/peripheral/vda",
        "qom-set /machine/peripheral/vdb",
        f"blockdev-add {prefix}-0-cbw",
        f"blockdev-add {prefix}-1-cbw",
        f"blockdev-reopen {prefix}-0-gate={prefix}-0-cbw {prefix}-1-gate={prefix}-1-cbw",
        f"blockdev-add {prefix}-0-snap",
        f"blockdev-add {prefix}-1-snap",
        "transaction",
    ]


async def test_between_stop_and_cont_only_filters_go_in_and_in_this_order(make: Make) -> None:
    world = make(discard_source=False)
    succeeded(await world.back_up())
    assert between(wire(world), "stop", "cont") == [
        "transaction",
        f"blockdev-add vmf-{RUN}-0-cbw",
        f"blockdev-add vmf-{RUN}-1-cbw",
        "qom-set /machine/peripheral/vda",
        "qom-set /machine/peripheral/vdb",
        f"blockdev-add vmf-{RUN}-0-snap",
        f"blockdev-add vmf-{RUN}-1-snap",
    ]


async def test_each_disk_is_taken_out_in_the_order_that_qemu_survives(make: Make) -> None:
    world = make(disks={"vda": MIB})
    own = world.qemu.devices["vda"].own_node
    succeeded(await world.back_up())
    commands = wire(world)
    prefix = f"vmf-{RUN}-0"
    assert commands[commands.index(f"job-dismiss {prefix}-copy") :] == [
        f"job-dismiss {prefix}-copy",
        f"blockdev-del {prefix}-snap",
        f"blockdev-reopen {prefix}-gate={own}",
        "qom-set /machine/peripheral/vda",
        f"blockdev-del {prefix}-gate",
        f"blockdev-del {prefix}-cbw",
        f"blockdev-del {prefix}-img",
        f"blockdev-del {prefix}-grant",
        f"blockdev-del {prefix}-file",
        f"blockdev-reopen {prefix}-target={prefix}-tfile",
        f"blockdev-del {prefix}-target",
        f"blockdev-del {prefix}-tfile",
    ]


@pytest.mark.parametrize("discard_source", [True, False])
@pytest.mark.parametrize("fleecing", [Fleecing(storage="local"), DIRECT], ids=["fleecing", "direct"])
async def test_all_disks_are_of_one_moment_however_busy_the_guest(
    make: Make, before: list[str], fleecing: Fleecing, discard_source: bool
) -> None:
    world = make(disks={"vda": 2 * MIB, "vdb": MIB, "vdc": MIB}, discard_source=discard_source)
    world.qemu.pace = 1
    world.qemu.before = lambda _command: scatter(world)
    world.qemu.during_copy = lambda _job: scatter(world)
    result = succeeded(await world.back_up(fleecing=fleecing))
    world.assert_copied(result.snapshot)
    assert world.qemu.writes > 300
    await world.assert_nothing_is_left(before)


def scatter(world: World) -> None:
    """Let the guest write somewhere else on each disk each time."""
    if world.qemu.running:
        for disk, content in world.first.items():
            at = world.qemu.writes * 7 * CLUSTER % len(content)
            world.qemu.guest_writes(disk, at, f"{world.qemu.writes}".encode())


async def test_without_fleecing_old_data_goes_to_the_target(make: Make, before: list[str]) -> None:
    world = make()
    world.qemu.pace = 1
    world.qemu.during_copy = writing_guest(world)
    result = succeeded(await world.back_up(fleecing=DIRECT))
    world.assert_copied(result.snapshot)
    assert all(disk.storage is None and disk.fleecing_peak_bytes == 0 for disk in result.disks)
    for job in backups(world):
        assert "discard-source" not in job
    assert not any("-img" in command or "-grant" in command for command in wire(world))
    await world.assert_nothing_is_left(before)


def backups(world: World) -> list[dict[str, object]]:
    """The arguments of each job that was started."""
    found: list[dict[str, object]] = []
    for command in world.qemu.executed:
        found += _backups_of(command)
    return found


def _backups_of(command: Command) -> list[dict[str, object]]:
    if command.name == "blockdev-backup":
        return [dict(command.arguments)]
    if command.name == "transaction":
        actions = command.arguments["actions"]
        return [action["data"] for action in actions if action["type"] == "blockdev-backup"]
    return []


async def test_preferred_fleecing_that_cannot_be_had_is_a_warning(make: Make, before: list[str]) -> None:
    world = make(quota=MIB)
    result = await world.back_up(fleecing=Fleecing(storage="local", policy=FleecingPolicy.PREFER))
    assert result.outcome is Outcome.WARNING
    world.assert_copied(result.snapshot)
    assert "without fleecing" in result.warnings[0]
    assert all(disk.storage is None for disk in result.disks)
    await world.assert_nothing_is_left(before)


async def test_required_fleecing_that_cannot_be_had_fails(make: Make, before: list[str]) -> None:
    world = make(quota=MIB)
    assert failed_with(await world.back_up()) == "quota-too-small"
    await world.assert_nothing_is_left(before)
    await world.assert_nothing_is_listed()


async def test_a_paused_vm_stays_paused(make: Make, before: list[str]) -> None:
    world = make(running=False)
    result = succeeded(await world.back_up())
    world.assert_copied(result.snapshot)
    assert result.pause_ms is None
    assert not {"stop", "cont"} & set(wire(world))
    await world.assert_nothing_is_left(before, status="paused")


async def test_a_vm_that_was_paused_while_it_was_copied_stays_paused(make: Make, before: list[str]) -> None:
    world = make()
    world.qemu.pace = 1
    world.qemu.during_copy = lambda _job: world.qemu.user("pause")
    result = succeeded(await world.back_up())
    world.assert_copied(result.snapshot)
    await world.assert_nothing_is_left(before, status="paused")


async def test_without_discard_source_everything_goes_out_while_paused(make: Make, before: list[str]) -> None:
    world = make(discard_source=False)
    world.qemu.pace = 1
    world.qemu.during_copy = writing_guest(world)
    result = succeeded(await world.back_up())
    world.assert_copied(result.snapshot)
    commands = wire(world)
    paused = False
    for command in commands:
        if command in ("stop", "cont"):
            paused = command == "stop"
        elif command.startswith(("qom-set", "blockdev-del vmf")) and not command.endswith(AT_ANY_TIME):
            assert paused, command
    assert commands.count("stop") == commands.count("cont")
    assert not any("discard-source" in job for job in backups(world))
    assert not any(command.startswith("block-set-write-threshold") for command in commands)
    reopened = [command.arguments["options"][0] for command in world.qemu.executed if "reopen" in command.name]
    assert all(options["driver"] == "qcow2" for options in reopened)
    await world.assert_nothing_is_left(before)


async def test_a_vm_paused_while_copied_stays_paused_without_discard_source(make: Make, before: list[str]) -> None:
    world = make(discard_source=False)
    world.qemu.pace = 1
    world.qemu.during_copy = lambda _job: world.qemu.user("pause")
    succeeded(await world.back_up())
    await world.assert_nothing_is_left(before, status="paused")


async def test_only_disks_that_can_be_backed_up_are(make: Make, before: list[str]) -> None:
    world = make()
    world.qemu.add_disk("cd0", bytes(MIB), removable=True)
    world.qemu.add_disk("ro0", bytes(MIB), read_only=True)
    world.qemu.add_disk("scratch0", bytes(MIB))
    result = succeeded(await world.back_up(vm=Vm("web01", SOCKET, exclude_disks=("scratch0",))))
    assert [disk.disk for disk in result.disks] == ["vda", "vdb"]
    await world.assert_nothing_is_left(before)


async def test_files_of_the_host_are_kept_with_the_disks(make: Make, tmp_path: Path) -> None:
    variables, link, gone = tmp_path / "OVMF_VARS.fd", tmp_path / "link", tmp_path / "gone"
    variables.write_bytes(b"boot order")
    variables.chmod(0o640)
    link.symlink_to(variables)
    world = make()
    result = await world.back_up(vm=Vm("web01", SOCKET, extra_files=(variables, link, gone, tmp_path)))
    assert result.outcome is Outcome.WARNING
    assert result.warnings == (
        f"extra file {gone} is not in the snapshot: No such file or directory",
        f"extra file {tmp_path} is not in the snapshot: it is no regular file",
    )
    (snapshot,) = world.fake_target.listed
    assert world.fake_target.files[snapshot.id] == [
        ExtraFile(str(variables), 0o640, b"boot order"),
        ExtraFile(str(link), 0o640, b"boot order"),
    ]
    assert snapshot.details["extra_files"] == [{"path": str(path), "size_bytes": 10} for path in (variables, link)]


async def test_a_file_that_is_too_large_is_left_out_and_said_so(make: Make, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 16 * MIB + 1)
    result = await make().back_up(vm=Vm("web01", SOCKET, extra_files=(large,)))
    assert result.warnings == (f"extra file {large} is not in the snapshot: it is larger than 16.0 MiB",)


async def test_a_disk_of_odd_size_is_copied_whole(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": MIB + 512})
    result = succeeded(await world.back_up())
    world.assert_copied(result.snapshot)
    assert result.disks[0].copied_bytes == MIB + 512
    await world.assert_nothing_is_left(before)


async def test_the_bandwidth_is_shared_and_goes_to_those_that_still_copy(make: Make) -> None:
    world = make(disks={"vda": 4 * MIB, "vdb": 256 << 10})
    world.qemu.pace = 1
    succeeded(await world.back_up(bwlimit=1000))
    assert [job["speed"] for job in backups(world)] == [500, 500]
    speeds = [dict(command.arguments) for command in world.qemu.executed if "speed" in command.name]
    assert speeds == [{"device": f"vmf-{RUN}-0-copy", "speed": 1000}]


async def test_names_fit_into_qemu_however_many_disks_there_are(make: Make, before: list[str]) -> None:
    world = make(disks={f"disk{number}": CLUSTER for number in range(12)})
    result = succeeded(await world.back_up())
    world.assert_copied(result.snapshot)
    await world.assert_nothing_is_left(before)


async def test_a_second_run_follows_the_first_on_the_same_vm(make: Make, before: list[str]) -> None:
    world = make()
    first = succeeded(await world.back_up(run="00000001"))
    overwrite(world.qemu, "vda", range(4))
    second = succeeded(await world.back_up(run="00000002"))
    world.assert_copied(second.snapshot)
    assert first.snapshot != second.snapshot
    await world.assert_nothing_is_left(before)


async def test_commands_reach_qemu_in_one_piece(make: Make) -> None:
    """Nothing else of ours comes between `stop` and `cont`, even while other disks are under way."""
    world = make(discard_source=False)
    world.qemu.pace = 1
    succeeded(await world.back_up())
    names = [command.name for command in world.qemu.executed]
    states = [name for name in names if name in ("stop", "cont")]
    assert all(one != other for one, other in pairwise(states))
    paused = False
    for name in names:
        paused = name == "stop" or (paused and name != "cont")
        assert not (paused and name.startswith("query-"))
