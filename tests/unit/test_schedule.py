import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.schedule import delay, missed, next_due

BERLIN = ZoneInfo("Europe/Berlin")
LORD_HOWE = ZoneInfo("Australia/Lord_Howe")  # jumps by half an hour


def at(text: str, zone: ZoneInfo = BERLIN, *, fold: int = 0) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold)


def dues(expression: str, after: datetime, count: int) -> list[str]:
    found = []
    for _ in range(count):
        due = next_due(expression, after)
        assert due is not None
        found.append(due.isoformat(timespec="minutes"))
        after = due
    return found


@pytest.mark.parametrize(
    ("expression", "due"),
    [
        ("mon..fri 02:30", "2026-11-23T02:30+01:00"),
        ("*-*-1..7 04:00", "2026-12-01T04:00+01:00"),
        ("daily", "2026-11-22T00:00+01:00"),
        ("weekly", "2026-11-23T00:00+01:00"),
        ("hourly", "2026-11-21T04:00+01:00"),
        ("02:30", "2026-11-22T02:30+01:00"),
        ("*:0/15", "2026-11-21T03:15+01:00"),
        ("02:30 UTC", "2026-11-21T03:30+01:00"),
        ("18:00 America/New_York", "2026-11-22T00:00+01:00"),
    ],
)
def test_next_due(expression: str, due: str) -> None:
    saturday = at("2026-11-21T03:00")
    assert dues(expression, saturday, 1) == [due]


def test_due_times_are_later_than_after_and_leave_out_none() -> None:
    assert dues("02:30", at("2026-11-21T02:30"), 1) == ["2026-11-22T02:30+01:00"]
    assert dues("02:30", at("2026-11-21T02:29:59"), 1) == ["2026-11-21T02:30+01:00"]


def test_an_expression_that_lies_in_the_past_is_never_due() -> None:
    assert next_due("2020-01-01 02:30", at("2026-11-21T03:00")) is None
    assert not missed("2020-01-01 02:30", at("2026-11-21T03:00"), at("2026-11-22T03:00"))


def test_a_bad_expression_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="'at noon' is no calendar expression"):
        next_due("at noon", at("2026-11-21T03:00"))


def test_a_time_in_the_skipped_hour_comes_as_much_later_as_the_clocks_jump() -> None:
    expected = ["2026-03-28T02:30+01:00", "2026-03-29T03:30+02:00", "2026-03-30T02:30+02:00"]
    assert dues("02:30", at("2026-03-27T12:00"), 3) == expected
    # Between the jump and the due time the day's backup is still to come.
    assert dues("02:30", at("2026-03-29T03:10"), 1) == ["2026-03-29T03:30+02:00"]
    assert dues("02:30", at("2026-03-29T03:30"), 1) == ["2026-03-30T02:30+02:00"]
    assert dues("02:30", at("2027-10-02T12:00", LORD_HOWE), 1) == ["2027-10-03T02:30+11:00"]
    assert dues("02:15", at("2027-10-02T12:00", LORD_HOWE), 1) == ["2027-10-03T02:45+11:00"]


def test_a_time_in_the_hour_that_comes_twice_is_due_the_first_time_only() -> None:
    expected = ["2026-10-24T02:30+02:00", "2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"]
    assert dues("02:30", at("2026-10-23T12:00"), 3) == expected
    # 02:15 the second time is later than 02:30 the first time.
    assert dues("02:30", at("2026-10-25T02:15", fold=1), 1) == ["2026-10-26T02:30+01:00"]
    assert dues("02:30", at("2026-10-25T02:15", fold=0), 1) == ["2026-10-25T02:30+02:00"]


def test_several_times_an_hour_stay_in_order_over_the_jump() -> None:
    assert dues("*:0/30", at("2026-03-29T01:10"), 4) == [
        "2026-03-29T01:30+01:00",
        "2026-03-29T03:00+02:00",
        "2026-03-29T03:30+02:00",
        "2026-03-29T04:00+02:00",
    ]
    # 2:55 is skipped and moves to 3:25 of Lord Howe's summer time: after 2:35 would have moved.
    assert dues("2:25,35", at("2027-10-03T01:00", LORD_HOWE), 2) == [
        "2027-10-03T02:35+11:00",
        "2027-10-03T02:55+11:00",
    ]


def test_a_zone_in_the_expression_decides_over_the_jump() -> None:
    after = at("2026-03-28T12:00", ZoneInfo("America/New_York"))
    assert dues("02:30 Europe/Berlin", after, 1) == ["2026-03-28T21:30-04:00"]


@pytest.fixture
def host_in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("host_in_berlin")
def test_without_a_named_zone_local_time_is_the_hosts() -> None:
    after = datetime(2026, 3, 28, 12, tzinfo=UTC)
    assert dues("02:30", after, 2) == ["2026-03-29T03:30+02:00", "2026-03-30T02:30+02:00"]
    after = datetime(2026, 10, 25, 0, 45, tzinfo=UTC)
    assert dues("02:30", after, 1) == ["2026-10-26T02:30+01:00"]


@settings(deadline=None)  # machines differ
@given(
    st.datetimes(datetime(2026, 1, 1), datetime(2027, 12, 31), timezones=st.just(BERLIN)),  # noqa: DTZ001
    st.sampled_from(["02:30", "*:0/30", "hourly", "mon..fri 02:30", "1..3:10,50", "*-*-1..7 04:00"]),
)
def test_due_times_go_forward_and_nothing_lies_between(after: datetime, expression: str) -> None:
    due = next_due(expression, after)
    assert due is not None
    assert due.timestamp() > after.timestamp()
    if due.timestamp() - after.timestamp() < 1:
        return
    between = datetime.fromtimestamp((due.timestamp() + after.timestamp()) / 2, BERLIN)
    assert next_due(expression, between) == due


@pytest.mark.parametrize(
    ("last", "now", "expected"),
    [
        (None, "2026-11-23T03:00", False),
        ("2026-11-23T02:30", "2026-11-24T02:29", False),
        ("2026-11-23T02:30", "2026-11-24T02:30", True),
        ("2026-11-20T02:30", "2026-11-23T02:00", False),  # Friday to Monday
        ("2026-11-20T02:30", "2026-11-27T02:00", True),
        ("2026-11-24T02:30", "2026-11-23T02:00", False),  # the clock was set back
    ],
)
def test_missed(last: str | None, now: str, expected: bool) -> None:
    assert missed("mon..fri 02:30", at(last) if last else None, at(now)) is expected


DUE = at("2026-11-23T02:30")


@given(st.text(), st.text(), st.floats(0, 86400))
def test_a_delay_is_stable_and_within_its_limit(job: str, seed: str, limit: float) -> None:
    first = delay(job, DUE, randomized_delay_seconds=limit, seed=seed)
    assert 0 <= first <= limit
    assert first == delay(job, DUE.astimezone(UTC), randomized_delay_seconds=limit, seed=seed)


def test_delays_spread_over_jobs_hosts_and_days() -> None:
    rolls = {
        delay(job, DUE + timedelta(days=day), randomized_delay_seconds=900, seed=seed)
        for job in ("nightly", "weekly")
        for seed in ("host-a", "host-b")
        for day in range(50)
    }
    assert len(rolls) == 200
    assert min(rolls) < 90
    assert max(rolls) > 810
