"""Starting jobs when they are due.

Each job has one task that sleeps until its next turn. A turn that was missed while the daemon was down is taken
at once if the job says so; a turn that comes while the job's last one is still running is skipped and said so.
A turn that vmfleece's own end interrupted is finished at the next start, unless the next one has come meanwhile.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Protocol

import structlog

from orchestrator import schedule
from orchestrator.config import JobSettings
from orchestrator.errors import VmfleeceError
from orchestrator.run import retry
from orchestrator.state.catalogue import Catalogue

log = structlog.get_logger(__name__)

LONGEST_SLEEP_SECONDS = 60.0
"""Clocks are set and machines sleep: look at the clock at least so often."""


class Run(Protocol):
    """Runs a job, for all of its VMs or for some: `Engine.run_job`."""

    async def __call__(self, job: str, vms: Mapping[str, int] | None = None, /) -> object: ...


async def serve(job: JobSettings, run: Run, catalogue: Catalogue) -> None:
    """Run a job at each of its turns until cancelled, or until it has none any more."""
    last = await asyncio.to_thread(catalogue.last_due, job.name)
    if job.schedule is None or not schedule.missed(job.schedule, last, now()):
        await _finish_turn(job, run, catalogue)
    elif job.repeat_missed:
        log.info("job.caught-up", job=job.name, last=last.isoformat() if last else None)
        await _take_turn(job, now(), run, catalogue)
    while job.schedule is not None and (due := schedule.next_due(job.schedule, now())) is not None:
        delay_seconds = schedule.delay(
            job.name,
            due,
            randomized_delay_seconds=job.randomized_delay_seconds,
            seed=socket.gethostname(),
        )
        start = due.astimezone(UTC) + timedelta(seconds=delay_seconds)
        log.info("job.scheduled", job=job.name, due=due.isoformat(), start=start.isoformat())
        await _sleep_until(start)
        await _take_turn(job, due, run, catalogue)
        overlapped = schedule.next_due(job.schedule, due)
        if overlapped is not None and overlapped <= now():
            log.warning("job.skipped", job=job.name, due=overlapped.isoformat())
            with _failing(job):
                await asyncio.to_thread(catalogue.set_last_due, job.name, overlapped)


async def turns(calendar: str | None) -> AsyncIterator[datetime]:
    """Each turn of a calendar as it comes, until there is none any more; one that is missed is left out."""
    while calendar is not None and (due := schedule.next_due(calendar, now())) is not None:
        await _sleep_until(due.astimezone(UTC))
        yield due


async def _take_turn(job: JobSettings, due: datetime, run: Run, catalogue: Catalogue) -> None:
    with _failing(job):
        await asyncio.to_thread(catalogue.set_last_due, job.name, due)
        await run(job.name)


async def _finish_turn(job: JobSettings, run: Run, catalogue: Catalogue) -> None:
    """Go on with the VMs that the last turn was not done with when vmfleece ended."""
    with _failing(job):
        unfinished = await asyncio.to_thread(catalogue.unfinished, job.name)
        vms = retry.after_restart(unfinished, vms=job.vms, retries=job.retries)
        if unfinished:
            given_up = sorted(unfinished.keys() - vms.keys())
            log.warning("job.interrupted", job=job.name, vms=sorted(vms), given_up=given_up)
            await run(job.name, vms)


@contextlib.contextmanager
def _failing(job: JobSettings) -> Iterator[None]:
    """Log what ends a turn, such as a full file system under state_dir: the next one may do better."""
    try:
        yield
    except VmfleeceError as error:
        log.error("job.failed", job=job.name, code=error.code, error=str(error))  # noqa: TRY400  no bug


async def _sleep_until(start: datetime) -> None:
    while (left_seconds := (start - now()).total_seconds()) > 0:
        await asyncio.sleep(min(left_seconds, LONGEST_SLEEP_SECONDS))


def now() -> datetime:
    """The present, with a zone."""
    return datetime.now(UTC)
