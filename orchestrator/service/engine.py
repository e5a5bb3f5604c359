"""The composition root: from a checked configuration to everything that runs need.

Used by the daemon and by commands that work in their own process. It owns state_dir for as long as it is open,
so there is one engine a host, and a VM has one run at a time.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

import structlog

from orchestrator.admission.controller import Controller
from orchestrator.config import Config
from orchestrator.model import Progress, RunOptions, RunResult
from orchestrator.qemu import qmp
from orchestrator.run.backup import Connect, Means, back_up, new_run_id
from orchestrator.state import lock
from orchestrator.state.catalogue import Catalogue
from orchestrator.storage.base import Storage
from orchestrator.storage.directory import DirectoryStorage
from orchestrator.target.base import Target
from orchestrator.target.images.target import ImagesTarget

log = structlog.get_logger(__name__)

RETRY_SECONDS = 60.0
"""The pause before the first retry; it doubles each time."""


def storages(config: Config) -> dict[str, Storage]:
    """The configured storages, by name."""
    return {
        name: DirectoryStorage(
            name,
            settings.path,
            quota_bytes=settings.quota_bytes,
            min_free=settings.min_free,
            max_runs=settings.max_runs,
        )
        for name, settings in config.storage.items()
    }


def targets(config: Config) -> dict[str, Target]:
    """The configured targets, by name."""
    return {
        name: ImagesTarget(name, settings.path, compression=settings.compress, max_runs=settings.max_runs)
        for name, settings in config.target.items()
    }


@contextlib.asynccontextmanager
async def opened(config: Config, *, connect: Connect = qmp.connect) -> AsyncIterator["Engine"]:
    """An engine that owns state_dir for the block; `connect` is how it reaches VMs. Raises StateError."""
    with lock.owned(config.daemon.state_dir):
        yield Engine(config, connect)


class Engine:
    """Runs backups of the configured VMs, each VM's one after the other."""

    def __init__(self, config: Config, connect: Connect) -> None:
        self.config = config
        self.catalogue = Catalogue(config.daemon.state_dir)
        by_name = storages(config)
        targets_by_name = targets(config)
        self._means = Means(
            storages=by_name,
            targets=targets_by_name,
            controller=Controller(
                by_name,
                max_runs=config.daemon.max_runs,
                target_max_runs={name: one.max_runs for name, one in targets_by_name.items()},
            ),
            is_ours=self.catalogue.knows,
            connect=connect,
        )
        self._vm_locks: dict[str, asyncio.Lock] = {}

    async def back_up(self, vm: str, options: RunOptions, *, on_progress: Callable[[Progress], None]) -> RunResult:
        """Back up one VM once. Failures are outcomes; cancellation undoes everything, then is raised."""
        async with self._vm_locks.setdefault(vm, asyncio.Lock()):
            run = new_run_id()
            await asyncio.to_thread(self.catalogue.begin, run, vm, options.job, datetime.now(UTC))
            result = await back_up(
                self.config.vms()[vm],
                options,
                self._means,
                run=run,
                on_progress=on_progress,
                on_cancelled=self.catalogue.finish,
            )
            await asyncio.to_thread(self.catalogue.finish, result)
            return result

    async def run_job(
        self, name: str, *, on_progress: Callable[[Progress], None] = lambda _progress: None
    ) -> list[RunResult]:
        """Back up all VMs of a job, side by side as far as admission allows."""
        job = self.config.job[name]
        options = self.config.run_options(name)
        log.info("job.started", job=name, vms=len(job.vms))
        async with asyncio.TaskGroup() as group:
            runs = [group.create_task(self._with_retries(vm, options, job.retries, on_progress)) for vm in job.vms]
        results = [run.result() for run in runs]
        failed = [result.vm for result in results if result.error is not None]
        log.info("job.finished", job=name, vms=len(results), failed=failed)
        return results

    async def _with_retries(
        self, vm: str, options: RunOptions, retries: int, on_progress: Callable[[Progress], None]
    ) -> RunResult:
        for attempt in range(retries):
            result = await self.back_up(vm, options, on_progress=on_progress)
            if result.error is None or not result.retryable:
                return result
            pause_seconds = RETRY_SECONDS * 2**attempt
            log.warning("run.retrying", vm=vm, run=result.run, code=result.error.code, pause_seconds=pause_seconds)
            await asyncio.sleep(pause_seconds)
        return await self.back_up(vm, options, on_progress=on_progress)
