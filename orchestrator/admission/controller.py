"""The async shell around `decide`: who waits, who holds what, and waking up those that may start.

Invariants: the grants of a storage never add up to more than its quota: the ledger refuses that. What is granted
is in the ledger before anybody uses it, and leaves it only once nobody can use it any more. One thing is done at a
time (`_turn`); what was begun is finished, also if who asked for it is cancelled.

Growing comes before admitting: each admission is a turn of its own, and only one of all who ask for admissions
waits for turns, so a grant that must grow waits for one at most; and what growing grants were refused is not
given to new runs.
"""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from itertools import count

import structlog

from orchestrator import aio
from orchestrator.admission import decide, estimate
from orchestrator.admission.accounts import Accounts
from orchestrator.admission.lease import Lease, QuotaLowered, Waiting
from orchestrator.admission.ledger.base import Grant, Holding, Ledger, Owner
from orchestrator.admission.queue import HOST, Queue, Request, Slot
from orchestrator.errors import FleecingError, StateError
from orchestrator.storage.base import ImageFile, Storage
from orchestrator.units import format_size

log = structlog.get_logger(__name__)

WATCH_SECONDS = 1.0
"""Others use the file systems as well: how often these are looked at while anybody holds or wants something."""
BEAT_TURNS = 10
"""A heartbeat each so many looks."""
WORTH_BYTES = 1 << 20
"""A run whose images occupy less frees nothing by giving way."""


@dataclass(slots=True, eq=False)
class _Waiter:
    owner: Owner
    request: Request
    grants: Mapping[str, Grant]
    on_wait: Callable[[Waiting], None]
    told: frozenset[str] | None = None
    lease: Lease | None = None
    error: StateError | QuotaLowered | None = None
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    context: Context = field(default_factory=copy_context)


class Controller:
    """Admits runs to storages, targets and the host, and extends their grants.

    `clock` is in seconds: how long requests wait. `accounts` answers what is held.
    """

    def __init__(
        self,
        storages: Mapping[str, Storage],
        ledger: Ledger,
        *,
        max_runs: int | None,
        target_max_runs: Mapping[str, int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.accounts = Accounts(storages)
        self._ledger = ledger
        self._clock = clock
        self._queue = Queue(_limits(storages, max_runs, target_max_runs))
        self._waiters: dict[str, _Waiter] = {}
        self._newcomers: dict[str, _Waiter] = {}
        self._arrivals = count()
        self._turn = asyncio.Lock()
        self._settling = asyncio.Lock()
        self._settled = True
        self._busy = asyncio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Take over what the ledger says that dead runs hold, and watch the storages, for the block.

        Raises StateError where the ledger cannot be used.
        """
        try:
            await self._reload()
            for holding in self.accounts.stranded.values():
                _warn_of(holding)
            async with aio.background(self._watch()):
                yield
        finally:
            await self._ledger.close()

    # --- limits ---

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """Nothing is granted for the block, in which limits may be changed; then those start who may by now."""
        async with self._turn:
            yield
        await aio.finish(self._settle())

    def limit(
        self,
        storages: Mapping[str, Storage],
        *,
        max_runs: int | None,
        target_max_runs: Mapping[str, int | None],
    ) -> None:
        """Have other limits from now on; only `at_rest`, unless they only name more or fewer storages.

        Among `storages` are all of which somebody holds or wants something. What is granted stays, also where it
        is more than may be by now: then nothing new is granted until it fits. A run that waits for more than it
        could ever get is told QuotaLowered.
        """
        self.accounts.storages = storages
        waiting, self._queue = self._queue, Queue(_limits(storages, max_runs, target_max_runs))
        for request in waiting:
            self._queue.add(request)
            if self._too_much(request):
                self._decided(self._waiters[request.run], QuotaLowered())

    def _too_much(self, request: Request) -> bool:
        quotas = self._quotas
        return any(size_bytes > quotas[name] for name, size_bytes in request.grants.items())

    @property
    def _quotas(self) -> dict[str, int]:
        return {name: storage.quota_bytes for name, storage in self.accounts.storages.items()}

    # --- runs ---

    @asynccontextmanager
    async def admit(
        self,
        *,
        run: str,
        vm: str,
        target: str,
        priority: int,
        disks: Mapping[str, Grant],
        on_wait: Callable[[Waiting], None],
        monitor: str = "",
    ) -> AsyncIterator[Lease]:
        """Wait for everything the run needs to start, hold it for the block, then give it all back.

        `on_wait` is told why it waits, each time something else keeps it from starting. `monitor` is where the VM
        can be asked if we die. Cancellation while waiting holds nothing. Raises StateError where the ledger cannot
        be used, QuotaLowered where it waits for more than there may be by now (see `limit`).
        """
        totals: dict[str, int] = {}
        for grant in disks.values():
            totals[grant.storage] = totals.get(grant.storage, 0) + grant.size_bytes
        request = Request(run, vm, target, priority, self._clock(), next(self._arrivals), totals)
        if self._too_much(request):
            raise QuotaLowered  # since it was planned
        owner = Owner(socket.gethostname(), os.getpid(), run, vm, monitor)
        waiter = self._waiters[run] = _Waiter(owner, request, disks, on_wait)
        self._newcomers[run] = waiter
        self._queue.add(request)
        self._busy.set()
        try:
            await aio.finish(self._settle())
            await waiter.decided.wait()
            if waiter.error is not None:
                raise waiter.error
            assert waiter.lease is not None  # noqa: S101  decided, without an error
            yield waiter.lease
        finally:
            await aio.finish(self._leave(waiter))

    async def _leave(self, waiter: _Waiter) -> None:
        run = waiter.request.run
        async with self._turn:
            lease = waiter.lease  # only now: it may have been admitted while it waited for its turn to leave
            if self._waiters.pop(run, None) is not None:
                self._queue.remove(run)
                self._newcomers.pop(run, None)
            if lease is not None:
                if lease.grants and not lease.stranded:
                    await self._give_back(lease)
                del self.accounts.leases[run]
                if lease.grants:
                    holding = Holding(waiter.owner, dict(lease.grants), time.time())
                    self.accounts.stranded[run] = holding
                    _warn_of(holding)
        await self._settle()

    async def _give_back(self, lease: Lease, disk: str | None = None) -> None:
        """Give back one disk's grant, or all of them; they stay where the ledger cannot be written."""
        try:
            await self._ledger.give_back(lease.request.run, disk)
        except StateError as error:
            lease.stranded = True
            log.warning("ledger.unusable", error=str(error))
            return
        for name in list(lease.grants) if disk is None else [disk]:
            lease.drop(name)

    # --- grants of admitted runs ---

    def attach(self, lease: Lease, disk: str, file: ImageFile) -> None:
        """Say which file a grant is used by: what it occupies already is not reserved twice."""
        lease.files[disk] = file

    async def grow(self, lease: Lease, disk: str, wanted_bytes: int) -> int:
        """Extend a grant towards `wanted_bytes` in all, by whole clusters; returns its size now.

        What is refused is kept from new runs until it was asked for again, or the disk is done.
        """
        return await aio.finish(self._grow(lease, disk, wanted_bytes))

    async def _grow(self, lease: Lease, disk: str, wanted_bytes: int) -> int:
        async with self._turn:
            grant = lease.grants[disk]
            lease.unmet_bytes.pop(disk, None)
            missing_bytes = max(0, wanted_bytes - grant.size_bytes)
            more_bytes = estimate.whole(decide.growth(self.accounts.storage_state(grant.storage), missing_bytes))
            if more_bytes:
                await self._resize(lease, disk, grant.size_bytes + more_bytes)
            size_bytes = lease.grants[disk].size_bytes
            if size_bytes < wanted_bytes:
                lease.unmet_bytes[disk] = wanted_bytes - size_bytes
                lease.room.clear()
            return size_bytes

    async def shrink(self, lease: Lease, disk: str, size_bytes: int) -> None:
        """Take back an extension that QEMU did not carry out."""

        async def act() -> None:
            async with self._turn:
                await self._resize(lease, disk, size_bytes)
            await self._settle()

        await aio.finish(act())

    async def _resize(self, lease: Lease, disk: str, size_bytes: int) -> None:
        """Resize a grant as far as its quota allows; it stays as it is where the ledger cannot be written."""
        grant = lease.grants[disk]
        try:
            size_bytes = await self._ledger.resize(
                lease.request.run, disk, size_bytes, self._quotas[grant.storage]
            )
        except StateError as error:
            log.warning("ledger.unusable", error=str(error))
            return
        lease.grants[disk] = replace(grant, size_bytes=size_bytes)

    async def release(self, lease: Lease, disk: str) -> None:
        """Give back one disk's grant before the run ends. May be called again."""

        async def act() -> None:
            async with self._turn:
                if disk in lease.grants:
                    lease.unmet_bytes.pop(disk, None)  # it grows no more, also if the ledger cannot be written
                    await self._give_back(lease, disk)
            await self._settle()

        await aio.finish(act())

    # --- grants of dead runs ---

    def stranded(self) -> list[Owner]:
        """Whose grants are kept although their runs are over: a QEMU of this host may still hold their images."""
        host = socket.gethostname()
        return [holding.owner for holding in self.accounts.stranded.values() if holding.owner.host == host]

    async def forget(self, owners: Sequence[Owner]) -> None:
        """Give back the grants of dead runs of which nothing lives any more. Raises StateError."""

        async def act() -> None:
            async with self._turn:
                for owner in owners:
                    if owner.run in self.accounts.stranded:
                        await self._ledger.give_back(owner.run)
                        holding = self.accounts.stranded.pop(owner.run)
                        log.info(
                            "grant.recovered", vm=owner.vm, run=owner.run, granted_bytes=holding.granted_bytes
                        )
            await self._settle()

        await aio.finish(act())

    # --- deciding ---

    def waiting(self) -> dict[str, Waiting]:
        """Why each waiting run waits, in order."""
        decision = self._decide()
        first = {request.line: decision.obstacles(request) for request in decision.stopped()}
        return {
            request.run: Waiting(first.get(request.line, ()), self._queue.ahead(request))
            for request in self._queue
        }

    def _decide(self) -> decide.Decision:
        return decide.decide(self.accounts.state(self._queue.storages()), self._queue)

    async def _settle(self) -> None:
        """Admit whoever may start now, and tell the others what they lack: once for all who ask meanwhile."""
        self._settled = False
        async with self._settling:
            if not self._settled:
                self._settled = True
                await self._admit_in_turns()

    async def _admit_in_turns(self) -> None:
        while self._queue:
            async with self._turn:
                decision = self._decide()
                if not decision.admitted:
                    self._tell(decision)  # not before: those that were admitted are holders, too
                    break
                if not await self._start(self._waiters[decision.admitted[0].run]):
                    break
        for lease in self.accounts.leases.values():
            storages = {lease.grants[disk].storage for disk in lease.unmet_bytes}
            if any(self.accounts.storage_state(name).free_bytes for name in storages):
                lease.room.set()

    async def _start(self, waiter: _Waiter) -> bool:
        """Grant it what it asked for; whether it waits no more."""
        request = waiter.request
        try:
            if waiter.grants and not await self._ledger.take(waiter.owner, waiter.grants, self._quotas):
                await self._reload()  # another host was faster
                return False
        except StateError as error:
            self._decided(waiter, error)
        else:
            waiter.lease = self.accounts.leases[request.run] = Lease(request, dict(waiter.grants))
            self._decided(waiter)
        return True

    def _decided(self, waiter: _Waiter, error: StateError | QuotaLowered | None = None) -> None:
        """It waits no more."""
        run = waiter.request.run
        waiter.error = error
        self._queue.remove(run)
        del self._waiters[run]
        self._newcomers.pop(run, None)
        waiter.decided.set()

    async def _reload(self) -> None:
        """What others hold, as the ledger has it."""
        holdings = await self._ledger.holdings()
        self.accounts.stranded = {
            holding.owner.run: holding for holding in holdings if holding.owner.run not in self.accounts.leases
        }

    def _tell(self, decision: decide.Decision) -> None:
        """Tell the first of each line what it lacks, if that is something new, and newcomers that they wait."""
        for first in decision.stopped():
            self._tell_one(self._waiters[first.run], Waiting(decision.obstacles(first)))
        for waiter in self._newcomers.values():
            if waiter.told is None:
                self._tell_one(waiter, Waiting((), self._queue.ahead(waiter.request)))
        self._newcomers.clear()

    def _tell_one(self, waiter: _Waiter, waiting: Waiting) -> None:
        lacks = frozenset(obstacle.resource for obstacle in waiting.obstacles)
        if lacks != waiter.told:
            waiter.told = lacks
            # Whoever settles is another run: what is logged must carry the waiting run's names.
            waiter.context.run(waiter.on_wait, waiting)

    # --- watching ---

    async def _watch(self) -> None:
        """Look at the storages while anybody holds or wants something of them. Runs until cancelled."""
        for turn in count():
            if not self.accounts.leases and not self._waiters:
                self._busy.clear()
                await self._busy.wait()
            await asyncio.sleep(WATCH_SECONDS)
            try:
                async with self._turn:
                    if turn % BEAT_TURNS == 0:
                        await self._ledger.beat(list(self.accounts.leases))
                    await self._reload()
            except StateError as error:
                log.warning("ledger.unusable", error=str(error))
            for name in self._quotas:
                self._keep_floor(name)
            await aio.finish(self._settle())

    def _keep_floor(self, name: str) -> None:
        """Have the last run in order give way if others have filled the file system below its floor."""
        space = self.accounts.space(name)
        self.accounts.used_bytes(name)
        leases = [lease for lease in self.accounts.leases.values() if name in lease.request.grants]
        if space is None or space.free_bytes >= space.floor_bytes or any(lease.gives_way for lease in leases):
            return
        worth = [lease for lease in leases if lease.used_bytes(name) >= WORTH_BYTES]
        if not worth:
            return
        last = max(worth, key=lambda lease: lease.request.rank)
        log.warning(
            "storage.low",
            storage=name,
            free_bytes=space.free_bytes,
            floor_bytes=space.floor_bytes,
            gives_way=last.request.run,
        )
        last.give_way(
            FleecingError(
                f"storage {name}: {format_size(space.free_bytes)} free on its file system, less than its min_free"
                f" ({format_size(space.floor_bytes)}); this run came last in order and gave way",
                hint="free some space there, since others write there as well, or lower the storage's quota",
                code="storage-low",
            )
        )


def _limits(
    storages: Mapping[str, Storage], max_runs: int | None, target_max_runs: Mapping[str, int | None]
) -> dict[Slot, int]:
    limits = {HOST: max_runs}
    limits |= {Slot("target", name): limit for name, limit in target_max_runs.items()}
    limits |= {Slot("storage", name): storage.max_runs for name, storage in storages.items()}
    return {slot: limit for slot, limit in limits.items() if limit is not None}


def _warn_of(holding: Holding) -> None:
    log.warning(
        "grant.stranded",
        vm=holding.owner.vm,
        run=holding.owner.run,
        owner_host=holding.owner.host,
        owner_process=holding.owner.process,
        granted_bytes=holding.granted_bytes,
    )
