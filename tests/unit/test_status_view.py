"""What `vmfleece status` looks like, without a terminal to look at it."""

import io
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.cli.status_view import View, lines
from orchestrator.service.status import RunStatus, Status, StorageStatus, WaitingStatus

GIB = 1024**3
NOW = datetime(2026, 11, 23, 3, tzinfo=UTC)
PLAIN = View(NOW)
STORAGE = StorageStatus(
    name="local",
    path="/srv/fleecing",
    quota_bytes=200 * GIB,
    granted_bytes=100 * GIB,
    stranded_bytes=0,
    used_bytes=50 * GIB,
    peak_bytes=75 * GIB,
    free_bytes=300 * GIB,
    floor_bytes=40 * GIB,
    runs=1,
    max_runs=None,
)
RUN = RunStatus(
    vm="web01",
    run="b46bcf3e",
    job="nightly",
    target="main",
    phase="copying",
    started="2026-11-23T02:38:50+00:00",
    size_bytes=64 * GIB,
    copied_bytes=16 * GIB,
    fleecing_bytes=GIB,
    grant_bytes=4 * GIB,
)
WAITING = WaitingStatus(
    vm="db01",
    run="5e22b9f4",
    job=None,
    target="main",
    priority=80,
    started="2026-11-23T02:59:30+00:00",
    reasons=("storage local: 24.0 GiB wanted, 4.0 GiB free", "host: 1 of 1 runs under way"),
)
STATUS = Status(4711, "2026-11-21T14:00:00+00:00", (STORAGE,), (RUN,), (WAITING,))


def text(status: Status, view: View = PLAIN) -> str:
    return "\n".join(map(str, lines(status, view)))


def of_storage(**changes: Any) -> str:
    return text(Status(1, None, (replace(STORAGE, **changes),)))


def of_run(**changes: Any) -> str:
    return text(Status(1, None, (), (replace(RUN, **changes),)))


def printed(status: Status, width: int, *, color: bool = False) -> str:
    """As a terminal of that width shows it."""
    console = Console(
        file=io.StringIO(),
        width=width,
        highlight=False,
        force_terminal=color,
        color_system="standard" if color else None,
    )
    console.print(*lines(status, View(NOW, width=width)), sep="\n")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def bar(shown: str) -> tuple[int, ...]:
    """The cells of the only bar: solid, lighter, free; without the legend's."""
    rows = [row for row in shown.splitlines() if "STORAGE" not in row]
    return tuple("".join(rows).count(glyph) for glyph in "█▒░")


def test_all_of_it_without_a_terminal() -> None:
    assert text(STATUS) == (
        "vmfleece, process 4711, running for 1d 13h\n"
        "\n"
        "STORAGE  █ used ▒ granted ░ free                       QUOTA    GRANTED       USED       PEAK\n"
        "local    ██████████▒▒▒▒▒▒▒▒▒▒░░░░░░░░░░░░░░░░░░░░  200.0 GiB  100.0 GiB   50.0 GiB   75.0 GiB\n"
        "\n"
        "RUNNING  PHASE         COPIED                                                                FLEECING"
        "            SINCE\n"
        "web01    copying       ██████████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░   25%  16.0 GiB of 64.0 GiB"
        "  1.0 GiB of 4.0 GiB  21min\n"
        "\n"
        "#  WAITING  PRIORITY  SINCE\n"
        "1  db01           80    30s\n"
        "   storage local: 24.0 GiB wanted, 4.0 GiB free\n"
        "   host: 1 of 1 runs under way"
    )


def test_all_of_it_in_80_columns() -> None:
    shown = printed(STATUS, 80)
    assert [row.rstrip() for row in shown.splitlines()[2:7]] == [
        "STORAGE  █ used ▒ granted ░ free          QUOTA    GRANTED       USED       PEAK",
        "local    ██████▒▒▒▒▒▒▒░░░░░░░░░░░░░░  200.0 GiB  100.0 GiB   50.0 GiB   75.0 GiB",
        "",
        "RUNNING  PHASE         COPIED                                          SINCE",
        "web01    copying       ██████████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░   25%  21min",
    ]
    assert shown.splitlines()[7].strip() == "16.0 GiB of 64.0 GiB, fleecing 1.0 GiB of 4.0 GiB"
    assert all(len(row) <= 80 for row in shown.splitlines())


def test_one_run_is_one_line_where_there_is_room() -> None:
    shown = printed(STATUS, 120)
    assert "16.0 GiB of 64.0 GiB  1.0 GiB of 4.0 GiB  21min" in shown
    assert all(len(row) <= 120 for row in shown.splitlines())


def test_nothing_is_going_on() -> None:
    shown = text(Status(1, None, (STORAGE,)))
    assert shown.splitlines()[0] == "vmfleece, process 1"
    assert shown.endswith("\n\nno run under way\n\nnobody waits")


def test_no_vmfleece_runs() -> None:
    assert text(Status(None, None)).splitlines() == [
        "no vmfleece is running",
        "",
        "no storage is configured",
        "",
        "no run under way",
        "",
        "nobody waits",
    ]


# Bars --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "granted", "cells"),
    [
        (0, 0, (0, 0, 40)),
        (0, 200 * GIB, (0, 40, 0)),
        (200 * GIB, 200 * GIB, (40, 0, 0)),
        (1, 200 * GIB, (1, 39, 0)),  # a little is some
        (200 * GIB - 1, 200 * GIB - 1, (39, 0, 1)),  # not all is not full
        (1, 2, (1, 0, 39)),
        (60 * GIB, 50 * GIB, (12, 0, 28)),  # used is what it is
        (300 * GIB, 300 * GIB, (40, 0, 0)),  # a quota that was lowered
    ],
)
def test_the_quotas_bar(used: int, granted: int, cells: tuple[int, int, int]) -> None:
    assert bar(of_storage(used_bytes=used, granted_bytes=granted)) == cells


def test_a_quota_of_nothing_is_an_empty_bar() -> None:
    assert bar(of_storage(quota_bytes=0)) == (0, 0, 40)


@pytest.mark.parametrize(
    ("copied", "size", "share", "solid"),
    [(0, 64, "0%", 0), (1, 64 * GIB, "0%", 1), (16, 64, "25%", 10), (64, 64, "100%", 40), (999, 1000, "99%", 39)],
)
def test_the_copied_share(copied: int, size: int, share: str, solid: int) -> None:
    shown = of_run(copied_bytes=copied, size_bytes=size)
    assert f" {share} " in shown
    assert bar(shown) == (solid, 0, 40 - solid)


def test_a_run_whose_disks_are_not_known_yet() -> None:
    run = replace(RUN, phase="planning", size_bytes=0, copied_bytes=0, fleecing_bytes=0, grant_bytes=0)
    for view in (PLAIN, View(NOW, width=80)):
        heading, shown, *others = text(Status(1, None, (), (run,)), view).splitlines()[4:]
        assert heading.startswith("RUNNING")
        assert shown.split() == ["web01", "planning", "░" * 40, "21min"]
        assert others == ["", "nobody waits"]


def test_a_run_without_fleecing_says_so() -> None:
    assert " none " in of_run(grant_bytes=0, fleecing_bytes=0)
    narrow = View(NOW, width=80)
    assert "fleecing none" in text(Status(1, None, (), (replace(RUN, grant_bytes=0, fleecing_bytes=0),)), narrow)


def test_without_unicode() -> None:
    shown = text(STATUS, View(NOW, ascii_only=True))
    assert shown.isascii()
    assert "##########==========--------------------" in shown
    assert "# used = granted - free" in shown


# Warnings ----------------------------------------------------------------------------------------------------


def test_a_storage_that_is_well_warns_of_nothing() -> None:
    assert "!" not in of_storage()
    assert "!" not in of_storage(free_bytes=40 * GIB)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"stranded_bytes": 12 * GIB}, "stranded: 12.0 GiB granted is kept for runs that are over"),
        ({"free_bytes": 10 * GIB}, "its file system has 10.0 GiB free, and must keep 40.0 GiB"),
        ({"free_bytes": None, "floor_bytes": None}, "the file system of /srv/fleecing cannot be asked"),
        ({"lacks": ("hole punching: x",)}, "the file system of /srv/fleecing lacks hole punching: x"),
    ],
)
def test_a_warning_stands_under_its_storage(changes: dict[str, Any], warning: str) -> None:
    rows = of_storage(**changes).splitlines()
    assert rows[3].startswith("local ")
    assert rows[4].startswith(f"  ! {warning}")
    assert rows[5] == ""


def test_each_warning_has_a_line() -> None:
    shown = of_storage(stranded_bytes=1, free_bytes=0, lacks=("a", "b"))
    assert shown.count("\n  ! ") == 4


# Names, times, widths ----------------------------------------------------------------------------------------


def test_markup_in_a_name_is_a_name() -> None:
    for name in ("[red]", "[/]", "[bold]x[/bold]", ":smiley:", "[link=file:///x]y[/link]"):
        status = Status(
            1,
            None,
            (replace(STORAGE, name=name, lacks=(name,)),),
            (replace(RUN, vm=name),),
            (replace(WAITING, vm=name, reasons=(name,)),),
        )
        assert printed(status, 120).count(name) == 5


def test_control_characters_do_not_reach_the_terminal() -> None:
    name = "web\x1b[2J\r\n\x07\x9b\u202e\udc80"
    status = Status(1, name, (replace(STORAGE, name=name),), (replace(RUN, vm=name, phase=name, started=name),))
    status = replace(status, queue=(replace(WAITING, vm=name, reasons=(name,)),))
    shown = text(status)
    assert shown.replace("\n", "").isprintable()
    assert len(shown.splitlines()) == len(lines(status, PLAIN))
    assert shown.count("web?[2J??????") == 7


def test_wide_letters_are_aligned() -> None:
    runs = (RUN, replace(RUN, vm="ウェブ"))
    rows = text(Status(1, None, (), runs)).splitlines()
    assert rows[5].index("█") == len("RUNNING  snapshotting  ")
    assert rows[6].index("█") == len("RUNNING  snapshotting  ") - 3  # three letters, each two columns wide


def test_a_long_name_is_not_cut() -> None:
    name = "x" * 64
    shown = printed(Status(1, None, (replace(STORAGE, name=name),), (replace(RUN, vm=name),)), 80)
    assert shown.replace("\n", "").count(name) == 2


@pytest.mark.parametrize("width", [12, 20, 40, 60, 79, 80, 81, 103, 104, 105, 300])
def test_nothing_is_lost_at_any_width(width: int) -> None:
    shown = printed(STATUS, width)
    assert max(map(len, shown.splitlines())) <= width
    bare = "".join(shown.split())
    for part in ("process4711", "local", "200.0GiB", "75.0GiB", "web01", "copying", "1.0GiBof4.0GiB", "21min"):
        assert part in bare
    assert "host:1of1runsunderway" in bare
    assert "…" not in bare


def test_colours_are_the_terminals_own() -> None:
    shown = printed(Status(1, None, (replace(STORAGE, stranded_bytes=1),)), 80, color=True)
    assert "\x1b[32m" in shown  # one of the sixteen, which every theme makes readable
    assert "38;" not in shown
    assert "\x1b[" not in printed(STATUS, 80)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (-5, "0s"),  # another clock
        (59.9, "59s"),
        (61, "1min 1s"),
        (599, "9min 59s"),
        (601, "10min"),
        (3600, "1h"),
        (86399, "23h 59min"),
        (86400, "1d"),
        (90061, "1d 1h"),
        (400 * 86400, "400d"),
    ],
)
def test_since(seconds: float, shown: str) -> None:
    started = NOW - timedelta(seconds=seconds)
    assert of_run_at(started.isoformat()).endswith(f" {shown}")


@pytest.mark.parametrize("started", ["", "soon", "2026-11-23T02:00:00"])
def test_a_time_that_is_none_is_shown_as_it_is(started: str) -> None:
    assert of_run_at(started).endswith(f" {started}".rstrip())


def of_run_at(started: str) -> str:
    return text(Status(1, None, (), (replace(RUN, started=started),))).splitlines()[-3]


# Many --------------------------------------------------------------------------------------------------------

MANY = replace(
    STATUS,
    runs=tuple(replace(RUN, vm=f"vm{number:03}") for number in range(400)),
    queue=tuple(replace(WAITING, vm=f"wait{number:03}") for number in range(300)),
)


def test_hundreds_are_all_listed_where_nobody_minds_the_height() -> None:
    for view in (PLAIN, View(NOW, width=80)):
        shown = text(MANY, view)
        assert all(f"vm{number:03}" in shown for number in range(400))
        assert "\n300  wait299 " in shown
        assert "\n  1  wait000 " in shown


@pytest.mark.parametrize("width", [80, 120])
def test_a_screen_shows_as_many_as_fit_and_says_how_many_do_not(width: int) -> None:
    for height in range(10, 40):
        rows = [str(line) for line in lines(MANY, View(NOW, width=width, height=height))]
        assert 0 <= height - len(rows) <= 3  # no room is left that another one would fit into
        runs = sum(row.startswith("vm") for row in rows) - 1
        waiting = sum("wait" in row for row in rows)
        hidden = [row for row in rows if row.startswith("and ")]
        assert hidden == [f"and {400 - runs} more", f"and {300 - waiting} more"]
        assert runs + waiting or height < 14


def test_what_fits_is_shown_whole() -> None:
    whole = lines(STATUS, View(NOW, width=80))
    assert lines(STATUS, View(NOW, width=80, height=len(whole))) == whole
    assert len(lines(STATUS, View(NOW, width=80, height=len(whole) - 1))) < len(whole)


def test_a_screen_that_is_too_small_for_anything() -> None:
    assert str(lines(MANY, View(NOW, width=80, height=1))[0]).startswith("vmfleece, process")


sizes = st.integers(min_value=0, max_value=2**63 - 1)
storages = st.builds(
    StorageStatus,
    name=st.text(max_size=70),
    path=st.text(max_size=70),
    quota_bytes=sizes,
    granted_bytes=sizes,
    stranded_bytes=sizes,
    used_bytes=sizes,
    peak_bytes=sizes,
    free_bytes=st.none() | sizes,
    floor_bytes=st.none() | sizes,
    runs=st.integers(),
    max_runs=st.none() | st.integers(),
    lacks=st.lists(st.text(), max_size=2).map(tuple),
)
runs = st.builds(RunStatus, size_bytes=sizes, copied_bytes=sizes, fleecing_bytes=sizes, grant_bytes=sizes)
waiting = st.builds(WaitingStatus, reasons=st.lists(st.text(), max_size=3).map(tuple))
statuses = st.builds(
    Status,
    storages=st.lists(storages, max_size=3).map(tuple),
    runs=st.lists(runs, max_size=5).map(tuple),
    queue=st.lists(waiting, max_size=5).map(tuple),
)


@given(status=statuses, width=st.integers(1, 200), height=st.integers(1, 60))
def test_whatever_it_says_it_can_be_shown(status: Status, width: int, height: int) -> None:
    assert text(status).replace("\n", "").isprintable()
    lines(status, View(NOW, width=width, height=height))
    printed(status, width)
