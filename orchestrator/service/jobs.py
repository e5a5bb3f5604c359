"""A job's turn: its VMs side by side, tried again where that can help; its hook, retention, and who is told."""

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

import structlog

from orchestrator import aio
from orchestrator.admission import estimate
from orchestrator.causes import Cause
from orchestrator.config.settings import JobSettings
from orchestrator.errors import UnknownName, VmfleeceError
from orchestrator.model import Phase, Progress, RunResult
from orchestrator.run import retry
from orchestrator.run.backup import new_run_id
from orchestrator.service import overview
from orchestrator.service.hooks import JobHook
from orchestrator.service.in_force import Setup
from orchestrator.service.notify import JobEnd, Notifiers

if TYPE_CHECKING:
    from orchestrator.service.engine import Engine

log = structlog.get_logger(__name__)

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class _Turn:
    """One turn of a job: it goes on with the configuration with which it began, its new tries as well."""

    job: JobSettings
    setup: Setup
    hook: JobHook
    on_progress: OnProgress


class Jobs:
    """Runs the jobs of an engine, which does the backups. `stopping`: see `Engine.stopping`."""

    def __init__(self, engine: "Engine", notifiers: Notifiers) -> None:
        self._engine = engine
        self._notifiers = notifiers
        self.pausing: dict[str, overview.Pausing] = {}
        """Tries to come, by their runs."""

    async def run(self, name: str, vms: Mapping[str, int] | None, on_progress: OnProgress) -> list[RunResult]:
        """See `Engine.run_job`. Raises UnknownName."""
        setup = self._engine.in_force.now
        config = setup.config
        if name not in config.job:
            raise UnknownName("job", name, config.job, place=str(config.path))
        job = config.job[name]
        turn = _Turn(job, setup, JobHook(job, config.target[job.options.target]), on_progress)
        with self._engine.in_force.using(setup):
            return await self._run(turn, dict.fromkeys(job.vms, 0) if vms is None else vms)

    async def _run(self, turn: _Turn, vms: Mapping[str, int]) -> list[RunResult]:
        name, hook = turn.job.name, turn.hook
        log.info("job.started", job=name, vms=len(vms))
        self._notifiers.job_started(name)
        await self._engine.enter(partial(self._engine.catalogue.begin_turn, name, vms))
        done = False
        try:
            await hook.job_started()
            results = await self._run_all(turn, vms)
            done = True
        except VmfleeceError as error:
            self._notifiers.job_ended(JobEnd(name, (), stopped=error))
            raise
        finally:
            await aio.finish(self._end(name, hook, done=done))
        failed = [result.vm for result in results if result.error is not None]
        log.info("job.finished", job=name, vms=len(results), failed=failed)
        self._notifiers.job_ended(JobEnd(name, results))
        return results

    async def _end(self, name: str, hook: JobHook, *, done: bool) -> None:
        if (
            not done and not self._engine.stopping
        ):  # somebody did not want it: the next start must not go on with it
            await self._engine.enter(partial(self._engine.catalogue.begin_turn, name, {}))
        await hook.job_ended(aborted=not done)

    async def _run_all(self, turn: _Turn, vms: Mapping[str, int]) -> list[RunResult]:
        job = turn.job
        async with asyncio.TaskGroup() as group:
            runs = [group.create_task(self._take_turn(turn, vm)) for vm in vms]
        results = [run.result() for run in runs]
        for result in results:
            if result.error is None:
                await self._engine.pruning.after_run(job.options.target, result.vm, merge=job.merge_chains)
        return results

    async def _take_turn(self, turn: _Turn, vm: str) -> RunResult:
        result = await self._with_retries(turn, vm)
        await aio.finish(self._engine.enter(partial(self._engine.catalogue.end_turn, turn.job.name, vm)))
        return result

    async def _with_retries(self, turn: _Turn, vm: str) -> RunResult:
        job, run = turn.job, new_run_id()
        for tries in itertools.count(1):
            result = await self._engine.back_up(
                vm, job.options, run=run, hook=turn.hook, on_progress=turn.on_progress, setup=turn.setup
            )
            if result.error is None:
                break
            pause_seconds = retry.pause_seconds(
                result.error.cause,
                tries=tries,
                retries=job.retries,
                may_be_granted_more=_may_be_granted_more(result, turn.setup),
            )
            if pause_seconds is None:
                break
            run = new_run_id()
            log.warning(
                "run.retrying",
                vm=vm,
                run=result.run,
                code=result.error.code,
                cause=result.error.cause,
                pause_seconds=pause_seconds,
                next_run=run,
            )
            if pause_seconds and await self._pause(turn, run, result, pause_seconds):
                break
        return result

    async def _pause(self, turn: _Turn, run: str, failed: RunResult, seconds: float) -> bool:
        """Wait before another try; whether it was told to end meanwhile."""
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        priority = turn.setup.config.vm[failed.vm].priority
        pausing = overview.Pausing(failed.vm, run, priority, turn.job.options, until, failed)
        self._engine.tell(Progress(failed.vm, run, Phase.QUEUED, waits_for=pausing.reason), turn.on_progress)
        self.pausing[run] = pausing
        try:
            return await pausing.ended_within(seconds)
        finally:
            del self.pausing[run]


def _may_be_granted_more(result: RunResult, setup: Setup) -> bool:
    """Whether a run ran full although it did not hold all of its storage."""
    if result.error is None or result.error.cause is not Cause.FLEECING_FULL:
        return False
    granted_bytes: dict[str, int] = {}
    for disk in result.disks:
        if disk.storage is not None:
            granted_bytes[disk.storage] = granted_bytes.get(disk.storage, 0) + disk.grant_bytes
    return all(size < estimate.whole(setup.storages[name].quota_bytes) for name, size in granted_bytes.items())
