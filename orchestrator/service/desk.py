"""What the API is answered: the engine's side of its contract, `api.base`."""

import asyncio
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orchestrator import schedule
from orchestrator.config import Config
from orchestrator.errors import RefusedError, StateError
from orchestrator.model import ErrorReport, Progress
from orchestrator.run.backup import Means, new_run_id
from orchestrator.run.prune import Pruned, PruneResult
from orchestrator.service import history, orders, protection, targets, vms
from orchestrator.service.api.base import Answers, CleanupOrder, RunsQuery, Service, SnapshotsQuery
from orchestrator.service.documents import (
    Cleanup,
    Fate,
    History,
    Jobs,
    JobSummary,
    Protection,
    PrunedSnapshot,
    RepairSummary,
    Request,
    RunDetails,
    Runs,
    Snapshots,
    Targets,
    VmDetails,
    Vms,
)
from orchestrator.service.guests import Repaired
from orchestrator.service.orders import BackupOrder, PruneOrder
from orchestrator.service.reconciler import Reconciler
from orchestrator.service.requests import Done
from orchestrator.service.status import Status
from orchestrator.state.catalogue import Catalogue

if TYPE_CHECKING:
    from orchestrator.service.engine import Engine


class Desk(Answers):
    """See the contract. What is asked for is looked up in the configuration in force."""

    def __init__(self, engine: "Engine", service: Service) -> None:
        self.feed = engine.feed
        self.service = service
        self._engine = engine

    @property
    def _config(self) -> Config:
        return self._engine.config

    @property
    def _means(self) -> Means:
        return self._engine.in_force.now.means

    def status(self) -> Status:
        return self._engine.status()

    async def protection(self) -> Protection:
        return await asyncio.to_thread(protected, self._config, self._engine.catalogue, self.status())

    def storage_history(self) -> History:
        return self._engine.samples.history()

    async def vms(self) -> Vms:
        return await vms.summaries(self._config, self._means.connect)

    async def vm(self, name: str) -> VmDetails:
        means = self._means
        return await vms.details(vms.configured(self._config, name), means.connect, means.storages, means.targets)

    async def runs(self, query: RunsQuery) -> Runs:
        return await asyncio.to_thread(history.runs, self._engine.catalogue, query, self.status())

    async def run(self, run: str) -> RunDetails:
        return await asyncio.to_thread(history.run, self._engine.catalogue, run, self.status())

    async def cancel_run(self, run: str) -> RunDetails:
        ended = self._engine.end_run(run)
        details = await self.run(run)
        if not ended:
            raise RefusedError(
                f"run {run} of {details.vm} is over: {details.state}",
                hint=f"`vmfleece run show {run}` says what it came to",
                code="run-over",
            )
        return details

    async def targets(self) -> Targets:
        return await targets.summaries(self._config, self._means.targets)

    async def snapshots(self, target: str, query: SnapshotsQuery) -> Snapshots:
        return await targets.snapshots(self._means.targets[orders.target_named(self._config, target)], query.vm)

    def jobs(self) -> Jobs:
        return jobs(self._config)

    def start(self, order: BackupOrder) -> Request:
        self._may_start()
        setup = self._engine.in_force.now
        wanted = orders.resolve(order, setup.config)
        runs = {vm: new_run_id() for vm in wanted.vms}

        async def work(on_progress: Callable[[Progress], None]) -> Done:
            async with asyncio.TaskGroup() as group:
                backups = [
                    group.create_task(
                        self._engine.back_up(
                            vm, wanted.options, on_progress=on_progress, run=runs[vm], setup=setup
                        )
                    )
                    for vm in wanted.vms
                ]
            return Done(tuple(backup.result() for backup in backups))

        return self._engine.requests.begin(work, vms=wanted.vms, runs=runs.values())

    def start_job(self, job: str) -> Request:
        self._may_start()
        name = orders.job_named(self._config, job)
        if self._engine.jobs_under_way[name]:
            raise RefusedError(
                f"job {name} is under way already",
                hint="wait until it has ended: `vmfleece status`",
                code="job-under-way",
            )

        async def work(on_progress: Callable[[Progress], None]) -> Done:
            return Done(tuple(await self._engine.run_job(name, on_progress=on_progress)))

        return self._engine.requests.begin(work, vms=self._config.job[name].vms, job=name)

    def prune(self, order: PruneOrder) -> Request:
        self._may_start()
        setup = self._engine.in_force.now
        pairs = orders.prunable(order, setup.config)

        async def work(_on_progress: Callable[[Progress], None]) -> Done:
            results = await self._engine.pruning.carry_out(pairs, setup, merge=order.merge, dry_run=order.dry_run)
            return Done(pruned=pruned(results, dry_run=order.dry_run))

        return self._engine.requests.begin(work, vms=dict.fromkeys(vm for _, vm in pairs))

    def request(self, request: str) -> Request:
        return self._engine.requests.shown(request)

    def cancel_request(self, request: str) -> Request:
        return self._engine.requests.cancel(request)

    async def clean_up(self, order: CleanupOrder) -> Cleanup:
        if not order.dry_run:
            self._may_start()
        return await clean_up(self._engine.reconciler, dry_run=order.dry_run)

    def metrics(self) -> bytes:
        return self._engine.metrics.text()

    def _may_start(self) -> None:
        """Raises StateError: a command does what it was called for, and ends."""
        if self.service is Service.COMMAND:
            raise StateError(
                "a vmfleece command is at work, which does only what it was called for",
                hint="ask again when it has ended",
            )


def jobs(config: Config) -> Jobs:
    """All configured jobs, and when each is due."""
    now = datetime.now(UTC)
    found = []
    for job in config.job.values():
        due = schedule.next_due(job.schedule, now) if job.schedule else None
        next_due = due.isoformat() if due else None
        found.append(JobSummary(job.name, job.schedule, next_due, job.options.target, job.vms))
    return Jobs(tuple(found))


def pruned(results: Iterable[PruneResult], *, dry_run: bool) -> tuple[PrunedSnapshot, ...]:
    """What retention did, or in a dry run would do, snapshot by snapshot."""
    return tuple(
        PrunedSnapshot(
            snapshot=one.snapshot.id,
            vm=one.snapshot.vm,
            target=one.snapshot.target,
            keep=one.keep,
            fate=_fate(one),
            reasons=one.reasons,
            removed=one.removed and not dry_run,
            merged=one.merged and not dry_run,
            stored_bytes=one.snapshot.stored_bytes,
            grown_bytes=one.grown_bytes,
            error=one.error,
        )
        for result in results
        for one in result.snapshots
    )


def _fate(one: Pruned) -> Fate:
    if one.error is not None:
        return Fate.FAILED
    if one.merged:
        return Fate.MERGE
    return Fate.KEEP if one.keep else Fate.REMOVE


def protected(config: Config, catalogue: Catalogue, live: Status) -> Protection:
    """How well each VM is protected. Blocks. Raises StateError."""
    good, ended = catalogue.last_runs(outcomes=protection.GOOD), catalogue.last_runs()
    under_way = {one.vm for one in live.runs} | {one.vm for one in live.queue}
    return protection.of(config, good, ended, protection.Moment(datetime.now(UTC), under_way))


async def clean_up(reconciler: Reconciler, *, dry_run: bool) -> Cleanup:
    """Put right what dead runs have left, or only say what that is."""
    if dry_run:
        repaired = [Repaired(repair) for repair in await reconciler.plan()]
    else:
        repaired = await reconciler.put_right()
    return Cleanup(
        dry_run,
        tuple(
            RepairSummary(
                one.repair.act,
                one.repair.vm or None,
                one.repair.subject,
                one.repair.reason,
                ErrorReport.of(one.error) if one.error else None,
            )
            for one in repaired
        ),
    )
