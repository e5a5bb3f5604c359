"""The service: runs jobs when they are due, until it is told to stop.

SIGTERM and SIGINT cancel the runs under way; each puts its VM right before the daemon ends. What has not ended
`stop_timeout` later, or when it is told again, is left as after a kill: the next start puts it right.
SIGHUP has it read its configuration again (`reload`).
"""

import asyncio
import os
from collections.abc import Mapping
from functools import partial
from typing import NoReturn

import structlog

from orchestrator import aio
from orchestrator.config import Config, JobSettings
from orchestrator.errors import EXIT_FAILED, EXIT_INTERRUPTED, VmfleeceError
from orchestrator.model import Phase, Progress
from orchestrator.service import engine, reclaim, reload, scheduler, systemd
from orchestrator.service.engine import Engine
from orchestrator.service.reconciler import Reconciler
from orchestrator.units import format_duration

log = structlog.get_logger(__name__)

RECONCILE_SECONDS = 600.0


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises StateError if another vmfleece runs.

    Ends the process with EXIT_FAILED if that takes longer than `stop_timeout`, EXIT_INTERRUPTED if told twice.
    """
    stop = asyncio.Event()
    async with engine.opened(config, supervise=True) as opened:
        abort = partial(_abort, opened, "told again", EXIT_INTERRUPTED)
        with aio.told_to_stop(partial(_stop, opened, stop), abort), reload.asked() as told:
            await _serve(opened, stop, told)
    log.info("daemon.stopped")


async def _serve(opened: Engine, stop: asyncio.Event, told: asyncio.Event) -> None:
    await opened.probe_storages()
    status = _Status()
    at_start = set(opened.config.job)

    async def run(job: str, vms: Mapping[str, int] | None = None, /) -> None:
        await opened.run_job(job, vms, on_progress=status.update)

    async def take_turns(seat: scheduler.Seat[JobSettings]) -> None:
        if seat.settings is not None and seat.settings.name in at_start:
            at_start.discard(seat.settings.name)
            await scheduler.catch_up(seat.settings, run, opened.catalogue)
        await scheduler.serve(seat, run, opened.catalogue)

    async with aio.background(systemd.watchdog(), _clear_targets(opened.reconciler)) as start:
        jobs = scheduler.Seats(start, take_turns)
        reclaims = scheduler.Seats(start, partial(reclaim.serve, gates=opened.gates))

        def follow(config: Config) -> None:
            jobs.follow(config.job)
            reclaims.follow(config.target)
            if not _scheduled(config):
                log.warning("jobs.unscheduled", path=str(config.path))

        config = opened.config
        follow(config)
        start(reload.serve(told, opened, follow=follow, say=status.warn))
        scheduled = _scheduled(config)
        log.info("daemon.ready", pid=os.getpid(), vms=len(config.vm), jobs=len(config.job), scheduled=scheduled)
        systemd.notify(READY="1", STATUS=f"{scheduled} jobs with a schedule, no run under way")
        await stop.wait()


def _scheduled(config: Config) -> int:
    """How many jobs have turns of their own. With none, it only does what it is asked for."""
    return sum(job.schedule is not None for job in config.job.values())


def _stop(opened: Engine, stop: asyncio.Event) -> None:
    timeout_seconds = opened.config.daemon.stop_timeout_seconds
    log.info("daemon.stopping", timeout_seconds=timeout_seconds)
    systemd.notify(STOPPING="1", STATUS="ending the runs under way")
    # Not taken back: after the runs, it is threads that may hang, in a file system that does not answer.
    why = f"not ended within {format_duration(timeout_seconds)} (daemon.stop_timeout)"
    asyncio.get_running_loop().call_later(timeout_seconds, _abort, opened, why, EXIT_FAILED)
    opened.stop()
    stop.set()


def _abort(opened: Engine, why: str, code: int) -> NoReturn:
    """End at once, as a kill does: the next start puts guests and targets right."""
    log.error("daemon.aborted", why=why, runs=opened.under_way())
    os._exit(code)


async def _clear_targets(reconciler: Reconciler) -> None:
    """Remove what dead writers have left, at once and from time to time. Runs until cancelled."""
    while True:
        try:
            await reconciler.put_targets_right()
        except VmfleeceError as error:
            log.warning("reconcile.failed", error=str(error))
        await asyncio.sleep(RECONCILE_SECONDS)


class _Status:
    """What `systemctl status` shows: which VM is in which phase, and what is wrong with the configuration."""

    def __init__(self) -> None:
        self._phases: dict[str, Phase] = {}
        self._warning = ""

    def warn(self, warning: str) -> None:
        """Show a warning from now on; none if it is empty."""
        self._warning = warning
        self._show()

    def update(self, progress: Progress) -> None:
        if self._phases.get(progress.vm) == progress.phase:
            return
        self._phases[progress.vm] = progress.phase
        if progress.phase is Phase.CLEANING:
            del self._phases[progress.vm]
        self._show()

    def _show(self) -> None:
        runs = ", ".join(f"{vm} {phase}" for vm, phase in sorted(self._phases.items()))
        shown = (self._warning, runs or "no run under way")
        systemd.notify(STATUS="; ".join(part for part in shown if part))
