"""A run gives way to its guest: its jobs go slower while writes take longer than the VM's budget."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from orchestrator import log
from orchestrator.fleecing import boundary
from orchestrator.model import RunResult
from orchestrator.run import copy, sampling
from orchestrator.run.throttle import FLOOR_BYTES_PER_SECOND
from tests.component.fake_blocks import CLUSTER
from tests.component.fake_monitor import Trouble
from tests.component.world import MIB, World

Make = Callable[..., World]
BUDGET_SECONDS = 0.02
SLOW_NS, FAST_NS = 100_000_000, 1_000_000


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that seconds of a run pass in moments. Rates are by the real clock: large ones."""
    monkeypatch.setattr(sampling, "SAMPLE_SECONDS", 0.02)
    monkeypatch.setattr(copy, "PROGRESS_SECONDS", 0.01)


class Copying:
    """A run whose jobs copy a cluster every few milliseconds, while its guest writes."""

    def __init__(self, world: World, *, budget_seconds: float | None, bwlimit: int) -> None:
        self._world = world
        world.qemu.automatic = False
        self._vm = replace(world.vm, latency_budget_seconds=budget_seconds)
        self._bwlimit = bwlimit

    async def run(self) -> RunResult:
        return await self._world.back_up(vm=self._vm, bwlimit=self._bwlimit)

    async def go_on(self) -> None:
        """The guest writes, and the jobs copy, until cancelled."""
        while True:
            for job in [job for job in self._world.qemu.jobs.values() if job.status == "running"]:
                self._world.qemu.guest_writes("vda", 0, b"new")
                self._world.qemu.step(job.id)
            await asyncio.sleep(0.005)

    async def until(self, seen: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not seen():
                await asyncio.sleep(0.002)

    @property
    def speeds(self) -> list[int]:
        return [job.speed for job in self._world.qemu.jobs.values()]


@contextlib.asynccontextmanager
async def copying(
    world: World, *, budget_seconds: float | None = BUDGET_SECONDS, bwlimit: int = 0
) -> AsyncIterator[tuple[Copying, "asyncio.Task[RunResult]"]]:
    one = Copying(world, budget_seconds=budget_seconds, bwlimit=bwlimit)
    async with asyncio.TaskGroup() as group:
        run = group.create_task(one.run())
        going = group.create_task(one.go_on())
        await one.until(lambda: any(job.status == "running" for job in world.qemu.jobs.values()))
        yield one, run
        await run
        going.cancel()


async def test_a_copy_gives_way_and_goes_on_when_the_guest_is_calm_again(
    make: Make,
    capfd: pytest.CaptureFixture[str],  # first: it opens files, too
    before: list[str],
) -> None:
    capfd.readouterr()
    log.configure(log_format="json", level="info")
    world = make(disks={"vda": 32 * MIB})
    world.qemu.write_ns = SLOW_NS
    async with copying(world) as (one, run):
        await one.until(lambda: one.speeds == [FLOOR_BYTES_PER_SECOND])
        await one.until(lambda: world.progress[-1].slowed_to_bytes_per_second == FLOOR_BYTES_PER_SECOND)
        world.qemu.write_ns = FAST_NS
        await one.until(lambda: one.speeds == [0])
        world.qemu.automatic = True
    result = run.result()
    assert result.error is None, result.error
    set_speeds = [
        command.arguments["speed"] for command in world.qemu.executed if command.name == "block-job-set-speed"
    ]
    first = set_speeds[0]
    down = list(dict.fromkeys(set_speeds[: set_speeds.index(FLOOR_BYTES_PER_SECOND) + 1]))
    assert down == [*dict.fromkeys(max(FLOOR_BYTES_PER_SECOND, first >> times) for times in range(len(down)))]
    assert result.slowed_seconds is not None
    assert 0 < result.slowed_seconds < result.duration_seconds
    assert world.progress[-1].slowed_to_bytes_per_second is None
    logs = map(json.loads, capfd.readouterr().err.splitlines())
    told = [one for one in logs if one["event"] in ("copy.slowed", "copy.released")]
    assert [one["event"] for one in told] == ["copy.slowed", "copy.released"]
    assert told[0]["write_ms"] == 100
    assert told[0]["budget_ms"] == 20
    assert told[0]["limit_bytes_per_second"] == first
    world.assert_copied(result.snapshot)
    await world.assert_nothing_is_left(before)


async def test_without_a_budget_nothing_is_slowed(make: Make) -> None:
    world = make(disks={"vda": 2 * MIB})
    world.qemu.write_ns = SLOW_NS
    async with copying(world, budget_seconds=None) as (one, run):
        await one.until(lambda: len(world.progress[-1].recent_write_ms) > 5)
        world.qemu.automatic = True
    assert run.result().slowed_seconds is None
    assert (run.result().guest_writes or pytest.fail("nothing was measured")).mean_ms == 100
    assert not [command for command in world.qemu.executed if command.name == "block-job-set-speed"]


async def test_a_configured_limit_is_gone_back_to_and_never_passed(make: Make) -> None:
    world = make(disks={"vda": 8 * MIB, "vdb": 8 * MIB})
    world.qemu.write_ns = SLOW_NS
    limit = 4 * MIB
    async with copying(world, bwlimit=limit) as (one, _):
        await one.until(lambda: one.speeds == [FLOOR_BYTES_PER_SECOND // 2] * 2)
        world.qemu.write_ns = FAST_NS
        await one.until(lambda: one.speeds == [limit // 2] * 2)
        world.qemu.automatic = True
    set_speeds = [
        command.arguments["speed"] for command in world.qemu.executed if command.name == "block-job-set-speed"
    ]
    assert all(FLOOR_BYTES_PER_SECOND // 2 <= speed <= limit for speed in set_speeds)


async def test_windows_that_begin_meanwhile_are_slowed_too(
    make: Make, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary, "WINDOW_BYTES", 16 * CLUSTER)
    world = make(disks={"vda": 16 * MIB}, discard_source=False)
    world.qemu.write_ns = SLOW_NS
    async with copying(world) as (one, run):
        await one.until(lambda: one.speeds == [FLOOR_BYTES_PER_SECOND])
        slowed = set(world.qemu.jobs)
        await one.until(lambda: bool(world.qemu.jobs) and not slowed & set(world.qemu.jobs))
        assert one.speeds == [FLOOR_BYTES_PER_SECOND]  # from its beginning on
        world.qemu.write_ns = FAST_NS
        world.qemu.automatic = True
    assert run.result().error is None, run.result().error
    world.assert_copied(run.result().snapshot)
    await world.assert_nothing_is_left(before)


@pytest.mark.parametrize("trouble", [Trouble.REFUSED, Trouble.LOST_BEFORE, Trouble.LOST_AFTER])
async def test_a_speed_that_could_not_be_set_fails_nothing_and_is_set_again(
    make: Make, before: list[str], trouble: Trouble
) -> None:
    world = make(disks={"vda": 32 * MIB})
    world.qemu.write_ns = SLOW_NS
    world.troubles.on("block-job-set-speed", trouble)
    async with copying(world) as (one, run):
        await one.until(lambda: one.speeds == [FLOOR_BYTES_PER_SECOND])
        if trouble is not Trouble.REFUSED:
            world.troubles.on("block-job-set-speed", trouble, also=lambda it: it.arguments["speed"] == 0)
        world.qemu.write_ns = FAST_NS
        await one.until(lambda: one.speeds == [0])
        world.qemu.automatic = True
    assert run.result().error is None, run.result().error
    world.assert_copied(run.result().snapshot)
    await world.assert_nothing_is_left(before)
