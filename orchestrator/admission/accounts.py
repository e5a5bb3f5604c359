"""What is held right now, and what the storages still have to give: the facts that decisions are made of.

Only `controller` changes them. What a dead run holds counts like what a live one holds.
"""

from collections import defaultdict
from collections.abc import Mapping

import structlog

from orchestrator.admission.decide import Holder, State, StorageState
from orchestrator.admission.lease import Lease
from orchestrator.admission.ledger.base import Grant, Holding
from orchestrator.admission.queue import Line
from orchestrator.errors import StorageError
from orchestrator.storage.base import Space, Storage

log = structlog.get_logger(__name__)


class Accounts:
    """By run, `leases` are what live runs hold, `stranded` what dead ones (or other hosts' runs) hold."""

    leases: dict[str, Lease]
    stranded: dict[str, Holding]

    def __init__(self, storages: Mapping[str, Storage]) -> None:
        self.leases = {}
        self.stranded = {}
        self.storages = storages
        self._peaks: defaultdict[str, int] = defaultdict(int)
        self._unreadable: set[str] = set()

    def state(self, storages: set[str]) -> State:
        """What a decision about these storages depends on."""
        return State(self._running(), self._storage_states(storages))

    def _running(self) -> Mapping[Line, list[dict[str, int]]]:
        """What each live run holds of its storages, by line."""
        running = defaultdict(list)
        for lease in self.leases.values():
            held = {name: _size_on(name, lease.grants) for name in lease.request.grants}
            running[lease.request.line].append(held)
        return running

    def storage_state(self, name: str) -> StorageState:
        """One storage right now. One that cannot be asked grants nothing; runs on other storages go on."""
        return self._storage_states({name})[name]

    def _storage_states(self, names: set[str]) -> dict[str, StorageState]:
        holders: dict[str, list[Holder]] = {name: [] for name in names}
        unmet_bytes = dict.fromkeys(names, 0)
        used_bytes = dict.fromkeys(names, 0)
        for run, lease in self.leases.items():
            for name in names.intersection(lease.request.grants):
                if size_bytes := _size_on(name, lease.grants):
                    holders[name].append(Holder(lease.request.vm, run, size_bytes))
                unmet_bytes[name] += lease.unmet_on(name)
                used_bytes[name] += lease.used_bytes(name)
        for run, holding in self.stranded.items():
            for name in names.intersection(grant.storage for grant in holding.grants.values()):
                holders[name].append(Holder(holding.owner.vm, run, _size_on(name, holding.grants), over=True))
        return {
            name: self._storage_state(name, tuple(holders[name]), used_bytes[name], unmet_bytes[name])
            for name in names
        }

    def _storage_state(
        self, name: str, holders: tuple[Holder, ...], used_bytes: int, unmet_bytes: int
    ) -> StorageState:
        self._peaks[name] = max(self._peaks[name], used_bytes)
        granted_bytes = sum(holder.size_bytes for holder in holders)
        space = self.space(name)
        spare_bytes = 0
        if space is not None:
            spare_bytes = space.free_bytes - space.floor_bytes - (granted_bytes - used_bytes)
        return StorageState(self.storages[name].quota_bytes, granted_bytes, spare_bytes, unmet_bytes, holders)

    def space(self, name: str) -> Space | None:
        """A storage's file system; None if it cannot be asked."""
        try:
            space = self.storages[name].space()
        except StorageError as error:
            if name not in self._unreadable:
                self._unreadable.add(name)
                log.warning("storage.unreadable", storage=name, error=str(error))
            return None
        self._unreadable.discard(name)
        return space

    def granted_bytes(self, storage: str) -> int:
        """What all runs together hold of a storage, dead ones included."""
        live_bytes = sum(_size_on(storage, lease.grants) for lease in self.leases.values())
        return live_bytes + self.stranded_bytes(storage)

    def stranded_bytes(self, storage: str) -> int:
        """What dead runs hold of a storage."""
        return sum(_size_on(storage, holding.grants) for holding in self.stranded.values())

    def used_bytes(self, storage: str) -> int:
        """What the images of live runs really occupy."""
        used_bytes = sum(lease.used_bytes(storage) for lease in self.leases.values())
        self._peaks[storage] = max(self._peaks[storage], used_bytes)
        return used_bytes

    def peak_bytes(self, storage: str) -> int:
        """The most that the images of live runs were seen to occupy."""
        return self._peaks[storage]

    def runs(self, storage: str) -> int:
        """How many runs under way use a storage."""
        return sum(storage in lease.request.grants for lease in self.leases.values())


def _size_on(storage: str, grants: Mapping[str, Grant]) -> int:
    return sum(grant.size_bytes for grant in grants.values() if grant.storage == storage)
