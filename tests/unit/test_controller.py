"""Admission in time: who holds what while runs come, grow, shrink, give back, fail and are cancelled."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.admission import controller
from orchestrator.admission.controller import Controller, Grant, Lease
from orchestrator.errors import StorageError
from orchestrator.storage.base import ImageFile, Space, Storage

QUOTA = 100


class MemoryFile(ImageFile):
    def __init__(self, used_bytes: int) -> None:
        self.used = used_bytes

    @property
    def descriptor(self) -> int:
        return -1

    def used_bytes(self) -> int:
        return self.used

    def close(self) -> None:
        self.used = 0


class MemoryStorage(Storage):
    def __init__(self, name: str, *, free: int = 10 * QUOTA, floor: int = 0, max_runs: int | None = None) -> None:
        self.name = name
        self.quota_bytes = QUOTA
        self.max_runs = max_runs
        self.free, self.floor, self.broken = free, floor, False

    def prepare(self) -> None: ...

    def create(self) -> ImageFile:
        return MemoryFile(0)

    def space(self) -> Space:
        if self.broken:
            raise StorageError(f"storage {self.name}: gone")
        return Space(self.free, self.floor)

    def nearness(self, image: Path) -> int:
        raise NotImplementedError


class Bench:
    """A controller, and runs that hold their leases until they are told to end."""

    def __init__(
        self, *storages: MemoryStorage, max_runs: int | None = None, target_max: int | None = None
    ) -> None:
        self.storages = {one.name: one for one in storages or (MemoryStorage("fast"), MemoryStorage("slow"))}
        self.controller = Controller(self.storages, max_runs=max_runs, target_max_runs={"main": target_max})
        self.leases: dict[str, Lease] = {}
        self.started: list[str] = []
        self.told: dict[str, list[str]] = defaultdict(list)
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def ask(self, run: str, disks: Mapping[str, Grant] | None = None, *, priority: int = 50) -> bool:
        """Ask for admission; whether it was given at once."""
        self._ends[run] = asyncio.Event()
        self.tasks[run] = asyncio.create_task(self._hold(run, disks or {}, priority))
        await settled()
        return run in self.leases

    async def _hold(self, run: str, disks: Mapping[str, Grant], priority: int) -> None:
        try:
            async with self.controller.admit(
                run=run,
                vm=f"vm-{run}",
                target="main",
                priority=priority,
                disks=disks,
                on_wait=self.told[run].append,
            ) as lease:
                self.leases[run] = lease
                self.started.append(run)
                await self._ends[run].wait()
        finally:
            self.leases.pop(run, None)

    async def end(self, run: str) -> None:
        self._ends[run].set()
        await self.tasks[run]
        await settled()

    async def cancel(self, run: str) -> None:
        self.tasks[run].cancel()
        await asyncio.wait([self.tasks[run]])
        await settled()

    async def end_all(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    def granted(self) -> dict[str, int]:
        return {name: self.controller.granted_bytes(name) for name in self.storages}


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def on(storage: str, *sizes: int) -> dict[str, Grant]:
    return {f"{storage}{at}": Grant(storage, size) for at, size in enumerate(sizes)}


@pytest.fixture
async def stack() -> Any:
    async with AsyncExitStack() as opened:
        yield opened


def bench(stack: AsyncExitStack, *storages: MemoryStorage, **limits: int) -> Bench:
    made = Bench(*storages, **limits)
    stack.push_async_callback(made.end_all)
    return made


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    runs = st.integers(0, 5)
    amounts = st.integers(1, 120)
    disks = st.lists(st.tuples(st.sampled_from(["fast", "slow"]), amounts), max_size=3)
    kinds = [
        st.tuples(st.just("ask"), runs, disks, st.integers(0, 2)),
        st.tuples(st.just("ask"), runs, disks, st.integers(0, 2)),
        st.tuples(st.just("grow"), runs, st.integers(0, 2), st.integers(1, 200)),
        st.tuples(st.just("shrink"), runs, st.integers(0, 2), st.integers(0, 10)),
        st.tuples(st.just("release"), runs, st.integers(0, 2)),
        st.tuples(st.just("end"), runs),
        st.tuples(st.just("cancel"), runs),
        st.tuples(st.just("free"), st.sampled_from(["fast", "slow"]), st.integers(0, 300)),
    ]
    return draw(st.lists(st.one_of(kinds), max_size=25))


@settings(max_examples=150, deadline=None)
@given(steps())
def test_grants_never_exceed_the_quota(sequence: list[tuple[Any, ...]]) -> None:
    asyncio.run(play(sequence))


async def play(sequence: list[tuple[Any, ...]]) -> None:
    made = Bench(max_runs=3)
    try:
        for kind, who, *rest in sequence:
            run = str(who)
            match kind:
                case "ask" if run not in made.tasks:
                    wanted, priority = rest
                    disks = {f"d{at}": Grant(*one) for at, one in enumerate(wanted)}
                    await made.ask(run, disks, priority=priority)
                case "end" if run in made.leases:
                    await made.end(run)
                case "cancel" if run in made.tasks:
                    await made.cancel(run)
                case "free":
                    made.storages[who].free = rest[0]
                case "grow" | "shrink" | "release" if run in made.leases:
                    change(made, made.leases[run], kind, *rest)
                    await settled()
            held = sum_of(made)
            assert made.granted() == held
            assert all(size <= QUOTA for size in held.values())
            assert len(made.leases) <= 3
            assert made.leases.keys().isdisjoint(made.controller.waiting())
    finally:
        await made.end_all()
    assert made.granted() == {"fast": 0, "slow": 0}
    assert made.controller.waiting() == {}


def change(made: Bench, lease: Lease, kind: str, at: int, amount: int = 0) -> None:
    disk = f"d{at}"
    if disk not in lease.grants:
        return
    before = lease.grants[disk].size_bytes
    if kind == "grow":
        granted = made.controller.grow(lease, disk, amount)
        assert granted == lease.grants[disk].size_bytes
        assert before <= granted <= max(before, amount)
    elif kind == "shrink":
        made.controller.shrink(lease, disk, max(0, before - amount))
    else:
        made.controller.release(lease, disk)


def sum_of(made: Bench) -> dict[str, int]:
    held = dict.fromkeys(made.storages, 0)
    for lease in made.leases.values():
        for grant in lease.grants.values():
            held[grant.storage] += grant.size_bytes
    return held


async def test_waiting_runs_start_by_priority_then_arrival(stack: AsyncExitStack) -> None:
    made = bench(stack, max_runs=1)
    assert await made.ask("first")
    for run, priority in (("late", 10), ("one", 50), ("two", 50), ("urgent", 90)):
        assert not await made.ask(run, priority=priority)
    for run in ("first", "urgent", "one", "two"):
        await made.end(run)
    assert made.started == ["first", "urgent", "one", "two", "late"]


async def test_a_run_gets_all_of_its_storages_or_none(stack: AsyncExitStack) -> None:
    made = bench(stack)
    assert await made.ask("a", on("fast", 60))
    assert not await made.ask("b", on("fast", 60) | on("slow", 60))
    assert made.granted() == {"fast": 60, "slow": 0}
    await made.end("a")
    assert made.granted() == {"fast": 60, "slow": 60}


async def test_cancelling_what_waits_holds_nothing_and_lets_others_through(stack: AsyncExitStack) -> None:
    made = bench(stack)
    assert await made.ask("a", on("fast", 60))
    assert not await made.ask("big", on("fast", 100))
    assert not await made.ask("small", on("fast", 40))
    await made.cancel("big")
    assert made.started == ["a", "small"]
    assert made.granted()["fast"] == 100
    assert made.controller.waiting() == {}


async def test_cancelling_in_the_moment_of_admission_gives_everything_back(stack: AsyncExitStack) -> None:
    made = bench(stack)
    await made.ask("a", on("fast", 100))
    await made.ask("b", on("fast", 100))
    made._ends["a"].set()
    while made.controller.waiting():  # b holds its lease, but has not run since
        await asyncio.sleep(0)
    made.tasks["b"].cancel()
    await settled()
    assert made.started == ["a"]
    assert made.granted()["fast"] == 0


async def test_a_disk_that_is_given_back_lets_a_waiting_run_start(stack: AsyncExitStack) -> None:
    made = bench(stack)
    await made.ask("a", on("fast", 60, 40))
    assert not await made.ask("b", on("fast", 40))
    made.controller.release(made.leases["a"], "fast1")
    made.controller.release(made.leases["a"], "fast1")
    await settled()
    assert made.started == ["a", "b"]
    assert made.granted()["fast"] == 100


async def test_an_extension_that_is_taken_back_lets_a_waiting_run_start(stack: AsyncExitStack) -> None:
    made = bench(stack)
    await made.ask("a", on("fast", 50))
    assert made.controller.grow(made.leases["a"], "fast0", 70) == 70
    assert not await made.ask("b", on("fast", 50))
    made.controller.shrink(made.leases["a"], "fast0", 50)
    await settled()
    assert made.started == ["a", "b"]


async def test_growth_comes_before_those_that_wait(stack: AsyncExitStack) -> None:
    made = bench(stack)
    await made.ask("a", on("fast", 50))
    assert not await made.ask("b", on("fast", 60))
    assert made.controller.grow(made.leases["a"], "fast0", 1000) == QUOTA
    assert made.controller.grow(made.leases["a"], "fast0", 1000) == QUOTA
    assert made.controller.grow(made.leases["a"], "fast0", 10) == QUOTA  # never shrinks


async def test_reasons_are_told_once_each(stack: AsyncExitStack) -> None:
    made = bench(stack, max_runs=2)
    await made.ask("a", on("fast", 60))
    await made.ask("b", on("slow", 10))
    await made.ask("c", on("fast", 60))
    storage = "storage fast: 60 B wanted, 40 B free of 100 B"
    assert made.controller.waiting() == {"c": f"host: 2 of 2 runs under way; {storage}"}
    await made.end("b")
    assert made.told["c"] == [f"host: 2 of 2 runs under way; {storage}", storage]
    assert made.told["a"] == []


async def test_a_reason_is_told_in_the_context_of_the_run_that_waits(stack: AsyncExitStack) -> None:
    """Its log line would carry another run's vm and run otherwise."""
    made = bench(stack, max_runs=1)
    seen: list[str] = []

    async def wait_for_admission(run: str) -> None:
        with structlog.contextvars.bound_contextvars(run=run):
            async with made.controller.admit(
                run=run,
                vm=run,
                target="main",
                priority=50,
                disks=on("fast", 60),
                on_wait=lambda _reason: seen.append(structlog.contextvars.get_contextvars()["run"]),
            ):
                pass

    await made.ask("a", on("fast", 60))
    waiting = asyncio.create_task(wait_for_admission("b"))
    await settled()
    with structlog.contextvars.bound_contextvars(run="a"):
        made.controller.shrink(made.leases["a"], "fast0", 50)  # b's reason changes
    await made.end("a")
    await waiting
    assert seen == ["b", "b"]


async def test_limits_of_targets_and_storages_count_runs(stack: AsyncExitStack) -> None:
    made = bench(stack, MemoryStorage("fast", max_runs=1), MemoryStorage("slow"), target_max=2)
    assert await made.ask("a", on("fast", 1, 1))
    assert not await made.ask("b", on("fast", 1))
    assert await made.ask("c", on("slow", 1))
    assert not await made.ask("d", on("slow", 1))
    waiting = made.controller.waiting()
    assert waiting["b"] == "target main: 2 of 2 runs under way; storage fast: 1 of 1 runs under way"
    assert waiting["d"] == "target main: 2 of 2 runs under way"


async def test_a_storage_that_cannot_be_asked_grants_nothing_and_breaks_nobody(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "RECHECK_SECONDS", 0.01)
    made = bench(stack)
    await made.ask("grows", on("fast", 10))
    made.storages["fast"].broken = True
    assert not await made.ask("waits", on("fast", 1))
    assert await made.ask("goes on", on("slow", 1))
    assert made.controller.grow(made.leases["grows"], "fast0", 20) == 10
    made.storages["fast"].broken = False  # nobody tells us: it is asked again
    async with asyncio.timeout(5):
        while "waits" not in made.leases:
            await asyncio.sleep(0.01)


async def test_the_floor_of_the_file_system_is_kept(stack: AsyncExitStack) -> None:
    made = bench(stack, MemoryStorage("fast", free=50, floor=30))
    assert not await made.ask("big", on("fast", 21))
    await made.cancel("big")
    assert await made.ask("fits", on("fast", 20))
    assert made.controller.grow(made.leases["fits"], "fast0", 25) == 20
    assert not await made.ask("none left", on("fast", 1))


async def test_what_an_image_occupies_already_is_not_reserved_twice(stack: AsyncExitStack) -> None:
    made = bench(stack, MemoryStorage("fast", free=50, floor=10))
    assert await made.ask("a", on("fast", 40))
    file = MemoryFile(30)
    made.controller.attach(made.leases["a"], "fast0", file)
    made.storages["fast"].free = 20  # the image took 30 of them; 10 more are promised to it
    assert not await made.ask("b", on("fast", 1))
    made.storages["fast"].free = 21
    assert made.controller.grow(made.leases["a"], "fast0", 100) == 41
