"""A ledger that lasts as long as its process: for tests, and as the contract's plainest reading."""

import time
from collections.abc import Mapping, Sequence

from orchestrator.admission.ledger.base import Grant, Holding, Ledger, Owner


class MemoryLedger(Ledger):
    """See the contract, `Ledger`. Nothing here waits, so each call is a transaction."""

    def __init__(self) -> None:
        self._holdings: dict[str, Holding] = {}

    async def take(self, owner: Owner, grants: Mapping[str, Grant], quotas: Mapping[str, int]) -> bool:
        wanted: dict[str, int] = {}
        for grant in grants.values():
            wanted[grant.storage] = wanted.get(grant.storage, 0) + grant.size_bytes
        for storage, size_bytes in wanted.items():
            if self._granted_bytes(storage, but=owner.run) + size_bytes > quotas[storage]:
                return False
        self._holdings[owner.run] = Holding(owner, dict(grants), time.time())
        return True

    async def resize(self, run: str, disk: str, size_bytes: int, quota_bytes: int) -> int:
        holding = self._holdings.get(run)
        if holding is None or disk not in holding.grants:
            return 0
        grant = holding.grants[disk]
        free_bytes = quota_bytes - self._granted_bytes(grant.storage)
        now_bytes = min(size_bytes, grant.size_bytes + max(0, free_bytes))
        grants = {**holding.grants, disk: Grant(grant.storage, now_bytes)}
        self._holdings[run] = Holding(holding.owner, grants, holding.beat_seconds)
        return now_bytes

    async def give_back(self, run: str, disk: str | None = None) -> None:
        holding = self._holdings.pop(run, None)
        if holding is None or disk is None:
            return
        grants = {name: grant for name, grant in holding.grants.items() if name != disk}
        if grants:
            self._holdings[run] = Holding(holding.owner, grants, holding.beat_seconds)

    async def beat(self, runs: Sequence[str]) -> None:
        for run in runs:
            if run in self._holdings:
                holding = self._holdings[run]
                self._holdings[run] = Holding(holding.owner, holding.grants, time.time())

    async def holdings(self) -> list[Holding]:
        return [self._holdings[run] for run in sorted(self._holdings)]

    async def close(self) -> None:
        pass

    def _granted_bytes(self, storage: str, *, but: str | None = None) -> int:
        return sum(
            grant.size_bytes
            for run, holding in self._holdings.items()
            if run != but
            for grant in holding.grants.values()
            if grant.storage == storage
        )
