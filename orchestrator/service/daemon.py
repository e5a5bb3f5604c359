"""The service: runs jobs when they are due, until it is told to stop.

SIGTERM and SIGINT cancel the runs under way; each puts its VM right before the daemon ends.
"""

import asyncio
import os
import signal

import structlog

from orchestrator import aio
from orchestrator.config import Config
from orchestrator.errors import ConfigError, VmfleeceError
from orchestrator.model import Phase, Progress
from orchestrator.service import engine, reclaim, scheduler, systemd
from orchestrator.service.reconciler import Reconciler

log = structlog.get_logger(__name__)

RECONCILE_SECONDS = 600.0


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises StateError if another vmfleece runs, ConfigError without jobs."""
    if not any(job.schedule for job in config.job.values()):
        raise ConfigError(
            f"{config.path} has no job with a schedule: the daemon would do nothing",
            hint="add a [job.NAME] with schedule, vms and target",
        )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with engine.opened(config, supervise=True) as opened:
        await opened.probe_storages()
        status = _Status()

        async def run(job: str) -> None:
            await opened.run_job(job, on_progress=status.update)

        jobs = [scheduler.serve(job, run, opened.catalogue) for job in config.job.values()]
        looking_after = _clear_targets(opened.reconciler)
        reclaims = [reclaim.serve(target, opened.gates[name]) for name, target in config.target.items()]
        async with aio.background(systemd.watchdog(), looking_after, *jobs, *reclaims):
            log.info("daemon.ready", pid=os.getpid(), vms=len(config.vm), jobs=len(config.job))
            systemd.notify(READY="1", STATUS=f"{len(config.job)} jobs, no run under way")
            await stop.wait()
            log.info("daemon.stopping")
            systemd.notify(STOPPING="1", STATUS="ending the runs under way")
    log.info("daemon.stopped")


async def _clear_targets(reconciler: Reconciler) -> None:
    """Remove what dead writers have left, at once and from time to time. Runs until cancelled."""
    while True:
        try:
            await reconciler.put_targets_right()
        except VmfleeceError as error:
            log.warning("reconcile.failed", error=str(error))
        await asyncio.sleep(RECONCILE_SECONDS)


class _Status:
    """What `systemctl status` shows: which VM is in which phase."""

    def __init__(self) -> None:
        self._phases: dict[str, Phase] = {}

    def update(self, progress: Progress) -> None:
        if self._phases.get(progress.vm) == progress.phase:
            return
        self._phases[progress.vm] = progress.phase
        if progress.phase is Phase.CLEANING:
            del self._phases[progress.vm]
        runs = ", ".join(f"{vm} {phase}" for vm, phase in sorted(self._phases.items()))
        systemd.notify(STATUS=runs or "no run under way")
