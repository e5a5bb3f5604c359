"""What we keep, beside what `restic forget` itself keeps of snapshots of the same times.

With one rule it is the same. With several, restic counts what an earlier rule keeps already and we don't, as
vzdump: ours is then what restic keeps for larger numbers, and never less than what it keeps for the same ones.
"""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from orchestrator.config.properties import parse_keep
from orchestrator.run.retention import Point, decide
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.repository import Repository
from tests.guest.restics import CHEAP

PASSWORD = "made up"
BERLIN = ZoneInfo("Europe/Berlin")
TIMES = """\
2023-02-01 02:30:00
2024-12-29 02:30:00
2024-12-30 02:30:00
2025-06-15 02:30:00
2026-03-29 01:59:59
2026-03-29 03:00:00
2026-03-31 02:30:00
2026-10-25 01:30:00
2026-10-25 02:50:00
2026-10-25 02:10:00*
2026-10-25 03:30:00
2026-11-21 23:59:59
2026-11-22 00:00:00
2026-11-22 02:30:00
2026-11-22 02:30:20
2026-11-22 02:30:40
2026-11-22 14:30:00
2026-11-29 02:30:00
2026-11-30 02:30:00
2026-12-06 02:30:00
2026-12-27 02:30:00
2026-12-28 02:30:00
2026-12-31 23:59:59
2027-01-01 00:00:00
2027-01-03 02:30:00
2027-01-04 02:30:00""".splitlines()
"""Berlin's wall clock; * is the second time that this hour comes. Years with gaps, week 1 in December and week 53
in January, both changes of clocks, several a minute, hour and day, a week over the end of a month."""

PROTECTED = ("2025-06-15 02:30:00", "2027-01-03 02:30:00")


def moment(wall: str) -> datetime:
    return datetime.fromisoformat(wall.removesuffix("*")).replace(tzinfo=BERLIN, fold=int(wall.endswith("*")))


class Restic:
    """A repository with a snapshot of a few bytes at each of the times."""

    def __init__(self, program: str, repository: Path) -> None:
        self.command = [program, "--repo", str(repository), "--no-cache"]
        asyncio.run(Repository.create(DirectoryBackend(repository), PASSWORD, cost=CHEAP))
        for wall in TIMES:
            # restic takes a wall clock's time, and its zone decides which of two equal ones is meant.
            hours = int(f"{moment(wall):%z}"[:3])
            tag = ("--tag", "protected") if wall in PROTECTED else ()
            when = ("--time", wall.removesuffix("*"), "--host", "web01")
            self.run("backup", "--quiet", "--stdin", *when, *tag, zone=f"Etc/GMT-{hours}")

    def run(self, *arguments: str, zone: str) -> bytes:
        environment = {"RESTIC_PASSWORD": PASSWORD, "TZ": zone}
        command = [*self.command, *arguments]
        done = subprocess.run(command, env=environment, input=b"few", capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.decode()}"
        return done.stdout

    def keeps(self, text: str, *more: str) -> list[str]:
        rules = (f"--{rule}" for rule in text.split(","))
        reply = self.run("forget", "--dry-run", "--no-lock", "--json", *rules, *more, zone="Europe/Berlin")
        (group,) = json.loads(reply)
        walls = {moment(wall).astimezone(UTC): wall for wall in TIMES}
        kept = [walls[datetime.fromisoformat(each["time"]).astimezone(UTC)] for each in group["keep"] or []]
        assert len(kept) + len(group["remove"] or []) == len(TIMES)
        return sorted(kept, key=TIMES.index)


@pytest.fixture(scope="module")
def restic(tmp_path_factory: pytest.TempPathFactory) -> Restic:
    program = shutil.which("restic")
    if program is None:
        pytest.fail("restic is not installed: run `sh tests/guest/install.sh`, as root, on Debian 12")
    return Restic(program, tmp_path_factory.mktemp("restic") / "repository")


def ours(text: str, *, protected: Iterable[str] = ()) -> list[str]:
    points = [Point(wall, moment(wall).astimezone(UTC), protected=wall in protected) for wall in TIMES]
    return [verdict.id for verdict in decide(points, parse_keep(text), BERLIN) if verdict.keep]


@pytest.mark.parametrize(
    "rule",
    [
        *("keep-last=10", "keep-last=100"),
        *("keep-hourly=11", "keep-hourly=16", "keep-hourly=100"),
        *("keep-daily=4", "keep-daily=100"),
        *("keep-weekly=2", "keep-weekly=9", "keep-weekly=100"),
        *("keep-monthly=5", "keep-monthly=100"),
        *("keep-yearly=4", "keep-yearly=6"),
    ],
)
def test_one_rule_keeps_the_same(restic: Restic, rule: str) -> None:
    assert ours(rule) == restic.keeps(rule)


@pytest.mark.parametrize(
    ("text", "larger", "beyond_restic"),
    [
        pytest.param(
            "keep-last=3,keep-daily=4",
            "keep-last=3,keep-daily=7",
            ["2026-12-06 02:30:00", "2026-12-27 02:30:00", "2026-12-28 02:30:00"],
            id="three days are covered",
        ),
        pytest.param(
            "keep-weekly=6,keep-monthly=2",
            "keep-weekly=6,keep-monthly=5",
            ["2026-03-31 02:30:00", "2026-10-25 03:30:00", "2026-11-30 02:30:00"],
            id="three months are covered, one of them by a week that lacks its newest",
        ),
        pytest.param(
            "keep-hourly=3,keep-yearly=2",
            "keep-hourly=3,keep-yearly=3",
            ["2025-06-15 02:30:00"],
            id="a year is covered",
        ),
        pytest.param(
            "keep-last=2,keep-daily=2,keep-weekly=2,keep-monthly=2,keep-yearly=1",
            "keep-last=2,keep-daily=4,keep-weekly=4,keep-monthly=4,keep-yearly=3",
            [
                "2025-06-15 02:30:00",
                "2026-10-25 03:30:00",
                "2026-11-30 02:30:00",
                "2026-12-06 02:30:00",
                "2026-12-27 02:30:00",
                "2027-01-01 00:00:00",
            ],
            id="each rule goes on where the one before it ended",
        ),
        pytest.param(
            "keep-daily=9,keep-weekly=4,keep-yearly=4",
            "keep-daily=9,keep-weekly=9,keep-yearly=6",
            [
                "2023-02-01 02:30:00",
                "2026-03-29 03:00:00",
                "2026-03-31 02:30:00",
                "2026-10-25 03:30:00",
                "2026-11-22 14:30:00",
            ],
            id="years are not used up: the oldest",
        ),
        pytest.param("keep-last=3,keep-monthly=12", "keep-last=3,keep-monthly=14", [], id="both reach everything"),
    ],
)
def test_of_several_rules_a_later_one_does_not_count_what_an_earlier_one_covers(
    restic: Restic, text: str, larger: str, beyond_restic: list[str]
) -> None:
    mine, same_numbers = ours(text), restic.keeps(text)
    assert mine == restic.keeps(larger)
    assert set(mine) >= set(same_numbers)
    assert [wall for wall in mine if wall not in same_numbers] == beyond_restic


def test_what_restic_keeps_by_tag_it_counts_and_we_do_not(restic: Restic) -> None:
    mine = ours("keep-last=2,keep-yearly=2", protected=PROTECTED)
    by_tag = restic.keeps("keep-last=2,keep-yearly=2", "--keep-tag", "protected")
    assert set(mine) >= set(by_tag)
    assert [wall for wall in mine if wall not in by_tag] == ["2024-12-30 02:30:00", "2027-01-01 00:00:00"]
