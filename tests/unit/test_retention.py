"""Which snapshots stay: tables of dates, chains, the exact reasons, and what holds whatever the snapshots.

Times are Berlin's wall clock; `*` after one means the second time that this hour comes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.properties import KEEP_ALLOWED, parse_keep
from orchestrator.model import Keep
from orchestrator.run.retention import Merge, Point, Verdict, decide, decide_all, merges, standing_alone

BERLIN = ZoneInfo("Europe/Berlin")
PERIODS = {
    "hourly": "%Y-%m-%d %H:00",
    "daily": "%Y-%m-%d",
    "weekly": "%G-W%V",
    "monthly": "%Y-%m",
    "yearly": "%Y",
}


def point(wall: str, *, parent: str | None = None, protected: bool = False) -> Point:
    local = datetime.fromisoformat(wall.removesuffix("*")).replace(tzinfo=BERLIN, fold=int(wall.endswith("*")))
    return Point(wall, local.astimezone(UTC), (parent,) if parent else (), protected)


def points(*walls: str) -> list[Point]:
    return [point(wall) for wall in walls]


def nights(first: str, count: int) -> list[Point]:
    start = datetime.fromisoformat(first)
    return [point(f"{start + timedelta(days=day):%Y-%m-%d} 02:30") for day in range(count)]


def staying(verdicts: Sequence[Verdict]) -> list[str]:
    return [verdict.id for verdict in verdicts if verdict.keep]


def kept(given_points: Sequence[Point], text: str) -> list[str]:
    return staying(decide(given_points, parse_keep(text), BERLIN))


def said(verdicts: Sequence[Verdict]) -> dict[str, str]:
    return {verdict.id: ", ".join(verdict.reasons) for verdict in verdicts}


@pytest.mark.parametrize(
    ("walls", "text", "expected"),
    [
        pytest.param(
            ["2026-11-21 23:59:59", "2026-11-22 00:00", "2026-11-22 00:30"],
            "keep-daily=2",
            ["2026-11-21 23:59:59", "2026-11-22 00:30"],
            id="midnight is local, not UTC's",
        ),
        pytest.param(
            ["2026-11-21 23:59:59", "2026-11-22 00:00"], "keep-hourly=1", ["2026-11-22 00:00"], id="an hour ends"
        ),
        pytest.param(
            ["2026-11-22 02:30:00", "2026-11-22 02:30:20", "2026-11-22 02:30:40"],
            "keep-last=2",
            ["2026-11-22 02:30:20", "2026-11-22 02:30:40"],
            id="several a minute: the last ones",
        ),
        pytest.param(
            ["2026-11-22 02:30:00", "2026-11-22 02:30:20", "2026-11-22 02:30:40"],
            "keep-hourly=1",
            ["2026-11-22 02:30:40"],
            id="several a minute: the newest of the hour",
        ),
        pytest.param(
            ["2026-11-20 02:30", "2026-11-20 14:30", "2026-11-21 02:30", "2026-11-21 14:30", "2026-11-22 02:30"],
            "keep-daily=3",
            ["2026-11-20 14:30", "2026-11-21 14:30", "2026-11-22 02:30"],
            id="several a day: the newest of each",
        ),
        pytest.param(
            [
                "2026-03-29 00:30",
                "2026-03-29 01:59:59",
                "2026-03-29 03:00",
                "2026-03-29 23:30",
                "2026-03-30 00:30",
            ],
            "keep-hourly=4",
            ["2026-03-29 01:59:59", "2026-03-29 03:00", "2026-03-29 23:30", "2026-03-30 00:30"],
            id="clocks go forward: one hour is missing",
        ),
        pytest.param(
            ["2026-03-29 00:30", "2026-03-29 23:30", "2026-03-30 00:30", "2026-03-30 23:30"],
            "keep-daily=2",
            ["2026-03-29 23:30", "2026-03-30 23:30"],
            id="clocks go forward: a day of 23 hours",
        ),
        pytest.param(
            ["2026-10-25 01:30", "2026-10-25 02:50", "2026-10-25 02:10*", "2026-10-25 03:30"],
            "keep-hourly=2",
            ["2026-10-25 02:10*", "2026-10-25 03:30"],
            id="clocks go back: 02 is one hour, though its second time shows an earlier minute",
        ),
        pytest.param(
            ["2026-10-24 23:30", "2026-10-25 00:30", "2026-10-25 23:30", "2026-10-26 00:30"],
            "keep-daily=2",
            ["2026-10-25 23:30", "2026-10-26 00:30"],
            id="clocks go back: a day of 25 hours",
        ),
        pytest.param(
            ["2026-12-27 02:30", "2026-12-28 02:30", "2026-12-31 02:30", "2027-01-01 02:30", "2027-01-04 02:30"],
            "keep-weekly=3",
            ["2026-12-27 02:30", "2027-01-01 02:30", "2027-01-04 02:30"],
            id="week 53 goes on in January",
        ),
        pytest.param(
            ["2024-12-29 02:30", "2024-12-30 02:30", "2025-01-05 02:30"],
            "keep-weekly=2",
            ["2024-12-29 02:30", "2025-01-05 02:30"],
            id="week 1 begins in December",
        ),
        pytest.param(
            ["2025-12-31 23:59:59", "2026-01-01 00:00", "2026-12-31 23:30", "2027-01-01 00:30"],
            "keep-yearly=2",
            ["2026-12-31 23:30", "2027-01-01 00:30"],
            id="a year ends at local midnight",
        ),
        pytest.param(
            ["2026-01-31 02:30", "2026-02-01 02:30", "2026-02-28 02:30", "2026-03-01 02:30"],
            "keep-monthly=2",
            ["2026-02-28 02:30", "2026-03-01 02:30"],
            id="months of any length",
        ),
        pytest.param(
            ["2023-02-01 02:30", "2025-06-15 02:30", "2026-11-21 02:30", "2026-11-22 02:30"],
            "keep-daily=3",
            ["2025-06-15 02:30", "2026-11-21 02:30", "2026-11-22 02:30"],
            id="a period without snapshots is not counted, however long",
        ),
        pytest.param(["2026-11-22 02:30"], "keep-yearly=1", ["2026-11-22 02:30"], id="the only one"),
        pytest.param([], "keep-last=1", [], id="none"),
    ],
)
def test_periods(walls: list[str], text: str, expected: list[str]) -> None:
    assert kept(points(*walls), text) == expected


def test_a_period_that_an_earlier_rule_covers_is_not_counted() -> None:
    assert kept(nights("2026-11-01", 22), "keep-last=3,keep-daily=13") == [
        night.id for night in nights("2026-11-07", 16)
    ]


def test_rules_follow_on_each_other() -> None:
    two_years = nights("2024-11-23", 730)
    assert said(
        decide(two_years, parse_keep("keep-last=2,keep-daily=3,keep-weekly=2,keep-monthly=2"), BERLIN)
    ) == {night.id: "no rule keeps it" for night in two_years} | {
        "2026-11-22 02:30": "last 1",
        "2026-11-21 02:30": "last 2",
        "2026-11-20 02:30": "daily 2026-11-20",
        "2026-11-19 02:30": "daily 2026-11-19",
        "2026-11-18 02:30": "daily 2026-11-18",
        "2026-11-15 02:30": "weekly 2026-W46",
        "2026-11-08 02:30": "weekly 2026-W45",
        "2026-10-31 02:30": "monthly 2026-10",
        "2026-09-30 02:30": "monthly 2026-09",
    }


def test_the_oldest_stays_until_every_rule_is_used_up() -> None:
    text = "keep-daily=2,keep-monthly=2"
    young = points("2026-11-01 02:30", "2026-11-02 02:30", "2026-11-21 02:30", "2026-11-22 02:30")
    assert said(decide(young, parse_keep(text), BERLIN)) == {
        "2026-11-01 02:30": "oldest, monthly not used up",
        "2026-11-02 02:30": "no rule keeps it",
        "2026-11-21 02:30": "daily 2026-11-21",
        "2026-11-22 02:30": "daily 2026-11-22",
    }
    used_up = points("2026-09-01 02:30", "2026-09-30 02:30", "2026-10-31 02:30") + young
    assert kept(used_up, text) == [
        "2026-09-30 02:30",
        "2026-10-31 02:30",
        "2026-11-21 02:30",
        "2026-11-22 02:30",
    ]


def test_several_rules_that_are_not_used_up_are_all_named() -> None:
    several = points("2026-11-22 02:10", "2026-11-22 02:20", "2026-11-22 02:30")
    verdicts = decide(several, parse_keep("keep-last=1,keep-daily=2,keep-yearly=1"), BERLIN)
    assert said(verdicts) == {
        "2026-11-22 02:10": "oldest, daily and yearly not used up",
        "2026-11-22 02:20": "no rule keeps it",
        "2026-11-22 02:30": "last 1",
    }


def test_a_week_over_the_end_of_a_month_loses_neither_its_newest_nor_the_months() -> None:
    walls = ["2026-11-22 02:30", "2026-11-29 02:30", "2026-11-30 02:30", "2026-12-06 02:30"]
    verdicts = decide(points(*walls), parse_keep("keep-weekly=2,keep-monthly=1"), BERLIN)
    assert said(verdicts) == {
        "2026-11-22 02:30": "oldest, monthly not used up",
        "2026-11-29 02:30": "weekly 2026-W48",
        "2026-11-30 02:30": "monthly 2026-11",
        "2026-12-06 02:30": "weekly 2026-W49",
    }
    assert kept(points(*walls), "keep-weekly=1,keep-monthly=1") == walls[2:]


def test_every_kind_of_period_has_its_label() -> None:
    one_a_rule = points(
        "2024-12-29 02:30",
        "2026-10-25 02:50",
        "2026-11-29 02:30",
        "2026-12-06 02:30",
        "2026-12-07 01:45",
        "2026-12-07 02:30",
    )
    everything = "keep-last=1,keep-hourly=1,keep-daily=1,keep-weekly=1,keep-monthly=1,keep-yearly=1"
    assert said(decide(one_a_rule, parse_keep(everything), BERLIN)) == {
        "2024-12-29 02:30": "yearly 2024",
        "2026-10-25 02:50": "monthly 2026-10",
        "2026-11-29 02:30": "weekly 2026-W48",
        "2026-12-06 02:30": "daily 2026-12-06",
        "2026-12-07 01:45": "hourly 2026-12-07 01:00",
        "2026-12-07 02:30": "last 1",
    }


def test_a_week_is_labelled_with_its_own_year() -> None:
    assert said(decide(points("2024-12-30 02:30", "2027-01-03 02:30"), Keep(weekly=2), BERLIN)) == {
        "2024-12-30 02:30": "weekly 2025-W01",
        "2027-01-03 02:30": "weekly 2026-W53",
    }


def test_the_callers_zone_counts_whatever_zone_the_times_are_in() -> None:
    late = points("2026-11-22 00:10", "2026-11-22 00:50", "2026-11-22 22:30")
    in_tokyo = [replace(each, time=each.time.astimezone(ZoneInfo("Asia/Tokyo"))) for each in late]
    assert staying(decide(in_tokyo, Keep(daily=2), BERLIN)) == ["2026-11-22 00:10", "2026-11-22 22:30"]
    assert staying(decide(in_tokyo, Keep(daily=2), UTC)) == ["2026-11-22 00:50", "2026-11-22 22:30"]


@pytest.fixture
def put_host_in() -> Iterator[Callable[[str], None]]:
    def put(zone: str) -> None:
        patch.setenv("TZ", zone)
        time.tzset()

    with pytest.MonkeyPatch.context() as patch:
        yield put
    time.tzset()


def test_without_a_zone_it_is_the_hosts(put_host_in: Callable[[str], None]) -> None:
    nightly = points("2026-07-21 23:10", "2026-07-22 00:10", "2026-07-22 01:10", "2026-07-22 02:10")
    found = []
    for zone in ("Europe/Berlin", "Asia/Tokyo", "UTC"):
        put_host_in(zone)
        found.append(decide(nightly, Keep(daily=2), None))
        assert found[-1] == decide(nightly, Keep(daily=2), ZoneInfo(zone))
    assert len(set(found)) == 3


def test_what_is_kept_keeps_what_it_is_based_on() -> None:
    chain = [
        point("2026-11-18 02:30"),
        point("2026-11-19 02:30", parent="2026-11-18 02:30"),
        point("2026-11-20 02:30", parent="2026-11-19 02:30"),
        point("2026-11-21 02:30", parent="2026-11-19 02:30"),
        point("2026-11-22 02:30", parent="2026-11-19 02:30"),
    ]
    assert said(decide(chain, Keep(last=2), BERLIN)) == {
        "2026-11-18 02:30": "needed by 2026-11-19 02:30",
        "2026-11-19 02:30": "needed by 2026-11-21 02:30, needed by 2026-11-22 02:30",
        "2026-11-20 02:30": "no rule keeps it",
        "2026-11-21 02:30": "last 2",
        "2026-11-22 02:30": "last 1",
    }


def test_a_long_chain_is_kept_down_to_its_full_backup() -> None:
    chain = nights("2026-11-03", 20)
    chain[1:] = [replace(later, parents=(earlier.id,)) for earlier, later in pairwise(chain)]
    assert kept(chain, "keep-last=1") == [night.id for night in chain]
    assert kept([*chain, point("2026-11-23 02:30")], "keep-last=1") == ["2026-11-23 02:30"]


def test_what_is_needed_says_so_beside_its_other_reason() -> None:
    full, incremental = "web01/20261122T023000Z", "web01/20261123T023000Z"
    pair = [
        Point(full, datetime(2026, 11, 22, 2, 30, tzinfo=UTC)),
        Point(incremental, datetime(2026, 11, 23, 2, 30, tzinfo=UTC), parents=(full,)),
    ]
    assert decide(pair, Keep(daily=2), BERLIN) == (
        Verdict(full, keep=True, reasons=("daily 2026-11-22", f"needed by {incremental}")),
        Verdict(incremental, keep=True, reasons=("daily 2026-11-23",)),
    )


def test_a_chain_is_kept_for_a_protected_snapshot_too() -> None:
    chain = [
        point("2026-11-20 02:30"),
        point("2026-11-21 02:30", parent="2026-11-20 02:30", protected=True),
        point("2026-11-22 02:30"),
    ]
    assert said(decide(chain, Keep(last=1), BERLIN)) == {
        "2026-11-20 02:30": "needed by 2026-11-21 02:30",
        "2026-11-21 02:30": "protected",
        "2026-11-22 02:30": "last 1",
    }


def test_each_disk_may_be_based_on_another_snapshot() -> None:
    """As where a disk was left out for a while: its bitmap is older than the others'."""
    chain = [
        point("2026-11-18 02:30"),
        point("2026-11-19 02:30"),
        point("2026-11-20 02:30"),
        replace(point("2026-11-21 02:30"), parents=("2026-11-20 02:30", "2026-11-18 02:30")),
    ]
    assert said(decide(chain, Keep(last=1), BERLIN)) == {
        "2026-11-18 02:30": "needed by 2026-11-21 02:30",
        "2026-11-19 02:30": "no rule keeps it",
        "2026-11-20 02:30": "needed by 2026-11-21 02:30",
        "2026-11-21 02:30": "last 1",
    }


def test_what_any_of_several_policies_keeps_stays_for_all_of_their_reasons() -> None:
    chain = [
        *nights("2026-10-30", 4),
        point("2026-11-03 02:30", parent="2026-11-02 02:30"),
        point("2026-11-03 14:30", parent="2026-11-03 02:30"),
    ]
    assert said(decide_all(chain, [Keep(last=1), Keep(monthly=2), Keep(last=1)], BERLIN)) == {
        "2026-10-30 02:30": "no rule keeps it",
        "2026-10-31 02:30": "monthly 2026-10",
        "2026-11-01 02:30": "no rule keeps it",
        "2026-11-02 02:30": "needed by 2026-11-03 02:30",
        "2026-11-03 02:30": "needed by 2026-11-03 14:30",
        "2026-11-03 14:30": "last 1, monthly 2026-11",
    }
    for keeps, reason in (([], "no retention configured"), ([Keep(last=1), Keep(all=True)], "keep-all")):
        verdicts = decide_all(chain, keeps, BERLIN)
        assert staying(verdicts) == [each.id for each in chain]
        assert all(reason in verdict.reasons for verdict in verdicts)


def test_protected_snapshots_are_not_counted() -> None:
    given_points = nights("2026-11-18", 5)
    given_points[3] = replace(given_points[3], protected=True)
    assert said(decide(given_points, Keep(last=1, daily=2), BERLIN)) == {
        "2026-11-18 02:30": "no rule keeps it",
        "2026-11-19 02:30": "daily 2026-11-19",
        "2026-11-20 02:30": "daily 2026-11-20",
        "2026-11-21 02:30": "protected",
        "2026-11-22 02:30": "last 1",
    }


def test_a_parent_that_is_not_there_is_ignored() -> None:
    only = [point("2026-11-22 02:30", parent="2026-11-21 02:30")]
    assert said(decide(only, Keep(last=1), BERLIN)) == {"2026-11-22 02:30": "last 1"}


def test_damaged_chains_that_go_in_circles_end() -> None:
    circle = [
        point("2026-11-20 02:30", parent="2026-11-21 02:30"),
        point("2026-11-21 02:30", parent="2026-11-20 02:30"),
        point("2026-11-22 02:30", parent="2026-11-21 02:30"),
    ]
    assert len(staying(decide(circle, Keep(last=1), BERLIN))) == 3


@pytest.mark.parametrize(
    ("keep", "reason"),
    [(Keep(), "no retention configured"), (Keep(all=True), "keep-all"), (Keep(3, all=True), "keep-all")],
)
def test_without_rules_everything_stays(keep: Keep, reason: str) -> None:
    given_points = [*nights("2026-11-18", 4), point("2026-11-22 02:30", protected=True)]
    assert set(said(decide(given_points, keep, BERLIN)).values()) == {reason}


def test_an_id_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="2 snapshots have only 1 different ids"):
        decide(points("2026-11-22 02:30", "2026-11-22 02:30"), Keep(last=1), BERLIN)


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("keep-last=3,keep-daily=13", Keep(last=3, daily=13)),
        (" keep-last = 3 , keep-weekly=0 ", Keep(last=3)),
        (
            "keep-yearly=6,keep-monthly=5,keep-weekly=4,keep-daily=3,keep-hourly=2,keep-last=1",
            Keep(1, 2, 3, 4, 5, 6),
        ),
        ("keep-all=1", Keep(all=True)),
        ("keep-all=1,keep-last=0", Keep(all=True)),
        ("keep-all=0,keep-last=3", Keep(last=3)),
    ],
)
def test_properties(text: str, keep: Keep) -> None:
    assert parse_keep(text) == keep


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"'': '' is no property; allowed: {KEEP_ALLOWED}"),
        ("3", f"'3': '3' is no property; allowed: {KEEP_ALLOWED}"),
        ("keep-last=3,", f"'keep-last=3,': '' is no property; allowed: {KEEP_ALLOWED}"),
        ("last=3", f"'last=3': 'last' is not known; allowed: {KEEP_ALLOWED}"),
        ("keep-minutely=3", f"'keep-minutely=3': 'keep-minutely' is not known; allowed: {KEEP_ALLOWED}"),
        ("keep-last=3,keep-last=4", f"'keep-last=3,keep-last=4' gives keep-last twice; allowed: {KEEP_ALLOWED}"),
        ("keep-last=-1", "'keep-last=-1': keep-last is '-1'; allowed: a whole number"),
        ("keep-last=1.5", "'keep-last=1.5': keep-last is '1.5'; allowed: a whole number"),
        ("keep-last=", "'keep-last=': keep-last is ''; allowed: a whole number"),
        ("keep-last=٣", "'keep-last=٣': keep-last is '٣'; allowed: a whole number"),
        ("keep-last=1\n2", "'keep-last=1\\n2': keep-last is '1\\n2'; allowed: a whole number"),
        ("keep-all=2", "'keep-all=2': keep-all is '2'; allowed: 1 or 0"),
        (
            "keep-last=0,keep-daily=0",
            (
                "'keep-last=0,keep-daily=0' would keep nothing; allowed: a number above 0, or keep-all=1 for"
                " everything"
            ),
        ),
        (
            "keep-all=0",
            "'keep-all=0' would keep nothing; allowed: a number above 0, or keep-all=1 for everything",
        ),
        (
            "keep-all=1,keep-last=3",
            (
                "'keep-all=1,keep-last=3' keeps all and gives numbers too;"
                " allowed: keep-all=1 alone, or numbers alone"
            ),
        ),
    ],
)
def test_wrong_properties_say_what_was_given_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the whole message is compared
        parse_keep(text)
    assert str(raised.value) == message


# What holds whatever the snapshots: times that are close together, days or months apart, on both sides of a
# change of clocks and of a year's end; chains that fork; any of them protected.

STARTS = [datetime(2026, 10, 24, 22, tzinfo=UTC), datetime(2026, 12, 26, 22, tzinfo=UTC)]
STEPS = [timedelta(seconds=20), timedelta(minutes=40), timedelta(hours=7), timedelta(days=1), timedelta(days=26)]


@st.composite
def histories(draw: st.DrawFn, *, chained: bool = True) -> list[Point]:
    moment, history = draw(st.sampled_from(STARTS)), list[Point]()
    for step in draw(st.lists(st.sampled_from(STEPS), max_size=25)):
        moment += step
        some = st.lists(st.sampled_from(history), max_size=2, unique=True) if chained and history else st.just([])
        parents = tuple(parent.id for parent in draw(some))
        protected = chained and draw(st.integers(0, 9)) == 9
        history.append(Point(f"{moment:%y%m%dT%H%M%S}", moment, parents, protected))
    return history


COUNTS = st.integers(0, 4) | st.just(0)
KEEPS = st.builds(Keep, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS).filter(lambda keep: keep != Keep())
RULES = [field.name for field in fields(Keep) if field.name != "all"]


def stays(history: Sequence[Point], keep: Keep) -> set[str]:
    return set(staying(decide(history, keep, BERLIN)))


@given(histories(), KEEPS)
def test_enough_stays(history: list[Point], keep: Keep) -> None:
    unprotected = [each.id for each in history if not each.protected]
    staying_ids = stays(history, keep)
    assert staying_ids >= set(unprotected[-keep.last :] if keep.last else [])
    assert staying_ids >= {each.id for each in history[-1:]}
    assert staying_ids >= {each.id for each in history if each.protected}
    assert staying_ids >= {parent for each in history if each.id in staying_ids for parent in each.parents}


@given(histories(), KEEPS, st.sampled_from(RULES), st.integers(1, 3))
def test_a_larger_number_never_keeps_less(history: list[Point], keep: Keep, rule: str, more: int) -> None:
    larger = replace(keep, **{rule: getattr(keep, rule) + more})
    assert stays(history, keep) <= stays(history, larger)


@given(histories(), KEEPS, st.data())
def test_protecting_one_never_removes_another(history: list[Point], keep: Keep, data: st.DataObject) -> None:
    protected = data.draw(st.sets(st.sampled_from(history))) if history else set()
    more = [replace(each, protected=each.protected or each in protected) for each in history]
    assert stays(history, keep) <= stays(more, keep)


@given(histories(), KEEPS, st.data())
def test_what_stayed_stays_however_much_was_removed(history: list[Point], keep: Keep, data: st.DataObject) -> None:
    staying_ids = stays(history, keep)
    going = [each.id for each in history if each.id not in staying_ids]
    gone = data.draw(st.sets(st.sampled_from(going))) if going else set()
    assert stays([each for each in history if each.id not in gone], keep) >= staying_ids
    assert stays([each for each in history if each.id in staying_ids], keep) == staying_ids


@given(histories(), st.lists(KEEPS, min_size=1, max_size=3), st.data())
def test_several_policies_keep_what_each_of_them_does_and_nothing_else(
    history: list[Point], keeps: list[Keep], data: st.DataObject
) -> None:
    staying_ids = set(staying(decide_all(history, keeps, BERLIN)))
    assert staying_ids == set[str]().union(*(stays(history, keep) for keep in keeps))
    going = [each.id for each in history if each.id not in staying_ids]
    gone = data.draw(st.sets(st.sampled_from(going))) if going else set()
    left = [each for each in history if each.id not in gone]
    assert set(staying(decide_all(left, keeps, BERLIN))) >= staying_ids


@given(histories(), KEEPS, st.randoms(use_true_random=False))
def test_the_order_of_what_is_given_does_not_matter(
    history: list[Point], keep: Keep, random: st.DataObject
) -> None:
    shuffled = list(history)
    random.shuffle(shuffled)
    verdicts = decide(history, keep, BERLIN)
    assert decide(shuffled, keep, BERLIN) == verdicts
    assert [verdict.id for verdict in verdicts] == [each.id for each in history]


@given(histories(), KEEPS)
def test_there_is_always_a_reason_and_a_number_is_never_exceeded(history: list[Point], keep: Keep) -> None:
    verdicts = decide(history, keep, BERLIN)
    assert all(
        verdict.reasons and verdict.keep != (verdict.reasons == ("no rule keeps it",)) for verdict in verdicts
    )
    by_rule = [verdict.reasons[0].split()[0] for verdict in verdicts]
    for rule in ("last", "hourly", "daily", "weekly"):
        assert by_rule.count(rule) <= getattr(keep, rule)


@given(histories(), KEEPS)
def test_removed_oldest_last_no_chain_is_broken_on_the_way(history: list[Point], keep: Keep) -> None:
    parents = {each.id: set(each.parents) for each in history}
    there = {each.id for each in history}
    for verdict in reversed(decide(history, keep, BERLIN)):
        if not verdict.keep:
            there.remove(verdict.id)
            assert all(parents[each] <= there for each in there)


# --- merging ---


def based(text: str) -> list[Point]:
    """Points of a night each, as "a b<a c<b,a !d": what each is based on, and which is protected."""
    found = []
    for day, word in enumerate(text.split(), start=1):
        name, _, parents = word.removeprefix("!").partition("<")
        moment = datetime(2026, 11, day, 2, 30, tzinfo=UTC)
        found.append(Point(name, moment, tuple(filter(None, parents.split(","))), word.startswith("!")))
    return found


def merged(text: str, keep: str) -> dict[str, str]:
    return {one.into: "".join(one.older) for one in merges(based(text), [parse_keep(keep)], BERLIN)}


@pytest.mark.parametrize(
    ("text", "keep", "expected"),
    [
        pytest.param("a b<a c<b d<c", "keep-last=2", {"c": "ab"}, id="a chain's first kept point takes over"),
        pytest.param("a b<a c<b d<c", "keep-last=1", {"d": "abc"}, id="its newest, if only that stays"),
        pytest.param("a b<a c<b d<c", "keep-last=4", {}, id="nothing would go"),
        pytest.param("a b<a c<b d<c", "keep-all=1", {}, id="everything is kept"),
        pytest.param("a b c", "keep-last=1", {}, id="no chains"),
        pytest.param("!a b<a c<b d<c", "keep-last=1", {}, id="its first is protected: a later one is not merged"),
        pytest.param("a !b<a c<b d<c", "keep-last=1", {"b": "a"}, id="a protected one counts as kept"),
        pytest.param("a b<a c d<c e<d", "keep-last=1", {"e": "cd"}, id="the older chain goes anyway"),
        pytest.param("a b<a !c<b d e<d f<e", "keep-last=1", {"c": "ab", "f": "de"}, id="several chains"),
        pytest.param("a b<a c<a", "keep-last=2", {"b": "a", "c": "a"}, id="two that build on one"),
        pytest.param("a b<a c<b,a d<c", "keep-last=3", {}, id="another disk of a later one needs it"),
        pytest.param("a b c<a,b d<c", "keep-last=2", {"c": "ab"}, id="each disk is based on another one"),
        pytest.param("a !b c<a,b d<c", "keep-last=2", {}, id="one of its disks is based on a kept one"),
        pytest.param("b<a c<b", "keep-last=1", {"c": "b"}, id="the first of it is gone"),
        pytest.param("b<a", "keep-last=1", {}, id="all of it is gone"),
        pytest.param("a<b b<a c<b", "keep-last=1", {"c": "ab"}, id="damaged, in circles"),
    ],
)
def test_what_is_worth_merging(text: str, keep: str, expected: dict[str, str]) -> None:
    assert merged(text, keep) == expected


def test_without_policies_nothing_is_merged() -> None:
    assert merges(based("a b<a c<b"), [], BERLIN) == ()


@given(histories(), st.lists(KEEPS, min_size=1, max_size=2))
def test_merging_frees_what_it_says_and_nothing_kept_for_its_own_sake(
    history: list[Point], keeps: list[Keep]
) -> None:
    found = merges(history, keeps, BERLIN)
    for_itself = set(staying(decide_all([replace(each, parents=()) for each in history], keeps, BERLIN)))
    before = set(staying(decide_all(history, keeps, BERLIN)))
    after_merging = standing_alone(history, [one.into for one in found])
    after = set(staying(decide_all(after_merging, keeps, BERLIN)))
    assert for_itself <= after <= before
    assert before - after == {id_ for one in found for id_ in one.older}
    assert {one.into for one in found} <= for_itself
    for one in found:  # each of them is worth it, and none is merged without need
        assert one.older
        rest = standing_alone(history, [other.into for other in found if other != one])
        assert set(staying(decide_all(rest, keeps, BERLIN))) >= after
    left = [each for each in after_merging if each.id in after]
    assert {parent for each in left for parent in each.parents} & {each.id for each in history} <= after
    assert merges(left, keeps, BERLIN) == ()


@given(histories(), KEEPS)
def test_a_chain_of_which_only_the_end_is_kept_is_freed_whole(history: list[Point], keep: Keep) -> None:
    chain = [
        replace(each, parents=tuple(one.id for one in history[number - 1 : number]), protected=False)
        for number, each in enumerate(history)
    ]
    found = merges(chain, [keep], BERLIN)
    for_itself = staying(decide([replace(each, parents=()) for each in chain], keep, BERLIN))
    older = [each.id for each in chain[: [each.id for each in chain].index(for_itself[0])]] if chain else []
    assert found == ((Merge(for_itself[0], tuple(older)),) if older else ())


# Both peers, written down from their documentation. tests/peer asks restic itself.


def forget(newest_first: Sequence[Point], keep: Keep) -> set[str]:
    """`restic forget`: each rule on its own; the oldest while a rule is not used up."""
    found = set()
    for rule in RULES:
        newest: dict[str, str] = {}
        for each in newest_first:
            newest.setdefault(period(rule, each), each.id)
        count = getattr(keep, rule)
        found |= set(list(newest.values())[:count])
        if len(newest) < count:
            found |= {each.id for each in newest_first[-1:]}
    return found


def prune_backups(newest_first: Sequence[Point], keep: Keep) -> dict[str, str]:
    """`vzdump --prune-backups`: by id the rule that keeps it. What one rule gave up, no later one looks at."""
    marked: dict[str, str] = {}
    for rule in RULES:
        covered = {period(rule, each) for each in newest_first if marked.get(each.id)}
        found: set[str] = set()
        for each in newest_first:
            label = period(rule, each)
            if each.id in marked or label in covered:
                continue
            if label not in found and len(found) == getattr(keep, rule):
                break
            marked[each.id] = "" if label in found else rule
            found.add(label)
    return {each: rule for each, rule in marked.items() if rule}


def period(rule: str, each: Point) -> str:
    return each.id if rule == "last" else each.time.astimezone(BERLIN).strftime(PERIODS[rule])


@given(histories(chained=False), KEEPS)
def test_what_restic_keeps_stays(history: list[Point], keep: Keep) -> None:
    assert stays(history, keep) >= forget(history[::-1], keep)


@given(histories(chained=False), st.sampled_from(RULES), st.integers(1, 6))
def test_with_one_rule_it_is_what_restic_keeps(history: list[Point], rule: str, count: int) -> None:
    keep = Keep(**{rule: count})
    assert stays(history, keep) == forget(history[::-1], keep)


@given(histories(chained=False), KEEPS)
def test_of_what_vzdump_keeps_stays_the_same_or_the_newest_of_its_month_or_year(
    history: list[Point], keep: Keep
) -> None:
    by_id, staying_ids = {each.id: each for each in history}, stays(history, keep)
    for kept_id, rule in prune_backups(history[::-1], keep).items():
        if kept_id not in staying_ids:
            assert rule in {"monthly", "yearly"}
            assert keep.weekly
            label = period(rule, by_id[kept_id])
            assert [each.id for each in history if period(rule, each) == label][-1] in staying_ids


def test_pruning_every_night_for_two_years_leaves_what_pruning_once_would() -> None:
    text = "keep-last=3,keep-daily=13,keep-weekly=8,keep-monthly=12"
    everything = nights("2024-11-23", 730)
    there: list[Point] = []
    for night in everything:
        there.append(night)
        staying_ids = set(kept(there, text))
        there = [each for each in there if each.id in staying_ids]
    assert [each.id for each in there] == kept(everything, text)
    assert all(later.time - earlier.time <= timedelta(days=31, hours=1) for earlier, later in pairwise(there))
