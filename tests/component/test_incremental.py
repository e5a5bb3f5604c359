"""Incremental backups: whatever happens in between, each snapshot is whole, and little is copied for it."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import CommandFailed
from orchestrator.fleecing.bitmaps import name_of
from orchestrator.fleecing.names import IMAGE, role_of
from orchestrator.model import Kind, Outcome, RunResult
from orchestrator.qemu.commands import QUERY_NODE_STATS, Command
from orchestrator.target.base import ParentUnusable
from tests.component.fake_blocks import CLUSTER
from tests.component.fake_monitor import Trouble
from tests.component.fake_target import FakeTarget
from tests.component.steps import Steps
from tests.component.world import MIB, World, failed_with

Make = Callable[..., World]
SIZE = 2 * MIB
CLUSTERS = SIZE // CLUSTER
pytestmark = pytest.mark.usefixtures("quick_images")


@pytest.fixture(params=[True, False], ids=["QEMU 9.1 or later", "older QEMU"])
def world(make: Make, request: pytest.FixtureRequest) -> World:
    return make(disks={"vda": SIZE, "vdb": MIB}, discard_source=request.param)


def write(world: World, disk: str, cluster: int, text: str) -> None:
    world.qemu.guest_writes(disk, cluster * CLUSTER, text.encode())


async def backed_up(world: World, *, number: int) -> RunResult:
    """A backup that succeeds, and whose snapshot is right."""
    result = await world.back_up(run=f"{number:08x}")
    assert result.error is None, result.error
    assert result.warnings == ()
    world.assert_copied(result.snapshot)
    return result


def bitmaps(world: World, disk: str = "vda") -> dict[str, Any]:
    return world.qemu.nodes[world.qemu.devices[disk].own_node].bitmaps


async def test_only_what_changed_is_copied(world: World, before: list[str]) -> None:
    first = await backed_up(world, number=1)
    assert (first.kind, first.reason) == (Kind.FULL, "vda, vdb: there is no bitmap of its changes")
    for number in range(2, 6):
        write(world, "vda", number, f"changed for {number}")
        write(world, "vda", CLUSTERS - 1, f"changed for {number}")
        previous = world.fake_target.listed[-1]
        result = await backed_up(world, number=number)
        assert (result.kind, result.reason) == (Kind.INCREMENTAL, f"vda, vdb: since {previous.id}")
        assert [disk.copied_bytes for disk in result.disks] == [2 * CLUSTER, 0]
        assert {disk.parent for disk in world.fake_target.listed[-1].disks} == {previous.id}
        assert list(bitmaps(world)) == list(bitmaps(world, "vdb")) == [name_of("main", result.snapshot or "")]
    await world.assert_nothing_is_left(before)


async def test_what_is_written_at_any_step_is_in_the_snapshot_or_in_the_next_one(world: World) -> None:
    """A write that were in neither would be missing from the chain for ever."""
    await backed_up(world, number=1)
    steps = 0

    def between(_command: Command) -> None:
        nonlocal steps
        if world.qemu.running:
            steps += 1
            for disk in ("vda", "vdb"):
                write(world, disk, steps % 16, f"before step {steps}")

    world.qemu.before = between
    for number in range(2, 5):
        await backed_up(world, number=number)
    world.qemu.before = lambda _command: None
    result = await backed_up(world, number=5)
    assert result.kind is Kind.INCREMENTAL
    assert steps > 60
    for disk in ("vda", "vdb"):
        assert world.fake_target.contents[str(result.snapshot), disk] == world.qemu.content(disk)


@pytest.mark.parametrize("step", ["add_disk", "seal", "commit"])
async def test_after_a_failure_the_next_one_is_incremental_and_right(world: World, step: str) -> None:
    first = await backed_up(world, number=1)
    write(world, "vda", 3, "before the failure")

    def fail(now: str) -> None:
        if now == step:
            raise RuntimeError("the test wants it so")

    world.fake_target.before = fail
    result = await world.back_up(run="00000002")
    assert result.outcome is Outcome.FAILED
    world.fake_target.before = lambda _step: None
    assert list(bitmaps(world)) == [name_of("main", first.snapshot or "")]
    write(world, "vda", 5, "after it")
    result = await backed_up(world, number=3)
    assert result.kind is Kind.INCREMENTAL
    assert result.disks[0].copied_bytes == 2 * CLUSTER


async def test_cancelled_at_any_step_the_next_one_is_incremental_and_right(make: Make) -> None:
    world = make(disks={"vda": MIB})
    await backed_up(world, number=1)
    number, cancel_at = 1, 0
    while True:
        number += 1
        write(world, "vda", number % 16, f"before {number}")
        steps = Steps(cancel_at)
        world.qemu.before = lambda _command: (
            world.qemu.running and write(world, "vda", 1, f"{len(world.qemu.executed)}")
        )
        try:
            await steps.run(world.back_up(run=f"{number:08x}"))
        except asyncio.CancelledError:
            pass
        else:
            break
        world.qemu.before = lambda _command: None
        cancel_at += 3
    assert cancel_at > 60
    world.qemu.before = lambda _command: None
    result = await backed_up(world, number=number + 1)
    assert result.kind is Kind.INCREMENTAL
    assert world.fake_target.contents[str(result.snapshot), "vda"] == world.qemu.content("vda")


async def test_what_could_not_be_settled_is_settled_by_the_next_run(make: Make) -> None:
    """As after a kill: the old bitmap is disabled, the new one belongs to a snapshot that never came to be."""
    world = make(disks={"vda": SIZE})
    await backed_up(world, number=1)
    write(world, "vda", 1, "before")
    world.qemu.during_copy = lambda _job: world.qemu.break_snapshot("vda")
    world.qemu.before = lambda asked: (
        asked == QUERY_NODE_STATS and world.troubles.on("transaction", Trouble.REFUSED)
    )
    assert (await world.back_up(run="00000002")).outcome is Outcome.FAILED
    assert len(bitmaps(world)) == 2
    assert [one.recording for one in bitmaps(world).values()] == [False, True]
    write(world, "vda", 2, "after")
    world.troubles.when.clear()
    world.qemu.before, world.qemu.during_copy = (lambda _command: None), (lambda _job: None)
    result = await backed_up(world, number=3)
    assert result.kind is Kind.INCREMENTAL
    assert result.disks[0].copied_bytes == 2 * CLUSTER


async def test_one_disks_fallback_does_not_force_the_others(world: World) -> None:
    first = await backed_up(world, number=1)
    world.qemu.add_disk("vdc", bytes(MIB))
    bitmaps(world, "vdb")[name_of("main", first.snapshot or "")].inconsistent = True
    result = await backed_up(world, number=2)
    assert result.kind is Kind.INCREMENTAL
    assert result.reason == (
        f"vda: since {first.snapshot}; vdb: its bitmap is inconsistent: QEMU was not shut down cleanly;"
        " vdc: there is no bitmap of its changes"
    )
    assert (await backed_up(world, number=3)).reason == f"vda, vdb, vdc: since {result.snapshot}"


async def test_a_foreign_bitmap_is_left_alone(world: World) -> None:
    from tests.component.fake_blocks import Bitmap

    for name in ("libvirt-checkpoint", "vmfleece:other:web01/0"):
        bitmaps(world)[name] = Bitmap()
    for number in range(1, 4):
        await backed_up(world, number=number)
    assert {"libvirt-checkpoint", "vmfleece:other:web01/0"} < set(bitmaps(world))


async def test_without_its_parent_on_the_target_a_disk_is_copied_whole(world: World) -> None:
    await backed_up(world, number=1)
    world.fake_target.listed.clear()
    result = await backed_up(world, number=2)
    assert result.reason == "vda, vdb: the snapshot that its bitmap records since is gone"
    assert len(bitmaps(world)) == 1


async def test_what_the_target_cannot_build_on_is_copied_whole_in_the_same_run(
    world: World, before: list[str]
) -> None:
    first = await backed_up(world, number=1)
    write(world, "vda", 3, "changed")
    seen: list[str] = []
    world.fake_target.before = lambda step: refuse_at_first_disk(step, seen)
    result = await backed_up(world, number=2)
    assert result.reason == f"vda: chunks of it are gone; vdb: since {first.snapshot}"
    assert seen.count("add_disk") == 3
    assert [one.recording for one in bitmaps(world).values()] == [True]
    await world.assert_nothing_is_left(before)


def refuse_at_first_disk(step: str, seen: list[str]) -> None:
    seen.append(step)
    if seen.count("add_disk") == 1 and step == "add_disk":
        raise ParentUnusable("chunks of it are gone")


async def test_a_bitmap_that_is_finer_than_what_the_target_stores_is_of_no_use(world: World) -> None:
    await backed_up(world, number=1)
    world.fake_target.granule_bytes = 2 * CLUSTER
    result = await backed_up(world, number=2)
    assert result.reason == "vda, vdb: its bitmap has a granularity of 64.0 KiB, not 128.0 KiB"
    assert [one.granularity for one in bitmaps(world).values()] == [2 * CLUSTER]
    assert (await backed_up(world, number=3)).kind is Kind.INCREMENTAL


async def test_bitmaps_outlast_the_vm_where_the_image_can_hold_them(world: World) -> None:
    world.qemu.nodes[world.qemu.devices["vdb"].own_node].driver = "raw"
    await backed_up(world, number=1)
    assert [one.persistent for one in (*bitmaps(world).values(), *bitmaps(world, "vdb").values())] == [True, False]


async def test_full_when_asked_for(world: World) -> None:
    await backed_up(world, number=1)
    options = world.options
    world.options = replace(options, full=True)
    result = await backed_up(world, number=2)
    assert (result.kind, result.reason) == (Kind.FULL, "vda, vdb: asked for")
    world.options = replace(options, full_every=2)
    assert (await backed_up(world, number=3)).kind is Kind.INCREMENTAL
    result = await backed_up(world, number=4)
    assert (result.kind, result.reason) == (Kind.FULL, "vda, vdb: its chain has 2 snapshots (full_every)")


async def test_a_resized_disk_is_copied_whole(make: Make) -> None:
    world = make(disks={"vda": SIZE})
    await backed_up(world, number=1)
    node = world.qemu.nodes[world.qemu.devices["vda"].own_node]
    assert node.content is not None
    node.content += bytes(MIB)
    node.size += MIB
    result = await backed_up(world, number=2)
    assert result.reason == "vda: it was resized from 2.0 MiB to 3.0 MiB"


async def test_a_broken_incremental_names_its_reason(make: Make) -> None:
    world = make(disks={"vda": SIZE}, target=FakeTarget("main"))
    await backed_up(world, number=1)
    write(world, "vda", 1, "x")
    world.qemu.target_error = "No space left on device"
    assert failed_with(await world.back_up(run="00000002")) == "target-full"


async def test_an_image_that_cannot_be_written_breaks_the_snapshot_and_is_no_bug(
    make: Make, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make(disks={"vda": SIZE, "vdb": MIB})
    await backed_up(world, number=1)
    write(world, "vda", 0, "changed")
    reopen = world.qemu._blockdev_reopen

    def flushed_first(arguments: dict[str, Any]) -> Any:
        if role_of(arguments["options"][0]["node-name"]) != IMAGE:
            return reopen(arguments)
        world.qemu.break_snapshot("vda")
        raise CommandFailed("blockdev-reopen", "Error flushing drive: Input/output error")

    monkeypatch.setattr(world.qemu, "_blockdev_reopen", flushed_first)
    assert failed_with(await world.back_up(run="00000002")) == "copy-timeout"
    await world.assert_nothing_is_left(before)
    monkeypatch.undo()
    assert (await backed_up(world, number=3)).kind is Kind.INCREMENTAL
