"""Starting jobs when they are due.

Each job has one task that sleeps until its next turn. A turn that was missed while the daemon was down is taken
at once if the job says so; a turn that comes while the job's last one is still running is skipped and said so.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import structlog

from orchestrator import schedule
from orchestrator.config import JobSettings
from orchestrator.errors import VmfleeceError
from orchestrator.state.catalogue import Catalogue

log = structlog.get_logger(__name__)

LONGEST_SLEEP_SECONDS = 60.0
"""Clocks are set and machines sleep: look at the clock at least so often."""


async def serve(job: JobSettings, run: Callable[[str], Awaitable[object]], catalogue: Catalogue) -> None:
    """Run a job at each of its turns until cancelled, or until it has none any more."""
    if job.schedule is None:
        return
    last = await asyncio.to_thread(catalogue.last_due, job.name)
    if job.repeat_missed and schedule.missed(job.schedule, last, now()):
        log.info("job.caught-up", job=job.name, last=last.isoformat() if last else None)
        await _take_turn(job, now(), run, catalogue)
    while (due := schedule.next_due(job.schedule, now())) is not None:
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
            await asyncio.to_thread(catalogue.set_last_due, job.name, overlapped)
            log.warning("job.skipped", job=job.name, due=overlapped.isoformat())


async def turns(calendar: str | None) -> AsyncIterator[datetime]:
    """Each turn of a calendar as it comes, until there is none any more; one that is missed is left out."""
    while calendar is not None and (due := schedule.next_due(calendar, now())) is not None:
        await _sleep_until(due.astimezone(UTC))
        yield due


async def _take_turn(
    job: JobSettings, due: datetime, run: Callable[[str], Awaitable[object]], catalogue: Catalogue
) -> None:
    try:
        await asyncio.to_thread(catalogue.set_last_due, job.name, due)
        await run(job.name)
    except VmfleeceError as error:  # such as a full file system under state_dir: the next turn may do better
        log.error("job.failed", job=job.name, code=error.code, error=str(error))  # noqa: TRY400  no bug


async def _sleep_until(start: datetime) -> None:
    while (left_seconds := (start - now()).total_seconds()) > 0:
        await asyncio.sleep(min(left_seconds, LONGEST_SLEEP_SECONDS))


def now() -> datetime:
    """The present, with a zone."""
    return datetime.now(UTC)
