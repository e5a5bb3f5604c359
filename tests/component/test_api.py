"""The control socket and who asks it, over real unix sockets."""

import asyncio
import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RefusedError, StateError, VmfleeceError
from orchestrator.service import client
from orchestrator.service.api import server
from orchestrator.service.status import RunStatus, Status, StorageStatus, WaitingStatus
from tests.component.answers import served
from tests.component.world import open_descriptors, settled

ROOT = Path(__file__).parents[2]
STATUS = Status(
    process=4711,
    started="2026-11-23T02:30:00+00:00",
    storages=(
        StorageStatus("local", "/srv/fleecing", 100, 50, 10, 20, 30, None, 5, 1, None, ("hole punching: x",)),
    ),
    runs=(RunStatus("wéb01", "b46bcf3e", None, "main", "copying", "2026-11-23T02:30:01+00:00", 9, 8, 7, 6),),
    queue=(WaitingStatus("db01", "5e22b9f4", "j", "main", 50, "2026-11-23T02:30:02+00:00", ("one", "two")),),
)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    umask = os.umask(0o022)
    with tempfile.TemporaryDirectory(prefix="vmf") as folder:  # a socket's path must be short
        yield Path(folder) / "run"
    os.umask(umask)


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "DEADLINE_SECONDS", 0.2)


def code_of(caught: "pytest.ExceptionInfo[Any]") -> str:
    assert caught.value.message
    assert caught.value.hint
    return caught.value.code


async def exchange(path: Path, request: bytes) -> tuple[int, dict[str, str]]:
    """The status and the JSON of an answer, and that the connection ends with it."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(request)
    async with asyncio.timeout(5):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), json.loads(body)


# Serving -----------------------------------------------------------------------------------------------------


async def test_a_status_comes_over_as_it_is(run_dir: Path) -> None:
    assert await client.status(run_dir) is None
    async with served(run_dir, lambda: STATUS):
        assert await client.status(run_dir) == STATUS
        assert await asyncio.gather(*(client.status(run_dir) for _ in range(20))) == [STATUS] * 20
    assert await client.status(run_dir) is None
    assert list(run_dir.iterdir()) == []


async def test_each_answer_is_asked_for_anew(run_dir: Path) -> None:
    answers = iter((Status(1, None), Status(2, None)))
    async with served(run_dir, lambda: next(answers)):
        assert await client.status(run_dir) == Status(1, None)
        assert await client.status(run_dir) == Status(2, None)


async def test_it_is_plain_http_for_other_programs(run_dir: Path) -> None:
    async with served(run_dir, lambda: STATUS):
        asked = b"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert await exchange(run_dir / "api.sock", asked) == (200, json.loads(json.dumps(STATUS.as_json())))


@pytest.mark.parametrize(
    ("method", "route", "status", "code"),
    [
        ("GET", "/page", 404, "not-found"),
        ("GET", "/api/v2/status", 404, "not-found"),
        ("POST", "/api/v1/status", 405, "method-not-allowed"),
        ("HEAD", "/api/v1/status/x", 404, None),
    ],
)
async def test_what_is_not_there_is_answered_as_json(
    run_dir: Path, method: str, route: str, status: int, code: str | None
) -> None:
    async with served(run_dir, lambda: STATUS):
        path = run_dir / "api.sock"
        request = f"{method} {route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode()
        if code is None:
            with pytest.raises(json.JSONDecodeError):  # no body, as HEAD wants it
                await exchange(path, request)
            return
        found, error = await exchange(path, request)
    assert (found, error["code"]) == (status, code)
    assert error["message"].startswith(f"{method} {route}")
    assert "GET /api/v1/openapi.json" in error["hint"]


@pytest.mark.parametrize(
    ("failure", "code", "hint"),
    [
        (RefusedError("it does not say", hint="ask again", code="vm-state"), "vm-state", "ask again"),
        (KeyError("web01"), "bug", "report this"),
    ],
)
async def test_a_failure_of_ours_is_told_and_serving_goes_on(
    run_dir: Path, capfd: pytest.CaptureFixture[str], failure: Exception, code: str, hint: str
) -> None:
    def fail_first() -> Status:
        if failures:
            raise failures.pop()
        return STATUS

    failures = [failure]
    async with served(run_dir, fail_first):
        with pytest.raises(VmfleeceError) as caught:
            await client.status(run_dir)
        assert await client.status(run_dir) == STATUS
    assert code_of(caught) == code
    assert hint in caught.value.hint
    assert capfd.readouterr() == ("", "")


async def test_nothing_that_a_client_sends_reaches_the_terminal(
    run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with served(run_dir, lambda: STATUS):
        for sent in (b"garbage\r\n\r\n", b"\0" * 100_000, b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000, b""):
            reader, writer = await asyncio.open_unix_connection(run_dir / "api.sock")
            with contextlib.suppress(ConnectionError):
                writer.write(sent)
                writer.write_eof()
                await reader.read()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        assert await client.status(run_dir) == STATUS
    assert capfd.readouterr() == ("", "")


# The end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"GET /api/v1/sta", b"GET /api/v1/status HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_a_client_cannot_hold_up_the_end(run_dir: Path, sent: bytes) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with served(run_dir, lambda: STATUS):
            reader, writer = await asyncio.open_unix_connection(run_dir / "api.sock")
            stack.callback(writer.close)
            writer.write(sent)
            await asyncio.sleep(0.05)
            began = time.monotonic()
        assert time.monotonic() - began < server.SHUTDOWN_SECONDS + 1
        async with asyncio.timeout(1):
            await reader.read()


@pytest.mark.parametrize("error", [asyncio.CancelledError, StateError])
async def test_however_the_block_ends_the_socket_is_gone(run_dir: Path, error: type[BaseException]) -> None:
    async def serve() -> None:
        async with served(run_dir, lambda: STATUS):
            raise error("it ends")

    with pytest.raises(error):
        await serve()
    assert list(run_dir.iterdir()) == []
    async with served(run_dir, lambda: STATUS):
        pass


@pytest.mark.parametrize("steps", range(6))
async def test_cancelled_at_any_step_nothing_is_left(run_dir: Path, steps: int) -> None:
    async def serve() -> None:
        async with served(run_dir, lambda: STATUS):
            await asyncio.Event().wait()

    async with served(run_dir, lambda: STATUS):
        pass  # what a loop opens once
    before = open_descriptors()
    task = asyncio.create_task(serve())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await settled(lambda: open_descriptors() == before)
    assert open_descriptors() == before
    assert not run_dir.exists() or list(run_dir.iterdir()) == []


async def test_descriptors_are_given_back(run_dir: Path) -> None:
    async with served(run_dir, lambda: STATUS):
        await client.status(run_dir)
    before = open_descriptors()
    for _ in range(5):
        async with served(run_dir, lambda: STATUS):
            await client.status(run_dir)
            with pytest.raises(StateError):
                await served(run_dir, lambda: STATUS).__aenter__()
    await settled(lambda: open_descriptors() == before)
    assert open_descriptors() == before


async def test_a_folder_that_is_gone_at_the_end_is_no_error(run_dir: Path) -> None:
    async with served(run_dir, lambda: STATUS):
        (run_dir / "api.sock").unlink()
        run_dir.rmdir()


# Who may -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o177])
async def test_modes_do_not_depend_on_the_umask(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    modes = []
    bind = socket.socket.bind

    def bind_and_look(self: socket.socket, address: str) -> None:
        bind(self, address)
        modes.append(stat.S_IMODE(Path(address).stat().st_mode))

    monkeypatch.setattr(socket.socket, "bind", bind_and_look)
    os.umask(umask)
    async with served(run_dir, lambda: STATUS):
        assert set(modes) == {0o660 & ~umask}  # from its first moment: never more than in the end
        assert stat.S_IMODE((run_dir / "api.sock").stat().st_mode) == 0o660
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o750


async def test_the_mode_of_a_folder_that_is_there_is_its_owners_business(run_dir: Path) -> None:
    run_dir.mkdir(mode=0o711)
    async with served(run_dir, lambda: STATUS):
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o711


@pytest.fixture
def nobody() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Be somebody else for a block, where we are root."""

    @contextlib.contextmanager
    def be() -> Iterator[None]:
        groups = os.getgroups()
        os.setgroups([])
        os.setegid(65534)
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(groups)

    return be if os.geteuid() == 0 else contextlib.nullcontext


@pytest.mark.parametrize("folder_mode", [0o700, 0o755])
async def test_who_may_not_ask_is_told_who_may(
    run_dir: Path, nobody: Callable[[], contextlib.AbstractContextManager[None]], folder_mode: int
) -> None:
    async with served(run_dir, lambda: STATUS):
        run_dir.parent.chmod(0o755)
        run_dir.chmod(folder_mode)
        if os.geteuid() != 0:
            (run_dir / "api.sock").chmod(0)
        with nobody(), pytest.raises(StateError) as caught:
            await client.status(run_dir)
    assert code_of(caught) == "api-forbidden"
    assert f"only {run_dir.owner()} and members of the group {run_dir.group()} may ask" in caught.value.hint


async def test_a_folder_that_may_not_be_written(
    run_dir: Path, nobody: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    run_dir.parent.chmod(0o555)
    with nobody(), pytest.raises(StateError) as caught:
        async with served(run_dir, lambda: STATUS):
            raise AssertionError
    assert code_of(caught) == "state-unusable"
    assert "Permission denied" in caught.value.message
    run_dir.parent.chmod(0o755)


# What was there before ---------------------------------------------------------------------------------------


async def test_a_socket_that_somebody_killed_left_is_replaced(run_dir: Path) -> None:
    run_dir.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(run_dir / "api.sock"))
        left.listen()
    assert await client.status(run_dir) is None
    async with served(run_dir, lambda: STATUS):
        assert await client.status(run_dir) == STATUS


SERVER = """\
import asyncio, sys
from pathlib import Path
from orchestrator.service.status import Status
from tests.component.answers import served
async def serve():
    async with served(Path(sys.argv[1]), lambda: Status(1, None)):
        print("ready", flush=True)
        await asyncio.Event().wait()
asyncio.run(serve())
"""


async def test_one_server_a_run_dir_also_after_a_kill(run_dir: Path) -> None:
    argv = [sys.executable, "-c", SERVER, str(run_dir)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:  # noqa: ASYNC220  waited for
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(StateError) as caught:
            async with served(run_dir, lambda: STATUS):
                raise AssertionError
        assert code_of(caught) == "run-dir-in-use"
        assert str(run_dir) in caught.value.message
        assert await client.status(run_dir) == Status(1, None)  # it goes on
        other.kill()
    assert await client.status(run_dir) is None
    async with served(run_dir, lambda: STATUS):
        assert await client.status(run_dir) == STATUS


@pytest.mark.parametrize("backlog", [0, 5])
async def test_somebody_else_who_answers_is_left_alone(run_dir: Path, backlog: int) -> None:
    run_dir.mkdir()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(run_dir / "api.sock"))
        listener.listen(backlog)
        if backlog == 0:  # full, and so whoever connects next is to try again
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).connect(listener.getsockname())
        with pytest.raises(StateError) as caught:
            async with served(run_dir, lambda: STATUS):
                raise AssertionError
        assert code_of(caught) == "run-dir-in-use"
        assert (run_dir / "api.sock").exists()


async def test_a_file_of_that_name_is_not_removed(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "api.sock").write_text("mine")
    with pytest.raises(StateError) as caught:
        async with served(run_dir, lambda: STATUS):
            raise AssertionError
    assert code_of(caught) == "state-unusable"
    assert "no socket" in caught.value.message
    assert (run_dir / "api.sock").read_text() == "mine"
    assert await client.status(run_dir) is None


async def test_a_run_dir_that_is_a_file(run_dir: Path) -> None:
    run_dir.touch()
    with pytest.raises(StateError) as caught:
        async with served(run_dir, lambda: STATUS):
            raise AssertionError
    assert code_of(caught) == "state-unusable"
    assert "Not a directory" in caught.value.message
    assert "daemon.run_dir" in caught.value.hint


@pytest.mark.parametrize(("extra", "fits"), [(0, True), (1, False)])
async def test_the_longest_path(run_dir: Path, extra: int, *, fits: bool) -> None:
    room = 107 - len(str(run_dir)) - len("//api.sock")
    folder = run_dir / ("é" * (room // 2) + "x" * (room % 2 + extra))  # bytes count, not letters
    if fits:
        async with served(folder, lambda: STATUS):
            assert await client.status(folder) == STATUS
        return
    with pytest.raises(StateError) as caught:
        async with served(folder, lambda: STATUS):
            raise AssertionError
    assert code_of(caught) == "state-unusable"
    assert "has 108 bytes" in caught.value.message
    assert not folder.exists()
    with pytest.raises(StateError, match="108 bytes"):
        await client.status(folder)


# Asking somebody who does not answer as he should ------------------------------------------------------------

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def answering(run_dir: Path, *answers: bytes, then: str = "hangs up") -> AsyncIterator[list[bytes]]:
    """A server that gives each connection the next answer, the last one again and again."""
    asked: list[bytes] = []
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = answers[min(len(asked), len(answers) - 1)]
        asked.append(await reader.read(1000))
        writer.write(answer)
        if then == "is mute":
            await ended.wait()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    run_dir.mkdir()
    server = await asyncio.start_unix_server(serve, run_dir / "api.sock")
    yield asked
    ended.set()
    server.close()
    await server.wait_closed()
    await asyncio.sleep(0.01)


def answer(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(body), body)


GOOD = json.dumps(STATUS.as_json()).encode()


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", answer(GOOD)[:-1]])
async def test_a_mute_server(run_dir: Path, said: bytes) -> None:
    async with answering(run_dir, said, then="is mute"):
        began = time.monotonic()
        with pytest.raises(StateError) as caught:
            await client.status(run_dir)
        assert time.monotonic() - began < 2
    assert code_of(caught) == "api-silent"


@pytest.mark.usefixtures("no_patience")
async def test_a_server_that_accepts_nobody(run_dir: Path) -> None:
    run_dir.mkdir()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(run_dir / "api.sock"))
        listener.listen(0)
        for full in range(2):
            with pytest.raises(StateError) as caught:
                await client.status(run_dir)
            assert code_of(caught) == "api-silent"
            if not full:
                held = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                held.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    held.connect(listener.getsockname())


@pytest.mark.parametrize(
    "said",
    [
        b"garbage",
        b"\0" * 1000,
        answer(b""),
        answer(b"<html>"),
        answer(b"[]"),
        answer(b"null"),
        answer(b"{}"),
        answer(b"\xff\xfe"),
        answer(b'{"process": 1}'),
        answer(GOOD.replace(b"4711", b'"4711"')),
        answer(GOOD.replace(b"4711", b"true")),
        answer(GOOD.replace(b'"reasons": [', b'"reasons": 3, "x": [')),
        answer(GOOD.replace(b'"quota_bytes": 100', b'"quota_bytes": "100"')),
        answer(GOOD.replace(b'"vm"', b'"wm"')),
        answer(b'{"code": "x"}', b"500 Internal Server Error"),
        answer(b"Bad Gateway", b"502 Bad Gateway"),
        answer(GOOD, b"204 No Content"),
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + GOOD[:50],
    ],
)
async def test_an_answer_that_makes_no_sense(run_dir: Path, said: bytes) -> None:
    async with answering(run_dir, said):
        with pytest.raises(StateError) as caught:
            await client.status(run_dir)
    assert code_of(caught) == "api-wrong"
    assert str(run_dir / "api.sock") in caught.value.message


async def test_a_newer_server_may_say_more(run_dir: Path) -> None:
    more = json.dumps(STATUS.as_json() | {"weather": "fine"}).encode()
    async with answering(run_dir, answer(more)):
        assert await client.status(run_dir) == STATUS


async def test_a_server_that_ends_while_it_is_asked_is_asked_again(run_dir: Path) -> None:
    async with answering(run_dir, b"", answer(GOOD)) as asked:
        assert await client.status(run_dir) == STATUS
    assert len(asked) == 2


async def test_a_server_that_is_gone_when_it_is_asked_again(run_dir: Path) -> None:
    run_dir.mkdir()
    path = run_dir / "api.sock"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        path.unlink()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_unix_server(serve, path):
        assert await client.status(run_dir) is None
    await asyncio.sleep(0.01)


async def test_a_server_that_hangs_up_on_everybody(run_dir: Path) -> None:
    async with answering(run_dir, b"") as asked:
        with pytest.raises(StateError) as caught:
            await client.status(run_dir)
    assert code_of(caught) == "api-silent"
    assert len(asked) == 2


async def test_asking_can_be_cancelled(run_dir: Path) -> None:
    async with answering(run_dir, b"", then="is mute") as asked:
        task = asyncio.create_task(client.status(run_dir))
        while not asked:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
