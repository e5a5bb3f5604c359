"""The repository's lock: who is refused, when it is renewed, when it is lost, and that none is left behind."""

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from orchestrator import aio
from orchestrator.target.restic import crypto, lock, lock_file
from orchestrator.target.restic.access import this_host
from orchestrator.target.restic.backend.base import Content, File, Kind, Stored
from orchestrator.target.restic.backend.memory import MemoryBackend
from orchestrator.target.restic.errors import LockLost, RepositoryLocked, Unreachable
from orchestrator.target.restic.lock import Pace, held
from orchestrator.target.restic.lock_file import LockFile

KEY = crypto.generate()
QUICK = Pace(settle_seconds=0.01, refresh_seconds=0.02, retry_seconds=0.01, give_up_seconds=60)
THEIRS = LockFile(datetime.now(UTC), False, "elsewhere", "root", 1)


class Watched(MemoryBackend):
    """Keeps what was done to locks, and does something before each save."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []
        self.before_save: Callable[[], None] = lambda: None
        self.before_remove: Callable[[], None] = lambda: None

    def save(self, file: File, content: Content, *, replace: bool = True) -> None:
        self.before_save()
        super().save(file, content, replace=replace)
        self.done.append("save")

    def list(self, kind: Kind) -> list[Stored]:
        self.done.append("list")
        return list(super().list(kind))

    def remove(self, file: File) -> None:
        self.before_remove()
        super().remove(file)
        self.done.append("remove")


@pytest.fixture
def backend() -> Watched:
    return Watched()


def put(backend: MemoryBackend, theirs: LockFile) -> File:
    content = lock_file.seal(theirs, KEY)
    file = File(Kind.LOCKS, hashlib.sha256(content).digest())
    backend.files[file] = content
    return file


def locks(backend: MemoryBackend) -> set[File]:
    return {file for file in backend.files if file.kind is Kind.LOCKS}


def unreachable() -> None:
    raise Unreachable("gone")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_it_lists_writes_lists_and_removes(backend: Watched) -> None:
    async with held(backend, KEY) as ours:
        assert backend.done == ["list", "save", "list"]
        (file,) = locks(backend)
        written = lock_file.open_sealed(backend.read(file), KEY, identity=file.identity, file="x")
        assert (written.exclusive, written.hostname, written.pid) == (False, this_host(), os.getpid())
        assert datetime.now(UTC) - written.time < timedelta(minutes=1)
        ours.check()
    assert locks(backend) == set()
    assert ours.left is None


async def test_ours_stand_beside_each_other_and_beside_those_of_others(backend: Watched) -> None:
    theirs = put(backend, THEIRS)
    async with held(backend, KEY, pace=QUICK), held(backend, KEY, pace=QUICK):
        assert len(locks(backend)) == 3
    assert locks(backend) == {theirs}


async def test_beside_an_exclusive_one_we_do_not_even_write(backend: Watched) -> None:
    theirs = put(backend, replace(THEIRS, exclusive=True))
    with pytest.raises(RepositoryLocked) as refused:
        async with held(backend, KEY):
            pytest.fail("it was held")
    assert (refused.value.code, refused.value.exit_code, refused.value.retryable) == (
        "repository-locked",
        11,
        True,
    )
    assert "process 1 of root on elsewhere" in str(refused.value)
    assert "save" not in backend.done
    assert locks(backend) == {theirs}


async def test_one_that_appears_while_we_wait_wins_and_ours_is_gone(backend: Watched) -> None:
    theirs: list[File] = []
    backend.before_save = lambda: theirs.append(put(backend, replace(THEIRS, exclusive=True)))
    with pytest.raises(RepositoryLocked):
        async with held(backend, KEY):
            pytest.fail("it was held")
    assert locks(backend) == set(theirs)


@pytest.mark.parametrize(("age", "hint"), [(1, "wait until it has ended"), (31, "restic unlock")])
async def test_an_old_exclusive_lock_refuses_too_and_says_how_to_go_on(
    backend: Watched, age: int, hint: str
) -> None:
    put(backend, replace(THEIRS, exclusive=True, time=datetime.now(UTC) - timedelta(minutes=age)))
    with pytest.raises(RepositoryLocked, match=hint):
        async with held(backend, KEY):
            pytest.fail("it was held")


async def test_what_is_not_readable_may_be_exclusive_what_is_empty_is_not(backend: Watched) -> None:
    backend.files[File(Kind.LOCKS, bytes(32))] = b""
    async with held(backend, KEY, pace=QUICK):
        pass
    backend.files[File(Kind.LOCKS, bytes(32))] = b"garbage"
    with pytest.raises(RepositoryLocked, match="remove-all"):
        async with held(backend, KEY, pace=QUICK):
            pytest.fail("it was held")


async def test_renewing_writes_the_new_one_before_it_removes_the_old_one(backend: Watched) -> None:
    async with held(backend, KEY, pace=QUICK) as ours:
        (first,) = locks(backend)
        await until(lambda: backend.done.count("remove") >= 3)
        ours.check()
        assert first not in locks(backend)
    changes = [what for what in backend.done if what != "list"]
    assert changes[:5] == ["save", "save", "remove", "save", "remove"]
    assert locks(backend) == set()


async def test_a_holder_whose_file_vanished_is_told(backend: Watched) -> None:
    async def work() -> None:
        backend.files.clear()
        await asyncio.sleep(60)

    async with held(backend, KEY, pace=QUICK) as ours:
        with pytest.raises(LockLost, match="removed its file") as lost:
            await aio.unless(ours.lost(), work())
        assert (lost.value.code, lost.value.retryable) == ("lock-lost", True)
        with pytest.raises(LockLost):
            ours.check()


async def test_one_that_cannot_be_renewed_is_tried_again_and_lost_in_the_end(backend: Watched) -> None:
    tries = 0

    def fail() -> None:
        nonlocal tries
        tries += 1
        unreachable()

    async with held(backend, KEY, pace=replace(QUICK, give_up_seconds=0.5)) as ours:
        backend.before_save = fail
        with pytest.raises(LockLost, match="not renewed"):
            await ours.lost()
        assert tries > 1
    assert locks(backend) == set()


async def test_one_that_is_renewed_after_failures_is_kept(backend: Watched) -> None:
    async with held(backend, KEY, pace=QUICK) as ours:
        backend.before_save = unreachable
        await asyncio.sleep(0.1)
        backend.before_save = lambda: None
        (before,) = locks(backend)
        await until(lambda: bool(locks(backend)) and before not in locks(backend))
        ours.check()
    assert locks(backend) == set()


async def test_a_thread_sees_that_it_is_lost_even_if_the_loop_stands_still(backend: Watched) -> None:
    async with held(backend, KEY, pace=Pace(settle_seconds=0, give_up_seconds=0.05)) as ours:
        time.sleep(0.1)  # noqa: ASYNC251  the loop stands still
        with pytest.raises(LockLost):
            ours.check()


async def test_saving_that_failed_although_it_was_written_leaves_nothing() -> None:
    class Doubtful(Watched):
        def save(self, file: File, content: Content, *, replace: bool = True) -> None:
            super().save(file, content, replace=replace)
            unreachable()

    doubtful = Doubtful()
    with pytest.raises(Unreachable):
        async with held(doubtful, KEY):
            pytest.fail("it was held")
    assert locks(doubtful) == set()


async def test_what_cannot_be_removed_hides_no_error_and_is_told(backend: Watched) -> None:
    async with held(backend, KEY, pace=Pace(settle_seconds=0)) as ours:
        backend.before_remove = unreachable
    assert isinstance(ours.left, Unreachable)
    with pytest.raises(RuntimeError, match="the block's"):
        async with held(backend, KEY, pace=Pace(settle_seconds=0)):
            raise RuntimeError("the block's")


@pytest.mark.parametrize("moment", range(6))
async def test_whenever_it_is_cancelled_nothing_is_left(moment: int) -> None:
    """At each of its steps in a thread, and in between."""
    backend = Watched()
    reached, go_on, steps = threading.Event(), threading.Event(), 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == moment:
            reached.set()
            go_on.wait(20)

    real_list = backend.list

    def list_files(kind: Kind) -> list[Stored]:
        step()
        return real_list(kind)

    backend.list = list_files  # type: ignore[method-assign]
    backend.before_save = step

    async def hold() -> None:
        async with held(backend, KEY, pace=replace(QUICK, settle_seconds=0.05)):
            await asyncio.sleep(60)

    task = asyncio.ensure_future(hold())
    if moment:
        await asyncio.to_thread(reached.wait, 20)
    else:
        await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.sleep(0.01)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert locks(backend) == set()


def test_locks_of_this_hosts_dead_are_removed_all_others_stay(backend: Watched) -> None:
    now = datetime.now(UTC)
    here = replace(THEIRS, hostname=this_host())
    for dead in (0, 4_194_304 - 7, 2**31, 2**32 - 1):
        put(backend, replace(here, time=now, pid=dead))
    stay = {put(backend, replace(THEIRS, time=now)), put(backend, replace(here, time=now, pid=os.getpid()))}
    stay.add(put(backend, replace(here, time=now, pid=1)))
    stay.add(put(backend, replace(THEIRS, time=now - timedelta(minutes=31))))
    garbage = File(Kind.LOCKS, bytes(32))
    backend.files[garbage] = b"garbage"
    assert lock.remove_abandoned(backend, KEY) == 4
    assert locks(backend) == stay | {garbage}
