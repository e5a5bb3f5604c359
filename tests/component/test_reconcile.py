"""Putting right what dead runs have left, everywhere at once; and leaving alone what is not provably theirs."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.fleecing.bitmaps import name_of
from orchestrator.fleecing.names import DiskNames
from orchestrator.run.reconcile import Act
from orchestrator.service.engine import Engine
from orchestrator.state import journal
from orchestrator.target.images.target import ImagesTarget
from tests.component.fake_agent import FakeAgent
from tests.component.fake_blocks import Bitmap
from tests.component.fake_monitor import Trouble
from tests.component.test_admission import OPTIONS, held, left_by_a_dead_process, opened
from tests.component.test_failing import leave
from tests.component.world import MIB, OTHER_RUN, World

Make = Callable[..., World]
pytestmark = pytest.mark.usefixtures("quick_images")


@pytest.fixture
def world(make: Make) -> World:
    return make(disks={"vda": MIB})


async def backed_up(one: Engine) -> None:
    result = await one.back_up("web01", OPTIONS, on_progress=lambda _progress: None)
    assert result.error is None, result.error


def state(world: World) -> object:
    """All that could be changed by a repair."""
    nodes = {
        name: sorted((bitmap, one.recording) for bitmap, one in node.bitmaps.items())
        for name, node in world.qemu.nodes.items()
    }
    return nodes, sorted(world.qemu.jobs), [device.node for device in world.qemu.devices.values()]


async def test_all_that_is_left_is_put_right_and_a_dry_run_only_tells(
    world: World, before: list[str], tmp_path: Path
) -> None:
    async with opened(world) as one:
        await backed_up(one)
        one.catalogue.begin(OTHER_RUN, "web01", None, datetime.now(UTC))
    own = world.qemu.nodes[world.qemu.devices["vda"].own_node].bitmaps
    own[name_of("main", "web01/never")] = Bitmap()  # of a snapshot that never came to be
    leave(world, OTHER_RUN)
    await left_by_a_dead_process(world)
    agent = FakeAgent()
    async with agent.serving(tmp_path / "web01.qga"):
        agent.frozen = 2
        intents = journal.Journal(world.folder / "state")
        intents.intend(journal.Act.FREEZE, vm="web01", run=OTHER_RUN, subject=str(tmp_path / "web01.qga"))
        was = state(world)
        async with opened(world, recover=False) as one:
            planned = await one.reconciler.plan()
            assert [repair.act for repair in planned] == [Act.THAW, Act.TAKE_OUT, Act.GIVE_BACK]
            assert state(world) == was
            assert (agent.frozen, await held(world)) == (2, 100 * MIB)
            repaired = await one.reconciler.put_right()
            assert [done.repair for done in repaired[:3]] == planned
            assert [done.repair.act for done in repaired[3:]] == [Act.SETTLE_BITMAPS]
            assert [done.error for done in repaired] == [None] * 4
            assert await one.reconciler.plan() == []
            assert (agent.frozen, await held(world)) == (0, 0)
            assert list(own) == [name_of("main", world.fake_target.listed[0].id)]
            await backed_up(one)
    await world.assert_nothing_is_left(before)


async def test_what_is_a_strangers_is_told_and_left(world: World) -> None:
    leave(world, OTHER_RUN)  # nobody has entered it in our catalogue
    own = world.qemu.nodes[world.qemu.devices["vda"].own_node].bitmaps
    own["vmfleece:elsewhere:web01/1"] = own["libvirt-1"] = Bitmap()
    was = state(world)
    async with opened(world, recover=False) as one:
        (repair,) = planned = await one.reconciler.plan()
        assert (repair.act, repair.subject) == (Act.NOTHING, OTHER_RUN)
        await one.reconciler.carry_out(planned)
    assert state(world) == was


async def test_bitmaps_are_left_alone_if_their_target_lists_nothing(world: World) -> None:
    """It may only not be mounted."""
    async with opened(world, recover=False) as one:
        await backed_up(one)
        world.fake_target.listed.clear()
        assert await one.reconciler.plan() == []


async def test_a_grant_stays_if_taking_out_fails(world: World) -> None:
    async with opened(world) as one:
        one.catalogue.begin(OTHER_RUN, "web01", None, datetime.now(UTC))
    leave(world, OTHER_RUN)
    await left_by_a_dead_process(world)
    world.qemu.before = lambda asked: (  # which is asked for each time that it is tried
        asked.name == "query-block" and world.troubles.on("blockdev-del", Trouble.REFUSED)
    )
    async with opened(world, recover=False) as one:
        planned = await one.reconciler.plan()
        assert [repair.act for repair in planned] == [Act.TAKE_OUT, Act.GIVE_BACK]
        repaired = await one.reconciler.carry_out(planned)
        assert all(done.error is not None for done in repaired)
        assert await held(world) == 100 * MIB


async def test_a_vm_that_is_gone_or_silent(world: World) -> None:
    await left_by_a_dead_process(world)
    world.qemu.accepts = False
    async with opened(world, recover=False) as one:
        (repair,) = await one.reconciler.plan()
        assert repair.act is Act.NOTHING
    world.qemu.kill()
    async with opened(world, recover=False) as one:
        await one.reconciler.carry_out(await one.reconciler.plan())
        assert await held(world) == 0


async def test_what_dead_writers_left_on_a_target_is_cleared(make: Make, tmp_path: Path) -> None:
    target = ImagesTarget("main", tmp_path / "backup")
    world = make(disks={"vda": MIB}, target=target)
    left = tmp_path / "backup" / "web01" / "20261122T023000Z.partial"
    left.mkdir(parents=True)
    draft = await target.begin("db01", datetime.now(UTC))
    async with opened(world, recover=False) as one:
        planned = await one.reconciler.plan()
        assert [(repair.act, repair.subject) for repair in planned] == [(Act.CLEAR_TARGET, "main")]
        assert str(left) in planned[0].reason
        await one.reconciler.carry_out(planned)
    assert not left.exists()
    assert list((tmp_path / "backup" / "db01").iterdir()) != []  # its writer lives
    await draft.abort()


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
async def test_a_paused_guest_with_leftovers_goes_on_only_if_the_journal_is_lost(
    make: Make, *, damaged: bool
) -> None:
    world = make(disks={"vda": MIB}, discard_source=False)
    async with opened(world, recover=False) as one:
        one.catalogue.begin(OTHER_RUN, "web01", None, datetime.now(UTC))
    world.qemu.user("blockdev-add", **{"driver": "null-co", "node-name": DiskNames(OTHER_RUN, 0).image})
    world.qemu.user("stop")
    if damaged:
        (world.folder / "state" / "journal.sqlite").write_bytes(b"no database")
    async with opened(world, recover=False) as one:
        repaired = await one.reconciler.put_right()
        assert [done.error for done in repaired] == [None] * len(repaired)
    assert world.qemu.running is damaged
