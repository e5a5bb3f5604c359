"""Which snapshot an operator means."""

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime

import pytest

from orchestrator.errors import TargetError
from orchestrator.target.base import Snapshot, SnapshotDisk, find

TIMES = ("2026-11-21T02:30:00Z", "2026-11-22T02:30:00Z", "2026-11-22T02:30:40Z", "2026-11-22T23:30:00Z")


def snapshot(vm: str, created: str) -> Snapshot:
    moment = datetime.fromisoformat(created)
    disks = (SnapshotDisk("vda", 512, "0" * 64, 512), SnapshotDisk("vdb", 512, "0" * 64, 512))
    return Snapshot(f"{vm}/{moment:%Y%m%dT%H%M%SZ}", "main", vm, moment, "full", disks, {})


KNOWN = [snapshot("web01", time) for time in TIMES[::-1]] + [snapshot("db01", "2026-11-23T00:00:00Z")]


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host's zone is an hour ahead of UTC in November."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("wanted", "created"),
    [
        ("web01/20261122T023000Z", TIMES[1]),
        ("web01@latest", TIMES[3]),
        ("db01@latest", "2026-11-23T00:00:00Z"),
        ("web01@2026-11-22", TIMES[2]),  # 23:30 UTC is the 23rd in Berlin
        ("web01@2026-11-23", TIMES[3]),
        ("web01@2026-11-21", TIMES[0]),
        ("web01@2026-11-22T03", TIMES[2]),
        ("web01@2026-11-22T03Z", TIMES[2]),
        ("web01@2026-11-22T02:30Z", TIMES[2]),
        ("web01@2026-11-22T02:29Z", TIMES[0]),
        ("web01@2026-11-22T03:30", TIMES[2]),
        ("web01@2026-11-22T02:30", TIMES[0]),
        ("web01@2026-11-22T02:30:00Z", TIMES[1]),
        ("web01@2026-11-22T02:30:39Z", TIMES[1]),
        ("web01@2026-11-22T02:30:40Z", TIMES[2]),
        ("web01@2026-11-22T02:30:40.5Z", TIMES[2]),
        ("web01@2026-11-22T04:30:00+02:00", TIMES[1]),
        ("web01@2026-11-21T21:30:00-0500", TIMES[1]),
        ("web01@2026-11-22 03:30", TIMES[2]),
        ("web01@2026-11-22 03:30:00", TIMES[1]),  # as `snapshot list` prints it
        ("web01@20261122T023000Z", TIMES[1]),  # as it is in an id
        ("web01@20261122T0230Z", TIMES[2]),
        ("web01@9998-12-31", TIMES[3]),
    ],
)
def test_it_is_found(wanted: str, created: str) -> None:
    for known in (KNOWN, KNOWN[::-1]):
        found = find(known, wanted)
        assert found.created == datetime.fromisoformat(created)
        assert found.vm == wanted.replace("/", "@").partition("@")[0]


@pytest.mark.parametrize(
    "wanted",
    [
        *("web01/20261122T023001Z", "20261122T023000Z", "web01", "web", "web0@latest", "@latest", ""),
        *("web01@2026-11-20", "web01@2026-11-21T02:29:59Z", "db01@2026-11-22T23:59:59Z"),
    ],
)
def test_nothing_is_found_but_what_there_is(wanted: str) -> None:
    with pytest.raises(TargetError) as none:
        find(KNOWN, wanted)
    assert none.value.code == "no-snapshot"
    assert repr(wanted) in none.value.message
    assert none.value.hint.endswith("there are snapshots of: db01, web01")


def test_nothing_is_there_at_all() -> None:
    with pytest.raises(TargetError, match="no VM"):
        find([], "web01@latest")


@pytest.mark.parametrize(
    "when",
    [
        "yesterday",
        "",
        "2026-13-01",
        "2026-11-22T25:00",
        "02:30",
        "2026-11-22x02:30",
        "2026-1122",
        "9999-12-31T23:59:59Z",
    ],
)
def test_what_is_no_time_is_said_so(when: str) -> None:
    with pytest.raises(TargetError, match="not a time"):
        find(KNOWN, f"web01@{when}")


def test_a_disk_is_found_by_name_or_the_names_are_told() -> None:
    assert KNOWN[0].disk("vdb").disk == "vdb"
    with pytest.raises(TargetError, match="vda, vdb") as none:
        KNOWN[0].disk("vdc")
    assert none.value.code == "no-disk"


def of_restic(number: int, restics: str) -> Snapshot:
    made = snapshot("web01", f"2026-11-2{number}T00:00:00Z")
    return replace(made, target="offsite", details={"restic": restics})


RESTICS = [of_restic(1, "0123abcd" + "0" * 56), of_restic(2, "0123abcd" + "f" * 56), of_restic(3, "77" * 32)]


@pytest.mark.parametrize(("wanted", "number"), [("0123abcdf", 1), ("0123abcd" + "0" * 56, 0), ("77777777", 2)])
def test_restics_id_is_as_good(wanted: str, number: int) -> None:
    assert find([*KNOWN, *RESTICS], wanted) == RESTICS[number]


@pytest.mark.parametrize("wanted", ["7777777", "77" * 33, "7777777x", "0123ABCDF", "88888888"])
def test_what_is_not_restics_id(wanted: str) -> None:
    with pytest.raises(TargetError, match=f"no snapshot '{wanted}'") as refused:
        find([*KNOWN, *RESTICS], wanted)
    assert refused.value.code == "no-snapshot"


def test_digits_of_several_are_not_enough() -> None:
    with pytest.raises(TargetError, match="several snapshots begin with 0123abcd") as refused:
        find(RESTICS, "0123abcd")
    assert refused.value.code != "no-snapshot"


def test_a_snapshot_that_is_on_two_targets_is_one() -> None:
    assert find([RESTICS[2], replace(RESTICS[2], target="copy")], "77777777").id == RESTICS[2].id
