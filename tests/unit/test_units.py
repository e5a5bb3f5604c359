import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import units
from orchestrator.units import GIB, KIB, MIB, Calendar, Share


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (0, 0),
        (1048576, MIB),
        ("512", 512),
        ("512B", 512),
        ("10G", 10 * GIB),
        ("10g", 10 * GIB),
        ("200GiB", 200 * GIB),
        (" 9.0 GiB ", 9 * GIB),
        ("1.5TiB", 1536 * GIB),
        ("1KB", 1000),
        ("1kB", 1000),
        ("2GB", 2_000_000_000),
        ("0.3KiB", 307),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_sizes_that_are_read(text: str | int, size_bytes: int) -> None:
    assert units.parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GiB",
        "-1",
        -1,
        "1e3",
        "10Mb",
        "10 gib",
        "1,5GiB",
        "0x10",
        "1GiB 2MiB",
        "inf",
        "nan",
        "٣GiB",
        "9" * 5000,
        "8192PiB",
        2**63,
        True,
        None,
        1.5,
        [],
        "10%",
    ],
)
def test_sizes_that_are_refused_say_what_was_given_and_what_is_allowed(text: object) -> None:
    with pytest.raises(ValueError, match="is no size; allowed: bytes as a number") as caught:
        units.parse_size(text)  # type: ignore[arg-type]
    assert repr(text) in str(caught.value)


@given(st.integers(0, 2**20), st.sampled_from(["", "B", "K", "MiB", "G", "TiB", "kB", "GB", "TB"]))
def test_a_size_with_a_unit_is_exact(amount: int, unit: str) -> None:
    power = 1000 if unit in {"kB", "GB", "TB"} else 1024
    factor = power ** {"": 0, "B": 0, "K": 1, "k": 1, "M": 2, "G": 3, "T": 4}[unit[:1]]
    if unit == "B":
        factor = 1
    assert units.parse_size(f"{amount}{unit}") == amount * factor


@given(st.integers(0, 2**63 - 1))
def test_what_format_size_writes_is_read_back(size_bytes: int) -> None:
    text = units.format_size(size_bytes)
    number, unit = text.split()
    assert float(number) < 1024
    if unit != "EiB":
        assert abs(units.parse_size(text) - size_bytes) <= size_bytes * 0.05


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (9 * GIB, "9.0 GiB"),
        (1024 * KIB - 1, "1.0 MiB"),
        (-3 * MIB, "-3.0 MiB"),
        (2**63 - 1, "8.0 EiB"),
    ],
)
def test_sizes_as_they_are_shown(size_bytes: int, text: str) -> None:
    assert units.format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [
        (0, 0),
        ("0", 0),
        ("0MiB", 0),
        (1, KIB),
        ("51200", 50 * MIB),
        ("50MiB", 50 * MIB),
        ("50 MiB/s", 50 * MIB),
        ("1.5MiB", 1536 * KIB),
        ("100B", 100),
    ],
)
def test_rates(text: str | int, bytes_per_second: int) -> None:
    assert units.parse_rate(text) == bytes_per_second


@pytest.mark.parametrize("text", ["", "-1", -1, "1.5", 1.5, "fast", "50/s", "0.1B", True, "50Mbit"])
def test_rates_that_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"is no rate; allowed: KiB/s as a whole number") as caught:
        units.parse_rate(text)  # type: ignore[arg-type]
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (0, 0),
        (2.5, 2.5),
        ("90", 90),
        ("10s", 10),
        ("15min", 900),
        ("15 m", 900),
        ("2h", 7200),
        ("1h 30min", 5400),
        ("1h30min", 5400),
        ("500ms", 0.5),
        ("20us", 0.00002),
        ("1d", 86400),
        ("1 week", 604800),
        ("1.5h", 5400),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "-1s",
        -1,
        "s",
        "10 parsecs",
        "1h 30",
        "infinity",
        float("inf"),
        float("nan"),
        True,
        None,
        "10s!",
        "1M",
    ],
)
def test_durations_that_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is no duration; allowed: seconds as a number") as caught:
        units.parse_duration(text)  # type: ignore[arg-type]
    assert repr(text) in str(caught.value)


@given(st.integers(0, 10**12))
def test_a_duration_is_written_as_it_is_read(milliseconds: int) -> None:
    text = units.format_duration(milliseconds / 1000)
    assert round(units.parse_duration(text) * 1000) == milliseconds


def test_durations_as_they_are_shown() -> None:
    assert units.format_duration(0) == "0s"
    assert units.format_duration(5400) == "1h 30min"
    assert units.format_duration(86400.25) == "1d 250ms"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10%", Share(10.0)),
        ("2.5 %", Share(2.5)),
        ("0%", Share(0.0)),
        ("5GiB", 5 * GIB),
        (0, 0),
    ],
)
def test_shares_and_sizes(text: str | int, value: Share | int) -> None:
    assert units.parse_share_or_size(text) == value


@pytest.mark.parametrize("text", ["100%", "-1%", "%", "ten", True, 1.5])
def test_shares_that_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is no share or size; allowed: a share from 0%") as caught:
        units.parse_share_or_size(text)  # type: ignore[arg-type]
    assert repr(text) in str(caught.value)


def test_a_share_of_a_whole() -> None:
    assert Share(10.0).of(1001) == 100
    assert str(Share(2.5)) == "2.5%"


@given(st.integers(0, 99), st.integers(0, 2**60))
def test_a_share_is_never_more_than_the_whole(percent: int, total_bytes: int) -> None:
    share = units.parse_share_or_size(f"{percent}%")
    assert isinstance(share, Share)
    assert 0 <= share.of(total_bytes) <= total_bytes


@pytest.mark.parametrize(
    "text",
    [
        "mon..fri 02:30",
        "*-*-1..7 04:00",
        "daily",
        "Weekly",
        "hourly",
        "Mon-Fri 02:30",
        "02:30",
        "2:30",
        "*:0/15",
        "sat",
        "*-*~1",
        "9..17/2:00",
        "10-15",
        "2020-01-01",
        "Mon,Thu 01:02:03",
    ],
)
def test_calendars_that_are_read(text: str) -> None:
    assert units.parse_calendar(f" {text} ") == Calendar(text)


def test_a_calendar_may_name_its_zone() -> None:
    calendar = units.parse_calendar("mon..fri 02:30 Europe/Berlin")
    assert (calendar.rule, str(calendar.zone)) == ("mon..fri 02:30", "Europe/Berlin")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is no calendar expression"),
        ("30", "bad day-of-week"),
        ("*/5", "bad day-of-week"),
        ("25:00", "bad hour"),
        ("fri..mon 02:00", "bad day-of-week"),
        ("22..2:00", "bad hour"),
        ("02:30:00.5", "bad second"),
        ("02:30 Europe", "bad day-of-week"),
        ("02:30 Mars/Olympus", "bad day-of-week"),
        ("02:30 ../../etc/passwd", "bad day-of-week"),
        ("02:30\n03:30", "bad"),
        ("mon" + "," * 5000, "is no calendar expression"),
        ("*-02-30", "never comes"),
        (True, "is no calendar expression"),
    ],
)
def test_calendars_that_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="allowed: a systemd calendar expression") as caught:
        units.parse_calendar(text)
    assert reason in str(caught.value)
    assert repr(text) in str(caught.value)


@settings(deadline=None)  # a calendar that never comes is followed to the year 2200
@given(st.text(alphabet="monfri dailyUTC0123456789*:-~/.,@%\n", max_size=30))
def test_any_text_is_a_calendar_or_a_value_error(text: str) -> None:
    try:
        units.parse_calendar(text)
    except ValueError as error:
        assert "allowed" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "now"),
        (0.4, "now"),
        (1, "1 s ago"),
        (59.9, "59 s ago"),
        (60, "1 min ago"),
        (3599, "59 min ago"),
        (13 * 3600 + 1800, "13 h ago"),
        (47 * 3600, "47 h ago"),
        (48 * 3600, "2 d ago"),
        (400 * 86400, "400 d ago"),
        (-90, "in 1 min"),
        (-3 * 86400, "in 3 d"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    assert units.format_age(seconds) == text


@given(st.floats(min_value=1, max_value=1e10))
def test_an_age_says_never_more_and_at_least_half_of_it(seconds: float) -> None:
    amount, unit = units.format_age(seconds).removesuffix(" ago").split(" ")
    said = units.parse_duration(f"{amount}{unit}")
    assert said <= seconds < 2 * said


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("berlin")
def test_a_moment_is_shown_in_the_local_zone() -> None:
    winter = datetime(2026, 11, 23, 1, 30, tzinfo=UTC)
    assert units.format_moment(winter, now=winter + timedelta(hours=13)) == "2026-11-23 02:30 (13 h ago)"
    summer = datetime(2026, 7, 1, 22, 30, 59, tzinfo=UTC)
    assert units.format_moment(summer, now=summer - timedelta(days=3)) == "2026-07-02 00:30 (in 3 d)"
