"""The asyncio idioms: what comes out of them, and that nothing of theirs stays behind."""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from structlog.testing import capture_logs

from orchestrator import aio


class BodyError(Exception):
    pass


class ChildBug(Exception):
    pass


class Steps:
    """What happened, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def forever(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise

    async def slow(self, turns: int = 20) -> str:
        for _ in range(turns):
            await asyncio.sleep(0)
        self.seen.append("finished")
        return "result"


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


# --- background ---


async def test_what_runs_beside_the_block_ends_with_it() -> None:
    steps = Steps()
    async with aio.background(steps.forever(), steps.forever()):
        await turns()
        assert steps.seen == []
    assert steps.seen == ["cancelled", "cancelled"]


async def test_the_blocks_error_comes_out_as_it_is() -> None:
    steps = Steps()

    async def block() -> None:
        async with aio.background(steps.forever()):
            await turns()
            raise BodyError

    with pytest.raises(BodyError):
        await block()
    assert steps.seen == ["cancelled"]


async def test_a_bug_beside_the_block_ends_it_and_comes_out() -> None:
    async def buggy() -> None:
        await asyncio.sleep(0)
        raise ChildBug

    steps = Steps()

    async def block() -> None:
        async with aio.background(buggy()):
            await steps.forever()

    with pytest.raises(ExceptionGroup) as bugs:
        await block()
    assert bugs.group_contains(ChildBug)
    assert steps.seen == ["cancelled"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_what_ended_by_itself_does_not_end_the_block() -> None:
    steps = Steps()
    async with aio.background(steps.slow(2)):  # type: ignore[arg-type]
        await turns()
    assert steps.seen == ["finished"]


async def test_cancelling_the_block_ends_everything() -> None:
    steps = Steps()

    async def block() -> None:
        async with aio.background(steps.forever()):
            await steps.forever()

    task = asyncio.create_task(block())
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps.seen == ["cancelled", "cancelled"]


async def test_a_deadline_around_it_is_still_a_deadline() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), aio.background(Steps().forever()):
            await asyncio.Event().wait()


# --- finish ---


async def test_finish_returns_the_result_or_the_error() -> None:
    async def failing() -> None:
        raise BodyError

    assert await aio.finish(Steps().slow()) == "result"
    with pytest.raises(BodyError):
        await aio.finish(failing())


async def test_finish_survives_cancellation_however_often_and_then_raises_it() -> None:
    steps = Steps()
    task = asyncio.create_task(aio.finish(steps.slow(30)))
    for _ in range(5):
        await turns(2)
        task.cancel()
        assert not task.done()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps.seen == ["finished"]


async def test_finish_survives_being_cancelled_before_it_began_to_wait() -> None:
    steps = Steps()

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await aio.finish(steps.slow())

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(work())
    assert steps.seen == ["finished"]


# --- acquire ---


async def test_what_is_acquired_is_ours_or_given_back() -> None:
    steps = Steps()

    async def give_back(result: str) -> None:
        await turns()
        steps.seen.append(f"gave back {result}")

    assert await aio.acquire(steps.slow(), give_back) == "result"
    assert steps.seen == ["finished"]
    for begun in (0, 3):
        steps.seen.clear()
        task = asyncio.create_task(aio.acquire(steps.slow(), give_back))
        await turns(1 + begun)
        task.cancel()
        await turns(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps.seen == ["finished", "gave back result"]


async def test_what_could_not_be_acquired_is_not_given_back() -> None:
    async def failing() -> str:
        await turns()
        raise BodyError

    async def give_back(result: str) -> None:
        pytest.fail(result)

    with pytest.raises(BodyError):
        await aio.acquire(failing(), give_back)
    task = asyncio.create_task(aio.acquire(failing(), give_back))
    await turns(2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- all_or_first_error ---


async def test_all_results_come_in_the_order_of_the_works() -> None:
    async def after(number: int) -> int:
        await turns(10 - number)
        return number

    assert await aio.all_or_first_error(after(number) for number in range(5)) == [0, 1, 2, 3, 4]
    assert await aio.all_or_first_error(()) == []


async def test_the_first_error_comes_out_and_the_others_are_cancelled() -> None:
    steps = Steps()

    async def failing(error: type[Exception], after_turns: int) -> None:
        await turns(after_turns)
        raise error

    async def failing_while_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ChildBug

    works = [failing_while_cancelled(), steps.forever(), failing(BodyError, 2), failing(ChildBug, 9)]
    with pytest.raises(BodyError):
        await aio.all_or_first_error(works)
    assert steps.seen == ["cancelled"]


async def test_cancelling_all_is_no_error_of_theirs() -> None:
    steps = Steps()
    task = asyncio.create_task(aio.all_or_first_error([steps.forever(), steps.forever()]))
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps.seen == ["cancelled", "cancelled"]


# --- in_thread ---


async def test_a_thread_gives_its_result_or_its_error() -> None:
    assert await aio.in_thread(abs, -3, end=pytest.fail) == 3
    with pytest.raises(ValueError, match="invalid literal"):
        await aio.in_thread(int, "three", end=pytest.fail)


async def test_a_cancelled_thread_is_told_to_end_and_awaited() -> None:
    stop, seen = threading.Event(), []

    def work(name: str) -> None:
        stop.wait(10)
        time.sleep(0.05)
        seen.append(name)

    task = asyncio.create_task(aio.in_thread(work, "ended", end=stop.set))
    await asyncio.sleep(0.02)
    task.cancel()
    await turns()
    task.cancel()  # an impatient second Ctrl-C
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["ended"]


# --- UndoStack ---


def undo_of(seen: list[str], name: str, error: Exception | None = None) -> aio.UndoAct:
    async def act() -> None:
        await asyncio.sleep(0)
        seen.append(name)
        if error is not None:
            raise error

    return act


async def test_undo_runs_last_first_whatever_fails_and_says_what_did() -> None:
    seen: list[str] = []
    stack = aio.UndoStack()
    stack.push("first", undo_of(seen, "first"))
    stack.push("second", undo_of(seen, "second", BodyError("no such node")))
    stack.push("third", undo_of(seen, "third", BodyError()))
    with capture_logs() as lines:
        assert await stack.unwind(step_deadline_seconds=5) == ["third", "second"]
    assert seen == ["third", "second", "first"]
    assert lines == [
        {"event": "undo.failed", "log_level": "warning", "step": "third", "error": "BodyError"},
        {"event": "undo.failed", "log_level": "warning", "step": "second", "error": "no such node"},
    ]


async def test_undo_happens_once() -> None:
    seen: list[str] = []
    stack = aio.UndoStack()
    stack.push("only", undo_of(seen, "only"))
    assert await stack.unwind(step_deadline_seconds=5) == []
    assert await stack.unwind(step_deadline_seconds=5) == []
    assert seen == ["only"]


async def test_each_undo_step_has_its_own_deadline() -> None:
    seen: list[str] = []
    stack = aio.UndoStack()
    stack.push("quick", undo_of(seen, "quick"))
    for name in ("hangs", "hangs too"):
        stack.push(name, asyncio.Event().wait)
    began = time.monotonic()
    with capture_logs() as lines:
        assert await stack.unwind(step_deadline_seconds=0.05) == ["hangs too", "hangs"]
    assert 0.09 <= time.monotonic() - began < 5  # uvloop counts in whole milliseconds
    assert seen == ["quick"]
    assert [line["error"] for line in lines] == ["TimeoutError", "TimeoutError"]


async def test_cancellation_does_not_interrupt_undo() -> None:
    seen: list[str] = []
    stack = aio.UndoStack()
    for number in range(5):
        stack.push(str(number), undo_of(seen, str(number)))
    task = asyncio.create_task(stack.unwind(step_deadline_seconds=5))
    await asyncio.sleep(0)
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    assert task.cancelled()
    assert seen == ["4", "3", "2", "1", "0"]


async def test_what_is_pushed_while_undoing_is_undone_too() -> None:
    seen: list[str] = []
    stack = aio.UndoStack()

    async def pushes() -> None:
        stack.push("late", undo_of(seen, "late"))

    stack.push("first", undo_of(seen, "first"))
    stack.push("pushes", pushes)
    await stack.unwind(step_deadline_seconds=5)
    assert seen == ["late", "first"]


# --- run_process ---


async def test_a_program_says_how_it_ended() -> None:
    code = "import sys; print('out', flush=True); sys.stderr.write(' last words\\n'); sys.exit(3)"
    ended = await aio.run_process([sys.executable, "-c", code])
    assert ended == aio.Finished(3, b"out\n", "last words")


async def test_a_program_gets_only_the_descriptors_that_it_is_given() -> None:
    read_end, write_end = os.pipe()
    try:
        ended = await aio.run_process(["sh", "-c", f"printf hello >/dev/fd/{write_end}"], pass_fds=[write_end])
        assert ended.returncode == 0
        assert os.read(read_end, 100) == b"hello"
        ended = await aio.run_process(["sh", "-c", f"printf hello >/dev/fd/{write_end}"])
        assert ended.returncode != 0
    finally:
        os.close(read_end)
        os.close(write_end)


async def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        await aio.run_process(["vmfleece-no-such-program"])


async def test_cancelling_kills_the_program(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"trap '' TERM INT; echo $$ > {pid_file}; while :; do sleep 0.1; done"
    task = asyncio.create_task(aio.run_process(["sh", "-c", script]))
    async with asyncio.timeout(10):
        while not pid_file.exists() or not pid_file.read_text():
            await asyncio.sleep(0.01)
    pid = int(pid_file.read_text())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not exists(pid)


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def children() -> str:
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()


async def test_a_program_that_is_only_starting_is_killed_too() -> None:
    await aio.run_process(["true"])
    before = children()
    for begun in range(12):
        task = asyncio.create_task(aio.run_process(["sleep", "600"]))
        await turns(begun)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert children() == before


# --- shared lock ---


async def test_many_share_a_lock_until_somebody_wants_it_alone() -> None:
    lock, seen = aio.SharedLock(), []

    async def share(name: str, until: asyncio.Event) -> None:
        async with lock.shared():
            seen.append(f"{name} in")
            await until.wait()
        seen.append(f"{name} out")

    async def have_alone() -> None:
        async with lock.alone():
            seen.append("alone in")
            await asyncio.sleep(0)
            seen.append("alone out")

    leave = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(share("a", leave))
        group.create_task(share("b", leave))
        await asyncio.sleep(0.01)
        assert not lock.taken
        group.create_task(have_alone())
        await asyncio.sleep(0.01)
        assert lock.taken
        group.create_task(share("late", leave))
        await asyncio.sleep(0.01)
        assert seen == ["a in", "b in"]
        leave.set()
    assert seen == ["a in", "b in", "a out", "b out", "alone in", "alone out", "late in", "late out"]
    assert not lock.taken


async def test_who_waits_for_a_shared_lock_can_give_up() -> None:
    lock = aio.SharedLock()
    async with lock.shared():
        waiting = asyncio.create_task(enter(lock.alone()))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert not lock.taken
        await asyncio.wait_for(enter(lock.shared()), 1)
    await asyncio.wait_for(enter(lock.alone()), 1)


async def enter(context: contextlib.AbstractAsyncContextManager[None]) -> None:
    async with context:
        pass


# --- contexts kept open ---


class Context:
    def __init__(self, entering: Exception | None = None, leaving: Exception | None = None) -> None:
        self.entering, self.leaving = entering, leaving
        self.inside = False
        self.tasks: list[asyncio.Task[Any] | None] = []

    async def __aenter__(self) -> Self:
        await asyncio.sleep(0.01)
        if self.entering:
            raise self.entering
        self.inside = True
        self.tasks.append(asyncio.current_task())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.inside = False
        self.tasks.append(asyncio.current_task())
        await asyncio.sleep(0)
        if self.leaving:
            raise self.leaving


async def test_a_context_is_kept_until_anybody_closes_it() -> None:
    kept = await aio.Kept.opened(Context())
    assert kept.value.inside
    await asyncio.create_task(kept.close())
    assert not kept.value.inside
    await kept.close()
    assert kept.value.tasks[0] is kept.value.tasks[1]


async def test_a_context_that_cannot_be_entered_or_left_says_why() -> None:
    with pytest.raises(OSError, match="shut"):
        await aio.Kept.opened(Context(entering=OSError("shut")))
    kept = await aio.Kept.opened(Context(leaving=OSError("stuck")))
    for _ in range(2):
        with pytest.raises(OSError, match="stuck"):
            await kept.close()


async def test_a_context_is_left_if_nobody_waits_for_it_any_more() -> None:
    context = Context()
    opening = asyncio.create_task(aio.Kept.opened(context))
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait([opening])
    assert opening.cancelled()
    assert not context.inside


# --- signals ---


@pytest.fixture
def _handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in aio.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers_as_before")
async def test_signals_within_a_second_are_one_and_a_later_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with aio.told_to_stop(lambda: told.append("stop"), lambda: told.append("end")):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.01)
        assert told == ["stop"]
    monkeypatch.setattr(aio, "SAME_SECONDS", 0.0)
    os.kill(os.getpid(), signal.SIGINT)  # also after the block: the process is ending
    await asyncio.sleep(0.01)
    assert told == ["stop", "end"]


@pytest.mark.usefixtures("_handlers_as_before")
async def test_signals_do_after_the_block_what_they_did_before_unless_one_came() -> None:
    before = [signal.getsignal(number) for number in aio.STOP_SIGNALS]
    told: list[str] = []
    with aio.told_to_stop(lambda: told.append("outer"), lambda: None):
        with aio.told_to_stop(lambda: None, lambda: None):
            pass
        assert [signal.getsignal(number) for number in aio.STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in aio.STOP_SIGNALS] == before
    with (
        aio.told_to_stop(lambda: told.append("outer"), lambda: None),
        aio.told_to_stop(lambda: told.append("inner"), lambda: None),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.01)
    assert told == ["inner"]
    assert [signal.getsignal(number) for number in aio.STOP_SIGNALS] != before
