"""The few asyncio idioms that everything here is built from.

Invariants: no task outlives the block that started it; what must be undone is undone in one task that repeated
cancellation cannot interrupt; a child process never outlives its caller.
"""

import asyncio
import atexit
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import structlog

log = structlog.get_logger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 1.0

T = TypeVar("T")
A = TypeVar("A")
Start = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]
UndoAct = Callable[[], Awaitable[object]]


@contextlib.contextmanager
def told_to_stop(stop: Callable[[], object], end: Callable[[], object]) -> Iterator[None]:
    """Have SIGTERM and SIGINT call `stop` the first time and then `end`; once they did, also after the block.

    Those within a second of the first are taken for the same one: timeout(1), for one, sends each twice. Both are
    called by the loop; once that is closed, and only threads are waited for, by the signal's handler.
    """
    loop = asyncio.get_running_loop()
    first: list[float] = []

    def told() -> None:
        if not first:
            first.append(time.monotonic())
            atexit.register(_ignore_stop_signals)
            stop()
        elif time.monotonic() - first[0] > SAME_SECONDS:
            end()

    def handle(_number: int, _frame: object) -> None:
        try:
            loop.call_soon_threadsafe(told)
        except RuntimeError:  # it is closed
            told()

    # Not by the loop's own handlers: they go with the loop, and the next signal would kill the process.
    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if not first and signal.getsignal(number) is handle:  # that of a block within stays, if it was told
                signal.signal(number, handler)


def _ignore_stop_signals() -> None:
    """Python gives up its handlers as it ends: a process that was told to stop is not to be killed then."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.asynccontextmanager
async def background(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[Start]:
    """Run coroutines, and those that are started later, beside the block and cancel them at its end.

    An error of the block comes out as it is (a TaskGroup alone would wrap it); an error of a coroutine is a bug,
    ends the block and comes out as an ExceptionGroup.
    """
    failure: BaseException | None = None
    async with asyncio.TaskGroup() as group:
        tasks: set[asyncio.Task[None]] = set()

        def start(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            task = group.create_task(coroutine)
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            return task

        for coroutine in coroutines:
            start(coroutine)
        try:
            yield start
        except BaseException as error:  # noqa: BLE001  raised again below, outside the group
            failure = error
        finally:
            for task in tuple(tasks):
                task.cancel()
    if failure is not None:
        raise failure


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even if the caller is cancelled meanwhile, however often.

    Raises CancelledError afterwards if the caller was cancelled.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from task.exception()
    return task.result()


async def acquire(work: Coroutine[Any, Any, T], give_back: Callable[[T], Awaitable[object]]) -> T:
    """Await `work` to its end even if the caller is cancelled meanwhile; what came of it is given back then.

    For what would be lost to everybody otherwise: an open folder, a child process.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await finish(_give_back(task, give_back))
        raise


async def _give_back(task: "asyncio.Future[T]", give_back: Callable[[T], Awaitable[object]]) -> None:
    await _done(task)
    if not task.cancelled() and task.exception() is None:
        await give_back(task.result())


async def all_or_first_error(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines side by side; the first one that fails cancels the others, and its error comes out."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]


async def unless(interruption: Coroutine[Any, Any, NoReturn], work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; if `interruption` raises before it is done, `work` is cancelled and that error comes out."""
    try:
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(interruption)
            working = group.create_task(work)
            working.add_done_callback(lambda _working: waiting.cancel())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return working.result()


async def in_thread(function: Callable[[A], T], argument: A, *, end: Callable[[], object]) -> T:
    """Run blocking work in a thread. On cancellation, `end` is called to make it stop, and it is awaited."""
    task = asyncio.ensure_future(asyncio.to_thread(function, argument))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        end()
        await finish(_done(task))
        raise


async def _done(task: "asyncio.Future[Any]") -> None:
    await asyncio.wait([task])


@dataclass(frozen=True, slots=True)
class _Undo:
    name: str
    act: UndoAct


class UndoStack:
    """Steps that put things back, run last first. Each step must be idempotent.

    Push the undo *before* acting: the act may succeed although nobody saw it.
    """

    def __init__(self) -> None:
        self._steps: list[_Undo] = []

    def push(self, name: str, act: UndoAct) -> None:
        """Remember how to put back what is about to be done."""
        self._steps.append(_Undo(name, act))

    async def unwind(self, *, step_deadline_seconds: float) -> list[str]:
        """Run all steps, each within its deadline, whatever fails. Returns the names of steps that failed.

        Cancellation does not interrupt it; it is raised again at the end.
        """
        failed: list[str] = []

        async def run_all() -> None:
            while self._steps:
                step = self._steps.pop()
                try:
                    async with asyncio.timeout(step_deadline_seconds):
                        await step.act()
                except Exception as error:  # noqa: BLE001  one failed step must not stop the others
                    failed.append(step.name)
                    log.warning("undo.failed", step=step.name, error=str(error) or type(error).__name__)

        await finish(run_all())
        return failed


@dataclass(frozen=True, slots=True)
class Finished:
    """How a child process ended. `stderr` is its last words, decoded."""

    returncode: int
    stdout: bytes
    stderr: str


async def run_process(argv: Sequence[str], *, pass_fds: Sequence[int] = ()) -> Finished:
    """Run a program to its end. Raises FileNotFoundError; cancellation kills the program, and sees it end."""
    process = await acquire(  # uvloop, cancelled while it starts one, does not wait for its end
        asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=tuple(pass_fds),
        ),
        _kill,
    )
    try:
        stdout, stderr = await process.communicate()
    except BaseException:
        await finish(_kill(process))
        raise
    assert process.returncode is not None  # noqa: S101  communicate() waited for it
    return Finished(process.returncode, stdout, stderr.decode(errors="replace").strip())


async def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.communicate()


class Kept(Generic[T]):
    """What an asynchronous context gives, kept open by a task of its own until `close`, whoever calls that.

    Contexts with task groups in them must be left by the task that entered them.
    """

    def __init__(self, task: "asyncio.Task[None]", value: T, closing: asyncio.Event) -> None:
        self.value = value
        self._task = task
        self._closing = closing

    @classmethod
    async def opened(cls, context: contextlib.AbstractAsyncContextManager[T]) -> "Kept[T]":
        """Enter it. Raises what entering raises; cancelling that leaves it."""
        value: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        closing = asyncio.Event()

        async def keep() -> None:
            async with context as entered:
                value.set_result(entered)
                await closing.wait()

        task = asyncio.create_task(keep())
        either: list[asyncio.Future[Any]] = [task, value]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            await finish(_done(task))
            raise
        if not value.done():
            await task  # which says why
        return cls(task, value.result(), closing)

    async def close(self) -> None:
        """Leave it, whatever that raises. May be called again; cancellation does not interrupt it."""
        self._closing.set()
        await finish(self._left())

    async def _left(self) -> None:
        await self._task


class SharedLock:
    """Held by many at once, or by one alone, who comes before all that ask after it."""

    def __init__(self) -> None:
        self._holders = 0
        self._alone = asyncio.Lock()
        self._nobody = asyncio.Event()
        self._nobody.set()

    @property
    def taken(self) -> bool:
        """Whether somebody has it alone, or waits for that: others wait."""
        return self._alone.locked()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold it beside others, for the block."""
        async with self._alone:
            self._holders += 1
            self._nobody.clear()
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._nobody.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold it with nobody beside, for the block."""
        async with self._alone:
            await self._nobody.wait()
            yield
