"""Kills and faults while one guest is backed up to a repository, and its neighbour as images."""

import pytest

from orchestrator.model import Phase
from tests.faults.conftest import Suffer
from tests.faults.plan import Fault, Kind, Moment, When

COPYING = Moment(When.PHASE, phase=Phase.COPYING)
FAULTS = [
    Fault(Kind.MOVER, COPYING),
    Fault(Kind.DAEMON, Moment(When.PHASE, phase=Phase.COMMITTING), at_once=True),
    Fault(Kind.IMAGE_ERRORS, COPYING),
    Fault(Kind.STOP, COPYING, 1),
    Fault(Kind.TARGET_SLOW, COPYING),
    Fault(Kind.TARGET_FULL, Moment(When.PHASE, phase=Phase.PREPARING)),
    Fault(Kind.QEMU, Moment(When.RUN, fraction=0.6), 1),
]


@pytest.mark.timeout(600)
async def test_kills_and_faults(suffer: Suffer) -> None:
    report = await suffer(FAULTS, version="10.0", repository=True)
    assert report.wrong == []
    assert (report.guest_errors, report.leftovers, report.wrong_restores) == (0, 0, 0)
    assert report.faults.total() == len(FAULTS)
    assert report.runs["failed with mover-died"] >= 1
