"""The service: runs jobs when they are due, until it is told to stop.

SIGTERM and SIGINT cancel the runs under way; each puts its VM right before the daemon ends. What has not ended
`stop_timeout` later, or when it is told again, is left as after a kill: the next start puts it right.
SIGHUP has it read its configuration again (`reload`).
"""

import asyncio
import os
from collections.abc import Iterable, Mapping
from functools import partial

import structlog

from orchestrator import aio, memory
from orchestrator.config import Config, JobSettings
from orchestrator.errors import StorageError, VmfleeceError
from orchestrator.model import Phase, Progress
from orchestrator.service import engine, reclaim, reload, scheduler, systemd
from orchestrator.service.engine import Engine
from orchestrator.service.reconciler import Reconciler
from orchestrator.service.starting import Told
from orchestrator.state.journal import Journal
from orchestrator.storage.base import Storage

log = structlog.get_logger(__name__)

RECONCILE_SECONDS = 600.0


async def serve(config: Config, journal: Journal, told: Told) -> None:
    """Serve until told to stop, in the state_dir of `journal`. Raises StateError."""
    async with engine.opened(config, supervise=True, journal=journal) as opened:
        told.serving(opened)
        await _serve(opened, told)


async def _serve(opened: Engine, told: Told) -> None:
    await _probe(opened.in_force.now.storages.values())
    status = _Status()
    at_start = set(opened.config.job)

    async def run(job: str, vms: Mapping[str, int] | None = None, /) -> None:
        await opened.run_job(job, vms, on_progress=status.update)

    async def take_turns(seat: scheduler.Seat[JobSettings]) -> None:
        if seat.settings is not None and seat.settings.name in at_start:
            at_start.discard(seat.settings.name)
            await scheduler.catch_up(seat.settings, run, opened.catalogue)
        await scheduler.serve(seat, run, opened.catalogue)

    async with aio.background(
        systemd.watchdog(),
        _clear_targets(opened.reconciler),
        memory.collect_when(lambda: not opened.under_way()),
    ) as start:
        jobs = scheduler.Seats(start, take_turns)
        reclaims = scheduler.Seats(start, partial(reclaim.serve, gates=opened.gates))

        def follow(config: Config) -> None:
            jobs.follow(config.job)
            reclaims.follow(config.target)
            if not _scheduled(config):
                log.warning("jobs.unscheduled", path=str(config.path))

        config = opened.config
        follow(config)
        start(reload.serve(told.reload, opened, follow=follow, say=status.warn))
        scheduled = _scheduled(config)
        log.info("daemon.ready", pid=os.getpid(), vms=len(config.vm), jobs=len(config.job), scheduled=scheduled)
        systemd.notify(READY="1", STATUS=f"{scheduled} jobs with a schedule, no run under way")
        await told.stop.wait()


async def _probe(storages: Iterable[Storage]) -> None:
    """Look what each storage's file system can do, and log what it cannot; none of it ends the service."""
    for storage in storages:
        try:
            lacks = await asyncio.to_thread(storage.prepare)
        except StorageError as error:
            log.warning("storage.unusable", storage=storage.name, error=str(error))
            continue
        for lack in lacks:
            log.warning("storage.lacks", storage=storage.name, feature=lack.feature, error=lack.consequence)


def _scheduled(config: Config) -> int:
    """How many jobs have turns of their own. With none, it only does what it is asked for."""
    return sum(job.schedule is not None for job in config.job.values())


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
