"""What was asked for over the API: begun at once, ended with the service, remembered for a while."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog

from orchestrator.errors import StateError, UnknownName, VmfleeceError
from orchestrator.model import ErrorReport, Progress, RunResult
from orchestrator.run.outcome import CANCELLED
from orchestrator.service.documents import PrunedSnapshot, Request, RequestState, RunOfVm

log = structlog.get_logger(__name__)

REMEMBERED = 200
"""Requests that are over, at most."""
REMEMBERED_PRUNED = 5
"""Of those, with what became of thousands of snapshots."""


@dataclass(frozen=True, slots=True)
class Done:
    """What a request came to."""

    results: tuple[RunResult, ...] = ()
    pruned: tuple[PrunedSnapshot, ...] = ()


Work = Callable[[Callable[[Progress], None]], Awaitable[Done]]
"""Does what was asked for, and tells how far its runs are."""


@dataclass(slots=True, eq=False)
class _Asked:
    """One of them, as far as it is."""

    request: str
    job: str | None
    vms: tuple[str, ...]
    runs: dict[str, str]
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    state: RequestState = RequestState.UNDER_WAY
    done: Done = Done()
    error: ErrorReport | None = None
    task: asyncio.Task[None] | None = None
    cancelled: bool = False

    def shown(self) -> Request:
        return Request(
            request=self.request,
            job=self.job,
            vms=self.vms,
            state=self.state,
            started=self.started.isoformat(),
            runs=tuple(RunOfVm(vm, run) for run, vm in self.runs.items()),
            results=self.done.results,
            pruned=self.done.pruned,
            error=self.error,
        )


class Requests:
    """All of them. `serve` runs beside everything else; its end is the end of what is under way."""

    def __init__(self) -> None:
        self._known: dict[str, _Asked] = {}
        self._group: asyncio.TaskGroup | None = None
        self._ending = asyncio.Event()

    async def serve(self) -> None:
        """Let requests begin until cancelled, or told to `end`; then their runs put their VMs right first."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                await self._ending.wait()
            finally:
                self._group = None
            for asked in self._known.values():
                if asked.task is not None:
                    asked.task.cancel()

    def end(self) -> None:
        """Have none begin any more, and the runs of those under way end."""
        self._ending.set()

    def begin(
        self, work: Work, *, vms: Iterable[str], job: str | None = None, runs: Iterable[str] = ()
    ) -> Request:
        """Begin; `runs` are the runs' ids where they are known. Raises StateError if the service is ending."""
        if self._group is None:
            raise StateError(
                "vmfleece is starting or ending: nothing can be begun now",
                hint="ask again once it runs",
                code="stopping",
            )
        names = tuple(vms)
        asked = _Asked(secrets.token_hex(4), job, names, dict(zip(runs, names, strict=False)))
        self._forget_old()
        self._known[asked.request] = asked
        asked.task = self._group.create_task(self._carry_out(asked, work))
        return asked.shown()

    def shown(self, request: str) -> Request:
        """What has become of one. Raises UnknownName."""
        return self._asked(request).shown()

    def cancel(self, request: str) -> Request:
        """Have its runs end, and begin no more. Raises UnknownName."""
        asked = self._asked(request)
        if asked.task is not None and asked.state is RequestState.UNDER_WAY:
            asked.cancelled = True
            asked.task.cancel()
        return asked.shown()

    def _asked(self, request: str) -> _Asked:
        if request not in self._known:
            raise UnknownName(
                "request",
                request,
                place="this vmfleece",
                hint="requests are remembered until the daemon ends, runs for ever: `vmfleece run list`",
            )
        return self._known[request]

    def _forget_old(self) -> None:
        over = [name for name, asked in self._known.items() if asked.state is not RequestState.UNDER_WAY]
        long_ones = [name for name in over if self._known[name].done.pruned]
        for name in {*over[: max(0, len(over) - REMEMBERED + 1)], *long_ones[:-REMEMBERED_PRUNED]}:
            del self._known[name]

    async def _carry_out(self, asked: _Asked, work: Work) -> None:
        def progressed(progress: Progress) -> None:
            asked.runs[progress.run] = progress.vm

        with structlog.contextvars.bound_contextvars(request=asked.request):
            log.info("request.started", job=asked.job, vms=list(asked.vms))
            asked_to_end = False
            try:
                asked.done = await work(progressed)
            except asyncio.CancelledError:
                asked.error = ErrorReport(CANCELLED, "the request was cancelled")
                asked_to_end = asked.cancelled
                if not asked_to_end:
                    raise
            except VmfleeceError as error:
                asked.error = ErrorReport.of(error)
            except Exception as bug:  # it must not end the service
                log.exception("request.bug")
                asked.error = ErrorReport("bug", f"{type(bug).__name__}: {bug}", "report this with the log")
            finally:
                was_cancelled = asked.error is not None and asked.error.code == CANCELLED
                asked.state = RequestState.CANCELLED if was_cancelled else RequestState.ENDED
                log.info(
                    "request.finished",
                    state=asked.state,
                    error=None if asked.error is None else asked.error.code,
                )
