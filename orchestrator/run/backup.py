"""One attempt at backing up one VM: the file that sequences a run.

    queued → preparing → snapshotting → copying → committing → cleaning → succeeded | warning | failed | cancelled

The way of the data: QEMU's block job reads the point in time through the snapshot-access node (old data from the
fleecing image, the rest from the disk) and writes it into the target's sink. Every step pushes its undo before it
acts, and all undos run at the end, whatever happened; a disk that is done gives everything back at once.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial

import structlog

from orchestrator import aio
from orchestrator.admission import estimate
from orchestrator.admission.controller import Controller
from orchestrator.admission.lease import Lease, QuotaLowered, Waiting
from orchestrator.admission.ledger.base import Grant
from orchestrator.errors import NobodyThere, VmfleeceError
from orchestrator.fleecing import bitmaps, coverage, graph, image, rotation, sink
from orchestrator.fleecing.bitmaps import Settlement
from orchestrator.fleecing.grant import GrantKeeper
from orchestrator.fleecing.names import DiskNames, run_prefix
from orchestrator.fleecing.pauser import Pauser
from orchestrator.fleecing.quiet import Quiet
from orchestrator.model import (
    Consistency,
    Discard,
    ErrorReport,
    Phase,
    Progress,
    RunOptions,
    RunResult,
    Vm,
)
from orchestrator.qemu import commands, jobs, qmp, tools
from orchestrator.qemu.builds import Builds
from orchestrator.qemu.monitor import Connect, Monitor
from orchestrator.run import copy, diagnosis, particulars, quiesce, survey, vigil
from orchestrator.run.copying import Copies, Copying, by_windows
from orchestrator.run.outcome import WAS_CANCELLED, DiskRun, Facts, log_result
from orchestrator.run.plan import Past, Plan
from orchestrator.run.sampling import Heed, Sampler
from orchestrator.run.slowing import Slowing
from orchestrator.run.survey import Storages
from orchestrator.state.journal import Journal
from orchestrator.target.base import Draft, ParentUnusable, Target

log = structlog.get_logger(__name__)

UNDO_STEP_SECONDS = 120.0
UNDO_RECONNECT_SECONDS = 20.0
TAKE_OUT = "take everything out of QEMU"


@dataclass(frozen=True, slots=True)
class Means:
    """What runs share. `is_ours` tells whether a run's id is in our catalogue: its leftovers are ours."""

    storages: Storages
    targets: Mapping[str, Target]
    controller: Controller
    is_ours: Callable[[str], bool]
    journal: Journal
    builds: Builds
    connect: Connect = qmp.connect


def new_run_id() -> str:
    """Eight hex digits: short enough to be part of every node's name."""
    return secrets.token_hex(4)


async def _nothing() -> None:
    pass


async def back_up(
    vm: Vm,
    options: RunOptions,
    means: Means,
    *,
    run: str,
    on_progress: Callable[[Progress], None],
    enter: Callable[[], Awaitable[None]] = _nothing,
    on_cancelled: Callable[[RunResult], None] = lambda _result: None,
) -> RunResult:
    """Run it to its end; a failure is an outcome in the result, not an exception.

    `enter` is called before anything is done, and may raise VmfleeceError. Cancellation undoes
    everything first, tells `on_cancelled` the result, and then raises CancelledError.
    """
    with structlog.contextvars.bound_contextvars(vm=vm.name, run=run):
        started, clock = datetime.now(UTC), time.monotonic()
        facts = Facts()
        log.info("run.started", target=options.target, job=options.job)
        error: ErrorReport | None = None
        cancelled: asyncio.CancelledError | None = None
        try:
            await enter()
            await _Run(vm, options, means, run=run, facts=facts, on_progress=on_progress).execute(started)
        except VmfleeceError as failure:
            error = ErrorReport.of(failure)
        except asyncio.CancelledError as cancellation:
            error = WAS_CANCELLED
            cancelled = cancellation
        except Exception as bug:  # one VM's run must not end the others
            log.exception("run.bug")
            what = f"{type(bug).__name__}: {bug}"
            error = ErrorReport("bug", what, "please report this with the log")
        result = facts.result(
            vm.name,
            run,
            started=started,
            duration_seconds=time.monotonic() - clock,
            error=error,
        )
        log_result(result, job=options.job, target=options.target)
        if cancelled is not None:
            on_cancelled(result)
            raise cancelled
        return result


@dataclass(frozen=True, slots=True)
class _Gear:
    """What the steps of an admitted run work with."""

    monitor: Monitor
    lease: Lease
    draft: Draft
    keeper: GrantKeeper
    quiet: Quiet
    copies: Copies


class _Run:
    def __init__(
        self,
        vm: Vm,
        options: RunOptions,
        means: Means,
        *,
        run: str,
        facts: Facts,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._vm = vm
        self._options = options
        self._means = means
        self._run = run
        self._facts = facts
        self._on_progress = on_progress
        self._undo = aio.UndoStack()
        self._pauser: Pauser | None = None
        self._lost: dict[str, str] = {}
        self._copied_whole: dict[str, str] = {}
        self._gone = False
        self._phase = Phase.QUEUED

    async def execute(self, started: datetime) -> None:
        """All phases. What was done is undone at the end, also on failure and cancellation."""
        await self._target.prepare()
        async with self._means.connect(self._vm.qmp, vm=self._vm.name) as monitor:
            self._capabilities = await self._means.builds.capabilities(monitor)
            if not self._capabilities.discard_source:
                journal = self._means.journal
                self._pauser = Pauser(monitor, self._vm.qmp, journal, vm=self._vm.name, run=self._run)
            self._sampler = Sampler(monitor, self._facts.impact, self._report)
            await self._sampler.meet()
            await survey.settle_leftovers(monitor, self._vm.name, self._pauser, self._means.is_ours)
            await self._forget_dead_runs()
            settled = await self._settle_bitmaps(monitor)
            self._lost = {disk: one.reason for disk, one in settled.items() if one.base is None}
            done = False
            while not done:
                planned = await self._survey(monitor)
                for name in {one.storage for one in planned.disks if one.storage is not None}:
                    await asyncio.to_thread(self._means.storages.by_name[name].prepare)
                try:
                    async with self._admit(planned) as lease:
                        # It may have waited for hours: the VM is asked again.
                        await monitor.reconnect(deadline_seconds=copy.RECONNECT_SECONDS)
                        if not (await self._survey(monitor)).is_like(planned):
                            log.info("run.replanned")
                            continue
                        self._facts.warnings += planned.warnings
                        try:
                            await self._back_up(monitor, lease, planned, started)
                            done = True
                        finally:
                            await self._clean_up(lease)
                except (ParentUnusable, QuotaLowered):
                    log.info("run.replanned")

    async def _forget_dead_runs(self) -> None:
        """Their images are out of this QEMU: nothing holds them any more."""
        controller = self._means.controller
        dead = [
            one for one in controller.stranded() if (one.vm, one.monitor) == (self._vm.name, str(self._vm.qmp))
        ]
        await controller.forget(dead)

    async def _clean_up(self, lease: Lease) -> None:
        try:
            self._enter(Phase.CLEANING)
        finally:  # also if nobody can be told any more: the command's output may be closed
            failed = await self._undo.unwind(step_deadline_seconds=UNDO_STEP_SECONDS)
            self._facts.warnings += [f"could not undo: {step}" for step in failed]
            lease.stranded = TAKE_OUT in failed

    async def _survey(self, monitor: Monitor) -> Plan:
        """What it would do now; asked again after it has waited, which may be for hours."""
        snapshots = await self._target.snapshots(self._vm.name)
        settlements = await rotation.look(monitor, self._target.name, [one.id for one in snapshots])
        for disk, one in settlements.items():
            if one.base is None:  # why is known only from before it was put right
                settlements[disk] = replace(one, reason=self._lost.get(disk, one.reason))
            if reason := self._copied_whole.get(disk):
                settlements[disk] = Settlement(None, reason, ())
        return await survey.survey(
            monitor,
            self._vm,
            self._options,
            self._means.storages,
            past=Past(
                snapshots,
                settlements,
                granule_bytes=self._target.granule_bytes,
                reads_sinks=self._target.reads_sinks,
            ),
            can=self._capabilities,
        )

    @property
    def _target(self) -> Target:
        return self._means.targets[self._options.target]

    async def _settle_bitmaps(self, monitor: Monitor) -> dict[str, Settlement]:
        """Go on from the snapshots that the target lists, whatever was under way when somebody died."""
        listed = [snapshot.id for snapshot in await self._target.snapshots(self._vm.name)]
        return await rotation.settle(monitor, self._target.name, listed)

    def _admit(self, planned: Plan) -> AbstractAsyncContextManager[Lease]:
        return self._means.controller.admit(
            run=self._run,
            vm=self._vm.name,
            target=self._options.target,
            priority=self._vm.priority,
            disks={
                one.disk.id: Grant(one.storage, one.grant_bytes)
                for one in planned.disks
                if one.storage is not None
            },
            on_wait=self._waiting,
            monitor=str(self._vm.qmp),
        )

    async def _back_up(self, monitor: Monitor, lease: Lease, planned: Plan, started: datetime) -> None:
        self._enter(Phase.PREPARING)
        self._undo.push("settle the bitmaps", lambda: self._settle_what_is_left(monitor))
        draft = await self._target.begin(self._vm.name, started)
        self._undo.push("remove the unfinished snapshot", draft.abort)
        self._undo.push(TAKE_OUT, lambda: self._dismantle(monitor))
        self._undo.push("cut off what QEMU writes to", draft.cut_off)
        self._facts.disks = [
            DiskRun(one, DiskNames(self._run, number)) for number, one in enumerate(planned.disks)
        ]
        quiet = Quiet(monitor)
        growable = self._capabilities.discard_source
        keeper = GrantKeeper(monitor, self._means.controller, lease, quiet, growable=growable)
        copies = Copies(monitor, quiet, self._options, self._capabilities, self._facts.disks)
        gear = _Gear(monitor, lease, draft, keeper, quiet, copies)
        for disk in self._facts.disks:
            await self._prepare(gear, disk)
        self._facts.particulars = await particulars.look(monitor, [one.disk for one in planned.disks])
        await self._sampler.begin([one.disk for one in planned.disks])
        self._enter(Phase.SNAPSHOTTING)
        # QEMU flushes the disks while the guest waits: what the host still caches is written before.
        images = [one.disk.image for one in planned.disks if one.disk.image]
        await asyncio.to_thread(tools.write_back, images)
        await vigil.check_disks(monitor, self._vm.name, [one.disk for one in planned.disks])
        async with self._frozen():
            await self._snapshot(monitor, draft)
        self._facts.files, missing = await particulars.read_files(self._vm.extra_files)
        self._facts.warnings += missing
        await self._limit_coverage(monitor)
        self._enter(Phase.COPYING)
        with contextlib.ExitStack() as watching:
            copying = [copies.of(disk, watching, partial(self._copied, disk, lease)) for disk in self._facts.disks]
            # Old data comes before the jobs run.
            async with aio.background(keeper.serve(), keeper.ask_again(), self._sampler.serve(self._heed(copies))):
                await copies.start_whole()
                finishing = aio.all_or_first_error(
                    self._finish(gear, disk, one) for disk, one in zip(self._facts.disks, copying, strict=True)
                )
                here = aio.unless(vigil.migrating(monitor, self._vm.name), finishing)
                await aio.unless(lease.giving_way(), aio.unless(draft.lost(), here))
            await self._sampler.look()
        await self._check_vm(monitor)
        self._enter(Phase.COMMITTING)
        self._facts.snapshot = await draft.commit(self._facts.details(self._run, self._options), self._facts.files)
        log.info("snapshot.committed", snapshot=draft.snapshot_id, target=self._options.target)

    def _heed(self, copies: Copies) -> Heed | None:
        budget_seconds = self._vm.latency_budget_seconds
        return Slowing(copies, self._facts, budget_seconds=budget_seconds).heed if budget_seconds else None

    async def _check_vm(self, monitor: Monitor) -> None:
        """Make sure that nothing has happened to the VM that makes the copy wrong."""
        await monitor.reconnect(deadline_seconds=copy.RECONNECT_SECONDS)
        await vigil.check_here(monitor, self._vm.name)
        for disk in await vigil.unplugged(monitor, [one.plan.disk for one in self._facts.disks]):
            self._facts.warnings.append(f"disk {disk} was unplugged meanwhile; the snapshot has it as it was")

    async def _prepare(self, gear: _Gear, disk: DiskRun) -> None:
        """Everything that can be done while the guest still runs on its own node."""
        try:
            disk.sink = await gear.draft.add_disk(
                disk.plan.disk,
                compressible=disk.plan.storage is not None and self._options.discard is not Discard.WINDOW,
                parent=disk.plan.parent,
            )
        except ParentUnusable as error:
            self._copied_whole[disk.plan.disk.id] = error.message
            raise
        disk.by_windows = by_windows(disk, self._options, self._capabilities)
        await sink.attach(gear.monitor, disk.names, disk.sink, incremental=disk.incremental)
        if disk.plan.storage is None:
            return
        disk.file = await image.create(
            self._means.storages.by_name[disk.plan.storage],
            name=disk.names.prefix.removesuffix("-"),
            disk_bytes=disk.plan.disk.size_bytes,
            length_bytes=estimate.worst_length(disk.plan.disk.size_bytes),
        )
        self._undo.push("close a fleecing image", partial(_close, disk))
        self._means.controller.attach(gear.lease, disk.plan.disk.id, disk.file)
        limit_bytes = estimate.limit(disk.plan.grant_bytes)
        discards = not self._is_limited_later(disk)
        await image.attach(gear.monitor, disk.names, disk.file, limit_bytes, discards=discards)
        disk.grant_bytes = disk.plan.grant_bytes
        await gear.keeper.take(disk.plan.disk, disk.names)

    async def _snapshot(self, monitor: Monitor, draft: Draft) -> None:
        filters = [
            graph.Filter(
                disk.plan.disk,
                disk.names,
                disk.names.image if disk.plan.storage else disk.names.target,
                new_bitmap=bitmaps.name_of(self._target.name, draft.snapshot_id),
                granule_bytes=self._target.granule_bytes,
                old_bitmap=disk.plan.bitmap,
            )
            for disk in self._facts.disks
        ]
        timeout_seconds = self._options.cbw_timeout_seconds
        if self._pauser is not None:
            self._facts.pause_ms = await graph.take_snapshot_paused(
                self._pauser, filters, cbw_timeout_seconds=timeout_seconds
            )
        else:
            running = (await monitor.execute(commands.QUERY_STATUS))["running"]
            held_ms = await graph.take_snapshot(monitor, filters, cbw_timeout_seconds=timeout_seconds)
            self._facts.pause_ms = held_ms if running else None
        log.info("snapshot.taken", disks=len(filters), pause_ms=self._facts.rounded_pause_ms)

    @contextlib.asynccontextmanager
    async def _frozen(self) -> AsyncIterator[None]:
        """The guest's file systems frozen for the block, if that is asked for and can be had."""
        if self._options.consistency is not Consistency.FREEZE or self._vm.agent is None:
            yield
            return
        async with quiesce.frozen(self._vm.agent, self._means.journal, vm=self._vm.name, run=self._run) as freeze:
            yield
        self._facts.frozen_file_systems = 0 if freeze.problem else freeze.file_systems
        if freeze.problem:
            self._facts.warnings.append(f"the guest was not frozen for the snapshot: {freeze.problem}")
        if freeze.unthawed:
            self._facts.warnings.append(f"the guest may still be frozen: {freeze.unthawed}")

    async def _limit_coverage(self, monitor: Monitor) -> None:
        """Have guest writes copied only where an incremental backup reads; where QEMU was paused, they are."""
        if limited := [disk.names for disk in self._facts.disks if self._is_limited_later(disk)]:
            await coverage.limit(monitor, limited)
            await image.start_discarding(monitor, limited)

    def _is_limited_later(self, disk: DiskRun) -> bool:
        # Without fleecing, what is discarded would be discarded in the backup itself.
        return self._pauser is None and disk.incremental and disk.plan.storage is not None

    async def _finish(self, gear: _Gear, disk: DiskRun, copying: Copying) -> None:
        """Wait for one disk's copy, give back everything that it held, and read the copy back."""
        ended = await copying.run()
        disk.copying = False
        gear.quiet.jobs.discard(disk.names.job)
        self._copied(disk, gear.lease, ended.state)
        if disk.file is not None:
            high_water_bytes = await image.high_water_bytes(gear.monitor, disk.names)
            # QEMU counts the write that did not fit, too (block/io.c, bdrv_co_write_req_finish).
            high_water_bytes = min(high_water_bytes, estimate.limit(disk.grant_bytes))
            disk.fleecing_peak_bytes = max(disk.fleecing_peak_bytes, high_water_bytes)
        if not ended.state.succeeded:
            raise await diagnosis.why(
                ended,
                disk,
                draft=gear.draft,
                keeper=gear.keeper,
                storages=self._means.storages,
                can=self._capabilities,
                cbw_timeout_seconds=self._options.cbw_timeout_seconds,
            )
        if disk.file is not None:
            await gear.keeper.let_go(disk.plan.disk.id)
        async with gear.quiet.changing_graph():
            assert disk.sink is not None  # noqa: S101  it was copied to it
            await graph.release(gear.monitor, disk.names, disk.sink, self._pauser, incremental=disk.incremental)
        await _close(disk)
        await self._means.controller.release(gear.lease, disk.plan.disk.id)
        await gear.copies.share_again()
        log.info(
            "disk.copied",
            disk=disk.plan.disk.id,
            copied_bytes=disk.copied_bytes,
            fleecing_peak_bytes=disk.fleecing_peak_bytes,
        )
        await gear.draft.seal(disk.plan.disk)

    def _copied(self, disk: DiskRun, lease: Lease, state: jobs.JobState) -> None:
        # The last cluster of a disk of odd size counts whole.
        disk.copied_bytes = min(state.current_bytes, disk.plan.disk.size_bytes)
        disk.to_copy_bytes = min(state.total_bytes, disk.plan.disk.size_bytes)
        if disk.file is not None:
            disk.fleecing_peak_bytes = max(disk.fleecing_peak_bytes, disk.file.used_bytes())
            disk.grant_bytes = lease.grants[disk.plan.disk.id].size_bytes
        self._report()

    async def _dismantle(self, monitor: Monitor) -> None:
        """The undo of everything in QEMU. A QEMU that is gone has nothing of ours any more."""
        try:
            await monitor.reconnect(deadline_seconds=UNDO_RECONNECT_SECONDS)
        except NobodyThere as error:
            log.warning("vm.gone", error=str(error))
            self._gone = True
            return
        if self._pauser is not None:
            await self._pauser.make_good()
        await graph.dismantle(monitor, run_prefix(self._run), self._pauser)

    async def _settle_what_is_left(self, monitor: Monitor) -> None:
        """The undo of the bitmaps. Those of a QEMU that is gone are settled when the VM is backed up again."""
        if not self._gone:
            await monitor.reconnect(deadline_seconds=UNDO_RECONNECT_SECONDS)
            await self._settle_bitmaps(monitor)

    def _waiting(self, waiting: Waiting) -> None:
        log.info("run.queued", reasons=list(waiting.reasons), obstacles=[asdict(one) for one in waiting.obstacles])
        self._on_progress(Progress(self._vm.name, self._run, Phase.QUEUED, waits_for=str(waiting)))

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        log.debug("run.phase", phase=phase)
        self._report()

    def _report(self) -> None:
        self._on_progress(self._facts.progress(self._vm.name, self._run, self._phase))


async def _close(disk: DiskRun) -> None:
    if disk.file is not None:
        disk.file.close()
