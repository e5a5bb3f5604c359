"""Telling people, and what watches over jobs for them, how jobs ended.

A notifier with the driver `apprise` tells people when a job's state is one of those it is for, or is good again
after one of these; the same state of the same job again not before `repeat_after`. One with the driver
`healthchecks` pings a check, as healthchecks.io and its like want it: URL/start, then URL, or URL/fail. Sending is
done beside the jobs: nothing waits for it, and its failure is a warning. Addresses hold secrets: they reach no log
and no error.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from functools import partial

import aiohttp
import structlog

from orchestrator import aio
from orchestrator.config.settings import JobState, NotifyDriver, NotifySettings
from orchestrator.errors import NotifyError, VmfleeceError
from orchestrator.model import Outcome, RunResult
from orchestrator.secret import credential, read_line

log = structlog.get_logger(__name__)

SEND_SECONDS = 30.0
TRIES = 3
RETRY_SECONDS = 5.0
LAST_WORDS_SECONDS = 10.0
"""How long what is not sent yet may take at the end."""
MOST_LINES = 20
MOST_WAITING = 100

# What it logs would name addresses.
logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ended: its runs' results, and why it was stopped, if it was before they were over."""

    job: str
    results: Sequence[RunResult]
    stopped: VmfleeceError | None = None

    @property
    def state(self) -> JobState:
        """The worst of it."""
        if self.stopped is not None or any(result.error is not None for result in self.results):
            return JobState.FAILED
        if any(result.outcome is Outcome.WARNING for result in self.results):
            return JobState.WARNING
        return JobState.SUCCEEDED

    def title(self) -> str:
        """One line for people."""
        if self.stopped is not None:
            return f"job {self.job} was stopped"
        failed = sum(result.error is not None for result in self.results)
        if failed:
            return f"job {self.job}: {failed} of {len(self.results)} backups failed"
        if self.state is JobState.WARNING:
            warned = sum(result.outcome is Outcome.WARNING for result in self.results)
            return f"job {self.job}: {warned} of {len(self.results)} backups with warnings"
        return f"job {self.job}: all {len(self.results)} backups succeeded"

    def body(self) -> str:
        """What happened to which VM, and what can be done, for people."""
        if self.stopped is not None:
            return str(self.stopped)
        lines = []
        for result in self.results:
            if result.error is not None:
                hint = f"; {result.error.hint}" if result.error.hint else ""
                lines.append(f"{result.vm}: {result.error.code}: {result.error.message}{hint}")
            lines += [f"{result.vm}: warning: {warning}" for warning in result.warnings]
        more = len(lines) - MOST_LINES
        return "\n".join([*lines[:MOST_LINES], *([f"and {more} more"] if more > 0 else [])]) or self.title()


@dataclass(frozen=True, slots=True)
class Told:
    """What people were last told of a job, and when."""

    state: JobState
    at: datetime


def is_told(settings: NotifySettings, state: JobState, last: Told | None, now: datetime) -> bool:
    """Whether people are told of a job's state. Pure."""
    if state not in settings.states:
        return last is not None and last.state in settings.states and state is JobState.SUCCEEDED
    repeat_after = timedelta(seconds=settings.repeat_after_seconds)
    return last is None or last.state is not state or now - last.at >= repeat_after


class Notifiers:
    """All that are configured. `serving` must be entered before anything is told."""

    def __init__(
        self, notifiers: Mapping[str, NotifySettings], *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._notifiers = notifiers
        self._now = now
        self._told: dict[tuple[str, str], Told] = {}
        self._waiting: asyncio.Queue[tuple[NotifySettings, str, str, str]] = asyncio.Queue(MOST_WAITING)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Send what is told in the block; what is not sent at its end has a few seconds yet."""
        async with aio.background(self._send_all()):
            try:
                yield
            finally:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_WORDS_SECONDS):
                        await self._waiting.join()

    def follow(self, notifiers: Mapping[str, NotifySettings]) -> None:
        """Have others from now on. What people were told already is remembered."""
        self._notifiers = notifiers

    def job_started(self, job: str) -> None:
        """Checks are told that it has."""
        for settings in self._of(job):
            if settings.driver is NotifyDriver.HEALTHCHECKS:
                self._tell(settings, "/start", "", "")

    def job_ended(self, end: JobEnd) -> None:
        """Checks are told, and people if they are to be."""
        for settings in self._of(end.job):
            if settings.driver is NotifyDriver.HEALTHCHECKS:
                suffix = "/fail" if end.state is JobState.FAILED else ""
                self._tell(settings, suffix, end.title(), end.body())
                continue
            key, now = (settings.name, end.job), self._now()
            if is_told(settings, end.state, self._told.get(key), now):
                self._told[key] = Told(end.state, now)
                self._tell(settings, "", end.title(), end.body())
            elif end.state is JobState.SUCCEEDED:
                self._told.pop(key, None)

    def _of(self, job: str) -> list[NotifySettings]:
        return [one for one in self._notifiers.values() if any(fnmatchcase(job, pattern) for pattern in one.jobs)]

    def _tell(self, settings: NotifySettings, suffix: str, title: str, body: str) -> None:
        try:
            self._waiting.put_nowait((settings, suffix, title, body))
        except asyncio.QueueFull:
            log.warning("notify.failed", notify=settings.name, error="too many wait to be sent")

    async def _send_all(self) -> None:
        while True:
            settings, suffix, title, body = await self._waiting.get()
            try:
                await _send(settings, suffix, title, body)
            except NotifyError as error:
                log.warning("notify.failed", notify=settings.name, error=str(error))
            else:
                log.info("notify.sent", notify=settings.name, title=title or suffix)
            finally:
                self._waiting.task_done()


async def _send(settings: NotifySettings, suffix: str, title: str, body: str) -> None:
    """Raises NotifyError once it has failed several times."""
    url = await asyncio.to_thread(_url, settings)
    for left in reversed(range(TRIES)):
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await _try(settings, url, suffix, title, body)
        except (NotifyError, TimeoutError) as error:
            if not left:
                raise NotifyError(
                    f"nobody could be told by {settings.name}: {error or 'no answer'}",
                    hint=f"check the address in its file (notify.{settings.name}.url_file), and the way there",
                ) from None
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return


async def _try(settings: NotifySettings, url: str, suffix: str, title: str, body: str) -> None:
    if settings.driver is NotifyDriver.HEALTHCHECKS:
        await _ping(f"{url.rstrip('/')}{suffix}", f"{title}\n{body}")
    else:
        title = f"vmfleece on {socket.gethostname()}: {title}"
        await asyncio.to_thread(_send_by_apprise, url, title, body)


async def _ping(url: str, body: str) -> None:
    try:
        async with aiohttp.ClientSession() as session, session.post(url, data=body.strip().encode()) as answer:
            if not answer.ok:
                raise NotifyError(f"the check answered {answer.status}")
    except aiohttp.ClientError as error:  # whose text holds the address
        raise NotifyError(f"the check cannot be reached ({type(error).__name__})") from None


def _send_by_apprise(url: str, title: str, body: str) -> None:
    import apprise  # noqa: PLC0415  it takes a second, and few need it

    sender = apprise.Apprise()
    try:
        known = sender.add(url)
        sent = known and sender.notify(title=title, body=body)
    except Exception as error:  # noqa: BLE001  some of its hundred plugins raise whatever they meet
        raise NotifyError(f"apprise could not send it ({type(error).__name__})") from None
    if not sent:
        raise NotifyError("apprise could not send it" if known else "apprise knows no such address")


def _url(settings: NotifySettings) -> str:
    path = settings.url_file or credential(f"{settings.name}.url")
    if path is None:
        raise _unusable(settings.name, "is not there", f"set notify.{settings.name}.url_file")
    return read_line(path, partial(_unusable, settings.name), missing="write the address into it")


def _unusable(name: str, problem: str, hint: str) -> NotifyError:
    return NotifyError(f"the address file of notify.{name} {problem}", hint=hint)
