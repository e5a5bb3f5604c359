"""Admission in time: who holds what while runs come, grow, shrink, give back, fail, die and are recovered."""

import asyncio
import contextlib
import gc
import os
import shutil
import socket
import tempfile
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import structlog
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from orchestrator.admission import controller as controller_module
from orchestrator.admission.controller import Controller
from orchestrator.admission.lease import Lease, Waiting
from orchestrator.admission.ledger.base import Grant, Holding, Ledger, Owner
from orchestrator.admission.ledger.memory import MemoryLedger
from orchestrator.admission.ledger.sqlite import SqliteLedger
from orchestrator.errors import FleecingError, StateError, StorageError
from orchestrator.state import database
from orchestrator.storage.base import ImageFile, Lack, Space, Storage
from orchestrator.units import KIB, MIB

T = TypeVar("T")
QUOTA = 100
"""In MiB, as all sizes in these tests."""
HOST = socket.gethostname()


class MemoryFile(ImageFile):
    direct = False

    def __init__(self, used_bytes: int) -> None:
        self.used = used_bytes

    @property
    def descriptor(self) -> int:
        return -1

    def extend(self, length_bytes: int) -> None: ...

    def used_bytes(self) -> int:
        return self.used

    def close(self) -> None:
        self.used = 0


class MemoryStorage(Storage):
    def __init__(self, name: str, *, free: int = 10 * QUOTA, floor: int = 0, max_runs: int | None = None) -> None:
        self.name = name
        self.quota_bytes = QUOTA * MIB
        self.max_runs = max_runs
        self.free, self.floor, self.broken = free, floor, False

    def prepare(self) -> tuple[Lack, ...]:
        return ()

    def create(self, name: str, length_bytes: int) -> ImageFile:
        raise NotImplementedError

    def space(self) -> Space:
        if self.broken:
            raise StorageError(f"storage {self.name}: gone")
        return Space(self.free * MIB, self.floor * MIB)

    def nearness(self, image: Path) -> int:
        raise NotImplementedError


class Desk(Ledger):
    """Passes on what a controller asks of a ledger: can fail it, keep it waiting, and cut it off for good.

    `slow` is how many turns of the loop a call takes before it does anything, and again after it did it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.slow = 0
        self.asked: Counter[str] = Counter()
        self.under_way = 0
        self.kept_waiting = 0
        self.closed = False
        self.cut_off = False
        self._fails: Counter[tuple[str, bool]] = Counter()
        self._kept: dict[tuple[str, bool], asyncio.Event] = {}

    def fail(self, name: str, *, done: bool = False, times: int = 1) -> None:
        """Let the next calls of a name fail, before they did anything, or although they did it."""
        self._fails[name, done] = times

    def keep_waiting(self, *names: str, done: bool = False) -> None:
        """Keep calls, all if none is named, waiting from now on, before they do anything or after they did it."""
        for name in names or ("take", "resize", "give_back", "beat", "holdings"):
            self._kept.setdefault((name, done), asyncio.Event())

    def go_on(self) -> None:
        while self._kept:
            self._kept.popitem()[1].set()

    def cut(self) -> None:
        """The process that asks is dead: no call is begun any more, none that is under way is answered."""
        self.cut_off = True
        self.go_on()

    async def take(self, owner: Owner, grants: Mapping[str, Grant], quotas: Mapping[str, int]) -> bool:
        return await self._pass_on("take", lambda: self.ledger.take(owner, grants, quotas))

    async def resize(self, run: str, disk: str, size_bytes: int, quota_bytes: int) -> int:
        return await self._pass_on("resize", lambda: self.ledger.resize(run, disk, size_bytes, quota_bytes))

    async def give_back(self, run: str, disk: str | None = None) -> None:
        await self._pass_on("give_back", lambda: self.ledger.give_back(run, disk))

    async def beat(self, runs: Sequence[str]) -> None:
        await self._pass_on("beat", lambda: self.ledger.beat(runs))

    async def holdings(self) -> list[Holding]:
        return await self._pass_on("holdings", self.ledger.holdings)

    async def close(self) -> None:
        self.closed = True

    async def _pass_on(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        self.asked[name] += 1
        self.under_way += 1
        try:
            await self._maybe_keep(name, done=False)
            result = await call()
            await self._maybe_keep(name, done=True)
            return result
        finally:
            self.under_way -= 1

    async def _maybe_keep(self, name: str, *, done: bool) -> None:
        for _ in range(self.slow):
            await asyncio.sleep(0)
        if kept := self._kept.get((name, done)):
            self.kept_waiting += 1
            try:
                await kept.wait()
            finally:
                self.kept_waiting -= 1
        if self.cut_off or self._fails[name, done] > 0:
            self._fails[name, done] -= 1
            raise StateError("cannot use the ledger", code="state-unusable")


async def settled(desk: Desk) -> None:
    """Until nothing goes on any more but what waits for somebody."""
    calm = 0
    while calm < 12:
        await asyncio.sleep(0)
        calm = calm + 1 if desk.under_way == desk.kept_waiting else 0


class Bench:
    """A controller, and runs that hold their leases until they are told to end."""

    def __init__(
        self,
        ledger: Ledger,
        *storages: MemoryStorage,
        max_runs: int | None = None,
        target_max: int | None = None,
    ) -> None:
        self.desk = Desk(ledger)
        self.storages = {one.name: one for one in storages or (MemoryStorage("fast"), MemoryStorage("slow"))}
        self.controller = Controller(
            self.storages, self.desk, max_runs=max_runs, target_max_runs={"main": target_max, "other": None}
        )
        self.leases: dict[str, Lease] = {}
        self.started: list[str] = []
        self.told: dict[str, list[str]] = defaultdict(list)
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    def begin(
        self, run: str, disks: Mapping[str, Grant] | None = None, *, priority: int = 50, target: str = "main"
    ) -> None:
        self._ends[run] = asyncio.Event()
        self.tasks[run] = asyncio.create_task(self._hold(run, disks or {}, priority, target))

    async def ask(self, run: str, disks: Mapping[str, Grant] | None = None, **more: Any) -> bool:
        """Ask for admission; whether it was given at once."""
        self.begin(run, disks, **more)
        await self.settled()
        return run in self.leases

    async def _hold(self, run: str, disks: Mapping[str, Grant], priority: int, target: str) -> None:
        try:
            async with self.controller.admit(
                run=run,
                vm=f"vm-{run}",
                target=target,
                priority=priority,
                disks=disks,
                on_wait=lambda waiting: self.told[run].append(str(waiting)),
                monitor=f"/run/{run}.qmp",
            ) as lease:
                self.leases[run] = lease
                self.started.append(run)
                await self._ends[run].wait()
        finally:
            self.leases.pop(run, None)

    def tell_to_end(self, run: str) -> None:
        self._ends[run].set()

    async def end(self, run: str) -> None:
        self.tell_to_end(run)
        await self.tasks[run]
        await self.settled()

    async def cancel(self, run: str) -> None:
        self.tasks[run].cancel()
        await asyncio.wait([self.tasks[run]])
        await self.settled()

    async def end_all(self) -> None:
        self.desk.go_on()
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    async def settled(self) -> None:
        await settled(self.desk)

    async def look(self) -> None:
        """What is done every second, now."""
        async with self.controller._turn:
            await self.controller._reload()
        await self.controller._settle()
        await self.settled()

    async def grow(self, run: str, disk: str, wanted: int) -> int:
        return await self.controller.grow(self.leases[run], disk, wanted * MIB) // MIB

    def granted(self) -> dict[str, int]:
        return {name: self.controller.accounts.granted_bytes(name) // MIB for name in self.storages}

    def waiting(self) -> dict[str, str]:
        return {run: str(waiting) for run, waiting in self.controller.waiting().items()}


async def held(ledger: Ledger) -> dict[str, dict[str, Grant]]:
    return {holding.owner.run: dict(holding.grants) for holding in await ledger.holdings()}


def on(storage: str, *sizes: int) -> dict[str, Grant]:
    return {f"{storage}{at}": Grant(storage, size * MIB) for at, size in enumerate(sizes)}


def dead(run: str, host: str = HOST) -> Owner:
    return Owner(host, 4711, run, f"vm-{run}", f"/run/{run}.qmp")


async def until(reached: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not reached():
            await asyncio.sleep(0.002)


Connect = Callable[[], Ledger]


def in_memory(_folder: Path) -> Connect:
    only = MemoryLedger()
    return lambda: only


def in_a_file(folder: Path) -> Connect:
    return lambda: SqliteLedger(folder / "ledger.sqlite")


KINDS: dict[str, Callable[[Path], Connect]] = {"memory": in_memory, "sqlite": in_a_file}


@contextlib.contextmanager
def quick_folder() -> Iterator[Path]:
    """Where a transaction does not wait for a disk, if there is such a place."""
    memory = Path("/dev/shm")  # noqa: S108  a folder of our own is made in it
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


Make = Callable[..., Bench]


@contextlib.asynccontextmanager
async def benches(connect: Connect) -> AsyncIterator[Make]:
    """Makes benches over clients of one ledger."""
    async with contextlib.AsyncExitStack() as stack:

        def make(*storages: MemoryStorage, **limits: int) -> Bench:
            made = Bench(connect(), *storages, **limits)
            stack.push_async_callback(made.desk.ledger.close)
            stack.push_async_callback(made.end_all)
            return made

        yield make


@pytest.fixture
async def bench() -> AsyncIterator[Make]:
    """For what does not depend on the ledger."""
    async with benches(in_memory(Path())) as make:
        yield make


@pytest.fixture(params=KINDS.values(), ids=KINDS)
async def any_bench(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    with quick_folder() as folder:
        async with benches(request.param(folder)) as make:
            yield make


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storages are looked at all the time."""
    monkeypatch.setattr(controller_module, "WATCH_SECONDS", 0.002)


# --- whatever happens, in whatever order ---

STORAGES = ("fast", "slow")
DISKS = ("d0", "d1", "d2")


class Inline(ThreadPoolExecutor):
    """Does everything at once: if it depended on the machine how far threads get, no example could be repeated."""

    def submit(self, work: Callable[..., T], /, *args: Any, **more: Any) -> "Future[T]":
        done: Future[T] = Future()
        try:
            done.set_result(work(*args, **more))
        except Exception as error:  # noqa: BLE001  it belongs to whoever waits for the result
            done.set_exception(error)
        return done


class Admission(RuleBasedStateMachine):
    """Anything that can happen to runs, their owner and its ledger, also while a call of the ledger is under way.

    `ledger` looks into the ledger beside the controller. What belongs to a run that is over is found there, or
    nowhere.
    """

    kind = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.runner = self.stack.enter_context(asyncio.Runner())
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(database, "ThreadPoolExecutor", Inline)
        self.connect = KINDS[self.kind](self.stack.enter_context(quick_folder()))
        self.ledger = self.connect()
        self.runs = 0
        self.acts: set[asyncio.Task[Any]] = set()
        self.errors: list[BaseException] = []
        self.leaving: set[str] = set()
        self.in_use: dict[str, dict[str, Grant]] = {}

    @initialize()
    def begin(self) -> None:
        self.runner.run(self._begin())

    async def _begin(self) -> None:
        self.bench = Bench(self.connect(), MemoryStorage("fast", max_runs=2), MemoryStorage("slow"), max_runs=3)
        self.bench.desk.slow = 2
        serves = asyncio.Event()

        async def serve(bench: Bench) -> None:
            async with bench.controller.serving():
                serves.set()
                await asyncio.Event().wait()

        self.serving = asyncio.create_task(serve(self.bench))
        await serves.wait()

    # What may be done; `turns` is how far everything gets before the next thing happens: to its end, if None.

    turns = st.sampled_from([None, None, 0, 1, 2, 3, 4, 6, 9])
    any_disk = st.sampled_from(DISKS)
    mibs = st.sampled_from([1, 10, 20, 30, 50, 80])
    grants = st.dictionaries(
        any_disk, st.builds(Grant, st.sampled_from(STORAGES), mibs.map(MIB.__mul__)), max_size=3
    )

    @rule(disks=grants, priority=st.integers(0, 2), to=st.sampled_from(["main", "other"]), turns=turns)
    def ask(self, disks: dict[str, Grant], priority: int, to: str, turns: int | None) -> None:
        self.runs += 1
        self.play(turns, lambda: self.bench.begin(f"r{self.runs}", disks, priority=priority, target=to))

    @rule(storage=st.sampled_from(STORAGES), mib=mibs, turns=turns)
    def ask_for_one_disk(self, storage: str, mib: int, turns: int | None) -> None:
        self.ask({"d0": Grant(storage, mib * MIB)}, 1, "main", turns)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), in_use=st.booleans(), turns=turns)
    def end(self, data: st.DataObject, in_use: bool, turns: int | None) -> None:
        """A run ends; `in_use`: a QEMU may still use its images."""
        run = data.draw(st.sampled_from(self.running))
        self.leaving.add(run)
        lease = self.bench.leases[run]
        lease.stranded = in_use
        if in_use and not self.acts:
            self.in_use[run] = dict(lease.grants)
        self.play(turns, lambda: self.bench.tell_to_end(run))

    @property
    def running(self) -> list[str]:
        return sorted(self.bench.leases.keys() - self.leaving)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), turns=turns)
    def cancel(self, data: st.DataObject, turns: int | None) -> None:
        run = data.draw(st.sampled_from(self.alive))
        self.leaving.add(run)
        self.play(turns, self.bench.tasks[run].cancel)

    @property
    def alive(self) -> list[str]:
        return sorted(run for run, task in self.bench.tasks.items() if not task.done())

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), what=st.sampled_from(["grow", "grow", "shrink", "release"]), mib=mibs, turns=turns)
    def change(self, data: st.DataObject, what: str, mib: int, turns: int | None) -> None:
        lease = self.bench.leases[data.draw(st.sampled_from(self.holders))]
        disk = data.draw(st.sampled_from(sorted(lease.grants)))
        self.play(turns, lambda: self.act(self._change(lease, disk, what, mib * MIB)))

    @property
    def holders(self) -> list[str]:
        return [run for run in self.running if self.bench.leases[run].grants]

    async def _change(self, lease: Lease, disk: str, what: str, size_bytes: int) -> None:
        controller = self.bench.controller
        with contextlib.suppress(KeyError):  # released, or over, in the meantime
            if what == "grow":
                assert await controller.grow(lease, disk, size_bytes) <= QUOTA * MIB
            elif what == "shrink":
                await controller.shrink(lease, disk, min(size_bytes, lease.grants[disk].size_bytes))
            else:
                await controller.release(lease, disk)

    @precondition(lambda self: self.bench.controller.stranded())
    @rule(data=st.data(), turns=turns)
    def recover(self, data: st.DataObject, turns: int | None) -> None:
        one = data.draw(st.sampled_from(self.bench.controller.stranded()))
        self.in_use.pop(one.run, None)
        self.play(turns, lambda: self.act(self._unless_refused(self.bench.controller.forget([one]))))

    async def _unless_refused(self, work: Awaitable[None]) -> None:
        with contextlib.suppress(StateError):
            await work

    @precondition(lambda self: self.acts)
    @rule(turns=turns)
    def interrupt(self, turns: int | None) -> None:
        self.play(turns, lambda: [task.cancel() for task in self.acts])

    @rule(turns=turns)
    def look(self, turns: int | None) -> None:
        self.play(turns, lambda: self.act(self._unless_refused(self.bench.look())))

    @rule(name=st.sampled_from(["take", "resize", "give_back", "give_back"]))
    def fail(self, name: str) -> None:
        self.bench.desk.fail(name)

    @rule(run=st.sampled_from(["theirs 1", "theirs 2"]), grants=st.none() | grants)
    def another_host(self, run: str, grants: dict[str, Grant] | None) -> None:
        """It takes what it gets, or gives everything back; nobody tells us."""
        owner, quotas = dead(run, host="elsewhere"), dict.fromkeys(STORAGES, QUOTA * MIB)
        self.runner.run(self.ledger.take(owner, grants, quotas) if grants else self.ledger.give_back(run))

    @rule(name=st.sampled_from(STORAGES), free=st.sampled_from([0, 50, 1000]), reopen=st.booleans())
    def change_the_surroundings(self, name: str, free: int, reopen: bool) -> None:
        self.bench.storages[name].free = free
        if reopen:
            self.runner.run(self.bench.desk.ledger.close())

    @rule()
    def crash(self) -> None:
        """The owner dies in the midst of whatever it does; another one takes over."""
        self.bench.desk.cut()
        self.runner.run(self._end())
        self.runner.run(self._begin())

    def play(self, turns: int | None, begin: Callable[[], object]) -> None:
        async def play() -> None:
            begin()
            if turns is None:
                await self.bench.settled()
            else:
                for _ in range(turns):
                    await asyncio.sleep(0)

        self.runner.run(play())

    def act(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self.acts.add(task)
        task.add_done_callback(self._acted)

    def _acted(self, task: "asyncio.Task[Any]") -> None:
        self.acts.remove(task)
        if not task.cancelled() and (error := task.exception()):
            self.errors.append(error)

    async def _end(self) -> None:
        await self.bench.end_all()
        await asyncio.gather(*self.acts, return_exceptions=True)
        self.serving.cancel()
        await asyncio.wait([self.serving])
        await self.bench.desk.ledger.close()

    # What must hold.

    @property
    def quiet(self) -> bool:
        ends = any(ends.is_set() for run, ends in self.bench._ends.items() if not self.bench.tasks[run].done())
        return not (self.bench.desk.under_way or self.acts or ends or self.bench.controller._turn.locked())

    @invariant()
    def nothing_fails(self) -> None:
        assert self.errors == []

    @invariant()
    def no_quota_is_exceeded(self) -> None:
        granted = Counter[str]()
        for grants in self.runner.run(held(self.ledger)).values():
            for grant in grants.values():
                granted[grant.storage] += grant.size_bytes
        for name in STORAGES:
            assert granted[name] <= QUOTA * MIB
            assert self.bench.controller.accounts.granted_bytes(name) <= QUOTA * MIB

    @invariant()
    def no_more_run_than_may(self) -> None:
        leases = self.bench.controller.accounts.leases.values()
        assert len(leases) <= 3
        assert sum("fast" in lease.request.grants for lease in leases) <= 2

    @invariant()
    def nothing_is_lost_or_granted_twice(self) -> None:
        if not self.quiet:
            return
        accounts = self.bench.controller.accounts
        assert not accounts.leases.keys() & accounts.stranded.keys()
        known = {run: lease.grants for run, lease in accounts.leases.items() if lease.grants}
        known |= {run: dict(holding.grants) for run, holding in accounts.stranded.items()}
        found = self.runner.run(held(self.ledger))
        assert {run: grants for run, grants in found.items() if not run.startswith("theirs")} == {
            run: grants for run, grants in known.items() if not run.startswith("theirs")
        }
        assert all(found.get(run, {}) == grants for run, grants in self.in_use.items())

    def teardown(self) -> None:
        try:
            if hasattr(self, "bench"):
                self.runner.run(self._finish())
        finally:
            self.stack.close()

    async def _finish(self) -> None:
        accounts, controller = self.bench.controller.accounts, self.bench.controller
        await self.bench.end_all()
        await asyncio.gather(*self.acts, return_exceptions=True)
        self.bench.desk.fail("give_back", times=0)
        for run in ("theirs 1", "theirs 2"):
            await self.ledger.give_back(run)
        await self.bench.look()
        await controller.forget(controller.stranded())
        assert controller.waiting() == {}
        assert (accounts.leases, accounts.stranded) == ({}, {})
        assert await self.ledger.holdings() == []
        await self._end()
        await self.ledger.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize(("kind", "examples"), [("memory", 150), ("sqlite", 40)])
def test_whatever_happens_no_quota_is_exceeded_and_nothing_is_lost(kind: str, examples: int) -> None:
    machine = type("Admission", (Admission,), {"kind": kind})
    steps = settings(max_examples=examples, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(machine, settings=steps)


# --- runs ---


async def test_waiting_runs_start_by_priority_then_arrival(bench: Make) -> None:
    made = bench(max_runs=1)
    assert await made.ask("first")
    for run, priority in (("late", 10), ("one", 50), ("two", 50), ("urgent", 90)):
        assert not await made.ask(run, priority=priority)
    assert list(made.waiting()) == ["urgent", "one", "two", "late"]
    for run in ("first", "urgent", "one", "two"):
        await made.end(run)
    assert made.started == ["first", "urgent", "one", "two", "late"]


async def test_a_run_gets_all_of_its_storages_or_none(any_bench: Make) -> None:
    made = any_bench()
    assert await made.ask("a", on("fast", 60))
    assert not await made.ask("b", on("fast", 60) | on("slow", 60))
    assert made.granted() == {"fast": 60, "slow": 0}
    assert await held(made.desk.ledger) == {"a": on("fast", 60)}
    await made.end("a")
    assert made.granted() == {"fast": 60, "slow": 60}
    assert await held(made.desk.ledger) == {"b": on("fast", 60) | on("slow", 60)}


async def test_the_ledger_says_whose_a_grant_is(bench: Make) -> None:
    made = bench()
    await made.ask("a", on("fast", 60))
    (holding,) = await made.desk.ledger.holdings()
    assert holding.owner == replace(dead("a"), process=os.getpid())


async def test_a_run_that_needs_no_storage_is_not_entered_in_the_ledger(bench: Make) -> None:
    made = bench(max_runs=1)
    assert await made.ask("a")
    assert not await made.ask("b")
    await made.end("a")
    assert made.started == ["a", "b"]
    assert not made.desk.asked


@pytest.mark.parametrize("waited", [False, True])
async def test_nothing_of_a_run_is_remembered_once_it_is_over(any_bench: Make, waited: bool) -> None:
    made = any_bench()
    await made.ask("forgotten 1", on("fast", 60))
    if waited:
        assert not await made.ask("forgotten 2", on("fast", 60))
        await made.cancel("forgotten 2")
    await made.end("forgotten 1")
    made.tasks.clear()
    gc.collect()
    records = [one for one in gc.get_objects() if type(one) in (Lease, controller_module._Waiter)]
    assert [one for one in records if one.request.run.startswith("forgotten")] == []


async def test_limits_of_targets_and_storages_count_runs(bench: Make) -> None:
    made = bench(MemoryStorage("fast", max_runs=1), MemoryStorage("slow"), target_max=2)
    assert await made.ask("a", on("fast", 1, 1))
    assert not await made.ask("b", on("fast", 1))
    assert await made.ask("c", on("slow", 1))
    assert not await made.ask("d", on("slow", 1))
    assert made.waiting() == {
        "b": "target main: 2 of 2 runs under way; storage fast: 1 of 1 runs under way",
        "d": "target main: 2 of 2 runs under way",
    }
    assert await made.ask("e", on("slow", 1), target="other")


async def test_a_slot_is_kept_until_the_run_ends_whatever_it_gave_back(bench: Make) -> None:
    made = bench(MemoryStorage("fast", max_runs=1))
    await made.ask("a", on("fast", 60))
    await made.controller.release(made.leases["a"], "fast0")
    assert not await made.ask("b", on("fast", 1))
    assert made.waiting() == {"b": "storage fast: 1 of 1 runs under way"}
    await made.end("a")
    assert made.started == ["a", "b"]


async def test_a_disk_that_is_given_back_lets_a_waiting_run_start(any_bench: Make) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 60, 40))
    assert not await made.ask("b", on("fast", 40))
    await made.controller.release(made.leases["a"], "fast1")
    await made.controller.release(made.leases["a"], "fast1")
    await made.settled()
    assert made.started == ["a", "b"]
    assert await held(made.desk.ledger) == {"a": on("fast", 60), "b": on("fast", 40)}


async def test_an_extension_that_is_taken_back_lets_a_waiting_run_start(any_bench: Make) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 50))
    assert await made.grow("a", "fast0", 70) == 70
    assert not await made.ask("b", on("fast", 50))
    await made.controller.shrink(made.leases["a"], "fast0", 50 * MIB)
    await made.settled()
    assert made.started == ["a", "b"]
    assert await held(made.desk.ledger) == {"a": on("fast", 50), "b": on("fast", 50)}


# --- cancellation ---


async def test_cancelling_what_waits_holds_nothing_and_lets_others_through(any_bench: Make) -> None:
    made = any_bench()
    assert await made.ask("a", on("fast", 60))
    assert not await made.ask("big", on("fast", 100))
    assert not await made.ask("small", on("fast", 40))
    await made.cancel("big")
    assert made.started == ["a", "small"]
    assert made.granted()["fast"] == 100
    assert made.waiting() == {}


@pytest.mark.parametrize("done", [False, True])
async def test_cancelling_while_the_ledger_is_written_gives_everything_back(any_bench: Make, done: bool) -> None:
    """It is admitted by another run that ends, in the moment in which it waits for its turn to leave."""
    made = any_bench()
    await made.ask("a", on("fast", 100))
    await made.ask("b", on("fast", 100))
    made.desk.keep_waiting("take", done=done)
    made.tell_to_end("a")
    await made.settled()
    made.tasks["b"].cancel()
    await made.settled()
    assert not made.tasks["b"].done()
    made.desk.go_on()
    await asyncio.wait([made.tasks["b"]])
    await made.settled()
    assert made.started == ["a"]
    assert made.controller.accounts.leases == {}
    assert await held(made.desk.ledger) == {}
    assert await made.ask("c", on("fast", 100))


async def test_cancelling_in_the_moment_of_admission_gives_everything_back(any_bench: Make) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 100))
    await made.ask("b", on("fast", 100))
    made.tell_to_end("a")
    while made.controller.waiting():  # b holds its lease, but has not run since
        await asyncio.sleep(0)
    made.tasks["b"].cancel()
    await asyncio.wait([made.tasks["b"]])
    await made.settled()
    assert made.started == ["a"]
    assert await held(made.desk.ledger) == {}


@pytest.mark.parametrize("waits", [False, True])
async def test_a_run_can_be_cancelled_at_any_point(any_bench: Make, waits: bool) -> None:
    made = any_bench()
    cut_off = 0
    for turns in range(30):
        if waits:
            await made.ask(f"before{turns}", on("fast", 60))
        made.begin(f"r{turns}", on("fast", 60))
        for _ in range(turns):
            await asyncio.sleep(0)
        cut_off += f"r{turns}" not in made.leases
        if waits:
            made.tell_to_end(f"before{turns}")
            for _ in range(turns // 2):
                await asyncio.sleep(0)
        made.tasks[f"r{turns}"].cancel()
        await asyncio.wait([task for run, task in made.tasks.items() if run.endswith(str(turns))])
        await made.settled()
        assert made.controller.accounts.leases == {}
        assert made.waiting() == {}
        assert await held(made.desk.ledger) == {}
    assert cut_off


async def test_growing_and_giving_back_are_finished_when_their_run_is_cancelled(any_bench: Make) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 10, 10))
    lease, controller = made.leases["a"], made.controller
    for act, after in (
        (controller.grow(lease, "fast0", 30 * MIB), on("fast", 30, 10)),
        (controller.shrink(lease, "fast0", 20 * MIB), on("fast", 20, 10)),
        (controller.release(lease, "fast1"), on("fast", 20)),
    ):
        made.desk.keep_waiting()
        task = asyncio.ensure_future(act)
        await made.settled()
        task.cancel()
        await made.settled()
        assert not task.done()
        made.desk.go_on()
        await asyncio.wait([task])
        assert task.cancelled()
        assert lease.grants == after
        assert await held(made.desk.ledger) == {"a": after}


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("order", [("grow", "release"), ("release", "grow")])
async def test_growing_and_giving_back_at_once_grants_nothing_again(
    any_bench: Make, order: Sequence[str], done: bool
) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 10, 20))
    lease = made.leases["a"]
    made.desk.keep_waiting(done=done)
    acts = {
        "grow": lambda: made.controller.grow(lease, "fast1", 30 * MIB),
        "release": lambda: made.controller.release(lease, "fast1"),
    }
    tasks = []
    for name in order:
        tasks.append(asyncio.ensure_future(acts[name]()))
        await made.settled()
    made.desk.go_on()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert lease.grants == on("fast", 10)
    assert await held(made.desk.ledger) == {"a": on("fast", 10)}


# --- growth ---


async def test_growth_comes_before_those_that_wait(any_bench: Make) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 50))
    assert not await made.ask("b", on("fast", 60))
    assert await made.grow("a", "fast0", 1000) == QUOTA
    assert await made.grow("a", "fast0", 1000) == QUOTA
    assert await made.grow("a", "fast0", 10) == QUOTA, "it never shrinks"
    assert await held(made.desk.ledger) == {"a": on("fast", QUOTA)}


async def test_growth_is_by_whole_clusters(bench: Make) -> None:
    made = bench()
    await made.ask("a", {"vda": Grant("fast", MIB)})
    lease = made.leases["a"]
    assert await made.controller.grow(lease, "vda", 2 * MIB + 1) == 2 * MIB
    assert await made.controller.grow(lease, "vda", 2 * MIB + 64 * KIB) == 2 * MIB + 64 * KIB


async def test_growth_waits_for_one_admission_at_most(any_bench: Make) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 10))
    await made.ask("x", on("fast", 90))
    for run in ("b", "c"):
        assert not await made.ask(run, on("fast", 30))
    made.desk.keep_waiting("take")
    made.tell_to_end("x")
    await made.settled()
    grows = asyncio.create_task(made.grow("a", "fast0", 70))
    await made.settled()
    made.desk.go_on()
    assert await grows == 70
    await made.settled()
    assert made.started == ["a", "x", "b"]


async def test_growth_does_not_wait_until_all_that_came_have_been_decided_about(any_bench: Make) -> None:
    made = any_bench(max_runs=1)
    await made.ask("a", on("fast", 10))
    async with made.controller._turn:
        for number in range(50):
            made.begin(f"new{number}", on("fast", 1))
        await made.settled()
        grows = asyncio.create_task(made.grow("a", "fast0", 70))
        await made.settled()
        assert len(made.controller._turn._waiters or ()) == 2, "one that decides about all of them, and the growth"
    assert await grows == 70
    await made.settled()
    assert all(made.told[f"new{number}"] for number in range(50)), "each is told why it waits"


async def test_what_growth_was_refused_is_kept_from_new_runs(any_bench: Make) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 40))
    await made.ask("x", on("fast", 50))
    assert await made.grow("a", "fast0", 80) == 50
    assert not await made.ask("b", on("fast", 30))
    await made.end("x")
    assert made.waiting() == {
        "b": "storage fast: 30.0 MiB wanted, 50.0 MiB free of 100.0 MiB, 30.0 MiB kept for runs that must grow;"
        " run a of vm-a holds 50.0 MiB"
    }
    assert await made.grow("a", "fast0", 80) == 80
    assert made.leases["a"].unmet_bytes == {}
    assert not await made.ask("c", on("fast", 20)), "it came after b"
    await made.cancel("b")
    assert made.started == ["a", "x", "c"]


async def test_what_growth_was_refused_is_kept_only_until_the_disk_is_done(any_bench: Make) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 40, 10))
    await made.ask("x", on("fast", 50))
    assert await made.grow("a", "fast0", 90) == 40
    assert not await made.ask("b", on("fast", 60))
    await made.end("x")
    await made.controller.release(made.leases["a"], "fast0")
    await made.settled()
    assert made.started == ["a", "x", "b"]


async def test_what_growth_was_refused_is_kept_only_until_it_wants_less(bench: Make) -> None:
    made = bench()
    await made.ask("a", on("fast", 40))
    await made.ask("x", on("fast", 60))
    assert await made.grow("a", "fast0", 90) == 40
    assert not await made.ask("b", on("fast", 50))
    await made.end("x")
    assert made.started == ["a", "x"]
    assert await made.grow("a", "fast0", 40) == 40
    await made.look()
    assert made.started == ["a", "x", "b"]


async def test_a_refused_run_is_told_when_asking_again_may_help(bench: Make) -> None:
    made = bench()
    await made.ask("a", on("fast", 40))
    await made.ask("full", on("slow", 100))
    await made.ask("x", on("fast", 60))
    lease = made.leases["a"]
    assert await made.grow("a", "fast0", 90) == 40
    await made.look()
    assert not lease.room.is_set()
    await made.end("full")
    assert not lease.room.is_set(), "there is room elsewhere only"
    await made.end("x")
    assert lease.room.is_set()
    made.storages["fast"].free = 50
    assert await made.grow("a", "fast0", 90) == 50
    assert not lease.room.is_set()
    made.storages["fast"].free = 70
    await made.look()
    assert lease.room.is_set()


# --- why a run waits ---


async def test_reasons_are_told_once_each(bench: Make) -> None:
    made = bench(max_runs=2)
    await made.ask("a", on("fast", 60))
    await made.ask("b", on("slow", 10))
    await made.ask("c", on("fast", 60))
    held_by_a = "run a of vm-a holds 60.0 MiB"
    storage = f"storage fast: 60.0 MiB wanted, 40.0 MiB free of 100.0 MiB; {held_by_a}"
    assert made.waiting() == {"c": f"host: 2 of 2 runs under way; {storage}"}
    await made.look()
    await made.end("b")
    await made.grow("a", "fast0", 70)
    await made.look()
    assert made.told == {"c": [f"host: 2 of 2 runs under way; {storage}", storage]}


async def test_who_waits_behind_others_is_told_so_and_then_what_it_lacks_itself(bench: Make) -> None:
    made = bench(MemoryStorage("fast", max_runs=1))
    await made.ask("a", on("fast", 1))
    for run in ("b", "c", "d"):
        await made.ask(run, on("fast", 1))
    used = "storage fast: 1 of 1 runs under way"
    assert made.waiting() == {
        "b": used,
        "c": f"1 run that needs the same and came first; {used}",
        "d": f"2 runs that need the same and came first; {used}",
    }
    await made.cancel("b")
    assert made.told == {
        "b": [used],
        "c": ["1 run that needs the same and came first", used],
        "d": ["2 runs that need the same and came first"],
    }


async def test_all_that_came_while_another_was_admitted_are_told(bench: Make) -> None:
    made = bench()
    await made.ask("a", on("fast", 100))
    made.desk.keep_waiting("take")
    made.begin("x", on("slow", 10))
    for run, disks in (("b", on("fast", 10)), ("c", on("fast", 10)), ("d", on("fast", 10) | on("slow", 10))):
        made.begin(run, disks)
    await made.settled()
    made.desk.go_on()
    await made.settled()
    full = "storage fast: 10.0 MiB wanted, 0 B free of 100.0 MiB; run a of vm-a holds 100.0 MiB"
    assert made.told == {"b": [full], "c": ["1 run that needs the same and came first"], "d": [full]}


async def test_a_reason_is_told_in_the_context_of_the_run_that_waits(bench: Make) -> None:
    """Its log line would carry another run's vm and run otherwise."""
    made = bench(max_runs=2)
    seen: list[str] = []

    async def wait_for_admission(run: str) -> None:
        def on_wait(_waiting: Waiting) -> None:
            seen.append(structlog.contextvars.get_contextvars()["run"])

        with structlog.contextvars.bound_contextvars(run=run):
            async with made.controller.admit(
                run=run, vm=run, target="main", priority=50, disks=on("fast", 60), on_wait=on_wait
            ):
                pass

    await made.ask("a", on("fast", 60))
    await made.ask("x", on("slow", 60))
    waiting = asyncio.create_task(wait_for_admission("b"))
    await made.settled()
    with structlog.contextvars.bound_contextvars(run="x"):
        await made.controller.release(made.leases["x"], "slow0")
        await made.end("x")  # b's reason changes
    await made.end("a")
    await waiting
    assert seen == ["b", "b"]


# --- the file systems ---


@pytest.mark.usefixtures("often")
async def test_a_storage_that_cannot_be_asked_grants_nothing_and_breaks_nobody(bench: Make) -> None:
    made = bench()
    async with made.controller.serving():
        await made.ask("grows", on("fast", 10))
        made.storages["fast"].broken = True
        assert not await made.ask("waits", on("fast", 1))
        assert await made.ask("goes on", on("slow", 1))
        assert await made.grow("grows", "fast0", 20) == 10
        made.storages["fast"].broken = False  # nobody tells us: it is asked again
        await until(lambda: "waits" in made.leases)
        await made.end_all()


async def test_the_floor_of_the_file_system_is_kept(bench: Make) -> None:
    made = bench(MemoryStorage("fast", free=50, floor=30))
    assert not await made.ask("big", on("fast", 21))
    await made.cancel("big")
    assert await made.ask("fits", on("fast", 20))
    assert await made.grow("fits", "fast0", 25) == 20
    assert not await made.ask("none left", on("fast", 1))


async def test_what_an_image_occupies_already_is_not_reserved_twice(bench: Make) -> None:
    made = bench(MemoryStorage("fast", free=50, floor=10))
    assert await made.ask("a", on("fast", 40))
    made.controller.attach(made.leases["a"], "fast0", MemoryFile(30 * MIB))
    made.storages["fast"].free = 20  # the image took 30 of them; 10 more are promised to it
    assert not await made.ask("b", on("fast", 1))
    made.storages["fast"].free = 21
    assert await made.grow("a", "fast0", 100) == 41


@pytest.mark.usefixtures("often")
async def test_peaks_are_the_most_that_was_seen(bench: Make) -> None:
    made, file = bench(), MemoryFile(30 * MIB)
    accounts = made.controller.accounts
    async with made.controller.serving():
        await made.ask("a", on("fast", 40) | on("slow", 40))
        made.controller.attach(made.leases["a"], "fast0", file)
        await until(lambda: accounts.peak_bytes("fast"))
        file.used = 10 * MIB
        assert accounts.used_bytes("fast") == 10 * MIB
        await made.end("a")
        assert (accounts.peak_bytes("fast"), accounts.peak_bytes("slow")) == (30 * MIB, 0)


async def fill(made: Bench, *runs: tuple[str, str, int, int]) -> None:
    """Runs with a storage, a priority, and what they occupy in bytes."""
    for run, storage, priority, used_bytes in runs:
        assert await made.ask(run, on(storage, 1), priority=priority)
        made.controller.attach(made.leases[run], f"{storage}0", MemoryFile(used_bytes))


def giving_way(made: Bench) -> list[str]:
    return [run for run, lease in made.leases.items() if lease.gives_way]


async def looked(made: Bench, times: int = 3) -> None:
    before = made.desk.asked["holdings"]
    await until(lambda: made.desk.asked["holdings"] > before + times)


@pytest.mark.usefixtures("often")
async def test_the_last_that_occupies_anything_gives_way_below_the_floor_and_one_at_a_time(bench: Make) -> None:
    made = bench(MemoryStorage("fast", free=20, floor=10), MemoryStorage("slow"))
    async with made.controller.serving():
        await fill(
            made,
            ("first", "fast", 90, MIB),
            ("last", "fast", 20, 5 * MIB),
            ("idle", "fast", 10, MIB - 1),
            ("elsewhere", "slow", 0, 5 * MIB),
        )
        made.storages["fast"].free = 10
        await looked(made)
        assert giving_way(made) == [], "it is as high as its floor"
        made.storages["fast"].free = 9
        with pytest.raises(FleecingError) as failed:
            await asyncio.wait_for(made.leases["last"].giving_way(), 5)
        assert (failed.value.code, failed.value.retryable) == ("storage-low", True)
        assert failed.value.message == (
            "storage fast: 9.0 MiB free on its file system, less than its min_free (10.0 MiB);"
            " this run came last in order and gave way"
        )
        idle = made.leases["idle"].files["fast0"]
        assert isinstance(idle, MemoryFile)
        idle.used = 5 * MIB
        await looked(made)
        assert giving_way(made) == ["last"], "the other one has to wait until it ended"
        idle.used = MIB - 1
        await made.end("last")
        await until(lambda: giving_way(made) == ["first"])
        await made.end("first")
        await looked(made)
        assert giving_way(made) == [], "the others would free nothing"
        await made.end_all()


@pytest.mark.usefixtures("often")
async def test_nobody_gives_way_for_others_if_there_is_room_again(bench: Make) -> None:
    made = bench(MemoryStorage("fast", free=20, floor=10))
    async with made.controller.serving():
        await fill(made, ("first", "fast", 90, MIB), ("last", "fast", 20, 5 * MIB))
        made.storages["fast"].free = 9
        await until(lambda: giving_way(made) == ["last"])
        made.storages["fast"].free = 14
        await made.end("last")
        await looked(made)
        assert giving_way(made) == []
        made.storages["fast"].broken = True
        await looked(made)
        assert giving_way(made) == []
        await made.end_all()


# --- dead runs ---


async def test_what_dead_runs_hold_counts_until_it_is_known_that_nothing_of_them_lives(any_bench: Make) -> None:
    made = any_bench()
    ledger = made.desk.ledger
    for owner, size in ((dead("d1"), 60), (dead("d2", host="elsewhere"), 10)):
        assert await ledger.take(owner, on("fast", size), {"fast": QUOTA * MIB})
    with structlog.testing.capture_logs() as logs:
        async with made.controller.serving():
            assert [line["run"] for line in logs if line["event"] == "grant.stranded"] == ["d1", "d2"]
            assert made.granted() == {"fast": 70, "slow": 0}
            assert made.controller.accounts.stranded_bytes("fast") == 70 * MIB
            assert not await made.ask("b", on("fast", 40))
            assert made.waiting() == {
                "b": "storage fast: 40.0 MiB wanted, 30.0 MiB free of 100.0 MiB; run d1 of vm-d1, which is over,"
                " holds 60.0 MiB, run d2 of vm-d2, which is over, holds 10.0 MiB"
            }
            assert made.controller.stranded() == [dead("d1")], "what another host holds is not ours to recover"
            await made.controller.forget(made.controller.stranded())
            await made.settled()
            assert made.started == ["b"]
            assert made.controller.stranded() == []
            assert await held(ledger) == {"b": on("fast", 40), "d2": on("fast", 10)}
            await made.end_all()
    assert [line["run"] for line in logs if line["event"] == "grant.recovered"] == ["d1"]


async def test_only_dead_runs_are_forgotten(any_bench: Make) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 40))
    (holding,) = await made.desk.ledger.holdings()
    await made.controller.forget([holding.owner, dead("unknown")])
    assert made.granted()["fast"] == 40
    assert await held(made.desk.ledger) == {"a": on("fast", 40)}


async def test_a_run_whose_qemu_may_still_use_its_images_keeps_its_grants(any_bench: Make) -> None:
    made = any_bench(max_runs=1)
    await made.ask("a", on("fast", 60, 30))
    await made.controller.release(made.leases["a"], "fast1")
    assert not await made.ask("b", on("fast", 50))
    made.leases["a"].stranded = True
    with structlog.testing.capture_logs() as logs:
        await made.end("a")
    assert [line["event"] for line in logs] == ["grant.stranded"]
    assert made.waiting() == {
        "b": "storage fast: 50.0 MiB wanted, 40.0 MiB free of 100.0 MiB;"
        " run a of vm-a, which is over, holds 60.0 MiB"
    }
    assert await held(made.desk.ledger) == {"a": on("fast", 60)}
    await made.look()
    await made.controller.forget(made.controller.stranded())
    await made.settled()
    assert made.started == ["a", "b"]


async def test_a_run_that_gave_everything_back_leaves_nothing_stranded(bench: Make) -> None:
    made = bench()
    await made.ask("a", on("fast", 60))
    made.leases["a"].stranded = True
    await made.controller.release(made.leases["a"], "fast0")
    await made.end("a")
    assert made.controller.stranded() == []
    assert await held(made.desk.ledger) == {}


async def test_who_takes_over_finds_what_a_dead_owner_held(any_bench: Make) -> None:
    first, second = any_bench(), any_bench()
    await first.ask("a", on("fast", 60) | on("slow", 5))
    await first.ask("waits", on("fast", 60))
    first.desk.cut()
    await first.end_all()
    async with second.controller.serving():
        assert second.granted() == {"fast": 60, "slow": 5}
        assert [owner.run for owner in second.controller.stranded()] == ["a"]
        assert not await second.ask("b", on("fast", 60))
        await second.controller.forget(second.controller.stranded())
        await second.settled()
        assert second.started == ["b"]
        await second.end_all()
    assert await held(second.desk.ledger) == {}


# --- other hosts ---


async def test_what_another_host_took_meanwhile_is_waited_for(any_bench: Make) -> None:
    here, there = any_bench(), any_bench()
    await there.ask("theirs", on("fast", 60))
    assert not await here.ask("ours", on("fast", 60))
    assert here.waiting() == {
        "ours": "storage fast: 60.0 MiB wanted, 40.0 MiB free of 100.0 MiB;"
        " run theirs of vm-theirs, which is over, holds 60.0 MiB"
    }
    await there.end("theirs")
    await here.look()
    assert here.started == ["ours"]


async def test_growth_stops_at_what_another_host_took_meanwhile(any_bench: Make) -> None:
    here, there = any_bench(), any_bench()
    await here.ask("ours", on("fast", 10))
    await there.ask("theirs", on("fast", 60))
    assert await here.grow("ours", "fast0", 80) == 40
    assert here.leases["ours"].unmet_bytes == {"fast0": 40 * MIB}
    assert await held(here.desk.ledger) == {"ours": on("fast", 40), "theirs": on("fast", 60)}


# --- a ledger that cannot be used ---


async def test_a_ledger_that_cannot_be_read_ends_serving_before_it_begins(bench: Make) -> None:
    made = bench()
    made.desk.fail("holdings")
    with pytest.raises(StateError):
        async with made.controller.serving():
            pytest.fail("it serves")
    assert made.desk.closed


async def test_the_ledger_is_closed_after_serving(bench: Make) -> None:
    made = bench()
    async with made.controller.serving():
        assert not made.desk.closed
    assert made.desk.closed


@pytest.mark.parametrize("done", [False, True])
async def test_a_run_that_cannot_be_entered_fails_and_others_go_on(any_bench: Make, done: bool) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 100))
    for run in ("b", "c"):
        assert not await made.ask(run, on("fast", 40))
    made.desk.fail("take", done=done)
    await made.end("a")
    with pytest.raises(StateError):
        await made.tasks["b"]
    assert made.started == ["a", "c"]
    assert made.granted()["fast"] == 40
    await made.look()
    assert [owner.run for owner in made.controller.stranded()] == (["b"] if done else [])
    assert made.granted()["fast"] == (80 if done else 40), "what may have been entered counts"
    await made.controller.forget(made.controller.stranded())
    assert await held(made.desk.ledger) == {"c": on("fast", 40)}


@pytest.mark.parametrize("done", [False, True])
async def test_grants_that_cannot_be_given_back_stay_counted_and_are_stranded(any_bench: Make, done: bool) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 60))
    assert not await made.ask("b", on("fast", 50))
    made.desk.fail("give_back", done=done)
    await made.end("a")
    assert made.started == ["a"]
    assert made.granted()["fast"] == 60
    assert "run a of vm-a, which is over, holds 60.0 MiB" in made.waiting()["b"]
    (owner,) = made.controller.stranded()
    await made.controller.forget([owner])
    await made.settled()
    assert made.started == ["a", "b"]
    assert await held(made.desk.ledger) == {"b": on("fast", 50)}


async def test_a_disk_that_cannot_be_given_back_stays_counted_and_its_run_goes_on(any_bench: Make) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 50, 40))
    await made.ask("x", on("fast", 10))
    assert await made.grow("a", "fast1", 80) == 40
    assert not await made.ask("b", on("fast", 10))
    made.desk.fail("give_back")
    await made.controller.release(made.leases["a"], "fast1")
    assert made.granted()["fast"] == 100
    assert await held(made.desk.ledger) == {"a": on("fast", 50, 40), "x": on("fast", 10)}
    await made.end("x")
    assert made.started == ["a", "x", "b"], "what it would have grown by is kept no more"
    await made.controller.release(made.leases["a"], "fast1")
    assert made.granted()["fast"] == 60


@pytest.mark.parametrize("done", [False, True])
async def test_growth_that_cannot_be_entered_is_refused_and_nothing_is_lost(any_bench: Make, done: bool) -> None:
    made = any_bench()
    await made.ask("a", on("fast", 40))
    made.desk.fail("resize", done=done)
    assert await made.grow("a", "fast0", 70) == 40
    assert made.leases["a"].unmet_bytes == {"fast0": 30 * MIB}
    assert await held(made.desk.ledger) == {"a": on("fast", 70 if done else 40)}
    assert await made.grow("a", "fast0", 70) == 70
    assert await held(made.desk.ledger) == {"a": on("fast", 70)}
    made.desk.fail("resize", done=done)
    await made.controller.shrink(made.leases["a"], "fast0", 40 * MIB)
    assert made.granted()["fast"] == 70
    await made.end("a")
    assert await held(made.desk.ledger) == {}


async def test_a_dead_run_that_cannot_be_forgotten_stays_counted(any_bench: Make) -> None:
    made = any_bench()
    await made.desk.ledger.take(dead("d1"), on("fast", 60), {"fast": QUOTA * MIB})
    async with made.controller.serving():
        made.desk.fail("give_back")
        with pytest.raises(StateError):
            await made.controller.forget([dead("d1")])
        assert made.controller.stranded() == [dead("d1")]
        assert made.granted()["fast"] == 60


@pytest.mark.usefixtures("often")
async def test_watching_goes_on_when_the_ledger_can_be_used_again(bench: Make) -> None:
    made = bench()
    await made.desk.ledger.take(dead("d1"), on("fast", 60), {"fast": QUOTA * MIB})
    async with made.controller.serving():
        assert not await made.ask("a", on("fast", 60))
        made.desk.fail("holdings", times=3)
        made.desk.fail("beat", times=1)
        await made.desk.ledger.give_back("d1")  # by hand, or by another host
        await until(lambda: "a" in made.leases)
        await made.end_all()


# --- watching ---


@pytest.mark.usefixtures("often")
async def test_owners_beat_while_their_runs_live(any_bench: Make) -> None:
    made = any_bench()
    await made.desk.ledger.take(dead("d1"), on("fast", 1), {"fast": QUOTA * MIB})
    async with made.controller.serving():
        await made.ask("a", on("fast", 1))
        before = {holding.owner.run: holding.beat_seconds for holding in await made.desk.ledger.holdings()}
        asked = made.desk.asked["beat"]
        await until(lambda: made.desk.asked["beat"] > asked + 1)
        after = {holding.owner.run: holding.beat_seconds for holding in await made.desk.ledger.holdings()}
        assert after["a"] > before["a"]
        assert after["d1"] == before["d1"]
        await made.end_all()


@pytest.mark.usefixtures("often")
async def test_nothing_is_watched_while_nobody_holds_or_wants_anything(bench: Make) -> None:
    made = bench()
    async with made.controller.serving():
        for _ in range(2):
            await asyncio.sleep(0.02)
            asked = made.desk.asked["holdings"]
            await asyncio.sleep(0.05)
            assert made.desk.asked["holdings"] == asked
            await made.ask("a", on("fast", 1))
            await looked(made)
            await made.end_all()
            made.tasks.clear()
