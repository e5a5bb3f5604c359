"""Starting jobs when they are due.

Each job has one task that sleeps until its next turn. A turn that was missed while the daemon was down is taken
at once if the job says so; a turn that comes while the job's last one is still running is skipped and said so.
A turn that vmfleece's own end interrupted is finished at the next start, unless the next one has come meanwhile.

What is waited for may change at any time: the next turn is then that of the new settings. A turn that has begun
is not touched; nothing is caught up with; and one that is due, but delayed, is taken if the new settings have it.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import structlog

from orchestrator import aio, schedule
from orchestrator.config import JobSettings
from orchestrator.errors import VmfleeceError
from orchestrator.run import retry
from orchestrator.state.catalogue import Catalogue

log = structlog.get_logger(__name__)

LONGEST_SLEEP_SECONDS = 60.0
"""Clocks are set and machines sleep: look at the clock at least so often."""


T = TypeVar("T")


class Changed(Exception):
    """What is waited for is another one."""


class Seat(Generic[T]):
    """The settings of one thing that has turns; None once it is to have none any more."""

    def __init__(self, settings: T) -> None:
        self.settings: T | None = settings
        self._changed = asyncio.Event()

    def change(self, settings: T | None) -> None:
        """Have other settings. The same ones change nothing."""
        if settings != self.settings:
            self.settings = settings
            self._changed.set()

    async def unchanged_until(self, start: datetime) -> bool:
        """Wait for a time; whether the settings are the same then."""
        self._changed.clear()
        try:
            await aio.unless(self._change(), _sleep_until(start))
        except Changed:
            return False
        return True

    async def _change(self) -> NoReturn:
        await self._changed.wait()
        raise Changed


class Seats(Generic[T]):
    """The tasks of all that have turns, by name: `serve` is each one's. `start` is that of `aio.background`."""

    def __init__(self, start: aio.Start, serve: Callable[[Seat[T]], Coroutine[Any, Any, None]]) -> None:
        self._start = start
        self._serve = serve
        self._seats: dict[str, tuple[Seat[T], asyncio.Task[None]]] = {}

    def follow(self, settings: Mapping[str, T]) -> None:
        """Have these from now on. Whoever is amid a turn finishes it."""
        for name in [*self._seats, *settings]:
            wanted = settings.get(name)
            seat, task = self._seats.get(name, (None, None))
            if seat is None or (task is not None and task.done() and seat.settings != wanted):
                self._seats.pop(name, None)
                if wanted is not None:
                    seat = Seat(wanted)
                    self._seats[name] = seat, self._start(self._serve(seat))
            else:
                seat.change(wanted)


async def turns(
    seat: Seat[T],
    calendar: Callable[[T], str | None],
    begins: Callable[[T, datetime], datetime] = lambda _settings, due: due,
) -> AsyncGenerator[tuple[T, datetime], None]:
    """Each turn as it comes, with the settings that it is taken with, until there is none any more.

    One that is missed is left out. `begins` tells when a turn begins that is due at a time.
    """
    waiting: datetime | None = None
    while (settings := seat.settings) is not None and (due := _next(calendar(settings), waiting)) is not None:
        if await seat.unchanged_until(begins(settings, due)):
            waiting = None
            yield settings, due
        else:
            waiting = due


def _next(calendar: str | None, waiting: datetime | None) -> datetime | None:
    """The turn that is `waiting` to begin, if it is due and the calendar has it; else the next one."""
    if calendar is None:
        return None
    if waiting is not None and waiting <= now():
        again = schedule.next_due(calendar, waiting - timedelta(seconds=1))
        if again == waiting:
            return again
    return schedule.next_due(calendar, now())


class Run(Protocol):
    """Runs a job, for all of its VMs or for some: `Engine.run_job`."""

    async def __call__(self, job: str, vms: Mapping[str, int] | None = None, /) -> object: ...


async def catch_up(job: JobSettings, run: Run, catalogue: Catalogue) -> None:
    """At the start: take the turn that was missed, or finish the one that was interrupted."""
    last = await catalogue.in_thread(catalogue.last_due, job.name)
    if job.schedule is None or not schedule.missed(job.schedule, last, now()):
        await _finish_turn(job, run, catalogue)
    elif job.repeat_missed:
        log.info("job.caught-up", job=job.name, last=last.isoformat() if last else None)
        await _take_turn(job, now(), run, catalogue)


async def serve(seat: Seat[JobSettings], run: Run, catalogue: Catalogue) -> None:
    """Run a job at each of its turns until cancelled, or until it has none any more."""
    async with contextlib.aclosing(turns(seat, lambda job: job.schedule, _begin)) as taken:
        async for job, due in taken:
            await _take_turn(job, due, run, catalogue)
            await _skip_overlapped(job, due, catalogue)


async def _skip_overlapped(job: JobSettings, due: datetime, catalogue: Catalogue) -> None:
    overlapped = schedule.next_due(job.schedule, due) if job.schedule else None
    if overlapped is not None and overlapped <= now():
        log.warning("job.skipped", job=job.name, due=overlapped.isoformat())
        with _failing(job):
            await catalogue.in_thread(catalogue.set_last_due, job.name, overlapped)


def _begin(job: JobSettings, due: datetime) -> datetime:
    delay_seconds = schedule.delay(
        job.name,
        due,
        randomized_delay_seconds=job.randomized_delay_seconds,
        seed=socket.gethostname(),
    )
    start = due.astimezone(UTC) + timedelta(seconds=delay_seconds)
    log.info("job.scheduled", job=job.name, due=due.isoformat(), start=start.isoformat())
    return start


async def _take_turn(job: JobSettings, due: datetime, run: Run, catalogue: Catalogue) -> None:
    with _failing(job):
        await catalogue.in_thread(catalogue.set_last_due, job.name, due)
        await run(job.name)


async def _finish_turn(job: JobSettings, run: Run, catalogue: Catalogue) -> None:
    """Go on with the VMs that the last turn was not done with when vmfleece ended."""
    with _failing(job):
        unfinished = await catalogue.in_thread(catalogue.unfinished, job.name)
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
