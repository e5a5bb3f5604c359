"""Child processes: what they say, how they end, and that nothing of them stays open."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from orchestrator import child

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208


Run = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs work on a loop of its own, of both kinds; nothing stays open after it."""

    async def checked(work: Callable[[], Awaitable[None]]) -> None:
        first = await child.start(("true",), stdout=child.PIPE, stderr=child.PIPE)
        await first.communicate()  # libuv keeps a descriptor in reserve from then on
        await asyncio.sleep(0.2)
        before = open_descriptors()
        await work()
        async with asyncio.timeout(10):  # uvloop closes its pipes a little later
            while not open_descriptors() <= before:
                await asyncio.sleep(0.01)

    def run(work: Callable[[], Awaitable[None]]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(checked(work))

    return run


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_it_says_how_it_ended_and_all_that_it_wrote(run: Run) -> None:
    code = "import sys; sys.stdout.write('x' * 1_000_000); sys.stderr.write('words'); sys.exit(3)"

    async def work() -> None:
        process = await child.start(python(code), stdout=child.PIPE, stderr=child.PIPE)
        assert await process.communicate() == (b"x" * 1_000_000, b"words")
        assert await process.wait() == process.returncode == 3

    run(work)


def test_many_end_at_once_and_each_is_noticed(run: Run) -> None:
    async def one(code: int) -> int:
        process = await child.start(("sh", "-c", f"exit {code}"), stdout=child.DEVNULL, stderr=child.DEVNULL)
        return await process.wait()

    async def work() -> None:
        async with asyncio.timeout(30):
            assert await asyncio.gather(*map(one, range(50))) == list(range(50))

    run(work)


def test_it_is_ended_by_a_signal_and_takes_none_afterwards(run: Run) -> None:
    async def work() -> None:
        process = await child.start(("sleep", "60"), stdout=child.DEVNULL, stderr=child.PIPE)
        assert process.returncode is None
        process.send_signal(signal.SIGINT)
        assert (await process.communicate(), process.returncode) == ((b"", b""), -signal.SIGINT)
        process.kill()  # nobody's process by now, perhaps somebody else's
        assert await process.wait() == -signal.SIGINT

    run(work)


def test_one_that_was_killed_before_anybody_waited_is_waited_for(run: Run) -> None:
    """`kill` may find that it has ended, and reap it, before the loop has looked."""

    async def work() -> None:
        process = await child.start(("true",), stdout=child.DEVNULL, stderr=child.DEVNULL)
        while process.returncode is None:
            process.send_signal(0)
        async with asyncio.timeout(10):
            assert await process.wait() == 0

    run(work)


def test_lines_are_read_as_they_come_and_not_longer_ones_than_told(run: Run) -> None:
    code = "import time; print('first', flush=True); time.sleep(60)"

    async def work() -> None:
        process = await child.start(python(code), stdout=child.PIPE, stderr=child.STDOUT)
        assert process.stdout is not None
        assert process.stderr is None
        async with asyncio.timeout(10):
            assert await process.stdout.readline() == b"first\n"
        process.kill()
        await process.communicate()
        process = await child.start(
            python("print('x' * 100)"), stdout=child.PIPE, stderr=child.DEVNULL, limit_bytes=50
        )
        assert process.stdout is not None
        with pytest.raises(ValueError, match=r"limit|longer"):
            await process.stdout.readline()
        await process.communicate()

    run(work)


def test_it_has_the_environment_the_descriptors_and_the_session_that_it_is_given(run: Run) -> None:
    code = "import os; print(sorted(os.listdir('/proc/self/fd')), os.environ['NAME'], os.getsid(0) == os.getpid())"

    async def work() -> None:
        given = os.open("/dev/null", os.O_RDONLY)
        withheld = os.open("/dev/null", os.O_RDONLY)
        os.set_inheritable(withheld, True)
        try:
            process = await child.start(
                python(code),
                stdout=child.PIPE,
                stderr=child.DEVNULL,
                pass_fds=[given],
                env={"NAME": "value"},
                start_new_session=True,
            )
            said, _ = await process.communicate()
        finally:
            os.close(given)
            os.close(withheld)
        names, name, leads = said.decode().rsplit(maxsplit=2)
        assert str(given) in names
        assert str(withheld) not in names.replace(str(given), "")
        assert (name, leads) == ("value", "True")

    run(work)


def test_there_is_no_such_program(run: Run) -> None:
    async def work() -> None:
        with pytest.raises(FileNotFoundError):
            await child.start(("vmfleece-no-such-program",), stdout=child.PIPE, stderr=child.PIPE)

    run(work)


def test_one_that_cannot_be_watched_does_not_run_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(pid: int) -> int:
        pids.append(pid)
        raise OSError(24, "Too many open files")

    pids: list[int] = []

    async def work() -> None:
        monkeypatch.setattr(os, "pidfd_open", none_left)
        with pytest.raises(OSError, match="Too many"):
            await child.start(("sleep", "60"), stdout=child.PIPE, stderr=child.PIPE)

    run(work)
    (pid,) = pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
