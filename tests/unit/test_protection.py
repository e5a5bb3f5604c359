"""Which VMs are protected, from their jobs and a real catalogue, at a moment that the test says."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orchestrator import config
from orchestrator.config import Config
from orchestrator.model import ErrorReport, Kind, Outcome, RunResult
from orchestrator.service import protection
from orchestrator.service.documents import Protected, VmProtection
from orchestrator.service.protection import Moment
from orchestrator.state.catalogue import Catalogue

NOW = datetime(2026, 11, 23, 3, 0, tzinfo=UTC)
TURN = datetime(2026, 11, 23, 2, 30, tzinfo=UTC)
"""The nightly job's latest."""
DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)
FAILURE = ErrorReport("target-full", "disk vda: the target is full", "free some space there")
CONFIG = """
[daemon]
state_dir = "{folder}/state"
run_dir = "{folder}/run"

[storage.local]
driver = "directory"
path = "{folder}/fleecing"
quota = "1GiB"

[target.main]
driver = "images"
path = "{folder}/main"
{more}
[vm.web01]
qmp = "/run/qemu/web01.qmp"

[vm.lone]
qmp = "/run/qemu/lone.qmp"

[job.nightly]
schedule = "*-*-* 02:30 UTC"
vms = ["web01"]
target = "main"
fleecing = "enabled=1,storage=local"
"""
OFFSITE = """
[target.away]
driver = "images"
path = "{folder}/away"

[job.offsite]
schedule = "*-*-* 01:00 UTC"
randomized_delay = "3h"
vms = ["web01"]
target = "away"
fleecing = "enabled=1,storage=local"
"""


@dataclass
class Judge:
    """A configuration and a history."""

    config: Config
    catalogue: Catalogue
    number: int = 0

    def ran(self, started: datetime, *, job: str | None = "nightly", failed: ErrorReport | None = None) -> str:
        self.number += 1
        run = f"{self.number:08x}"
        outcome = Outcome.SUCCEEDED if failed is None else Outcome.FAILED
        snapshot = f"web01/{run}" if failed is None else None
        self.catalogue.begin(run, "web01", job, started)
        self.catalogue.finish(
            RunResult("web01", run, outcome, snapshot, Kind.FULL, "", started, 1.0, None, (), error=failed)
        )
        return run

    def __call__(self, vm: str = "web01", *, now: datetime = NOW, busy: bool = False) -> VmProtection:
        moment = Moment(now, {vm} if busy else set())
        found = protection.of(
            self.config, self.catalogue.last_runs(outcomes=protection.GOOD), self.catalogue.last_runs(), moment
        )
        assert [one.vm for one in found.vms] == ["web01", "lone"]
        assert found.now == now.isoformat()
        return next(one for one in found.vms if one.vm == vm)


def judge_of(folder: Path, more: str = "") -> Judge:
    path = folder / "vmfleece.toml"
    path.write_text(CONFIG.format(folder=folder, more=more.format(folder=folder)))
    (folder / "state").mkdir()
    return Judge(config.load(path), Catalogue(folder / "state"))


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    return judge_of(tmp_path)


def test_what_was_never_backed_up_is_not_protected(judge: Judge) -> None:
    found = judge()
    assert (found.state, found.last, found.failure) == (Protected.NEVER, None, None)
    (job,) = found.jobs
    assert (job.job, job.last, job.next_due) == ("nightly", None, (TURN + DAY).isoformat())


def test_what_was_backed_up_since_its_turn_is_protected(judge: Judge) -> None:
    judge.ran(TURN - DAY)
    run = judge.ran(TURN)
    found = judge()
    assert (found.state, found.jobs[0].missed, found.failure) == (Protected.PROTECTED, None, None)
    assert found.last is not None
    assert (found.last.run, found.last.snapshot) == (run, f"web01/{run}")
    assert judge(now=TURN + DAY - MINUTE).state is Protected.PROTECTED


@pytest.mark.parametrize(
    ("now", "busy", "state"),
    [
        (TURN + MINUTE, False, Protected.DUE),  # it may begin yet
        (TURN + 11 * MINUTE, False, Protected.OVERDUE),
        (TURN + 11 * MINUTE, True, Protected.DUE),  # it is under way, or waits
        (TURN + DAY - MINUTE, True, Protected.DUE),
        (TURN + DAY, True, Protected.OVERDUE),  # but waiting for ever is no protection
    ],
)
def test_when_a_turn_is_missing_it_counts_whether_anything_is_done(
    judge: Judge, now: datetime, busy: bool, state: Protected
) -> None:
    judge.ran(TURN - DAY)
    found = judge(now=now, busy=busy)
    assert (found.state, found.jobs[0].missed) == (state, TURN.isoformat())


def test_a_turn_that_failed_is_overdue_at_once_and_says_why(judge: Judge) -> None:
    judge.ran(TURN - DAY)
    run = judge.ran(TURN, failed=FAILURE)
    found = judge(now=TURN + MINUTE)
    assert found.state is Protected.OVERDUE
    assert found.failure is not None
    assert (found.failure.run, found.failure.outcome, found.failure.error) == (run, "failed", FAILURE)
    assert judge(now=TURN + MINUTE, busy=True).state is Protected.DUE  # it is tried again
    judge.ran(TURN + 2 * MINUTE)
    mended = judge(now=TURN + 3 * MINUTE)
    assert (mended.state, mended.failure) == (Protected.PROTECTED, None)


def test_a_failure_by_hand_after_the_turn_leaves_it_protected_but_is_told(judge: Judge) -> None:
    judge.ran(TURN)
    judge.ran(TURN + MINUTE, job=None, failed=FAILURE)
    found = judge()
    assert found.state is Protected.PROTECTED
    assert found.failure is not None


def test_the_worst_of_its_jobs_counts(tmp_path: Path) -> None:
    judge = judge_of(tmp_path, OFFSITE)
    judge.ran(TURN)
    assert judge().state is Protected.NEVER
    judge.ran(TURN - 2 * DAY, job="offsite")
    found = judge(now=TURN + DAY - MINUTE)
    assert {one.job: one.state for one in found.jobs} == {
        "nightly": Protected.PROTECTED,
        "offsite": Protected.OVERDUE,
    }
    assert found.state is Protected.OVERDUE


def test_a_randomized_delay_may_pass_first(tmp_path: Path) -> None:
    judge = judge_of(tmp_path, OFFSITE)
    judge.ran(TURN, job="nightly")
    judge.ran(datetime(2026, 11, 22, 1, tzinfo=UTC), job="offsite")
    assert judge(now=NOW).state is Protected.DUE  # until 04:00, and ten minutes
    assert judge(now=NOW + 71 * MINUTE).state is Protected.OVERDUE


def test_a_backup_by_hand_counts_only_where_it_went_to_the_same_target(tmp_path: Path) -> None:
    one_target = tmp_path / "one"
    two_targets = tmp_path / "two"
    for folder in (one_target, two_targets):
        folder.mkdir()
    judge = judge_of(one_target)
    judge.ran(TURN, job=None)
    assert judge().state is Protected.PROTECTED
    judge = judge_of(two_targets, OFFSITE)
    judge.ran(TURN, job=None)
    assert judge().state is Protected.NEVER
    assert judge().last is not None


def test_without_a_schedule_nothing_is_promised(judge: Judge) -> None:
    found = judge("lone")
    assert (found.state, found.jobs) == (Protected.UNSCHEDULED, ())


def test_a_run_under_way_is_no_failure(judge: Judge) -> None:
    judge.ran(TURN - DAY)
    judge.catalogue.begin("ffffffff", "web01", "nightly", TURN)
    assert judge(busy=True).failure is None


def test_a_result_that_cannot_be_read_any_more_does_not_hide_the_failure(judge: Judge) -> None:
    judge.ran(TURN - DAY)
    judge.ran(TURN, failed=replace(FAILURE, code="bug"))
    with judge.catalogue._database.transaction() as connection:
        connection.execute("UPDATE runs SET result = NULL WHERE outcome = 'failed'")
    found = judge()
    assert found.failure is not None
    assert (found.state, found.failure.error) == (Protected.OVERDUE, None)
