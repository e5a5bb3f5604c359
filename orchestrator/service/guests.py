"""Guests that dead runs left paused or frozen: the first that is put right, whichever other VMs do not answer.

The daemon does it before it imports most of itself (`first`), so this imports little; whoever did not answer then
is seen to by the `Reconciler`, by the same means.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from orchestrator.errors import NobodyThere, VmfleeceError
from orchestrator.fleecing import pauser
from orchestrator.qemu import qmp
from orchestrator.qemu.monitor import Connect
from orchestrator.run import quiesce, reconcile
from orchestrator.run.reconcile import Act, Repair
from orchestrator.state import journal as journals
from orchestrator.state import lock
from orchestrator.state.journal import Intent, Journal

log = structlog.get_logger(__name__)

FIRST_SECONDS = 1.0
"""How long a start waits for guests at most; usually it is milliseconds."""
GUESTS = {Act.CONTINUE: journals.Act.PAUSE, Act.THAW: journals.Act.FREEZE}
"""What puts a guest right, and what had been done to it."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """What became of a repair. Without an `error` it was done; a repair that is `Act.NOTHING` is only told."""

    repair: Repair
    error: VmfleeceError | None = None


@contextlib.asynccontextmanager
async def first(state_dir: Path, *, connect: Connect = qmp.connect) -> AsyncIterator[Journal]:
    """Own state_dir for the block, and put guests right before it as far as they answer soon. Raises StateError.

    Cancelled, it leaves what it has not done to the next one.
    """
    with lock.owned(state_dir):
        journal = Journal(state_dir)
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                await Guests(journal, connect, running=list).put_right()
        except TimeoutError:
            pass
        except VmfleeceError as error:  # it is tried again, and must not end the service
            log.warning("reconcile.failed", error=str(error))
        yield journal


@dataclass(frozen=True, slots=True)
class Guests:
    """What finds them in the journal, and puts them right. `running` tells which runs are not dead."""

    journal: Journal
    connect: Connect
    running: Callable[[], Collection[str]]
    _turns: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    """Held while a VM's guest is put right: an agent serves one client."""

    async def put_right(self, vm: str | None = None) -> list[Repaired]:
        """Continue what is paused, and thaw what is frozen: all guests at once, or one VM's. Raises StateError."""
        intents = await self.journal.in_thread(self.journal.open)
        repairs: defaultdict[str, list[Repair]] = defaultdict(list)
        for repair in reconcile.of_guests([one for one in intents if vm in (None, one.vm)], self.running()):
            repairs[repair.vm].append(repair)
        done = await asyncio.gather(*(self._one_after_the_other(of_vm) for of_vm in repairs.values()))
        return [repaired for of_vm in done for repaired in of_vm]

    async def _one_after_the_other(self, repairs: Iterable[Repair]) -> list[Repaired]:
        return [await attempt(repair, self.act) for repair in repairs]

    async def act(self, repair: Repair) -> bool:
        """Put a guest right; whether it was still to be done. Raises VmfleeceError."""
        done = False
        async with self._turns[repair.vm]:
            for intent in await self.journal.in_thread(self.journal.open):  # somebody may just have done it
                if (intent.act, intent.vm, intent.run) != (GUESTS[repair.act], repair.vm, repair.subject):
                    continue
                if intent.act is journals.Act.FREEZE:
                    await quiesce.recover(intent, self.journal)
                else:
                    await self._continue(intent)
                done = True
        return done

    async def _continue(self, intent: Intent) -> None:
        with contextlib.suppress(NobodyThere):  # so is the guest that was paused
            async with self.connect(pauser.monitor_of(intent), vm=intent.vm) as monitor:
                await pauser.go_on(monitor, intent)
        await self.journal.in_thread(self.journal.settled, intent)


async def attempt(repair: Repair, act: Callable[[Repair], Awaitable[bool]]) -> Repaired:
    """Carry a repair out, and log what comes of it. `act` tells whether there was something to do."""
    with structlog.contextvars.bound_contextvars(vm=repair.vm):
        try:
            acted = await act(repair)
        except VmfleeceError as error:
            log.warning("repair.failed", act=repair.act, subject=repair.subject, error=str(error))
            return Repaired(repair, error)
        if acted:
            log.info("repair.done", act=repair.act, subject=repair.subject, reason=repair.reason)
        return Repaired(repair)
