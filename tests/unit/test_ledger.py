"""What every ledger promises, over each of them; then what only a file can promise, or break."""

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.admission.ledger import sqlite
from orchestrator.admission.ledger.base import Grant, Holding, Ledger, Owner
from orchestrator.admission.ledger.memory import MemoryLedger
from orchestrator.admission.ledger.sqlite import SqliteLedger
from orchestrator.errors import EXIT_LOCKED, StateError
from orchestrator.state import database

ROOT = Path(__file__).parents[2]
QUOTAS = {"fast": 100, "slow": 50}
RUNS, DISKS = ("r0", "r1", "r2"), ("vda", "vdb")

Connect = Callable[[], Ledger]
"""Another client of one ledger, as another process or host would be."""


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


@pytest.fixture(params=KINDS.values(), ids=KINDS)
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    opened: list[Ledger] = []
    with quick_folder() as folder:
        open_one: Connect = request.param(folder)

        def client() -> Ledger:
            opened.append(open_one())
            return opened[-1]

        yield client
        for ledger in opened:
            await ledger.close()


@pytest.fixture
def ledger(connect: Connect) -> Ledger:
    return connect()


def owner(run: str, **changes: Any) -> Owner:
    said = {"host": "host1", "process": 4711, "run": run, "vm": f"vm-{run}", "monitor": f"/run/{run}.qmp"}
    return Owner(**said | changes)


def on(storage: str, *sizes: int) -> dict[str, Grant]:
    return {disk: Grant(storage, size) for disk, size in zip(("vda", "vdb", "vdc"), sizes, strict=False)}


async def held(ledger: Ledger) -> dict[str, dict[str, Grant]]:
    return {holding.owner.run: dict(holding.grants) for holding in await ledger.holdings()}


async def granted(ledger: Ledger) -> Counter[str]:
    total: Counter[str] = Counter()
    for grants in (await held(ledger)).values():
        for grant in grants.values():
            total[grant.storage] += grant.size_bytes
    return total


# --- taking ---


async def test_a_quota_can_be_used_up_and_not_exceeded(ledger: Ledger) -> None:
    assert await ledger.take(owner("a"), on("fast", 60), QUOTAS)
    assert not await ledger.take(owner("b"), on("fast", 41), QUOTAS)
    assert await ledger.take(owner("c"), on("fast", 40), QUOTAS)
    assert not await ledger.take(owner("d"), on("fast", 1), QUOTAS)
    assert await ledger.take(owner("e"), on("slow", 50), QUOTAS)
    assert await held(ledger) == {"a": on("fast", 60), "c": on("fast", 40), "e": on("slow", 50)}


async def test_all_of_a_runs_disks_count_together(ledger: Ledger) -> None:
    assert not await ledger.take(owner("a"), on("fast", 50, 51), QUOTAS)
    assert await ledger.take(owner("a"), on("fast", 50, 25, 25), QUOTAS)


@pytest.mark.parametrize("order", [("vda", "vdb"), ("vdb", "vda")])
async def test_a_run_gets_everything_or_nothing(ledger: Ledger, order: tuple[str, str]) -> None:
    grants = dict(zip(order, (Grant("fast", 10), Grant("slow", 51)), strict=True))
    assert not await ledger.take(owner("a"), grants, QUOTAS)
    assert await ledger.holdings() == []


async def test_taking_again_changes_nothing(ledger: Ledger) -> None:
    for _ in range(3):
        assert await ledger.take(owner("a"), on("fast", 60, 40), QUOTAS)
        assert await held(ledger) == {"a": on("fast", 60, 40)}


async def test_taking_something_else_replaces_what_was_held(ledger: Ledger) -> None:
    assert await ledger.take(owner("a"), on("fast", 60, 40), QUOTAS)
    assert not await ledger.take(owner("a"), on("fast", 101), QUOTAS)
    assert await held(ledger) == {"a": on("fast", 60, 40)}
    assert await ledger.take(owner("a", vm="other"), on("slow", 50), QUOTAS)
    assert await held(ledger) == {"a": on("slow", 50)}
    assert (await ledger.holdings())[0].owner.vm == "other"
    assert await ledger.take(owner("b"), on("fast", 100), QUOTAS)


async def test_a_quota_that_became_smaller_takes_nothing_away_and_gives_nothing(ledger: Ledger) -> None:
    assert await ledger.take(owner("a"), on("fast", 80), QUOTAS)
    assert not await ledger.take(owner("b"), on("fast", 1), {"fast": 50})
    assert await ledger.resize("a", "vda", 90, 50) == 80
    assert await ledger.resize("a", "vda", 70, 50) == 70
    assert await held(ledger) == {"a": on("fast", 70)}


# --- changing and giving back ---


@pytest.mark.parametrize(
    ("wanted", "now"),
    [
        pytest.param(30, 30, id="larger"),
        pytest.param(40, 40, id="all that is left"),
        pytest.param(41, 40, id="more than is left"),
        pytest.param(20, 20, id="the same"),
        pytest.param(5, 5, id="smaller"),
        pytest.param(0, 0, id="nothing"),
    ],
)
async def test_a_grant_is_resized_as_far_as_the_quota_allows(ledger: Ledger, wanted: int, now: int) -> None:
    await ledger.take(owner("a"), on("fast", 20, 30), QUOTAS)
    await ledger.take(owner("b"), on("fast", 30), QUOTAS)
    for _ in range(2):
        assert await ledger.resize("a", "vda", wanted, QUOTAS["fast"]) == now
        assert await held(ledger) == {"a": on("fast", now, 30), "b": on("fast", 30)}


@pytest.mark.parametrize(("run", "disk"), [("a", "vdb"), ("b", "vda")])
async def test_what_is_not_held_is_not_resized(ledger: Ledger, run: str, disk: str) -> None:
    await ledger.take(owner("a"), on("fast", 20), QUOTAS)
    assert await ledger.resize(run, disk, 10, QUOTAS["fast"]) == 0
    assert await held(ledger) == {"a": on("fast", 20)}


async def test_what_is_given_back_can_be_taken(ledger: Ledger) -> None:
    await ledger.take(owner("a"), on("fast", 60, 40), QUOTAS)
    for _ in range(2):
        await ledger.give_back("a", "vda")
        assert await held(ledger) == {"a": {"vdb": Grant("fast", 40)}}
    assert await ledger.take(owner("b"), on("fast", 60), QUOTAS)
    for _ in range(2):
        await ledger.give_back("a")
        assert await held(ledger) == {"b": on("fast", 60)}
    assert await ledger.take(owner("c"), on("fast", 40), QUOTAS)


async def test_a_run_that_gave_back_its_last_disk_holds_nothing(ledger: Ledger) -> None:
    await ledger.take(owner("a"), on("fast", 60, 40), QUOTAS)
    for disk in ("vda", "vdb"):
        await ledger.give_back("a", disk)
    assert await ledger.holdings() == []
    assert await ledger.take(owner("b"), on("fast", 100), QUOTAS)


async def test_giving_back_what_is_not_held_is_no_error(ledger: Ledger) -> None:
    await ledger.take(owner("a"), on("fast", 60), QUOTAS)
    await ledger.give_back("b")
    await ledger.give_back("b", "vda")
    await ledger.give_back("a", "vdb")
    assert await held(ledger) == {"a": on("fast", 60)}


# --- who holds what ---


async def test_holdings_say_everything_in_the_order_of_runs(connect: Connect) -> None:
    ledger, before = connect(), time.time()
    owners = [owner("b", vm="ü", monitor=""), owner("a", host="host2", process=1), owner("c")]
    grants = [on("fast", 2**40, 0), on("slow", 1) | {"vdb": Grant("fast", 2)}, on("slow", 3)]
    for one, wanted in zip(owners, grants, strict=True):
        assert await ledger.take(one, wanted, {"fast": 2**60, "slow": 4})
    found = await connect().holdings()
    assert [holding.owner for holding in found] == [owners[1], owners[0], owners[2]]
    assert [holding.grants for holding in found] == [grants[1], grants[0], grants[2]]
    assert all(before <= holding.beat_seconds <= time.time() for holding in found)


async def test_a_beat_says_that_owners_live(connect: Connect) -> None:
    ledger = connect()
    for run in ("a", "b", "c"):
        await ledger.take(owner(run), on("fast", 10), QUOTAS)
    before = await ledger.holdings()
    await asyncio.sleep(0.01)
    now = time.time()
    await ledger.beat(["a", "c", "unknown"])
    await ledger.beat([])
    after = await connect().holdings()
    assert [(one.owner, one.grants) for one in after] == [(one.owner, one.grants) for one in before]
    assert after[1] == before[1]
    assert min(after[0].beat_seconds, after[2].beat_seconds) >= now > before[0].beat_seconds


async def test_a_grant_outlives_its_owners_silence_and_growth(ledger: Ledger) -> None:
    await ledger.take(owner("a"), on("fast", 10, 20), QUOTAS)
    (before,) = await ledger.holdings()
    await ledger.resize("a", "vda", 30, QUOTAS["fast"])
    await ledger.give_back("a", "vdb")
    assert await ledger.holdings() == [Holding(before.owner, on("fast", 30), before.beat_seconds)]


# --- many at once ---


async def test_many_who_take_at_once_share_the_quota_and_no_more(connect: Connect) -> None:
    clients = [connect() for _ in range(3)]
    took = await asyncio.gather(
        *(clients[at % 3].take(owner(f"r{at}"), on("fast", 4, 3), QUOTAS) for at in range(40))
    )
    assert sum(took) == 14
    assert await held(connect()) == {f"r{at}": on("fast", 4, 3) for at, got in enumerate(took) if got}


async def test_many_who_grow_at_once_share_the_quota_and_no_more(connect: Connect) -> None:
    clients = [connect() for _ in range(3)]
    for at in range(9):
        assert await clients[0].take(owner(f"r{at}"), on("fast", 1), QUOTAS)
    now = await asyncio.gather(*(clients[at % 3].resize(f"r{at}", "vda", 30, QUOTAS["fast"]) for at in range(9)))
    assert sum(now) == QUOTAS["fast"]
    assert await held(connect()) == {f"r{at}": on("fast", size) for at, size in enumerate(now)}


async def test_the_quota_holds_at_each_moment_whatever_many_do_at_once(connect: Connect) -> None:
    over, done = [], asyncio.Event()

    async def watch(client: Ledger) -> None:
        while not done.is_set():
            over.extend(name for name, size in (await granted(client)).items() if size > QUOTAS[name])
            await asyncio.sleep(0)

    async def run(client: Ledger, at: int) -> None:
        for turn in range(3):
            name = f"r{at}-{turn}"
            wanted = on("fast", 10 + at, 5) | {"vdc": Grant("slow", 5 + turn)}
            if await client.take(owner(name), wanted, QUOTAS):
                await client.resize(name, "vda", 40, QUOTAS["fast"])
                await client.resize(name, "vdc", 1, QUOTAS["slow"])
                await client.give_back(name, "vdb")
                await client.give_back(name)

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch(connect()))
        clients = [connect() for _ in range(3)]
        await asyncio.gather(*(run(clients[at % 3], at) for at in range(9)))
        done.set()
    assert watching.done()
    assert over == []
    assert await connect().holdings() == []


Call = Callable[[Ledger], Awaitable[object]]
calls = st.one_of(
    st.builds(
        lambda run, grants: lambda one: one.take(owner(run), grants, QUOTAS),
        st.sampled_from(RUNS),
        st.dictionaries(
            st.sampled_from(DISKS),
            st.builds(Grant, st.sampled_from(sorted(QUOTAS)), st.integers(0, 60)),
            min_size=1,
        ),
    ),
    st.builds(
        lambda run, disk, size, quota: lambda one: one.resize(run, disk, size, quota),
        st.sampled_from(RUNS),
        st.sampled_from(DISKS),
        st.integers(0, 120),
        st.sampled_from([50, 100]),
    ),
    st.builds(
        lambda run, disk: lambda one: one.give_back(run, disk),
        st.sampled_from(RUNS),
        st.none() | st.sampled_from(DISKS),
    ),
)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "memory"])
@settings(max_examples=40, deadline=None)
@given(st.lists(calls, max_size=15))
def test_every_ledger_answers_as_the_plainest_one(kind: str, sequence: list[Call]) -> None:
    async def play() -> None:
        with quick_folder() as folder:
            plain, ledger = MemoryLedger(), KINDS[kind](folder)()
            try:
                for call in sequence:
                    assert await call(ledger) == await call(plain)
                    assert await held(ledger) == await held(plain)
            finally:
                await ledger.close()

    asyncio.run(play())


# --- cancellation ---

CALLS: dict[str, tuple[Call, dict[str, dict[str, Grant]]]] = {
    "take": (
        lambda one: one.take(owner("b"), on("fast", 20, 30), QUOTAS),
        {"a": on("fast", 10, 20), "b": on("fast", 20, 30)},
    ),
    "take instead": (lambda one: one.take(owner("a"), on("slow", 30), QUOTAS), {"a": on("slow", 30)}),
    "resize": (lambda one: one.resize("a", "vda", 50, QUOTAS["fast"]), {"a": on("fast", 50, 20)}),
    "give back": (lambda one: one.give_back("a"), {}),
    "give back a disk": (lambda one: one.give_back("a", "vda"), {"a": {"vdb": Grant("fast", 20)}}),
}


@pytest.mark.parametrize(("call", "after"), CALLS.values(), ids=CALLS)
async def test_a_cancelled_call_takes_effect_as_a_whole_or_not_at_all(
    connect: Connect, call: Call, after: dict[str, dict[str, Grant]]
) -> None:
    ledger, before = connect(), {"a": on("fast", 10, 20)}
    outcomes: list[bool] = []
    for turns in range(8):
        await ledger.give_back("b")
        await ledger.take(owner("a"), before["a"], QUOTAS)
        task = asyncio.ensure_future(call(ledger))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        found = await held(connect())
        assert found in (before, after)
        outcomes.append(found == after)
        assert task.cancelled() or outcomes[-1]
        await asyncio.sleep(0.002)
        assert await held(connect()) == found, "it took effect after it was said to be over"
    assert outcomes[0] is False
    assert outcomes[-1] is True


# --- a file ---


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SqliteLedger]:
    ledger = SqliteLedger(path)
    try:
        yield ledger
    finally:
        await ledger.close()


@contextlib.asynccontextmanager
async def unusable(path: Path) -> AsyncIterator[pytest.ExceptionInfo[StateError]]:
    with pytest.raises(StateError) as failed:
        yield failed
    assert failed.value.code == "state-unusable"
    assert failed.value.exit_code == EXIT_LOCKED
    assert str(path) in failed.value.message


async def test_what_is_held_stays_held_when_the_ledger_is_opened_again(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.take(owner("a"), on("fast", 60, 30), QUOTAS)
        before = await ledger.holdings()
    await ledger.close()
    async with opened(path) as ledger:
        assert await ledger.holdings() == before
        assert not await ledger.take(owner("b"), on("fast", 11), QUOTAS)
    assert await ledger.holdings() == before, "it opens by itself after it was closed"
    await ledger.close()


async def test_what_it_returned_survives_power_loss(path: Path) -> None:
    async with opened(path) as ledger:
        with ledger._database.transaction() as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,), "FULL: synced at each commit"
            assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


async def test_a_cancelled_call_that_waits_for_another_process_ends_once_it_took_effect(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.take(owner("a"), on("fast", 10), QUOTAS)
        other = sqlite3.connect(path, isolation_level=None)
        with contextlib.closing(other):
            other.execute("BEGIN IMMEDIATE")
            task = asyncio.ensure_future(ledger.take(owner("b"), on("fast", 20), QUOTAS))
            for _ in range(3):
                await asyncio.sleep(0.01)
                task.cancel()
            assert not task.done()
            other.execute("ROLLBACK")
            await asyncio.wait([task])
            assert task.cancelled()
        assert await held(ledger) == {"a": on("fast", 10), "b": on("fast", 20)}


async def test_it_is_answered_also_while_all_threads_are_taken(path: Path) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    taken = threading.Event()
    taking = asyncio.ensure_future(asyncio.to_thread(taken.wait))
    try:
        async with asyncio.timeout(60), opened(path) as ledger:
            assert await ledger.take(owner("a"), on("fast", 10), QUOTAS)
            assert await ledger.resize("a", "vda", 20, 100) == 20
    finally:
        taken.set()
        await taking


async def test_another_process_that_keeps_the_file_is_an_error_and_nothing_is_changed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.02)
    async with opened(path) as ledger:
        await ledger.take(owner("a"), on("fast", 10), QUOTAS)
        other = sqlite3.connect(path, isolation_level=None)
        with contextlib.closing(other):
            other.execute("BEGIN IMMEDIATE")
            async with unusable(path):
                await ledger.give_back("a")
        assert await held(ledger) == {"a": on("fast", 10)}
        await ledger.give_back("a")
        assert await ledger.holdings() == []


def test_many_can_open_a_new_file_at_once(path: Path) -> None:
    ledgers = [SqliteLedger(path) for _ in range(8)]
    ready = threading.Barrier(len(ledgers))
    errors: list[Exception] = []

    def open_one(ledger: SqliteLedger) -> None:
        ready.wait()
        try:
            asyncio.run(ledger.holdings())
        except Exception as error:  # noqa: BLE001  whatever it is, it is told below
            errors.append(error)

    threads = [threading.Thread(target=open_one, args=[ledger]) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ledger in ledgers:
        ledger._database.close()
    assert errors == []


TAKES_UNTIL_KILLED = """
import asyncio, os, pathlib, sys
from orchestrator.admission.ledger.base import Grant, Owner
from orchestrator.admission.ledger.sqlite import SqliteLedger

ledger = SqliteLedger(pathlib.Path(sys.argv[1]))

async def take(worker):
    for turn in range(1000):
        run = f"{worker}-{turn}"
        grants = {"vda": Grant("fast", 3), "vdb": Grant("slow", 2)}
        if await ledger.take(Owner("host1", os.getpid(), run, "vm", ""), grants, {"fast": 10**6, "slow": 10**6}):
            os.write(1, f"{run}\\n".encode())

async def main():
    await asyncio.gather(*(take(worker) for worker in range(3)))

asyncio.run(main())
"""


@pytest.mark.parametrize("count", [1, 7, 20])
async def test_what_was_returned_survives_the_death_of_the_process(path: Path, count: int) -> None:
    argv = [sys.executable, "-c", TAKES_UNTIL_KILLED, str(path)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:  # noqa: ASYNC220  nothing else runs
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(count)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    returned = {line.strip() for line in lines}
    async with opened(path) as ledger:
        found = await held(ledger)
        assert returned <= found.keys()
        assert len(found) <= len(returned) + 3, "one for each that was in the midst of it"
        assert all(grants == {"vda": Grant("fast", 3), "vdb": Grant("slow", 2)} for grants in found.values())
        assert {holding.owner.process for holding in await ledger.holdings()} == {process.pid}
        assert await ledger.take(owner("after"), on("fast", 1), {"fast": 10**6})


QUESTIONS: dict[str, Call] = {
    "take": lambda one: one.take(owner("b"), on("fast", 1), QUOTAS),
    "resize": lambda one: one.resize("a", "vda", 1, 100),
    "give_back": lambda one: one.give_back("a"),
    "beat": lambda one: one.beat(["a"]),
    "holdings": lambda one: one.holdings(),
}


@pytest.mark.parametrize("call", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.parametrize("damage", [b"no database", b"SQLite format 3\0" + bytes(range(256)) * 16])
async def test_a_damaged_file_is_named_and_left_as_it_is(path: Path, call: Call, damage: bytes) -> None:
    path.write_bytes(damage)
    async with opened(path) as ledger:
        for _ in range(2):
            async with unusable(path) as failed:
                await call(ledger)
    assert "moved away" in failed.value.hint
    assert "restart the VMs" in failed.value.hint
    assert path.read_bytes() == damage


async def test_a_file_that_is_damaged_further_on_is_named(path: Path) -> None:
    async with opened(path) as ledger:
        for at in range(100):
            await ledger.take(owner(f"r{at}"), on("fast", 1), QUOTAS)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    async with opened(path) as ledger, unusable(path):
        await ledger.holdings()


@pytest.mark.parametrize("call", QUESTIONS.values(), ids=QUESTIONS)
async def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(path: Path, call: Call) -> None:
    newer = sqlite.VERSION + 1
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA user_version = {newer}")
        connection.execute("CREATE TABLE grants (of TEXT, another TEXT, kind TEXT)")
    async with opened(path) as ledger, unusable(path) as failed:
        await call(ledger)
    assert f"format {newer}, here {sqlite.VERSION}" in failed.value.message
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (newer,)
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("grants",)]


@pytest.mark.parametrize("folder", ["absent", "file"])
async def test_a_folder_that_is_none_is_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / folder / "ledger.sqlite"
    async with opened(path) as ledger, unusable(path) as failed:
        await ledger.holdings()
    assert "unable to open" in failed.value.message


async def test_a_file_that_is_full_in_the_midst_of_a_call_says_so_and_is_left_as_it_was(path: Path) -> None:
    many = {f"d{at}": Grant("fast", 0) for at in range(3000)}
    async with opened(path) as ledger:
        await ledger.take(owner("a"), on("fast", 10), QUOTAS)
        with ledger._database.transaction() as connection:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")
        async with unusable(path) as failed:
            await ledger.take(owner("b"), many, QUOTAS)
        assert "disk is full" in failed.value.message
        assert await held(ledger) == {"a": on("fast", 10)}
        assert await ledger.take(owner("b"), many, QUOTAS), "it was opened again, without that limit"


@pytest.mark.parametrize(
    ("scene", "mounting"),
    [
        ("on_a_full_file_system", "mount -t tmpfs -o size=256k none {folder}"),
        (
            "on_a_read_only_file_system",
            "mount -t tmpfs -o size=1m none {folder} && {prepare} && mount -o remount,ro {folder}",
        ),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_and_what_was_held_stays_held(
    tmp_path: Path, scene: str, mounting: str
) -> None:
    """In a process of its own, with a small file system that nobody else sees."""
    python = (
        f"{sys.executable} -c 'import asyncio, sys, test_ledger as suite; asyncio.run(suite.play(*sys.argv[1:]))'"
    )
    folder = shlex.quote(str(tmp_path))
    mount = mounting.format(folder=folder, prepare=f"{python} before_it_was_read_only {folder}")
    root = os.geteuid() == 0
    argv = ["unshare", "--mount", *([] if root else ["--map-root-user"]), "sh", "-c"]
    places = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    done = subprocess.run(
        [*argv, f"{mount} && exec {python} {scene} {folder}"],
        env=os.environ | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


async def play(scene: str, folder: str) -> None:
    scenes: Mapping[str, Callable[[Path], Awaitable[None]]] = {
        "on_a_full_file_system": on_a_full_file_system,
        "before_it_was_read_only": before_it_was_read_only,
        "on_a_read_only_file_system": on_a_read_only_file_system,
    }
    await scenes[scene](Path(folder) / "ledger.sqlite")


async def on_a_full_file_system(path: Path) -> None:
    many, expected, junk = {"fast": 10**6}, {}, path.with_name("junk")
    async with opened(path) as ledger:
        assert await ledger.take(owner("before"), on("fast", 1), many)
        with junk.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(512)):
                pass
        async with unusable(path) as failed:
            for at in range(1000):
                assert await ledger.take(owner(f"r{at}"), on("fast", 1), many)
                expected[f"r{at}"] = on("fast", 1)
        assert "disk is full" in failed.value.message
        junk.unlink()
        assert await held(ledger) == {"before": on("fast", 1)} | expected
        await ledger.give_back("before")
        assert await ledger.take(owner("after"), on("fast", 1), many)


async def before_it_was_read_only(path: Path) -> None:
    async with opened(path) as ledger:
        assert await ledger.take(owner("a"), on("fast", 1), QUOTAS)


async def on_a_read_only_file_system(path: Path) -> None:
    for call in QUESTIONS.values():
        async with opened(path) as ledger, unusable(path):
            await call(ledger)
