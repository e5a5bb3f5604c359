"""Who is told how jobs ended: by apprise and as a check is pinged, to an HTTP server here."""

import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from orchestrator.config.settings import JobState, NotifyDriver, NotifySettings
from orchestrator.errors import HookError
from orchestrator.model import ErrorReport, Kind, Outcome, RunResult
from orchestrator.service import notify
from orchestrator.service.notify import JobEnd, Notifiers, Told, is_told
from tests.component.http_server import http_server

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
SECRET = "s3cr3t-token"


def settings(folder: Path, driver: NotifyDriver, url: str, **more: Any) -> NotifySettings:
    file = folder / f"{driver}.url"
    file.touch(mode=0o600)
    file.write_text(f"{url}\n")
    given: dict[str, Any] = {
        "jobs": ("night*",),
        "states": (JobState.FAILED, JobState.WARNING),
        "repeat_after_seconds": 3600.0,
    }
    return NotifySettings(str(driver), driver, file, **(given | more))


def result(vm: str, *, error: ErrorReport | None = None, warnings: tuple[str, ...] = ()) -> RunResult:
    outcome = Outcome.FAILED if error else Outcome.WARNING if warnings else Outcome.SUCCEEDED
    return RunResult(vm, "0a1b2c3d", outcome, None, Kind.FULL, "first", NOON, 1.0, None, (), warnings, error)


FULL = ErrorReport("target-full", "No space left on device", "free some space or prune")
FAILED = JobEnd("nightly", [result("web01"), result("db01", error=FULL)])
WARNED = JobEnd("nightly", [result("web01", warnings=("it was not frozen",))])
GOOD = JobEnd("nightly", [result("web01")])
STOPPED = JobEnd("nightly", [], HookError("the hook /hook ended with exit code 7"))


async def test_people_get_one_message_with_what_failed_and_what_to_do(tmp_path: Path) -> None:
    async with http_server() as server:
        people = settings(tmp_path, NotifyDriver.APPRISE, f"json://127.0.0.1:{server.port}/{SECRET}")
        notifiers = Notifiers({"admins": people})
        with capture_logs() as logs:
            async with notifiers.serving():
                notifiers.job_started("nightly")
                notifiers.job_ended(FAILED)
    ((path, body),) = server.got
    assert path == f"/{SECRET}"
    assert "job nightly: 1 of 2 backups failed" in body
    assert "db01: target-full: No space left on device; free some space or prune" in body
    assert SECRET not in str(logs)


async def test_a_check_is_pinged_at_the_start_and_at_every_end(tmp_path: Path) -> None:
    async with http_server() as server:
        check = settings(tmp_path, NotifyDriver.HEALTHCHECKS, f"http://127.0.0.1:{server.port}/{SECRET}")
        notifiers = Notifiers({"check": check})
        async with notifiers.serving():
            for end in (GOOD, GOOD, FAILED, WARNED, STOPPED):
                notifiers.job_started("nightly")
                notifiers.job_ended(end)
            notifiers.job_started("weekly")
    ends = [path.removeprefix(f"/{SECRET}") for path, _ in server.got[1::2]]
    assert {path for path, _ in server.got[::2]} == {f"/{SECRET}/start"}
    assert ends == ["", "", "/fail", "", "/fail"]
    assert "the hook /hook ended with exit code 7" in server.got[-1][1]


async def test_what_cannot_be_sent_is_tried_again_then_logged_without_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "RETRY_SECONDS", 0.0)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("info"))
    async with http_server() as server:
        urls = {
            NotifyDriver.HEALTHCHECKS: f"http://127.0.0.1:{server.port}/{SECRET}",
            NotifyDriver.APPRISE: f"json://127.0.0.1:{server.port}/{SECRET}",
        }
        for driver, url in urls.items():
            server.answers = [500, 500]
            notifiers = Notifiers({"it": settings(tmp_path, driver, url)})
            with capture_logs() as logs:
                async with notifiers.serving():
                    notifiers.job_ended(FAILED)
            assert [one["event"] for one in logs] == ["notify.sent"]
            server.answers = [500, 500, 500]
            with capture_logs() as logs:
                async with Notifiers({"it": settings(tmp_path, driver, url)}).serving() as _:
                    pass
                again = Notifiers({"it": settings(tmp_path, driver, url)})
                async with again.serving():
                    again.job_ended(FAILED)
            assert [one["event"] for one in logs] == ["notify.failed"]
            assert SECRET not in str(logs)
    unreachable = settings(tmp_path, NotifyDriver.HEALTHCHECKS, f"http://127.0.0.1:1/{SECRET}")
    unknown = settings(tmp_path, NotifyDriver.APPRISE, f"nonsense://{SECRET}")
    missing = NotifySettings("gone", NotifyDriver.APPRISE, tmp_path / "gone", ("*",), (JobState.FAILED,), 1.0)
    notifiers = Notifiers({"a": unreachable, "b": unknown, "c": missing})
    with capture_logs() as logs:
        async with notifiers.serving():
            notifiers.job_ended(FAILED)
    assert [one["event"] for one in logs] == ["notify.failed"] * 3
    assert SECRET not in str(logs)


async def test_whoever_does_not_answer_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "LAST_WORDS_SECONDS", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        notifiers = Notifiers({"it": settings(tmp_path, NotifyDriver.HEALTHCHECKS, url)})
        async with notifiers.serving():
            for _ in range(2 * notify.MOST_WAITING):
                notifiers.job_ended(FAILED)


async def test_people_are_told_again_after_a_while_and_when_it_is_good_again(tmp_path: Path) -> None:
    now = NOON
    async with http_server() as server:
        people = settings(tmp_path, NotifyDriver.APPRISE, f"json://127.0.0.1:{server.port}/")
        notifiers = Notifiers({"admins": people}, now=lambda: now)
        async with notifiers.serving():
            for minutes, end in (
                (0, GOOD),
                (1, FAILED),
                (2, FAILED),
                (62, FAILED),
                (63, GOOD),
                (64, GOOD),
                (65, FAILED),
            ):
                now = NOON + timedelta(minutes=minutes)
                notifiers.job_ended(end)
    titles = ["1 of 2 backups failed", "1 of 2 backups failed", "all 1 backups succeeded", "1 of 2 backups failed"]
    assert len(server.got) == len(titles)
    for (_, body), title in zip(server.got, titles, strict=True):
        assert title in body


@given(
    st.lists(st.tuples(st.sampled_from(JobState), st.integers(0, 7200)), max_size=20),
    st.sets(st.sampled_from(JobState)),
)
def test_a_change_is_told_at_once_and_nothing_twice_within_the_pause(
    ends: list[tuple[JobState, int]], states: set[JobState]
) -> None:
    people = NotifySettings("it", NotifyDriver.APPRISE, None, ("*",), tuple(states), 3600.0)
    last: Told | None = None
    now = NOON
    for state, seconds in ends:
        now += timedelta(seconds=seconds)
        told = is_told(people, state, last, now)
        if state in states:
            assert told == (last is None or last.state is not state or now - last.at >= timedelta(hours=1))
        elif told:
            assert state is JobState.SUCCEEDED
            assert last is not None
        if told:
            last = Told(state, now)


def test_a_long_story_is_cut_short() -> None:
    many = JobEnd("nightly", [result(f"vm{number}", error=FULL) for number in range(100)])
    assert many.body().splitlines()[-1] == "and 80 more"
    assert WARNED.title() == "job nightly: 1 of 1 backups with warnings"
    assert WARNED.body() == "web01: warning: it was not frozen"
    assert GOOD.body() == GOOD.title()
