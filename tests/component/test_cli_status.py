"""`vmfleece status` as it is called: with and without somebody who answers, piped and on a terminal."""

import asyncio
import codecs
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import structlog

from orchestrator.cli.main import main
from orchestrator.model import GuestWrites
from orchestrator.service.status import RunStatus, Status, StorageStatus, WaitingStatus
from tests.component import answers
from tests.component.test_cli import CONFIG, ROOT, command

GIB = 1024**3
STATUS = Status(
    process=4711,
    started="2026-11-23T02:30:00+00:00",
    storages=(
        StorageStatus("local", "/srv/f", 200 * GIB, 100 * GIB, GIB, 50 * GIB, 75 * GIB, 9 * GIB, GIB, 1, None),
    ),
    runs=(
        RunStatus(
            *("web01", "b46b", "j", "main", "copying", "2026-11-23T02:30:01+00:00", 64, 16, GIB, 4 * GIB),
            guest_writes=GuestWrites(7, 2.5, 9.0, None, 1.5),
            recent_write_ms=(2.0, None, 9.0),
            slowed_to_bytes_per_second=1 << 20,
        ),
    ),
    queue=(WaitingStatus("db01", "5e22", "j", "main", 50, "2026-11-23T02:30:02+00:00", ("the quota", "a slot")),),
)
SOON_SECONDS = 20.0


@pytest.fixture
def config() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmf") as folder:  # a socket's path must be short
        path = Path(folder) / "vmfleece.toml"
        path.write_text(CONFIG.format(folder))
        yield path


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], config: Path) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Call the command in this process."""

    def called(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["status", *arguments, "--config", str(config)])
        output = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, output.out, output.err

    umask = os.umask(0o022)
    yield called
    os.umask(umask)
    structlog.reset_defaults()


Run = Callable[..., tuple[int, str, str]]


@contextlib.contextmanager
def served(config: Path, status: Status) -> Iterator[None]:
    """Somebody who answers, in a thread of its own."""
    ready, ended = threading.Event(), threading.Event()

    async def serve() -> None:
        async with answers.served(config.parent / "run", lambda: status):
            ready.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(SOON_SECONDS)
        yield
    finally:
        ended.set()
        thread.join()


def start(config: Path, *arguments: str, **streams: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command("status", *arguments, "--config", config),
        cwd=ROOT,
        text=True,
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams),
    )


# Nobody answers ----------------------------------------------------------------------------------------------


def test_without_a_vmfleece_the_storages_are_shown_as_they_are(run: Run, config: Path) -> None:
    code, shown, complaints = run()
    assert (code, complaints) == (0, "")
    lines = shown.splitlines()
    assert lines[0] == "no vmfleece is running"
    assert re.fullmatch(r"local +░{40} +1\.0 GiB +0 B +0 B +0 B", lines[3])
    assert lines[-3:] == ["no run under way", "", "nobody waits"]
    assert sorted(path.name for path in config.parent.iterdir()) == ["vmfleece.toml"]  # looking changes nothing


def test_without_a_vmfleece_for_programs(run: Run, config: Path) -> None:
    code, shown, complaints = run("--json")
    assert (code, complaints) == (0, "")
    document = json.loads(shown)
    assert (document["process"], document["started"]) == (None, None)
    assert (document["runs"], document["queue"]) == ([], [])
    (storage,) = document["storages"]
    assert storage["free_bytes"] > 0
    assert storage | {"free_bytes": 0} == {
        "name": "local",
        "path": f"{config.parent}/fleecing",
        "quota_bytes": GIB,
        "granted_bytes": 0,
        "stranded_bytes": 0,
        "used_bytes": 0,
        "peak_bytes": 0,
        "free_bytes": 0,
        "floor_bytes": 0,
        "runs": 0,
        "max_runs": None,
        "lacks": [],
    }


def test_a_storage_that_cannot_be_asked_is_a_warning(run: Run, config: Path) -> None:
    (config.parent / "fleecing").touch()
    code, shown, complaints = run()
    assert (code, complaints) == (0, "")
    assert f"  ! the file system of {config.parent}/fleecing cannot be asked" in shown
    (storage,) = json.loads(run("--json")[1])["storages"]
    assert (storage["free_bytes"], storage["floor_bytes"]) == (None, None)


def test_a_socket_that_a_killed_vmfleece_left(run: Run, config: Path) -> None:
    (config.parent / "run").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(config.parent / "run" / "api.sock"))
    assert run()[:2] == (0, run()[1])
    assert run()[1].startswith("no vmfleece is running\n")


# Somebody answers --------------------------------------------------------------------------------------------


def test_what_a_vmfleece_says_is_shown(run: Run, config: Path) -> None:
    with served(config, STATUS):
        code, shown, complaints = run()
    assert (code, complaints) == (0, "")
    assert shown.startswith("vmfleece, process 4711, running for ")
    for text in ("200.0 GiB  100.0 GiB   50.0 GiB   75.0 GiB", "! stranded: 1.0 GiB", "1.0 GiB of 4.0 GiB"):
        assert text in shown
    assert "\n1  db01" in shown
    assert shown.endswith("\n   the quota\n   a slot\n")


def test_what_a_vmfleece_says_is_given_to_programs(run: Run, config: Path) -> None:
    with served(config, STATUS):
        code, shown, complaints = run("--json")
    assert (code, complaints) == (0, "")
    assert Status.from_json(json.loads(shown)) == STATUS


def test_without_a_terminal_it_is_plain_and_whole(run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    reason = "wanted " * 100 + "[red]at last[/red]"
    with served(config, replace(STATUS, queue=(replace(STATUS.queue[0], reasons=(reason,)),))):
        _, shown, _ = run()
    assert "\x1b" not in shown
    assert shown.endswith(f"\n   {reason}\n")
    assert not re.search(r" $", shown, re.MULTILINE)


def test_where_letters_are_ascii(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with served(config, STATUS), start(config) as process:
        shown, complaints = process.communicate(timeout=SOON_SECONDS)
    assert (process.returncode, complaints) == (0, "")
    assert "##########==========--------------------" in shown


@pytest.mark.parametrize("arguments", [(), ("--watch",), ("--watch", "--json"), ("--json",)])
def test_a_run_dir_that_cannot_be_asked_is_an_error(run: Run, config: Path, arguments: tuple[str, ...]) -> None:
    (config.parent / "run").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(config.parent / "run" / "api.sock"))
        other.listen()
        thread = threading.Thread(target=hang_up_on_all, args=(other,), daemon=True)
        thread.start()
        code, shown, complaints = run(*arguments)
        other.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert code == 11
    assert complaints.startswith("vmfleece: no answer on the control socket")
    assert json.loads(shown)["error"]["code"] == "api-silent" if "--json" in arguments else shown == ""


def hang_up_on_all(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].close()


# Watching ----------------------------------------------------------------------------------------------------


def test_watching_gives_programs_a_line_a_second(config: Path) -> None:
    with served(config, STATUS), start(config, "--watch", "--json") as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        began = time.monotonic()
        second = process.stdout.readline()
        assert 0.5 < time.monotonic() - began < SOON_SECONDS
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=SOON_SECONDS)
    assert Status.from_json(json.loads(first)) == Status.from_json(json.loads(second)) == STATUS
    assert ": " not in first.replace("2026", "").replace("the quota", "")  # compact
    assert (process.returncode, complaints) == (0, "")


def test_watching_without_a_terminal_prints_blocks(config: Path) -> None:
    with served(config, STATUS), start(config, "--watch") as process:
        assert process.stdout is not None
        shown = ""
        while shown.count("vmfleece, process 4711") < 2:
            shown += process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        shown += process.stdout.read()
        _, complaints = process.communicate(timeout=SOON_SECONDS)
    assert (process.returncode, complaints) == (0, "")
    assert "   a slot\n\nvmfleece, process 4711" in shown
    assert shown.endswith("   a slot\n\n")
    assert "\x1b" not in shown


def test_watching_goes_on_while_the_daemon_is_started_anew(config: Path) -> None:
    def until(process: int | None) -> None:
        limit = time.monotonic() + SOON_SECONDS
        while json.loads(watching.stdout.readline())["process"] != process:  # type: ignore[union-attr]  # a pipe
            assert time.monotonic() < limit

    with start(config, "--watch", "--json") as watching:
        until(None)
        with served(config, STATUS):
            until(4711)
        until(None)
        with served(config, replace(STATUS, process=4712)):
            until(4712)
        watching.send_signal(signal.SIGINT)
        _, complaints = watching.communicate(timeout=SOON_SECONDS)
    assert (watching.returncode, complaints) == (0, "")


@pytest.mark.parametrize("arguments", [("--json",), ()])
def test_watching_goes_on_while_the_answer_is_none(config: Path, arguments: tuple[str, ...]) -> None:
    with start(config, "--watch", *arguments) as watching:
        assert watching.stdout is not None
        watching.stdout.readline()
        (config.parent / "run").mkdir()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.bind(str(config.parent / "run" / "api.sock"))
            other.listen()
            thread = threading.Thread(target=hang_up_on_all, args=(other,), daemon=True)
            thread.start()
            seen = ""
            while "no answer on the control socket" not in seen:
                seen = watching.stdout.readline()
                assert watching.poll() is None
            if arguments:
                assert json.loads(seen)["error"]["code"] == "api-silent"
            other.shutdown(socket.SHUT_RDWR)
            thread.join()
        with served(config, STATUS):
            while "4711" not in seen:
                seen = watching.stdout.readline()
                assert watching.poll() is None
        watching.send_signal(signal.SIGINT)
        _, complaints = watching.communicate(timeout=SOON_SECONDS)
    assert (watching.returncode, complaints) == (0, "")


@pytest.mark.parametrize("arguments", [("--watch", "--json"), ("--watch",)])
def test_a_reader_that_has_seen_enough_ends_it_quietly(config: Path, arguments: tuple[str, ...]) -> None:
    with start(config, *arguments) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(SOON_SECONDS) == 1
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_reader_that_is_gone_already(config: Path, arguments: tuple[str, ...]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with start(config, *arguments, stdout=write_end) as process:
        os.close(write_end)
        _, complaints = process.communicate(timeout=SOON_SECONDS)
    assert (process.returncode, complaints) == (1, "")


# On a terminal -----------------------------------------------------------------------------------------------


class Terminal:
    """A terminal with the command on it."""

    def __init__(self, config: Path, *arguments: str, columns: int = 80, rows: int = 24) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self.process = start(
            config, *arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        self._theirs = theirs
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.seen = ""

    def read_until(self, *texts: str) -> None:
        limit = time.monotonic() + SOON_SECONDS
        while not all(text in self.seen for text in texts):
            assert time.monotonic() < limit, self.seen
            self._read()

    def _read(self) -> bool:
        readable, _, _ = select.select([self._ours], [], [], 0.1)
        if readable:
            self.seen += self._decoder.decode(os.read(self._ours, 65536))
        return bool(readable)

    def end(self) -> int:
        code = self.process.wait(SOON_SECONDS)
        while self._read():
            pass
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.wait()
        assert termios.tcgetattr(self._theirs) == self.before
        os.close(self._ours)
        os.close(self._theirs)


def test_once_on_a_terminal(config: Path) -> None:
    with served(config, STATUS), Terminal(config) as terminal:
        assert terminal.end() == 0
    assert "\x1b[32m" in terminal.seen
    assert "\x1b[?1049h" not in terminal.seen
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.seen)
    assert "16 B of 64 B, fleecing 1.0 GiB of 4.0 GiB" in plain
    assert max(map(len, plain.splitlines())) <= 80


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watching_on_a_terminal(config: Path, number: signal.Signals) -> None:
    with Terminal(config, "--watch") as terminal:
        terminal.read_until("\x1b[?1049h", "\x1b[?25l", "no vmfleece is running")  # another screen, no cursor
        with served(config, STATUS):
            terminal.read_until("process 4711")
        terminal.seen = ""
        terminal.read_until("no vmfleece is running")
        assert "\x1b[?1049l" not in terminal.seen
        terminal.process.send_signal(number)
        assert terminal.end() == 0
    assert terminal.seen.endswith("\x1b[?25h\x1b[?1049l")  # the cursor, and the screen that was there
    assert "interrupted" not in terminal.seen


def test_watching_more_than_fits_on_the_terminal(config: Path) -> None:
    many = replace(STATUS, runs=STATUS.runs * 300)
    with served(config, many), Terminal(config, "--watch") as terminal:
        terminal.read_until("process 4711", "and 295 more", "a slot")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 0


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("TTY_COMPATIBLE", "0")])
def test_watching_on_a_terminal_that_can_only_print(
    config: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with Terminal(config, "--watch") as terminal:
        terminal.read_until("nobody waits")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 0
    assert "\x1b" not in terminal.seen
