"""When jobs are started, on a clock that only sleeping moves."""

import asyncio
import contextlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from orchestrator import aio
from orchestrator.config import JobSettings
from orchestrator.errors import StateError
from orchestrator.model import Fleecing, RunOptions
from orchestrator.service import scheduler
from orchestrator.service.scheduler import Seat, Seats
from orchestrator.state.catalogue import Catalogue

START = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
REAL_SLEEP = asyncio.sleep


def at(hour: float, day: int = 22) -> datetime:
    return datetime(2026, 11, day, tzinfo=UTC) + timedelta(hours=hour)


def job(schedule: str | None = "*-*-* 14:00 UTC", **changes: Any) -> JobSettings:
    settings: dict[str, Any] = {"randomized_delay_seconds": 0.0, "repeat_missed": False, "retries": 0} | changes
    return JobSettings("nightly", ("web01",), RunOptions("main", Fleecing()), schedule, **settings)


async def serve(one: JobSettings, run: scheduler.Run, catalogue: Catalogue) -> None:
    """A job from the daemon's start on."""
    await scheduler.catch_up(one, run, catalogue)
    await scheduler.serve(Seat(one), run, catalogue)


class Clock:
    """The scheduler's clock: sleeping moves it, and it ends the test at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, until: datetime) -> None:
        self.now, self.until = START, until
        self.sleeps: list[float] = []
        self.runs: list[datetime] = []
        self.vms: list[Mapping[str, int] | None] = []
        self.takes = timedelta(0)
        monkeypatch.setattr(scheduler, "now", lambda: self.now)
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += timedelta(seconds=seconds)
        if self.now > self.until:
            raise asyncio.CancelledError
        await REAL_SLEEP(0)

    async def run(self, name: str, vms: Mapping[str, int] | None = None, /) -> None:
        assert name == "nightly"
        self.vms.append(vms)
        self.runs.append(self.now)
        self.now += self.takes


async def served(
    monkeypatch: pytest.MonkeyPatch,
    one: JobSettings,
    catalogue: Catalogue,
    until: datetime,
    *,
    takes: timedelta = timedelta(0),
) -> tuple[list[datetime], list[dict[str, Any]]]:
    """When runs started, and what was logged."""
    clock = Clock(monkeypatch, until)
    clock.takes = takes
    with capture_logs() as lines, pytest.raises(asyncio.CancelledError):
        await serve(one, clock.run, catalogue)
    assert max(clock.sleeps, default=0) <= scheduler.LONGEST_SLEEP_SECONDS
    return clock.runs, [dict(line) for line in lines]


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue(tmp_path)


async def test_a_job_runs_whenever_it_is_due(monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue) -> None:
    runs, lines = await served(monkeypatch, job(), catalogue, at(13, day=25))
    assert runs == [at(14, day) for day in (22, 23, 24)]
    assert catalogue.last_due("nightly") == at(14, day=24)
    assert [line["event"] for line in lines] == ["job.scheduled"] * 4
    assert datetime.fromisoformat(lines[0]["due"]) == datetime.fromisoformat(lines[0]["start"]) == at(14)


async def test_a_job_without_a_schedule_is_never_due(catalogue: Catalogue) -> None:
    async def run(name: str, _vms: Mapping[str, int] | None = None, /) -> None:
        pytest.fail(name)

    await asyncio.wait_for(serve(job(None), run, catalogue), 5)


async def test_a_job_that_never_comes_again_ends(monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue) -> None:
    clock = Clock(monkeypatch, at(0, day=30))
    await serve(job("2026-11-23 02:00 UTC"), clock.run, catalogue)
    assert clock.runs == [at(2, day=23)]


@pytest.mark.parametrize(
    ("repeat_missed", "last", "caught_up"),
    [
        (True, at(14, day=20), True),  # the 21st was missed
        (True, at(14, day=21), False),
        (True, None, False),  # a new job has missed nothing
        (False, at(14, day=20), False),
    ],
)
async def test_a_missed_turn_is_taken_at_once_if_the_job_says_so(
    monkeypatch: pytest.MonkeyPatch,
    catalogue: Catalogue,
    repeat_missed: bool,
    last: datetime | None,
    caught_up: bool,
) -> None:
    if last is not None:
        catalogue.set_last_due("nightly", last)
    runs, lines = await served(monkeypatch, job(repeat_missed=repeat_missed), catalogue, at(15))
    assert runs == ([START] if caught_up else []) + [at(14)]
    assert [line["event"] for line in lines].count("job.caught-up") == caught_up


async def test_many_missed_turns_are_taken_once(monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue) -> None:
    catalogue.set_last_due("nightly", at(14, day=1))
    runs, _ = await served(monkeypatch, job(repeat_missed=True), catalogue, at(13))
    assert runs == [START]
    runs, _ = await served(monkeypatch, job(repeat_missed=True), catalogue, at(13))  # after a restart
    assert runs == []


@pytest.mark.parametrize("schedule", [None, "*-*-* 14:00 UTC"])
async def test_a_turn_that_was_interrupted_is_finished_at_the_next_start(
    monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue, schedule: str | None
) -> None:
    catalogue.set_last_due("nightly", at(11))
    catalogue.begin_turn("nightly", {"web01": 0, "gone": 0})
    clock = Clock(monkeypatch, at(13))
    with capture_logs() as lines, contextlib.suppress(asyncio.CancelledError):
        await serve(job(schedule, retries=1), clock.run, catalogue)
    assert (clock.runs, clock.vms) == ([START], [{"web01": 1}])
    (said,) = [line for line in lines if line["event"] == "job.interrupted"]
    assert (said["vms"], said["given_up"]) == (["web01"], ["gone"])
    assert catalogue.last_due("nightly") == at(11)


@pytest.mark.parametrize("repeat_missed", [True, False])
async def test_a_turn_that_was_interrupted_is_not_finished_once_another_was_missed(
    monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue, repeat_missed: bool
) -> None:
    catalogue.set_last_due("nightly", at(14, day=20))
    catalogue.begin_turn("nightly", {"web01": 0})
    clock = Clock(monkeypatch, at(13))
    with contextlib.suppress(asyncio.CancelledError):
        await serve(job(repeat_missed=repeat_missed, retries=2), clock.run, catalogue)
    assert clock.vms == ([None] if repeat_missed else [])


async def test_a_turn_that_comes_while_the_last_one_runs_is_skipped_and_said_so(
    monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue
) -> None:
    runs, lines = await served(
        monkeypatch, job("*-*-* 00/2:00 UTC"), catalogue, at(23.9), takes=timedelta(hours=3)
    )
    assert runs == [at(14), at(18), at(22)]
    skipped = [line for line in lines if line["event"] == "job.skipped"]
    assert [datetime.fromisoformat(line["due"]) for line in skipped] == [at(16), at(20), at(24)]
    assert all(line["log_level"] == "warning" for line in skipped)


async def test_a_run_that_ends_just_when_the_next_turn_comes_skips_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue
) -> None:
    runs, lines = await served(monkeypatch, job("*-*-* 00/2:00 UTC"), catalogue, at(17), takes=timedelta(hours=2))
    assert runs == [at(14)]
    assert [line["event"] for line in lines] == ["job.scheduled", "job.skipped", "job.scheduled"]


async def test_a_run_that_ends_in_time_skips_nothing(
    monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue
) -> None:
    runs, lines = await served(
        monkeypatch, job("*-*-* 00/2:00 UTC"), catalogue, at(19), takes=timedelta(hours=1, minutes=59)
    )
    assert runs == [at(14), at(16), at(18)]
    assert {line["event"] for line in lines} == {"job.scheduled"}


async def test_a_turn_is_remembered_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue
) -> None:
    """A daemon that is killed in a run must not repeat it at every start."""
    seen: list[datetime | None] = []

    async def killed(_name: str, _vms: Mapping[str, int] | None = None, /) -> None:
        seen.append(catalogue.last_due("nightly"))
        raise asyncio.CancelledError

    Clock(monkeypatch, at(15))
    with pytest.raises(asyncio.CancelledError):
        await serve(job(), killed, catalogue)
    assert seen == [at(14)]


async def test_a_job_that_cannot_go_on_is_said_so_and_taken_again_at_its_next_turn(
    monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue
) -> None:
    clock = Clock(monkeypatch, at(15, day=23))

    async def failing(name: str, _vms: Mapping[str, int] | None = None, /) -> None:
        await clock.run(name)
        if len(clock.runs) == 1:
            raise StateError("no space left", code="state-unusable")

    with capture_logs() as lines, pytest.raises(asyncio.CancelledError):
        await serve(job(), failing, catalogue)
    assert clock.runs == [at(14), at(14, day=23)]
    assert [(line["code"], line["error"]) for line in lines if line["event"] == "job.failed"] == [
        ("state-unusable", "no space left")
    ]


async def test_the_randomized_delay_comes_on_top(monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue) -> None:
    delayed = job(randomized_delay_seconds=1800.0)
    (first,), lines = await served(monkeypatch, delayed, catalogue, at(15))
    assert at(14) < first < at(14.5)
    assert datetime.fromisoformat(lines[0]["start"]) == first
    assert catalogue.last_due("nightly") == at(14)
    (again,), _ = await served(monkeypatch, delayed, catalogue, at(15))
    assert again == first


async def test_a_clock_that_is_set_forward_is_noticed_within_a_minute(
    monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue
) -> None:
    clock = Clock(monkeypatch, at(23))
    sleep = clock.sleep

    async def jumping(seconds: float) -> None:
        await sleep(seconds)
        if len(clock.sleeps) == 1:
            clock.now = at(15)  # the host slept

    monkeypatch.setattr(asyncio, "sleep", jumping)
    with capture_logs(), pytest.raises(asyncio.CancelledError):
        await serve(job(), clock.run, catalogue)
    assert clock.runs == [at(15)]


# --- settings that change ---


async def changed(
    monkeypatch: pytest.MonkeyPatch,
    catalogue: Catalogue,
    first: JobSettings,
    then: JobSettings | None,
    *,
    when: datetime,
    until: datetime,
) -> list[datetime]:
    """When turns were taken, of a job that is another one from a time on."""
    clock = Clock(monkeypatch, until)
    seats: dict[str, Seat[JobSettings]] = {"nightly": Seat(first)}
    sleep = clock.sleep

    async def changing(seconds: float) -> None:
        await sleep(seconds)
        if clock.now >= when:
            seats["nightly"].change(then)
            await REAL_SLEEP(0)

    monkeypatch.setattr(asyncio, "sleep", changing)
    with capture_logs(), contextlib.suppress(asyncio.CancelledError):
        await scheduler.serve(seats["nightly"], clock.run, catalogue)
    return clock.runs


@pytest.mark.parametrize(
    "case",
    [
        (job(), job("*-*-* 16:00 UTC"), at(13), [at(16)]),  # before it is due
        (job(), job("*-*-* 16:00 UTC"), at(15), [at(14), at(16)]),  # and after
        (job(), job("*-*-* 12:30 UTC"), at(13), []),  # what had been due is not caught up with
        (job(), job(retries=2), at(13), [at(14)]),
        (job(), None, at(13), []),
        (job(), None, at(15), [at(14)]),
        (job(), job(None), at(13), []),
        # due at 14:00, and delayed: it is taken if it is still to be
        (job(randomized_delay_seconds=7000.0), job(), at(14.01), [at(14.01)]),
        (job(randomized_delay_seconds=7000.0), job("*-*-* 16:00 UTC"), at(14.01), [at(16)]),
    ],
)
async def test_a_job_that_is_changed_takes_its_next_turn_as_it_says_then(
    monkeypatch: pytest.MonkeyPatch,
    catalogue: Catalogue,
    case: tuple[JobSettings, JobSettings | None, datetime, list[datetime]],
) -> None:
    first, then, when, taken = case
    runs = await changed(monkeypatch, catalogue, first, then, when=when, until=at(17))
    assert len(runs) == len(taken)
    assert all(abs(one - other) < timedelta(minutes=2) for one, other in zip(runs, taken, strict=True))


async def test_a_turn_that_has_begun_is_finished_whatever_becomes_of_its_job(catalogue: Catalogue) -> None:
    begun, end, runs = asyncio.Event(), asyncio.Event(), 0

    async def run(_name: str, _vms: Mapping[str, int] | None = None, /) -> None:
        nonlocal runs
        begun.set()
        await end.wait()
        runs += 1

    often, never = job("*-*-* *:*:* UTC"), job("2040-01-01")
    async with aio.background() as start, asyncio.timeout(20):
        seats = Seats[JobSettings](start, partial(scheduler.serve, run=run, catalogue=catalogue))
        seats.follow({"nightly": often})
        await begun.wait()
        for settings in ({}, {"nightly": often}, {"nightly": never}, {}, {"nightly": never}):
            seats.follow(settings)
            await asyncio.sleep(0)
        end.set()
        while not runs:
            await asyncio.sleep(0.01)
        begun.clear()
        await asyncio.sleep(0)
        seats.follow({"nightly": often})
        await begun.wait()
    assert runs >= 1
