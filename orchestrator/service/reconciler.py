"""Finding what dead runs have left, and putting it right. What is decided: `run.reconcile`."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import structlog

from orchestrator.admission.controller import Controller
from orchestrator.errors import MonitorError, NobodyThere, TargetError, VmfleeceError
from orchestrator.fleecing import rotation
from orchestrator.qemu.monitor import Monitor
from orchestrator.run import quiesce, reconcile, survey
from orchestrator.run.backup import Connect
from orchestrator.run.reconcile import Act, Evidence, Reach, Repair, Vm
from orchestrator.state.catalogue import Catalogue
from orchestrator.state.journal import Journal
from orchestrator.target.base import Target

log = structlog.get_logger(__name__)

ROUNDS = 3
AT_ONCE = 16
"""VMs that are asked side by side."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """What became of a repair. Without an `error` it was done; a repair that is `Act.NOTHING` is only told."""

    repair: Repair
    error: VmfleeceError | None = None


@dataclass(frozen=True, slots=True)
class Reconciler:
    """The engine's parts that it needs. `monitors` are the VMs' sockets by name; `running` tells VMs' live runs.

    `lock` is held for a VM while something in its QEMU is put right: no run of it begins meanwhile.
    """

    monitors: Mapping[str, Path]
    targets: Mapping[str, Target]
    catalogue: Catalogue
    journal: Journal
    controller: Controller
    connect: Connect
    running: Callable[[], Mapping[str, str]]
    lock: Callable[[str], AbstractAsyncContextManager[object]]

    async def plan(self) -> list[Repair]:
        """What would be done now. Raises StateError."""
        known = await asyncio.to_thread(self.catalogue.runs)
        running = self.running().values()
        return reconcile.decide(await self._look(), host=socket.gethostname(), ours=known, running=running)

    async def put_right(self) -> list[Repaired]:
        """Plan and do it, again while something new comes to light: bitmaps are seen once no filter is above them.

        Raises StateError.
        """
        done: list[Repaired] = []
        for _ in range(ROUNDS):
            told = {one.repair for one in done}
            news = [repair for repair in await self.plan() if repair not in told]
            done += await self.carry_out(news)
            if all(repair.act is Act.NOTHING for repair in news):
                break
        return done

    async def carry_out(self, repairs: Sequence[Repair]) -> list[Repaired]:
        """Do it, in this order. What fails stops nothing but that its VM's grants are given back."""
        done: list[Repaired] = []
        for repair in repairs:
            with structlog.contextvars.bound_contextvars(vm=repair.vm):
                held = [one.error for one in done if one.error and one.repair.vm == repair.vm]
                if repair.act is Act.GIVE_BACK and held:  # its QEMU may still hold the image
                    done.append(Repaired(repair, held[0]))
                else:
                    done.append(await self._carry_out(repair))
        return done

    async def _look(self) -> Evidence:
        """Raises StateError."""
        holdings = self.controller.accounts.stranded.values()
        places = {str(path): vm for vm, path in self.monitors.items()}
        places |= {one.owner.monitor: one.owner.vm for one in holdings if one.owner.host == socket.gethostname()}
        turn = asyncio.Semaphore(AT_ONCE)

        async def ask(monitor: str, vm: str) -> Vm | None:
            async with turn:
                if vm in self.running():
                    return None
                async with self.lock(vm):  # a monitor serves one client
                    return await self._ask(monitor, vm)

        asked = await asyncio.gather(*(ask(monitor, vm) for monitor, vm in places.items()))
        return Evidence(
            vms=[vm for vm in asked if vm is not None],
            intents=await asyncio.to_thread(self.journal.open),
            holdings=list(holdings),
            leftovers=await self._leftovers(),
        )

    async def _ask(self, monitor: str, vm: str) -> Vm:
        try:
            async with self.connect(Path(monitor), vm=vm) as connection:
                objects = await survey.our_objects(connection)
                return Vm(vm, monitor, Reach.ANSWERS, tuple(objects), tuple(await self._unsettled(connection, vm)))
        except NobodyThere:
            return Vm(vm, monitor, Reach.GONE)
        except MonitorError as error:
            return Vm(vm, monitor, Reach.SILENT, problem=error.message)

    async def _unsettled(self, connection: Monitor, vm: str) -> Collection[str]:
        found = []
        for name, target in self.targets.items():
            with contextlib.suppress(TargetError):  # a target that cannot be listed says nothing about bitmaps
                settlements = await rotation.look(connection, name, [one.id for one in await target.snapshots(vm)])
                # Without a base all would be removed: perhaps the target is only not mounted.
                if any(one.actions for one in settlements.values()) and all(
                    one.base is not None or not one.actions for one in settlements.values()
                ):
                    found.append(name)
        return found

    async def _leftovers(self) -> dict[str, Sequence[str]]:
        found: dict[str, Sequence[str]] = {}
        for name, target in self.targets.items():
            try:
                found[name] = await target.leftovers()
            except TargetError as error:
                log.warning("target.unlisted", target=name, error=str(error))
        return found

    async def _carry_out(self, repair: Repair) -> Repaired:
        if repair.act is Act.NOTHING:
            return Repaired(repair)
        try:
            async with self.lock(repair.vm) if repair.vm else contextlib.nullcontext():
                if repair.vm in self.running():
                    return Repaired(repair)  # a run that began meanwhile has seen to it
                await self._act(repair)
        except VmfleeceError as error:
            log.warning("repair.failed", act=repair.act, subject=repair.subject, error=str(error))
            return Repaired(repair, error)
        log.info("repair.done", act=repair.act, subject=repair.subject, reason=repair.reason)
        return Repaired(repair)

    async def _act(self, repair: Repair) -> None:
        match repair.act:
            case Act.THAW:
                await quiesce.recover(self.journal, running=self.running().values())
            case Act.TAKE_OUT:
                async with self.connect(self._monitor_of(repair), vm=repair.vm) as monitor:
                    await survey.recover(monitor, repair.vm, self.catalogue.knows)
            case Act.SETTLE_BITMAPS:
                listed = [one.id for one in await self.targets[repair.subject].snapshots(repair.vm)]
                async with self.connect(self.monitors[repair.vm], vm=repair.vm) as monitor:
                    await rotation.settle(monitor, repair.subject, listed)
            case Act.GIVE_BACK:
                owners = [one for one in self.controller.stranded() if one.run == repair.subject]
                await self.controller.forget(owners)
            case Act.CLEAR_TARGET:
                await self.targets[repair.subject].clear()

    def _monitor_of(self, repair: Repair) -> Path:
        """A run that holds grants says itself where its VM was asked."""
        for owner in self.controller.stranded():
            if owner.run == repair.subject:
                return Path(owner.monitor)
        return self.monitors[repair.vm]
