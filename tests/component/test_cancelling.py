"""A run that is cancelled, at whichever of its steps: everything is put back before the cancellation comes out."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.model import Outcome
from orchestrator.target.images.target import ImagesTarget
from tests.component.steps import Steps
from tests.component.test_trouble import SHAPES, SMALL, Shape
from tests.component.world import HANGS_SECONDS, World, make_world, open_descriptors

SAMPLES = 160
ENOUGH = 8
"""So many failures tell it all."""
SLOW_SAMPLES = 24


def sampled(count: int, samples: int, *, offset: int = 0) -> range:
    """Steps to try: all of them, or evenly spread ones."""
    return range(offset % max(1, count // samples), count, max(1, count // samples))


async def cancelled_at(world: World, shape: Shape, *at: int) -> tuple[Steps, str]:
    """A run that is cancelled at these steps, and what is wrong with how it ended ("" if nothing is)."""
    steps = Steps(*at)
    try:
        async with asyncio.timeout(HANGS_SECONDS):
            result = await steps.run(world.back_up(fleecing=shape.fleecing, bwlimit=shape.bwlimit))
    except asyncio.CancelledError:
        (told,) = world.cancelled
        return steps, "" if told.outcome is Outcome.CANCELLED else f"the result says {told.outcome}"
    except TimeoutError:
        return steps, "the run hangs"
    if steps.count <= at[0] + 1:
        return steps, ""  # the last step was over before
    return steps, f"the cancellation was swallowed: {result.outcome}, {result.error}"


async def what_is_wrong(world: World, shape: Shape, at: tuple[int, ...]) -> str:
    before, status = open_descriptors(), world.qemu.status
    _, wrong = await cancelled_at(world, shape, *at)
    try:
        assert not wrong, wrong
        listed = await world.target.snapshots()
        if not listed:  # otherwise it was cancelled after its commit
            await world.assert_nothing_is_listed()
        await world.assert_nothing_is_left(before, status=status)
    except AssertionError as error:
        return str(error).partition("\n")[0] or "?"
    return ""


async def sweep(make: Callable[[], World], shape: Shape, choose: Callable[[int], Any]) -> None:
    steps = Steps()
    result = await steps.run(make().back_up(fleecing=shape.fleecing, bwlimit=shape.bwlimit))
    assert result.error is None, result.error
    found = []
    for at in choose(steps.count):
        moments = at if isinstance(at, tuple) else (at,)
        if wrong := await what_is_wrong(make(), shape, moments):
            found.append(f"step {moments} of {steps.count}: {wrong}")
        if len(found) == ENOUGH:
            break
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.usefixtures("before", "quick_images", "small_grants")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
async def test_cancelled_at_any_step(shape: Shape, tmp_path: Path) -> None:
    await sweep(lambda: shape.make(tmp_path), shape, lambda count: sampled(count, SAMPLES))


@pytest.mark.usefixtures("before", "quick_images", "small_grants")
@pytest.mark.parametrize("later", [1, 3, 10])
async def test_cancelled_again_while_it_is_undone(later: int, tmp_path: Path) -> None:
    shape = SHAPES[0]
    await sweep(
        lambda: shape.make(tmp_path),
        shape,
        lambda count: [(at, at + later, at + 2 * later) for at in sampled(count, SAMPLES // 3, offset=later)],
    )


@pytest.mark.usefixtures("before")
async def test_cancelled_with_a_real_target_and_real_images(tmp_path: Path) -> None:
    shape = SHAPES[0]

    def make() -> World:
        world = make_world(tmp_path, disks=SMALL, target=ImagesTarget("main", tmp_path / "target"))
        for snapshot in (tmp_path / "target").glob("*/*"):
            for file in snapshot.iterdir():
                file.unlink()
            snapshot.rmdir()
        return world

    await sweep(make, shape, lambda count: sampled(count, SLOW_SAMPLES))


async def test_the_last_word_on_a_cancelled_run(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    task = asyncio.ensure_future(world.back_up())
    world.qemu.during_copy = lambda _job: task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (result,) = world.cancelled
    assert result.outcome is Outcome.CANCELLED
    assert result.snapshot is None
    assert result.error is not None
    assert result.error.code == "cancelled"


async def test_a_guest_that_was_shut_down_is_no_obstacle_to_cancelling(tmp_path: Path, before: list[str]) -> None:
    world = make_world(tmp_path)
    task = asyncio.ensure_future(world.back_up())

    def shut_down(_job: object) -> None:
        world.qemu.kill()
        task.cancel()

    world.qemu.during_copy = shut_down
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert world.cancelled
    await world.assert_nothing_is_left(before)
    await world.assert_nothing_is_listed()


async def test_a_run_that_is_cancelled_once_its_snapshot_is_listed_names_it(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    task = asyncio.ensure_future(world.back_up())
    world.qemu.before = lambda _command: bool(world.fake_target.listed) and task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (told,) = world.cancelled
    (listed,) = world.fake_target.listed
    assert told.snapshot == listed.id
