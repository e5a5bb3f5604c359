"""The async shell around `decide`: who waits, who holds what, and waking up those that may start.

Invariant: the grants of a storage never add up to more than its quota. Everything that changes them happens
between two awaits on one loop, so no lock is needed. A lease that was admitted is released exactly once.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from itertools import count

import structlog

from orchestrator.admission import decide
from orchestrator.errors import StorageError
from orchestrator.storage.base import ImageFile, Space, Storage

log = structlog.get_logger(__name__)

RECHECK_SECONDS = 5.0
"""Others use the storage's file system as well: what did not fit may fit later without our doing."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What one disk's image may occupy, on which storage; `file` once it exists."""

    storage: str
    size_bytes: int
    file: ImageFile | None = None


@dataclass(slots=True)
class Lease:
    """What one run holds: its slots and a grant for each fleeced disk."""

    request: decide.Request
    grants: dict[str, Grant] = field(default_factory=dict)


@dataclass(slots=True)
class _Waiter:
    request: decide.Request
    disks: Mapping[str, Grant]
    on_wait: Callable[[str], None]
    reason: str = ""
    lease: Lease | None = None
    admitted: asyncio.Event = field(default_factory=asyncio.Event)
    context: Context = field(default_factory=copy_context)


class Controller:
    """Admits runs to storages, targets and the host, and extends their grants."""

    def __init__(
        self,
        storages: Mapping[str, Storage],
        *,
        max_runs: int | None,
        target_max_runs: Mapping[str, int | None],
    ) -> None:
        self._storages = storages
        self._max_runs = max_runs
        self._target_max_runs = target_max_runs
        self._leases: list[Lease] = []
        self._waiters: list[_Waiter] = []
        self._arrivals = count()
        self._unreadable: set[str] = set()

    @asynccontextmanager
    async def admit(
        self,
        *,
        run: str,
        vm: str,
        target: str,
        priority: int,
        disks: Mapping[str, Grant],
        on_wait: Callable[[str], None],
    ) -> AsyncIterator[Lease]:
        """Wait for everything the run needs to start, hold it for the block, then give it all back.

        `on_wait` is told why it waits, each time the reason changes. Cancellation while waiting holds nothing.
        """
        totals: dict[str, int] = {}
        for grant in disks.values():
            totals[grant.storage] = totals.get(grant.storage, 0) + grant.size_bytes
        request = decide.Request(run, vm, target, priority, next(self._arrivals), totals)
        waiter = _Waiter(request, disks, on_wait)
        self._waiters.append(waiter)
        try:
            self._settle()
            while waiter.lease is None:
                try:
                    async with asyncio.timeout(RECHECK_SECONDS):
                        await waiter.admitted.wait()
                except TimeoutError:
                    self._settle()
            yield waiter.lease
        finally:
            if waiter.lease is None:
                self._waiters.remove(waiter)
            else:
                self._leases.remove(waiter.lease)
            self._settle()

    def attach(self, lease: Lease, disk: str, file: ImageFile) -> None:
        """Say which file a grant is used by: what it occupies already is not reserved twice."""
        lease.grants[disk] = Grant(lease.grants[disk].storage, lease.grants[disk].size_bytes, file)

    def grow(self, lease: Lease, disk: str, wanted_bytes: int) -> int:
        """Extend a grant towards `wanted_bytes` in all; returns the new size, the old one if refused."""
        grant = lease.grants[disk]
        more = decide.growth(self._storage_state(grant.storage), max(0, wanted_bytes - grant.size_bytes))
        lease.grants[disk] = Grant(grant.storage, grant.size_bytes + more, grant.file)
        return grant.size_bytes + more

    def shrink(self, lease: Lease, disk: str, size_bytes: int) -> None:
        """Take back an extension that QEMU did not carry out."""
        grant = lease.grants[disk]
        lease.grants[disk] = Grant(grant.storage, size_bytes, grant.file)
        self._settle()

    def release(self, lease: Lease, disk: str) -> None:
        """Give back one disk's grant before the run ends. May be called again."""
        if lease.grants.pop(disk, None) is not None:
            self._settle()

    def granted_bytes(self, storage: str) -> int:
        """What all runs together hold of a storage."""
        return sum(
            grant.size_bytes
            for lease in self._leases
            for grant in lease.grants.values()
            if grant.storage == storage
        )

    def waiting(self) -> dict[str, str]:
        """Why each waiting run waits."""
        return {waiter.request.run: waiter.reason for waiter in self._waiters}

    def _settle(self) -> None:
        """Admit whoever may start now and tell the others why not."""
        decision = decide.admissible(self._state(), [waiter.request for waiter in self._waiters])
        admitted = {request.run for request in decision.admitted}
        for waiter in [waiter for waiter in self._waiters if waiter.request.run in admitted]:
            self._waiters.remove(waiter)
            waiter.lease = Lease(waiter.request, dict(waiter.disks))
            self._leases.append(waiter.lease)
            waiter.admitted.set()
        for waiter in self._waiters:
            reason = decision.waiting[waiter.request.run]
            if reason != waiter.reason:
                waiter.reason = reason
                # Whoever settles is another run: what is logged must carry the waiting run's names.
                waiter.context.run(waiter.on_wait, reason)

    def _state(self) -> decide.State:
        on_target: dict[str, int] = {}
        for lease in self._leases:
            on_target[lease.request.target] = on_target.get(lease.request.target, 0) + 1
        return decide.State(
            decide.Slots(len(self._leases), self._max_runs),
            {name: decide.Slots(on_target.get(name, 0), limit) for name, limit in self._target_max_runs.items()},
            {name: self._storage_state(name) for name in self._storages},
        )

    def _storage_state(self, name: str) -> decide.StorageState:
        storage = self._storages[name]
        grants = [grant for lease in self._leases for grant in lease.grants.values() if grant.storage == name]
        granted_bytes = sum(grant.size_bytes for grant in grants)
        used_bytes = sum(grant.file.used_bytes() for grant in grants if grant.file)
        space = self._space(storage)
        return decide.StorageState(
            quota_bytes=storage.quota_bytes,
            granted_bytes=granted_bytes,
            spare_bytes=space.free_bytes - space.floor_bytes - (granted_bytes - used_bytes),
            runs=sum(1 for lease in self._leases if name in lease.request.grants),
            max_runs=storage.max_runs,
        )

    def _space(self, storage: Storage) -> Space:
        """A storage that cannot be asked grants nothing; runs on other storages go on."""
        try:
            space = storage.space()
        except StorageError as error:
            if storage.name not in self._unreadable:
                self._unreadable.add(storage.name)
                log.warning("storage.unreadable", storage=storage.name, error=str(error))
            return Space(free_bytes=0, floor_bytes=0)
        self._unreadable.discard(storage.name)
        return space
