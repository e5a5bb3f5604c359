"""Who may ask what, and what clients that do not behave come to: the socket and TCP, over real connections."""

import asyncio
import contextlib
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from orchestrator.config import Address
from orchestrator.errors import StateError, VmfleeceError
from orchestrator.service.api import connection, guard, server, stream
from orchestrator.service.api.base import Service
from orchestrator.service.status import Status
from tests.component import answers
from tests.component.answers import Recorded
from tests.component.http import Caller, free_port, over_socket, over_tcp
from tests.component.world import open_descriptors, settled

TOKEN = "0123456789abcdef0123456789abcdef"
ORDER = {"vms": ["web01"]}
HEAD = b"POST /api/v1/runs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("info"))
    with capture_logs() as found:
        yield found


@contextlib.asynccontextmanager
async def daemon(
    run_dir: Path, *, token: str | None = None, hosts: tuple[str, ...] = ()
) -> AsyncIterator[tuple[Recorded, Caller]]:
    """By TCP."""
    token_file = None
    if token is not None:
        token_file = run_dir.parent / "token"
        token_file.touch(0o600)
        token_file.write_text(token + "\n")
    told = Recorded(lambda: Status(1, None), Service.DAEMON)
    listen = Address("127.0.0.1", free_port())
    settings = answers.settings(run_dir, listen=listen, hosts=hosts, token_file=token_file)
    async with server.served(settings, told), over_tcp(listen.port) as call:
        yield told, call


# --- by TCP ---


async def test_by_tcp_everybody_may_read_and_nobody_change_anything(run_dir: Path, logs: list[Any]) -> None:
    async with daemon(run_dir) as (told, call):
        assert (await call.get("/api/v1/status"))["process"] == 1
        answer = await call("GET", "/api/v1/status")
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert not [name for name in answer.headers if name.startswith("Access-Control")]
        for path, body in (
            ("/api/v1/runs", ORDER),
            ("/api/v1/runs/0badcafe/cancel", None),
            ("/api/v1/jobs/nightly/run", None),
            ("/api/v1/cleanup", {"dry_run": True}),
        ):
            for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {TOKEN}"}):
                refused = await call("POST", path, body=body, headers=headers)
                assert (refused.status, refused.code) == (403, "read-only")
        assert told.asked == []
    assert {line["code"] for line in logs if line["event"] == "api.refused"} == {"read-only"}


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN} x"],
)
async def test_a_wrong_token_changes_nothing(run_dir: Path, authorization: str | None, logs: list[Any]) -> None:
    async with daemon(run_dir, token=TOKEN) as (told, call):
        headers = {} if authorization is None else {"Authorization": authorization}
        refused = await call("POST", "/api/v1/runs", body=ORDER, headers=headers)
        assert (refused.status, refused.code) == (401, "unauthorized")
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert told.asked == []
    (line,) = [line for line in logs if line["event"] == "api.refused"]
    assert (line["code"], line["peer"]) == ("unauthorized", "127.0.0.1")
    assert TOKEN[:-1] not in str(logs) + refused.text


async def test_with_the_token_what_is_asked_for_is_begun(run_dir: Path, logs: list[Any]) -> None:
    async with daemon(run_dir, token=TOKEN) as (told, call):
        begun = await call("POST", "/api/v1/runs", body=ORDER, headers={"Authorization": f"bearer {TOKEN}"})
        assert (begun.status, begun.json["vms"]) == (202, ["web01"])
        assert len(told.asked) == 1
        (run_dir.parent / "token").write_text("another-token-of-good-length\n")  # from the next call on
        refused = await call("POST", "/api/v1/runs", body=ORDER, headers={"Authorization": f"Bearer {TOKEN}"})
        assert refused.status == 401
    assert [line["path"] for line in logs if line["event"] == "api.asked"] == ["/api/v1/runs"]


@pytest.mark.parametrize(("token", "problem"), [("", "is empty"), ("short", "is no good token")])
async def test_a_token_that_cannot_be_used_is_said_at_the_start(run_dir: Path, token: str, problem: str) -> None:
    with pytest.raises(VmfleeceError, match=problem) as caught:
        async with daemon(run_dir, token=token):
            raise AssertionError
    assert caught.value.code == "token-file"


async def test_systemds_credential_is_a_token(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir.parent / "api.token").touch(0o600)
    (run_dir.parent / "api.token").write_text(TOKEN)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(run_dir.parent))
    async with daemon(run_dir) as (_, call):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert (await call("POST", "/api/v1/runs", body=ORDER, headers=headers)).status == 202


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Host": "evil.example"}, 421, "host-unknown"),
        ({"Host": "127.0.0.1.evil.example"}, 421, "host-unknown"),
        ({"Host": "localhost.evil.example:9321"}, 421, "host-unknown"),
        ({"Host": "[::1"}, 421, "host-unknown"),
        ({"Host": "a b"}, 421, "host-unknown"),
        ({"Host": "127.0.0.1", "Origin": "http://evil.example"}, 403, "origin-foreign"),
        ({"Host": "127.0.0.1", "Origin": "null"}, 403, "origin-foreign"),
        ({"Host": "localhost", "Origin": "http://localhost:8080"}, 403, "origin-foreign"),
        ({"Host": "localhost:9321", "Origin": "http://localhost:9321"}, 200, None),
        ({"Host": "LOCALHOST"}, 200, None),
        ({"Host": "[::1]:9321"}, 200, None),
        ({"Host": "192.0.2.7:80"}, 200, None),
        ({"Host": "backup.example.org"}, 200, None),
        ({"Host": socket.gethostname()}, 200, None),
    ],
)
async def test_a_page_of_somebody_elses_is_refused(
    run_dir: Path, headers: dict[str, str], status: int, code: str | None
) -> None:
    async with daemon(run_dir, hosts=("Backup.example.org",)) as (_, call):
        for path in ("/api/v1/status", "/api/v1/events" if code else "/healthz", "/metrics"):
            answer = await call("GET", path, headers=headers)
            assert answer.status == status
            if code:
                assert answer.code == code


async def test_metrics_are_served(run_dir: Path) -> None:
    async with daemon(run_dir) as (_, call):
        answer = await call("GET", "/metrics")
        assert "vmfleece_test 1.0" in answer.text
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")


async def test_an_address_that_is_taken_is_named(run_dir: Path, before: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = Address("127.0.0.1", taken.getsockname()[1])
        told = Recorded(lambda: Status(1, None), Service.DAEMON)
        with pytest.raises(StateError, match=f"cannot listen on {listen}") as caught:
            async with server.served(answers.settings(run_dir, listen=listen), told):
                raise AssertionError
        assert caught.value.code == "listen-unusable"
        assert not (run_dir / "api.sock").exists()
    await settled(lambda: open_descriptors() == before)
    assert open_descriptors() == before


async def test_a_command_does_not_listen(run_dir: Path) -> None:
    listen = Address("127.0.0.1", free_port())
    told = Recorded(lambda: Status(1, None), Service.COMMAND)
    async with server.served(answers.settings(run_dir, listen=listen), told) as serving:
        assert serving.address is None
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(listen.host, listen.port)


# --- on the socket ---


def peer(user: int, *groups: int) -> guard.Peer:
    return guard.Peer(1, user, frozenset(groups))


@pytest.mark.parametrize(
    ("who", "may"),
    [
        (peer(0, 0), True),
        (peer(os.geteuid(), 7), True),
        (peer(4711, 100, 42), True),
        (peer(4711, 100), False),
        (peer(4711), False),
    ],
)
def test_who_may_use_the_socket(who: guard.Peer, may: bool) -> None:
    if may:
        guard.check_peer(who, group=42)
        return
    with pytest.raises(guard.Forbidden, match="user 4711"):
        guard.check_peer(who, group=42)


AS_NOBODY = """\
import os, socket, sys
asking = socket.socket(socket.AF_UNIX)
os.setgroups({groups})
os.setgid(65534)
os.setuid(65534)
asking.connect(sys.argv[1])
asking.sendall(b'GET /api/v1/status HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')
print(asking.makefile('rb').readline().split()[1].decode())
"""


@pytest.mark.parametrize(("groups", "status"), [([], 403), ([4242], 200)])
async def test_the_kernel_says_who_asks(groups: list[int], status: int) -> None:
    assert os.geteuid() == 0, "only root can ask as somebody else: run this as root"
    told = Recorded(lambda: Status(1, None), Service.DAEMON)
    with tempfile.TemporaryDirectory(prefix="vmf") as folder:  # whose parents anybody may enter
        async with server.served(answers.settings(Path(folder)), told):
            path = Path(folder) / "api.sock"
            os.chown(path, -1, 4242)
            path.chmod(0o666)  # by somebody's mistake
            path.parent.chmod(0o755)
            said = await asyncio.create_subprocess_exec(
                "python3", "-c", AS_NOBODY.format(groups=groups), path, stdout=asyncio.subprocess.PIPE, cwd="/"
            )
            answer, _ = await said.communicate()
    assert answer.decode().strip() == str(status)


# --- clients that do not behave ---


@pytest.mark.parametrize("sizes", [(64 * 1024 + 1, None), (64 * 1024 + 1, 100), (10**12, 100)])
async def test_a_body_that_is_too_large(run_dir: Path, sizes: tuple[int, int | None], logs: list[Any]) -> None:
    size, sent = sizes
    told = Recorded(lambda: Status(1, None), Service.DAEMON)
    async with server.served(answers.settings(run_dir), told):
        reader, writer = await asyncio.open_unix_connection(run_dir / "api.sock")
        writer.write(HEAD % size + b" " * (sent or size))
        async with asyncio.timeout(10):
            assert (await reader.readline()).split()[1] == b"413"
        writer.close()
        assert told.asked == []
        await asyncio.sleep(2 * server.LINGER_SECONDS)
    assert "request-entity-too-large" in str(logs)


async def test_a_chunked_body_that_is_too_large(run_dir: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 4096

    told = Recorded(lambda: Status(1, None), Service.DAEMON)
    async with server.served(answers.settings(run_dir), told), over_socket(run_dir / "api.sock") as call:
        headers = {"Content-Type": "application/json"}
        async with call.session.post(call.base + "/api/v1/runs", data=endless(), headers=headers) as response:
            assert response.status == 413
        assert told.asked == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_what_a_form_could_send_is_refused(run_dir: Path, kind: str) -> None:
    async with daemon(run_dir, token=TOKEN) as (told, call):
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind}
        async with call.session.post(
            call.base + "/api/v1/runs", data=b'{"vms": ["web01"]}', headers=headers
        ) as found:
            assert found.status == 415
        assert told.asked == []


async def test_a_body_that_never_comes(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_SECONDS", 0.1)
    told = Recorded(lambda: Status(1, None), Service.DAEMON)
    async with server.served(answers.settings(run_dir), told):
        reader, writer = await asyncio.open_unix_connection(run_dir / "api.sock")
        writer.write(HEAD % 9 + b"{")
        async with asyncio.timeout(10):
            assert (await reader.readline()).split()[1] == b"408"
        writer.close()
        await asyncio.sleep(2 * server.LINGER_SECONDS)


async def half_open(path: Path, count: int) -> list[asyncio.StreamWriter]:
    writers = []
    for number in range(count):
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET /api/v1/status HTTP/1.1\r\nX-Slow: "[: number % 40])
        writers.append(writer)
    return writers


async def test_half_open_connections_keep_nobody_out(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, logs: list[Any]
) -> None:
    monkeypatch.setattr(connection, "CONNECTIONS", 20)
    told = Recorded(lambda: Status(1, None), Service.DAEMON)
    path = run_dir / "api.sock"
    async with server.served(answers.settings(run_dir), told), over_socket(path) as call:
        writers = await half_open(path, 60)
        await asyncio.gather(*(call.get("/api/v1/status") for _ in range(10)))
        assert len(open_descriptors()) < 2 * 60 + 60
        for writer in writers:
            writer.close()
    (line,) = [line for line in logs if line["event"] == "api.refused"]  # and not one for each of them
    assert line["code"] == "slow-client"


async def test_who_sends_no_whole_head_in_time_is_disconnected(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    told = Recorded(lambda: Status(1, None), Service.DAEMON)
    async with server.served(answers.settings(run_dir), told):
        reader, writer = await asyncio.open_unix_connection(run_dir / "api.sock")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for letter in "GET /api/v1/status HTTP/1.1\r\n" * 10:  # now and then a letter does not help
                writer.write(letter.encode())
                await writer.drain()
                await asyncio.sleep(0.05)
                if reader.at_eof():
                    break
            assert await reader.read() == b""
        assert time.monotonic() - began < 10
        writer.close()


async def test_who_does_not_take_his_answer_is_disconnected(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.3)
    told = Recorded(lambda: Status(1, "x" * (8 << 20)), Service.DAEMON)
    async with server.served(answers.settings(run_dir), told):
        before = len(open_descriptors())
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(run_dir / "api.sock"))
            client.sendall(b"GET /api/v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
            await settled(lambda: len(open_descriptors()) > before + 1)
            await settled(lambda: len(open_descriptors()) == before + 1)  # the client's own


async def test_a_follower_that_takes_nothing_is_dropped_and_others_go_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WRITE_SECONDS", 0.3)
    monkeypatch.setattr(stream, "HEARTBEAT_SECONDS", 0.05)
    told = Recorded(lambda: Status(1, None), Service.DAEMON)
    path = run_dir / "api.sock"
    async with (
        server.served(answers.settings(run_dir), told),
        over_socket(path) as call,
        call.events() as events,
    ):
        with socket.socket(socket.AF_UNIX) as mute:
            mute.connect(str(path))
            mute.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
            await settled(lambda: told.feed.followers == 2)
            for number in range(900):
                told.feed._keep({"event": "x", "run": str(number), "more": "x" * 2000})
            seen = [await anext(events) for _ in range(900)]
            await settled(lambda: told.feed.followers == 1)
        told.feed._keep({"event": "y", "run": "0"})
        assert (await anext(events))["event"] == "y"
    assert [event["run"] for event in seen] == [str(number) for number in range(900)]


async def test_followers_are_limited(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "FOLLOWERS", 2)
    told = Recorded(lambda: Status(1, None), Service.DAEMON)
    async with (
        server.served(answers.settings(run_dir), told),
        over_socket(run_dir / "api.sock") as call,
        call.events(),
        call.events(),
    ):
        refused = await call("GET", "/api/v1/events")
        assert (refused.status, refused.code) == (503, "too-many-followers")


async def test_a_stream_has_a_heartbeat(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_SECONDS", 0.05)
    told = Recorded(lambda: Status(1, None), Service.DAEMON)
    async with server.served(answers.settings(run_dir), told):
        reader, writer = await asyncio.open_unix_connection(run_dir / "api.sock")
        writer.write(b"GET /api/v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(10):
            await reader.readuntil(b": still here")
        writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /api/v1/status HTTP/1.1\r\n\r\n",
        b"GET http://127.0.0.1:1/api/v1/status HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /api/v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /api/v1/status HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=range(7),
)
async def test_whatever_is_sent_the_service_goes_on(run_dir: Path, sent: bytes) -> None:
    async with daemon(run_dir) as (_, call):
        port = int(call.base.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(15):
                said = await reader.read()
            assert b" 500 " not in said.partition(b"\r\n")[0]
        writer.close()
        assert (await call.get("/healthz"))["status"] == "ok"
