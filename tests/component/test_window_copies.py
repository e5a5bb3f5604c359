"""Full copies by windows: what QEMU is told, in which order, and what a window that fails leads to."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.fleecing import boundary, graph
from orchestrator.fleecing.names import DISMANTLING, DiskNames, run_prefix
from orchestrator.model import Discard, Fleecing, Outcome
from orchestrator.qemu import tools
from orchestrator.qemu.commands import Command
from orchestrator.run import windows
from tests.component.fake_blocks import CLUSTER, Job
from tests.component.world import MIB, OTHER_RUN, RUN, World, failed_with, settled

Make = Callable[..., World]
pytestmark = pytest.mark.usefixtures("quick_images", "at_once")
DISKS = {"vda": 8 * CLUSTER, "vdb": 3 * CLUSTER - 512}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "RETRY_SECONDS", 0.0)


@pytest.fixture
def by_windows(make: Make) -> World:
    world = make(disks=DISKS)
    world.options = replace(world.options, discard=Discard.WINDOW)
    return world


def jobs(world: World) -> list[dict[str, object]]:
    """The jobs that were started, in order."""
    return [
        action["data"]
        for command in world.qemu.executed
        if command.name == "transaction"
        for action in command.arguments["actions"]
        if action["type"] == "blockdev-backup"
    ]


def copied(world: World, number: int) -> list[tuple[int, int]]:
    """The parts of a disk that were copied, in order, by offset and size."""
    return [
        (command.arguments["offset"], command.arguments["size"])
        for command in world.qemu.executed
        if command.name == "blockdev-add" and command.arguments["node-name"].endswith(f"-{number}-wfrom")
    ]


def discards(world: World) -> list[str]:
    lines = [str(command.arguments.get("command-line", "")) for command in world.qemu.executed]
    return [line for line in lines if "discard" in line]


async def test_every_window_is_copied_and_discarded_once(by_windows: World, before: list[str]) -> None:
    result = await by_windows.back_up()
    assert result.outcome is Outcome.SUCCEEDED, result.error
    by_windows.assert_copied(result.snapshot)
    assert copied(by_windows, 0) == [(at * CLUSTER, 2 * CLUSTER) for at in (0, 2, 4, 6)]
    assert copied(by_windows, 1) == [(0, 2 * CLUSTER), (2 * CLUSTER, CLUSTER - 512)]
    assert len(discards(by_windows)) == 6
    assert not any("discard-source" in job for job in jobs(by_windows))
    assert [disk.copied_bytes for disk in result.disks] == list(DISKS.values())
    await by_windows.assert_nothing_is_left(before)


@pytest.mark.parametrize(
    ("discard", "discard_source", "by_windows"),
    [
        (Discard.AUTO, True, False),
        (Discard.AUTO, False, True),
        (Discard.JOB, True, False),
        (Discard.JOB, False, False),
        (Discard.WINDOW, True, True),
        (Discard.WINDOW, False, True),
    ],
)
async def test_who_discards(
    make: Make, discard: Discard, discard_source: bool, by_windows: bool, before: list[str]
) -> None:
    world = make(disks=DISKS, discard_source=discard_source)
    world.options = replace(world.options, discard=discard)
    result = await world.back_up()
    world.assert_copied(result.snapshot)
    assert bool(discards(world)) == by_windows
    by_job = discard_source and not by_windows
    assert all(job.get("discard-source", False) == by_job for job in jobs(world))
    assert len(jobs(world)) == (6 if by_windows else 2)
    await world.assert_nothing_is_left(before)


async def test_without_fleecing_there_is_nothing_to_discard(by_windows: World) -> None:
    result = await by_windows.back_up(fleecing=Fleecing(enabled=False))
    by_windows.assert_copied(result.snapshot)
    assert (len(jobs(by_windows)), discards(by_windows)) == (2, [])


@pytest.mark.parametrize(("discard", "compressed"), [(Discard.AUTO, True), (Discard.WINDOW, False)])
async def test_an_image_that_is_to_be_compressed_is_written_by_one_job(
    make: Make, discard: Discard, compressed: bool
) -> None:
    world = make(disks=DISKS, discard_source=False)
    world.fake_target.compresses = True
    world.options = replace(world.options, discard=discard)
    result = await world.back_up()
    world.assert_copied(result.snapshot)
    assert all(job.get("compress", False) == compressed for job in jobs(world))
    assert bool(discards(world)) != compressed


async def test_what_a_finished_window_held_is_given_back(by_windows: World) -> None:
    """Old data is held only for windows that are not done, and the guest's writes to others are not copied."""
    qemu = by_windows.qemu
    qemu.pace = 1
    held: list[tuple[int, set[int]]] = []

    def write(job: Job) -> None:
        for at in range(DISKS["vda"] // CLUSTER):
            qemu.guest_writes("vda", at * CLUSTER, b"new")
        if job.source.endswith("-0-snap"):
            held.append((job.first, set(qemu.nodes[job.source.replace("snap", "img")].store)))

    qemu.during_copy = write
    result = await by_windows.back_up()
    by_windows.assert_copied(result.snapshot)
    for first, clusters in held:
        assert clusters == set(range(first, DISKS["vda"] // CLUSTER))


async def test_disks_advance_in_proportion(make: Make) -> None:
    world = make(disks={"vda": 16 * CLUSTER, "vdb": 4 * CLUSTER})
    world.options = replace(world.options, discard=Discard.WINDOW)
    await world.back_up()
    order = [str(job["device"])[-7] for job in jobs(world)]
    assert sorted(order) == ["0"] * 8 + ["1"] * 2
    assert order.index("1") <= 1
    second = len(order) - 1 - order[::-1].index("1")
    assert order[:second].count("0") >= 3, order  # half of the small disk, then half of the large one


async def test_what_holds_most_goes_first(by_windows: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def allocated(descriptor: int) -> list[tuple[int, int]]:  # noqa: ARG001
        return [(5 * CLUSTER, CLUSTER)]

    monkeypatch.setattr(tools, "allocated", allocated)
    result = await by_windows.back_up()
    by_windows.assert_copied(result.snapshot)
    assert [offset // CLUSTER for offset, _ in copied(by_windows, 0)] == [4, 0, 2, 6]


@pytest.mark.parametrize("failures", [1, windows.TRIES - 1])
async def test_a_window_that_failed_is_tried_again(by_windows: World, failures: int, before: list[str]) -> None:
    qemu, left = by_windows.qemu, failures

    def fail(job: Job) -> None:
        nonlocal left
        qemu.target_error = None
        if job.first == 4 and left:
            left -= 1
            qemu.target_error = "Input/output error"

    qemu.during_copy = fail
    result = await by_windows.back_up()
    assert result.outcome is Outcome.SUCCEEDED, result.error
    by_windows.assert_copied(result.snapshot)
    assert [offset // CLUSTER for offset, _ in copied(by_windows, 0)] == [0, 2, *[4] * (failures + 1), 6]
    assert len(discards(by_windows)) == 6
    await by_windows.assert_nothing_is_left(before)


async def test_a_window_that_keeps_failing_fails_the_run(by_windows: World, before: list[str]) -> None:
    by_windows.qemu.target_error = "Input/output error"
    assert failed_with(await by_windows.back_up()) == "target-write-failed"
    assert len(copied(by_windows, 0)) <= windows.TRIES
    assert max(len(copied(by_windows, 0)), len(copied(by_windows, 1))) == windows.TRIES
    await by_windows.assert_nothing_is_left(before)
    await by_windows.assert_nothing_is_listed()


@pytest.mark.parametrize("trouble", ["full", "broken"])
async def test_what_cannot_get_better_is_not_tried_again(
    by_windows: World, trouble: str, before: list[str]
) -> None:
    qemu = by_windows.qemu
    if trouble == "full":
        qemu.target_error = "No space left on device"
    else:
        qemu.during_copy = lambda job: qemu.break_snapshot("vda") if job.first == 4 else None
    code = {"full": "target-full", "broken": "copy-timeout"}[trouble]
    assert failed_with(await by_windows.back_up()) == code
    tried = [offset for offset, _ in copied(by_windows, 0)]
    assert len(tried) == len(set(tried))
    await by_windows.assert_nothing_is_left(before)


async def test_a_connection_that_is_lost_between_windows_fails_nothing(
    by_windows: World, before: list[str]
) -> None:
    seen = 0

    def cut(command: Command) -> None:
        nonlocal seen
        if "flush" in str(command.arguments.get("command-line")):
            seen += 1

    by_windows.qemu.before = cut
    by_windows.qemu.during_copy = lambda job: by_windows.qemu.cut() if job.first == 2 else None
    result = await by_windows.back_up()
    assert result.outcome is Outcome.SUCCEEDED, result.error
    by_windows.assert_copied(result.snapshot)
    assert seen >= 6
    await by_windows.assert_nothing_is_left(before)


async def test_an_incremental_copy_is_one_job(by_windows: World) -> None:
    assert (await by_windows.back_up()).outcome is Outcome.SUCCEEDED
    by_windows.qemu.guest_writes("vda", 0, b"new")
    by_windows.qemu.executed.clear()
    result = await by_windows.back_up(run=OTHER_RUN)
    assert result.outcome is Outcome.SUCCEEDED, result.error
    by_windows.assert_copied(result.snapshot)
    assert (len(jobs(by_windows)), discards(by_windows)) == (2, [])
    assert all(job["discard-source"] for job in jobs(by_windows))


async def test_bandwidth_is_shared_by_size(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "WINDOW_BYTES", MIB)
    world = make(disks={"vda": 12 * CLUSTER, "vdb": 4 * CLUSTER})
    world.options = replace(world.options, discard=Discard.WINDOW)
    await world.back_up(bwlimit=16 << 20)
    assert [job["speed"] for job in jobs(world)] == [12 << 20, 4 << 20]


async def test_a_dead_runs_window_is_taken_out(by_windows: World, before: list[str]) -> None:
    """Its process died while a window was copied: that job and its nodes are still there."""
    qemu = by_windows.qemu
    qemu.automatic = False
    task = asyncio.ensure_future(by_windows.back_up())
    await settled(lambda: any("copy-0" in one for one in qemu.ours()))
    names = DiskNames(RUN, 0)
    assert {names.source_window, names.target_window} <= qemu.nodes.keys()
    taking_out = graph.removal(
        run_prefix(RUN),
        roles=DISMANTLING,
        nodes=qemu.user("query-named-block-nodes"),
        block=qemu.user("query-block"),
        graph=qemu.user("x-debug-query-block-graph"),
    )
    deleted = [command.arguments["node-name"] for command in taking_out if command.name == "blockdev-del"]
    assert deleted.index(names.source_window) < deleted.index(names.snapshot)
    assert deleted.index(names.target_window) < deleted.index(names.target)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await by_windows.assert_nothing_is_left(before)
