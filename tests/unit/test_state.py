"""What is remembered between processes, and who owns it."""

import contextlib
import fcntl
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from orchestrator.errors import EXIT_LOCKED, StateError
from orchestrator.model import ErrorReport, Kind, Outcome, RunResult
from orchestrator.state import lock
from orchestrator.state.catalogue import Begun, Catalogue
from orchestrator.state.database import Database

ROOT = Path(__file__).parents[2]
STARTED = datetime(2026, 11, 22, 2, 30, tzinfo=UTC)
RESULT = RunResult(
    vm="web01",
    run="0a1b2c3d",
    outcome=Outcome.SUCCEEDED,
    snapshot="web01/20261122T023000Z",
    kind=Kind.FULL,
    reason="why",
    started=STARTED,
    duration_seconds=1.5,
    pause_ms=None,
    disks=(),
)


# --- the lock ---


def owner(state_dir: Path) -> "subprocess.Popen[str]":
    """Another process that owns state_dir."""
    code = (
        "import pathlib, sys, time\n"
        "from orchestrator.state.lock import owned\n"
        "with owned(pathlib.Path(sys.argv[1])):\n"
        "    print('mine', flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, state_dir], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    return process


def test_a_second_owner_is_refused_with_the_firsts_pid_until_it_is_dead(tmp_path: Path) -> None:
    state_dir = tmp_path / "deep" / "state"
    with owner(state_dir) as first:
        try:
            for _ in range(2):
                with pytest.raises(StateError) as refused, lock.owned(state_dir):
                    pytest.fail("owned twice")
                said = re.search(r"another vmfleece \(process (\d+), since (.+?)\) is", refused.value.message)
                assert said is not None
                assert int(said[1]) == first.pid
                assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(said[2]) < timedelta(minutes=1)
                assert (refused.value.code, refused.value.exit_code) == ("locked", EXIT_LOCKED)
                assert str(state_dir) in refused.value.message
        finally:
            first.send_signal(signal.SIGKILL)
        first.wait()
    (state_dir / "lock").write_text("what is longer than what it is replaced by" * 10)
    with lock.owned(state_dir):
        assert json.loads((state_dir / "lock").read_text())["process"] == os.getpid()


@pytest.mark.parametrize(
    "left",
    [
        '{"process": %d, "born": 1, "since": "2026-11-22T02:30:00+00:00"}',  # the id was given to another one
        '{"process": 4194305, "born": 1, "since": "2026-11-22T02:30:00+00:00"}',  # nobody has it
        '{"process": %d, "bo',
        "%d",
        "[%d]",
        "",
    ],
)
def test_nobody_is_named_for_what_a_dead_owner_wrote(tmp_path: Path, left: str) -> None:
    """The next owner has the lock and has not entered itself yet."""
    (tmp_path / "lock").write_text(left.replace("%d", str(os.getpid())))
    with (tmp_path / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StateError) as refused, lock.owned(tmp_path):
            pytest.fail("owned twice")
    assert refused.value.message == f"another vmfleece is using state_dir {tmp_path}"
    with lock.owned(tmp_path):  # whatever it says: the kernel knows that nobody holds it
        pass


def test_a_lock_ends_with_its_block_also_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), lock.owned(tmp_path):
            1 / 0  # noqa: B018
    with lock.owned(tmp_path), pytest.raises(StateError), lock.owned(tmp_path):
        pytest.fail("owned twice")


def test_state_is_private(tmp_path: Path) -> None:
    with lock.owned(tmp_path / "state"):
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "state" / "lock").stat().st_mode & 0o777 == 0o600


def test_a_state_dir_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "state"):
        with pytest.raises(StateError) as failed, ExitStack() as stack:
            stack.enter_context(lock.owned(path))
        assert failed.value.code == "state-unusable"
        assert str(path) in failed.value.message
        assert "daemon.state_dir" in failed.value.hint


# --- the catalogue ---


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue(tmp_path)


def test_a_result_comes_back_as_it_was(catalogue: Catalogue, tmp_path: Path) -> None:
    failed = replace(RESULT, outcome=Outcome.FAILED, error=ErrorReport("copy-failed", "ä", "b"), warnings=("w",))
    catalogue.begin(RESULT.run, "web01", "nightly", STARTED)
    assert catalogue.results("web01") == []
    catalogue.finish(failed)
    for opened in (catalogue, Catalogue(tmp_path)):
        assert opened.results("web01") == [json.loads(json.dumps(failed.as_json()))]
        assert opened.results("web") == []


def test_results_are_oldest_first_and_of_ended_runs_only(catalogue: Catalogue) -> None:
    for number in (2, 0, 1):
        one = replace(RESULT, run=f"run{number}", started=STARTED + timedelta(hours=number))
        catalogue.begin(one.run, "web01", None, one.started)
        if number != 1:
            catalogue.finish(one)
    catalogue.begin("other", "db01", None, STARTED)
    assert [one["run"] for one in catalogue.results("web01")] == ["run0", "run2"]


def test_a_run_is_known_from_its_beginning_for_ever(catalogue: Catalogue, tmp_path: Path) -> None:
    assert not catalogue.knows("0a1b2c3d")
    catalogue.begin("0a1b2c3d", "web01", None, STARTED)
    assert catalogue.knows("0a1b2c3d")
    catalogue.finish(RESULT)
    assert Catalogue(tmp_path).knows("0a1b2c3d")
    assert not catalogue.knows("0a1b2c3")


def test_a_run_cannot_be_entered_twice(catalogue: Catalogue) -> None:
    catalogue.begin("0a1b2c3d", "web01", None, STARTED)
    with pytest.raises(StateError):
        catalogue.begin("0a1b2c3d", "db01", None, STARTED)


def test_the_last_due_time_of_each_job_is_kept_with_its_zone(catalogue: Catalogue, tmp_path: Path) -> None:
    assert catalogue.last_due("nightly") is None
    for due in (STARTED, STARTED.astimezone(timezone(timedelta(hours=1))) + timedelta(days=1)):
        catalogue.set_last_due("nightly", due)
        assert Catalogue(tmp_path).last_due("nightly") == due
    assert catalogue.last_due("weekly") is None


def test_runs_without_an_end_are_told_oldest_first(catalogue: Catalogue, tmp_path: Path) -> None:
    for number in (2, 0, 1):
        catalogue.begin(f"run{number}", "web01", "nightly" if number else None, STARTED + timedelta(hours=number))
    catalogue.finish(replace(RESULT, run="run1"))
    assert Catalogue(tmp_path).unended() == [
        Begun("run0", "web01", None, STARTED),
        Begun("run2", "web01", "nightly", STARTED + timedelta(hours=2)),
    ]


def test_what_a_turn_is_not_done_with_is_kept(catalogue: Catalogue, tmp_path: Path) -> None:
    catalogue.begin_turn("nightly", {"web01": 0, "db01": 3})
    catalogue.begin_turn("weekly", {"web01": 1})
    catalogue.end_turn("nightly", "web01")
    catalogue.end_turn("nightly", "never there")
    for opened in (catalogue, Catalogue(tmp_path)):
        assert opened.unfinished("nightly") == {"db01": 3}
        assert opened.unfinished("weekly") == {"web01": 1}
    catalogue.begin_turn("nightly", {"web01": 0})
    assert catalogue.unfinished("nightly") == {"web01": 0}


def test_a_catalogue_of_the_first_format_is_taken_over(catalogue: Catalogue, tmp_path: Path) -> None:
    catalogue.begin(RESULT.run, "web01", None, STARTED)
    with contextlib.closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as connection:
        connection.executescript("DROP TABLE turns; PRAGMA user_version = 1")
    again = Catalogue(tmp_path)
    assert again.unfinished("nightly") == {}
    assert again.knows(RESULT.run)


@pytest.mark.parametrize(
    "ask",
    [
        lambda one: one.last_runs(),
        lambda one: one.last_runs(outcomes=["succeeded", "warning"]),
        lambda one: one.entries(limit=3),
        lambda one: one.entries(job="nightly", limit=3),
        lambda one: one.entries(vm="web01", outcomes=["failed", None], limit=3),
        lambda one: one.results("web01"),
        lambda one: one.entry("r"),
        lambda one: one.runs(),
    ],
)
def test_no_question_reads_a_long_history_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Catalogue], object]
) -> None:
    """Also in a history that an older vmfleece began, without an index."""
    Catalogue(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as connection:
        connection.executescript("DROP INDEX runs_by_start; DROP INDEX runs_by_vm; PRAGMA user_version = 2")
        again, asked = Catalogue(tmp_path), list[str]()
        connection.set_trace_callback(asked.append)
        monkeypatch.setattr(again._database, "transaction", lambda: contextlib.nullcontext(connection))
        ask(again)
        (query,) = asked
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}")]
    assert plan
    assert not [step for step in plan if step.startswith("SCAN runs") and "INDEX" not in step], plan


@pytest.mark.parametrize(
    "act",
    [
        lambda one: one.begin("r", "v", None, STARTED),
        lambda one: one.finish(RESULT),
        lambda one: one.knows("r"),
        lambda one: one.results("v"),
        lambda one: one.unended(),
        lambda one: one.begin_turn("j", {"v": 0}),
        lambda one: one.end_turn("j", "v"),
        lambda one: one.unfinished("j"),
        lambda one: one.last_due("j"),
        lambda one: one.set_last_due("j", STARTED),
        lambda one: Catalogue(one._database._path.parent),
    ],
)
@pytest.mark.parametrize("damage", [b"no database", b"SQLite format 3\0" + bytes(range(256)) * 16])
def test_a_damaged_file_is_named(
    catalogue: Catalogue, tmp_path: Path, act: Callable[[Catalogue], object], damage: bytes
) -> None:
    path = tmp_path / "catalogue.sqlite"
    path.write_bytes(damage)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    with pytest.raises(StateError) as failed:
        act(catalogue)
    assert failed.value.code == "state-unusable"
    assert str(path) in failed.value.message
    assert "moved away" in failed.value.hint
    assert path.read_bytes() == damage


def test_no_catalogue_can_be_made_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="unable to open"):
        Catalogue(tmp_path / "absent")


def test_many_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    def enter(path: Path) -> None:
        file = Database(path, schema, version=1, lost="", stays_open=False)
        ready.wait()
        with file.transaction() as connection:
            connection.execute("INSERT INTO entered VALUES (1)")

    schema = "CREATE TABLE IF NOT EXISTS entered (at INTEGER)"
    ready = threading.Barrier(8)
    with ThreadPoolExecutor(8) as threads:
        for at in range(40):  # without waiting, one of about fifty was refused
            path = tmp_path / f"{at}.sqlite"
            list(threads.map(enter, [path] * 8))
            with contextlib.closing(sqlite3.connect(path)) as connection:
                assert connection.execute("SELECT COUNT(*) FROM entered").fetchone() == (8,)
