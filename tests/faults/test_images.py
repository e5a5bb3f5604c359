"""Kills and faults while two guests are backed up as images: DESIGN.md's failure table, on real processes.

The first guest's QEMU is 7.2, which is stopped for a moment. `make soak` does all of this 200 times.
"""

import pytest

from orchestrator.model import Phase
from tests.faults.conftest import Suffer
from tests.faults.plan import Damage, Fault, Kind, Moment, When

COPYING = Moment(When.PHASE, phase=Phase.COPYING)
KILLS = [
    Fault(Kind.DAEMON, Moment(When.PHASE, phase=Phase.PREPARING), 0),
    Fault(Kind.DAEMON, Moment(When.PHASE, phase=Phase.SNAPSHOTTING), 1, alone=True),
    Fault(Kind.DAEMON, COPYING, 0, at_once=True),
    Fault(Kind.DAEMON, Moment(When.STARTING, fraction=0.8), at_once=True),
    Fault(Kind.DAEMON, Moment(When.PAUSE, number=4), at_once=True),
]
FAULTS = [
    Fault(Kind.STATE, COPYING, 0, damage=Damage.TRUNCATED),
    Fault(Kind.STORAGE_FULL, COPYING),
    Fault(Kind.TARGET_HANGS, COPYING),
    Fault(Kind.TARGET_ERRORS, COPYING),
]


@pytest.mark.timeout(600)
async def test_kills_and_faults(suffer: Suffer) -> None:
    report = await suffer([*KILLS, *FAULTS], version="7.2")
    assert report.wrong == []
    assert (report.guest_errors, report.leftovers, report.wrong_restores) == (0, 0, 0)
    assert report.faults[Kind.DAEMON] == len(KILLS)
    assert report.compared >= 2
    assert report.restores > report.compared
    assert sum(count for what, count in report.runs.items() if what.startswith("failed with ")) >= 1
