"""The composition root: from a checked configuration to everything that runs need.

Used by the daemon and by commands that work in their own process. It owns state_dir for as long as it is open,
so there is one engine a host, and a VM has one run at a time.
"""

import asyncio
import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from orchestrator import aio
from orchestrator.admission.controller import Controller
from orchestrator.admission.ledger.sqlite import SqliteLedger
from orchestrator.config import Config, change
from orchestrator.errors import StateError, VmfleeceError
from orchestrator.model import ErrorReport, Phase, Progress, RunOptions, RunResult, Vm
from orchestrator.qemu import qmp
from orchestrator.qemu.builds import Builds
from orchestrator.qemu.monitor import Connect, Monitor
from orchestrator.run.backup import Means, back_up, new_run_id
from orchestrator.run.outcome import Facts, log_result, never_began
from orchestrator.service import drivers, overview, samples
from orchestrator.service.api import server
from orchestrator.service.api.base import Service
from orchestrator.service.desk import Desk
from orchestrator.service.feed import Feed
from orchestrator.service.guests import Guests
from orchestrator.service.hooks import JobHook
from orchestrator.service.in_force import InForce, Setup
from orchestrator.service.jobs import Jobs
from orchestrator.service.metrics import Metrics
from orchestrator.service.notify import Notifiers
from orchestrator.service.pruning import Pruning
from orchestrator.service.reconciler import Reconciler
from orchestrator.service.requests import Requests
from orchestrator.service.status import ConfigStatus, Status, StorageStatus
from orchestrator.service.supervisor import Supervisors
from orchestrator.state import lock
from orchestrator.state.catalogue import Catalogue
from orchestrator.state.journal import Journal

log = structlog.get_logger(__name__)

RECOVER_SECONDS = 60.0
"""How often it is tried to give back what dead runs hold."""


@contextlib.asynccontextmanager
async def opened(
    config: Config,
    *,
    connect: Connect = qmp.connect,
    recover: bool = True,
    supervise: bool = False,
    journal: Journal | None = None,
) -> AsyncIterator["Engine"]:
    """An engine that owns state_dir for the block; `connect` is how it reaches VMs. Raises StateError.

    `recover`: it puts right by itself what dead runs left of guests and grants. `supervise`: it looks after all
    VMs all the time, and does what it is asked for over the API, as the daemon does. `journal`: that of a
    state_dir that is owned already.
    """
    with contextlib.ExitStack() as stack:
        if journal is None:
            stack.enter_context(lock.owned(config.daemon.state_dir))
        engine = Engine(config, journal or Journal(config.daemon.state_dir), connect, supervise=supervise)
        async with engine.serving(recover=recover):
            yield engine


class Engine:
    """Runs backups of the configured VMs, each VM's one after the other."""

    def __init__(self, config: Config, journal: Journal, connect: Connect, *, supervise: bool) -> None:
        self._supervise = supervise
        self.catalogue = Catalogue(config.daemon.state_dir)
        self._journal = journal
        self._started = datetime.now(UTC)
        ledger = SqliteLedger(SqliteLedger.path(config.daemon.state_dir))
        self._controller = Controller({}, ledger, max_runs=config.daemon.max_runs, target_max_runs={})
        self.in_force = InForce(self._setup(config), self._controller)
        """The configuration, and what it comes to."""
        self.gates: defaultdict[str, aio.SharedLock] = defaultdict(aio.SharedLock)
        """Held by each run to a target; alone by who frees space there."""
        self._vm_locks: dict[str, asyncio.Lock] = {}
        self._live: dict[str, overview.Live] = {}
        self._lined_up: dict[str, overview.Live] = {}
        self.stopping = False
        """Whether vmfleece ends: its next start goes on with the jobs' turns that are cancelled then."""
        self.reconciler = Reconciler(
            in_force=self.in_force,
            catalogue=self.catalogue,
            journal=self._journal,
            controller=self._controller,
            connect=self._reach,
            running=lambda: {live.vm: run for run, live in self._live.items()},
            lock=self._vm_lock,
            guests=Guests(self._journal, self._reach, running=lambda: self._live),
        )
        """What finds all that dead runs have left, anywhere, and puts it right."""
        self._supervisors = Supervisors(connect, self.reconciler)
        self.jobs_under_way: Counter[str] = Counter()
        self.feed = Feed()
        self.pruning = Pruning(self.in_force, self._vm_lock, self.feed.merging)
        self.requests = Requests()
        self.metrics = Metrics(lambda: self.config, self.status)
        self.samples = samples.Samples()
        self._notifiers = Notifiers(config.notify)
        self._jobs = Jobs(self, self._notifiers)
        self._desk = Desk(self, Service.DAEMON if supervise else Service.COMMAND)
        self._served: server.Served | None = None

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.in_force.now.config

    def _setup(self, config: Config) -> Setup:
        """That with which it starts."""
        storages = drivers.storages(config)
        means = Means(
            # Of our own catalogue: another connection for each run would wait for the file's lock, which many
            # together do not all get in time.
            storages=drivers.storages_for_plans(
                config, storages, self.catalogue.results, self._controller.accounts.used_bytes
            ),
            targets=drivers.targets(config),
            controller=self._controller,
            is_ours=self.catalogue.knows,
            journal=self._journal,
            builds=Builds(),
            connect=self._reach,
        )
        return Setup(config, storages, means)

    @contextlib.asynccontextmanager
    async def serving(self, *, recover: bool) -> AsyncIterator[None]:
        """Put guests right, hold the ledger, look after VMs, and answer over the API, for the block."""
        with self.feed.listening():
            async with aio.background(*([self._guests_first()] if recover else [])):
                await self.enter(self._end_dead_runs)
                await self.enter(partial(self.metrics.remember, self.catalogue))
                async with (
                    self._controller.serving(),
                    self._supervisors.serving(self._looked_after(self.config)),
                    self._notifiers.serving(),
                    aio.background(*([self._recover()] if recover else [])),
                    server.served(self.config.daemon, self._desk) as self._served,
                    aio.background(
                        self.requests.serve(),
                        samples.serve(self.samples, self._storages_now),
                        *([self.metrics.serve()] if self._supervise else []),
                    ),
                ):
                    yield

    # --- the configuration ---

    async def reload(self, config: Config) -> change.Change:
        """Put a configuration in force. What is under way goes on with the one that it began with.

        Raises ConfigError with all that is against it; StateError, `listen-unusable`, and VmfleeceError,
        `token-file`, if the API cannot be served as it says. The one before is wholly in force then.
        """
        assert self._served is not None  # noqa: S101  `serving`
        await self._served.check(config.daemon)
        async with self._controller.at_rest():
            # Nothing is awaited in here: whoever begins something finds all of the one, or all of the other.
            self.in_force.check(config)
            self._served.take(config.daemon)
            changed = self.in_force.take(config)
            self._notifiers.follow(config.notify)
            self._supervisors.follow(self._looked_after(config))
        await self._served.settle()
        return changed

    def _looked_after(self, config: Config) -> Iterable[Vm]:
        return config.vm.values() if self._supervise else ()

    def _reach(self, path: Path, *, vm: str) -> AbstractAsyncContextManager[Monitor]:
        return self._supervisors.connect(path, vm=vm)

    def stop(self) -> None:
        """Begin nothing more that is asked for, and end what was: to be called before jobs are cancelled."""
        self.stopping = True
        self.requests.end()

    def under_way(self) -> list[dict[str, str]]:
        """The runs that are not over: `vm`, `run` and `phase`."""
        runs, _ = overview.runs_and_queue(self._live.values(), self._controller, (), ())
        return [{"vm": one.vm, "run": one.run, "phase": one.phase} for one in runs]

    def status(self) -> Status:
        """What is going on right now."""
        runs, queue = overview.runs_and_queue(
            self._live.values(), self._controller, self._lined_up.values(), self._jobs.pausing.values()
        )
        return Status(
            process=os.getpid(),
            started=self._started.isoformat(),
            storages=self._storages_now(),
            runs=runs,
            queue=queue,
            config=ConfigStatus(str(self.config.path), self.in_force.since.isoformat(), self.in_force.refused),
        )

    def _storages_now(self) -> tuple[StorageStatus, ...]:
        return overview.storage_statuses(self.in_force.storages(), self._controller.accounts)

    async def back_up(
        self,
        vm: str,
        options: RunOptions,
        *,
        on_progress: Callable[[Progress], None],
        run: str | None = None,
        hook: JobHook | None = None,
        setup: Setup | None = None,
    ) -> RunResult:
        """Back up one VM once. Failures are outcomes; cancellation undoes everything, then is raised.

        A run that is ended by `end_run` is undone, too; that is an outcome. `hook` is called before and after.
        `setup` is the configuration that names the VM and what is in `options`, if not the one in force.
        """
        setup = setup or self.in_force.now
        run = run or new_run_id()
        live = overview.Live(vm, run, setup.config.vm[vm].priority, options, datetime.now(UTC))

        def progressed(progress: Progress) -> None:
            live.progress = progress
            self.tell(progress, on_progress)

        try:
            with self.in_force.using(setup):
                result = await aio.unless(live.told_to_end(), self._back_up(live, setup, hook, progressed))
        except overview.RunCancelled:
            if live.result is not None:
                return live.result
            result = await self._never_began(live)
        finally:
            self.feed.forget(run)
        self.metrics.ended(result, job=options.job, target=options.target)
        await aio.finish(self.catalogue.in_thread(self._remember, result))
        return result

    async def _back_up(
        self, live: overview.Live, setup: Setup, hook: JobHook | None, progressed: Callable[[Progress], None]
    ) -> RunResult:
        vm, run, options = live.vm, live.run, live.options
        gate = self.gates[options.target]
        async with self._in_line(live):
            if gate.taken:
                waits_for = f"target {options.target}: the space of forgotten snapshots is being freed"
                with structlog.contextvars.bound_contextvars(vm=vm, run=run):
                    log.info("run.queued", reasons=[waits_for], obstacles=[])
                progressed(Progress(vm, run, Phase.QUEUED, waits_for=waits_for))
            async with gate.shared():
                ended: RunResult | None = None

                async def enter() -> None:
                    await aio.finish(self._enter_begun(live))
                    if hook is not None:
                        await hook.run_started(vm, run)

                def cancelled(result: RunResult) -> None:
                    nonlocal ended
                    ended = live.result = result
                    self.metrics.ended(result, job=options.job, target=options.target)
                    self._remember(result)

                try:
                    ended = await back_up(
                        setup.config.vm[vm],
                        options,
                        setup.means,
                        run=run,
                        on_progress=progressed,
                        enter=enter,
                        on_cancelled=cancelled,
                    )
                finally:
                    if hook is not None and ended is not None:
                        await aio.finish(hook.run_ended(ended))
                return ended

    @contextlib.asynccontextmanager
    async def _in_line(self, live: overview.Live) -> AsyncIterator[None]:
        """Have the VM for the block, with no other run of it beside."""
        self._lined_up[live.run] = live
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._vm_lock(live.vm))
            finally:
                del self._lined_up[live.run]
            live.started = datetime.now(UTC)
            self._live[live.run] = live
            stack.callback(self._live.pop, live.run)
            yield

    async def _never_began(self, live: overview.Live) -> RunResult:
        """What comes of a run that was ended while it waited for its turn."""
        await self._enter_begun(live)
        with structlog.contextvars.bound_contextvars(vm=live.vm, run=live.run):
            return never_began(live.vm, live.run, live.options, live.started)

    async def _enter_begun(self, live: overview.Live) -> None:
        begin = self.catalogue.begin
        await self.catalogue.in_thread(begin, live.run, live.vm, live.options.job, live.started)

    def end_run(self, run: str) -> bool:
        """Have a run end, which puts its VM right by itself; whether there is such a run, or try to come."""
        for waiting in (self._live, self._lined_up, self._jobs.pausing):
            if run in waiting:
                waiting[run].ending.set()
                return True
        return False

    def tell(self, progress: Progress, on_progress: Callable[[Progress], None]) -> None:
        """Tell whoever follows, and whoever asked for the run, how far it is."""
        self.feed.progress(progress)
        on_progress(progress)

    def _remember(self, result: RunResult) -> None:
        self._enter(partial(self.catalogue.finish, result))

    async def enter(self, entry: Callable[[], None]) -> None:
        """Enter something into the catalogue. What cannot be is no less so."""
        await self.catalogue.in_thread(self._enter, entry)

    def _enter(self, entry: Callable[[], None]) -> None:
        try:
            entry()
        except StateError as error:
            log.warning("catalogue.unusable", error=str(error))

    def _end_dead_runs(self) -> None:
        """Enter how the runs ended that were under way when a vmfleece was killed. Raises StateError."""
        for begun in self.catalogue.unended():
            error = ErrorReport(
                "vmfleece-gone",
                "vmfleece ended while this run was under way: it was killed, or the host lost its power",
                "nothing: what it left in the VM is taken out, and a job tries again when the daemon starts",
            )
            result = Facts().result(begun.vm, begun.run, started=begun.started, duration_seconds=0.0, error=error)
            target = self.config.job[begun.job].options.target if begun.job in self.config.job else None
            with structlog.contextvars.bound_contextvars(vm=begun.vm, run=begun.run):
                log_result(result, job=begun.job, target=target)
            self.catalogue.finish(result)

    def _vm_lock(self, vm: str) -> asyncio.Lock:
        return self._vm_locks.setdefault(vm, asyncio.Lock())

    async def run_job(
        self,
        name: str,
        vms: Mapping[str, int] | None = None,
        *,
        on_progress: Callable[[Progress], None] = lambda _progress: None,
    ) -> list[RunResult]:
        """Back up all VMs of a job, or those of `vms`, side by side as far as admission allows.

        The catalogue knows which it is not done with; `vms` says how often it was interrupted amid each (see
        `retry.after_restart`). Cancelled, it is done with all, unless that is because vmfleece is `stopping`.
        """
        self.jobs_under_way[name] += 1
        try:
            return await self._jobs.run(name, vms, on_progress)
        finally:
            self.jobs_under_way[name] -= 1

    async def _guests_first(self) -> None:
        """Continue and thaw what dead runs left paused or frozen, at once and until it is known to be done."""
        while True:
            await self._try(self.reconciler.guests.put_right())
            await asyncio.sleep(RECOVER_SECONDS)

    async def _recover(self) -> None:
        """Put right what dead runs hold where no supervisor does it. Runs until cancelled."""
        while True:
            await self._try(self.reconciler.put_stranded_right(but=self._supervisors.monitors))
            await asyncio.sleep(RECOVER_SECONDS)

    async def _try(self, work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except VmfleeceError as error:
            log.warning("reconcile.failed", error=str(error))
        except Exception:  # it must not end the service, which would start with it again
            log.exception("run.bug")
