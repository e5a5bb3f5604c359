"""Finding what dead runs have left, and putting it right. What is decided: `run.reconcile`.

The one mechanism for it: at start, after each connection to a VM (`supervisor`), from time to time, and as
`vmfleece cleanup`. Guests come first, and nobody waits for another VM that does not answer.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Collection, Container, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from orchestrator.admission.controller import Controller
from orchestrator.admission.ledger.base import Holding
from orchestrator.errors import MonitorError, NobodyThere, TargetError
from orchestrator.fleecing import rotation
from orchestrator.qemu.monitor import Connect, Monitor
from orchestrator.run import reconcile, survey
from orchestrator.run.reconcile import Act, Evidence, Reach, Repair, Vm
from orchestrator.service.guests import GUESTS, Guests, Repaired, attempt
from orchestrator.service.in_force import InForce
from orchestrator.state.catalogue import Catalogue
from orchestrator.state.journal import Intent, Journal
from orchestrator.target.base import Target

log = structlog.get_logger(__name__)

T = TypeVar("T")

ROUNDS = 3
AT_ONCE = 64
"""VMs that are asked side by side."""


@dataclass(frozen=True, slots=True)
class _Known(Container[str]):
    """All runs that were ever ours, of which nearly none is ever asked after."""

    catalogue: Catalogue

    def __contains__(self, run: object) -> bool:
        return self.catalogue.knows(str(run))


@dataclass(frozen=True, slots=True)
class Reconciler:
    """The engine's parts that it needs. `running` tells VMs' live runs.

    `lock` is held for a VM while something in its QEMU is put right: no run of it begins meanwhile.
    """

    in_force: InForce
    catalogue: Catalogue
    journal: Journal
    controller: Controller
    connect: Connect
    running: Callable[[], Mapping[str, str]]
    lock: Callable[[str], AbstractAsyncContextManager[object]]
    guests: Guests

    @property
    def monitors(self) -> dict[str, Path]:
        """The configured VMs' sockets by name."""
        return {name: vm.qmp for name, vm in self.in_force.now.config.vm.items()}

    @property
    def targets(self) -> Mapping[str, Target]:
        """The configured targets by name."""
        return self.in_force.now.targets

    # --- everything ---

    async def plan(self) -> list[Repair]:
        """What would be done now. Raises StateError."""
        planned = self._decide(intents=await self.journal.in_thread(self.journal.open))
        for found in await self._at_each(self._places(), self._plan_at):
            planned += found
        planned += await self._plan_elsewhere()
        order = list(Act)
        return sorted(planned, key=lambda repair: order.index(repair.act))

    async def put_right(self) -> list[Repaired]:
        """Plan and do it: guests first, then VM by VM, side by side. Raises StateError."""
        done = await self.guests.put_right()
        for repaired in await self._at_each(self._places(), self.put_vm_right):
            done += repaired
        return [*done, *await self.put_targets_right()]

    # --- one VM ---

    async def put_vm_right(self, vm: str, monitor: str) -> list[Repaired]:
        """Take out what dead runs left in the QEMU behind a monitor, and give back what they held there.

        Again while something new comes to light: bitmaps are seen once no filter is above them. Raises StateError.
        """
        done: list[Repaired] = []
        for _ in range(ROUNDS):
            told = {one.repair for one in done}
            news = [repair for repair in await self._plan_at(vm, monitor) if repair not in told]
            done += await self.carry_out(news)
            if all(repair.act is Act.NOTHING for repair in news):
                break
        for one in done:
            if one.repair.act is Act.NOTHING and self._held_at(monitor) and vm not in self.running():
                with structlog.contextvars.bound_contextvars(vm=vm, run=one.repair.subject):
                    log.warning("grant.unrecovered", error=one.repair.reason)
        return done

    async def owes(self, vm: str) -> bool:
        """Whether a run of a VM that is over has left something that it knew of. Raises StateError."""
        running = self.running().values()
        if any(one.owner.vm == vm for one in self._holdings()):
            return True
        intents = await self.journal.in_thread(self.journal.open)
        return any(one.vm == vm and one.run not in running for one in intents)

    async def put_stranded_right(self, *, but: Container[str]) -> None:
        """The same for each monitor at which dead runs hold grants, except those in `but`. Raises StateError."""
        await self._at_each({one: vm for one, vm in self._stranded().items() if one not in but}, self.put_vm_right)

    async def carry_out(self, repairs: Sequence[Repair]) -> list[Repaired]:
        """Do it, in this order. What fails stops nothing but that its VM's grants are given back."""
        done: list[Repaired] = []
        for repair in repairs:
            held = [one.error for one in done if one.error and one.repair.vm == repair.vm]
            if repair.act is Act.GIVE_BACK and held:  # its QEMU may still hold the image
                done.append(Repaired(repair, held[0]))
            else:
                done.append(await self._carry_out(repair))
        return done

    async def _plan_at(self, vm: str, monitor: str) -> list[Repair]:
        found = await self._look(vm, monitor)
        return self._decide(vms=[found] if found else [], holdings=self._held_at(monitor))

    async def _look(self, vm: str, monitor: str) -> Vm | None:
        """What is in its QEMU; None while it is backed up."""
        if vm in self.running():
            return None
        async with self.lock(vm):
            return await self._ask(vm, monitor)

    async def _ask(self, vm: str, monitor: str) -> Vm:
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

    # --- targets, and other hosts ---

    async def put_targets_right(self) -> list[Repaired]:
        """Remove what dead writers left on targets. Raises StateError."""
        return await self.carry_out(await self._plan_elsewhere())

    async def _plan_elsewhere(self) -> list[Repair]:
        here = socket.gethostname()
        others = [one for one in self._holdings() if one.owner.host != here]
        return self._decide(holdings=others, leftovers=await self._leftovers())

    async def _leftovers(self) -> dict[str, Sequence[str]]:
        found: dict[str, Sequence[str]] = {}
        for name, target in self.targets.items():
            try:
                found[name] = await target.leftovers()
            except TargetError as error:
                log.warning("target.unlisted", target=name, error=str(error))
        return found

    # --- deciding and acting ---

    def _decide(
        self,
        *,
        vms: Sequence[Vm] = (),
        intents: Sequence[Intent] = (),
        holdings: Sequence[Holding] = (),
        leftovers: Mapping[str, Sequence[str]] | None = None,
    ) -> list[Repair]:
        evidence = Evidence(vms, intents, holdings, leftovers or {})
        running = self.running().values()
        return reconcile.decide(evidence, host=socket.gethostname(), ours=_Known(self.catalogue), running=running)

    def _holdings(self) -> Collection[Holding]:
        return self.controller.accounts.stranded.values()

    def _held_at(self, monitor: str) -> list[Holding]:
        here = socket.gethostname()
        return [one for one in self._holdings() if (one.owner.host, one.owner.monitor) == (here, monitor)]

    def _stranded(self) -> dict[str, str]:
        """VMs by the monitors at which dead runs of this host hold grants."""
        here = socket.gethostname()
        return {one.owner.monitor: one.owner.vm for one in self._holdings() if one.owner.host == here}

    def _places(self) -> dict[str, str]:
        """VMs by monitor: those configured, and those that have been and where something may be left."""
        return self._stranded() | {str(path): vm for vm, path in self.monitors.items()}

    async def _at_each(
        self, places: Mapping[str, str], act: Callable[[str, str], Awaitable[list[T]]]
    ) -> list[list[T]]:
        turn = asyncio.Semaphore(AT_ONCE)

        async def at(vm: str, monitor: str) -> list[T]:
            async with turn:
                return await act(vm, monitor)

        return await asyncio.gather(*(at(vm, monitor) for monitor, vm in places.items()))

    async def _carry_out(self, repair: Repair) -> Repaired:
        if repair.act is Act.NOTHING:
            return Repaired(repair)
        return await attempt(repair, self._act)

    async def _act(self, repair: Repair) -> bool:
        """Whether it was still to be done, and is ours to do."""
        if repair.act in GUESTS:
            return await self.guests.act(repair)
        if repair.act is Act.CLEAR_TARGET:
            if target := self.targets.get(repair.subject):  # it may not be configured any more
                await target.clear()
            return target is not None
        async with self.lock(repair.vm):
            if repair.vm in self.running():  # a run that began meanwhile has seen to it
                return False
            return await self._act_on_vm(repair)

    async def _act_on_vm(self, repair: Repair) -> bool:
        """Whether it was ours to do: VM and target may not be configured any more."""
        match repair.act:
            case Act.TAKE_OUT:
                if (path := self._monitor_of(repair)) is None:
                    return False
                async with self.connect(path, vm=repair.vm) as monitor:
                    await survey.recover(monitor, repair.vm, self.catalogue.knows, path=path, journal=self.journal)
            case Act.SETTLE_BITMAPS:
                target, path = self.targets.get(repair.subject), self.monitors.get(repair.vm)
                if target is None or path is None:
                    return False
                listed = [one.id for one in await target.snapshots(repair.vm)]
                async with self.connect(path, vm=repair.vm) as monitor:
                    await rotation.settle(monitor, repair.subject, listed)
            case Act.GIVE_BACK:
                owners = [one for one in self.controller.stranded() if one.run == repair.subject]
                await self.controller.forget(owners)
        return True

    def _monitor_of(self, repair: Repair) -> Path | None:
        """A run that holds grants says itself where its VM was asked."""
        for owner in self.controller.stranded():
            if owner.run == repair.subject:
                return Path(owner.monitor)
        return self.monitors.get(repair.vm)
