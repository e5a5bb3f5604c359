"""Which VMs are protected: what their jobs promise, held against what the history says. Pure.

A job promises a good backup since its latest turn. One that is missing is due as long as something is being done
about it, and overdue when nothing is, or when the next turn has come as well.
"""

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from orchestrator import schedule
from orchestrator.config import Config, JobSettings
from orchestrator.model import ErrorReport, Outcome
from orchestrator.service.documents import GoodRun, JobProtection, Protected, Protection, RunFailure, VmProtection
from orchestrator.state.catalogue import Entry

GOOD = (Outcome.SUCCEEDED, Outcome.WARNING)
GRACE = timedelta(minutes=10)
"""How long after its turn nothing need be under way: vmfleece may just have been restarted."""
_WORST_FIRST = (Protected.NEVER, Protected.OVERDUE, Protected.DUE, Protected.PROTECTED)


@dataclass(frozen=True, slots=True)
class Moment:
    """When it is judged, and of which VMs a run is under way or waits then."""

    now: datetime
    under_way: Collection[str]


@dataclass(slots=True)
class Latest:
    """A VM's latest good runs by each job (None: by hand), and its latest run that has ended."""

    good_by_job: dict[str | None, Entry] = field(default_factory=dict)
    ended: Entry | None = None

    @property
    def good(self) -> Entry | None:
        """Its latest good run."""
        return max(self.good_by_job.values(), key=_started, default=None)


def of(config: Config, good: Iterable[Entry], ended: Iterable[Entry], moment: Moment) -> Protection:
    """Each VM's, in the file's order.

    `good` are the last good runs of each VM by each job and by hand, `ended` the last of any outcome.
    """
    latest: dict[str, Latest] = {}
    for entry in good:
        latest.setdefault(entry.vm, Latest()).good_by_job[entry.job] = entry
    for entry in ended:
        known = latest.setdefault(entry.vm, Latest())
        known.ended = max((one for one in (known.ended, entry) if one is not None), key=_started)
    scheduled = [job for job in config.job.values() if job.schedule is not None]
    due = {job.name: _next_due(job, moment.now) for job in scheduled}
    return Protection(
        moment.now.isoformat(),
        tuple(
            _of_vm(
                vm,
                [job for job in scheduled if vm in job.vms],
                latest.get(vm, Latest()),
                moment,
                due=due,
                one_target=len(config.target) == 1,
            )
            for vm in config.vm
        ),
    )


def _of_vm(
    vm: str,
    jobs: Iterable[JobSettings],
    latest: Latest,
    moment: Moment,
    *,
    due: Mapping[str, str | None],
    one_target: bool,
) -> VmProtection:
    failed_at = datetime.fromisoformat(latest.ended.started) if _has_failed(latest) and latest.ended else None
    promises = []
    for job in jobs:
        # One by hand counts for a job where it can only have gone to the job's own target.
        goods = [latest.good_by_job.get(job.name), latest.good_by_job.get(None) if one_target else None]
        good = max((one for one in goods if one is not None), key=_started, default=None)
        state, missed = _judge(job, good, moment, busy=vm in moment.under_way, failed_at=failed_at)
        promises.append(
            JobProtection(
                job.name,
                state,
                last=good.started if good else None,
                missed=missed.isoformat() if missed else None,
                next_due=due[job.name],
            )
        )
    worst = min((one.state for one in promises), key=_WORST_FIRST.index, default=Protected.UNSCHEDULED)
    return VmProtection(vm, worst, _good(latest.good), tuple(promises), _failure(latest))


def _judge(
    job: JobSettings, good: Entry | None, moment: Moment, *, busy: bool, failed_at: datetime | None
) -> tuple[Protected, datetime | None]:
    """How a job's promise stands, and the turn that is missing."""
    if good is None:
        return Protected.NEVER, None
    missed = _turn_after(job.schedule or "", _started(good))
    if missed is None or missed > moment.now:
        return Protected.PROTECTED, None
    if busy:
        following = _turn_after(job.schedule or "", missed)
        late = following is not None and following <= moment.now
    else:
        latest_start = missed + timedelta(seconds=job.randomized_delay_seconds) + GRACE
        late = latest_start <= moment.now or (failed_at is not None and failed_at >= missed)
    return (Protected.OVERDUE if late else Protected.DUE), missed


@functools.lru_cache(maxsize=4096)
def _turn_after(calendar: str, after: datetime) -> datetime | None:
    """Asked again and again of the same runs, and it takes a while."""
    return schedule.next_due(calendar, after)


def _next_due(job: JobSettings, now: datetime) -> str | None:
    due = schedule.next_due(job.schedule, now) if job.schedule else None
    return due.isoformat() if due else None


def _started(entry: Entry) -> datetime:
    return datetime.fromisoformat(entry.started)


def _has_failed(latest: Latest) -> bool:
    """Whether the last thing that happened was no good backup."""
    return latest.ended is not None and (latest.good is None or _started(latest.ended) > _started(latest.good))


def _good(entry: Entry | None) -> GoodRun | None:
    if entry is None:
        return None
    snapshot = entry.result.get("snapshot") if entry.result else None
    return GoodRun(entry.run, entry.job, entry.started, snapshot)


def _failure(latest: Latest) -> RunFailure | None:
    entry = latest.ended
    if entry is None or not _has_failed(latest):
        return None
    error = (entry.result or {}).get("error") or {}
    report = ErrorReport(error["code"], error["message"], error.get("hint", "")) if error else None
    return RunFailure(entry.run, entry.job, entry.started, str(entry.outcome), report)
