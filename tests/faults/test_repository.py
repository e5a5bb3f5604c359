"""Kills and faults while one guest is backed up to a repository, and its neighbour as images."""

import random

from orchestrator.model import Phase
from tests.faults import plan
from tests.faults.conftest import Suffer
from tests.faults.plan import Fault, Kind, Moment, When

SEED = 20261123
COPYING = Moment(When.PHASE, phase=Phase.COPYING)
FAULTS = [
    Fault(Kind.MOVER, COPYING),
    Fault(Kind.DAEMON, COPYING),
    Fault(Kind.DAEMON, Moment(When.PHASE, phase=Phase.COMMITTING), at_once=True),
    Fault(Kind.STOP, COPYING, 1, alone=True),
    Fault(Kind.TARGET_FULL, Moment(When.PHASE, phase=Phase.PREPARING)),
    Fault(Kind.CUT, Moment(When.COMMAND, number=25, after=True)),
    Fault(Kind.QEMU, Moment(When.RUN, fraction=0.6), 1),
    plan.one(random.Random(SEED), Kind.DAEMON),  # noqa: S311  (test data)
]


async def test_kills_and_faults(suffer: Suffer) -> None:
    report = await suffer(FAULTS, version="10.0", repository=True)
    assert report.wrong == []
    assert (report.guest_errors, report.leftovers, report.wrong_restores) == (0, 0, 0)
    assert report.faults.total() == len(FAULTS)
    assert report.runs["failed with mover-died"] >= 1
