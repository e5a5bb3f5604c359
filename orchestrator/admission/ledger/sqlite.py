"""The ledger of one host: a SQLite file in state_dir (WAL, synchronous=FULL)."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import TypeVar

from orchestrator import aio
from orchestrator.admission.ledger.base import Grant, Holding, Ledger, Owner
from orchestrator.state.database import Database

T = TypeVar("T")

VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS owners (
    run TEXT PRIMARY KEY,
    host TEXT NOT NULL,
    process INTEGER NOT NULL,
    vm TEXT NOT NULL,
    monitor TEXT NOT NULL,
    beat_seconds REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS grants (
    run TEXT NOT NULL REFERENCES owners (run) ON DELETE CASCADE,
    disk TEXT NOT NULL,
    storage TEXT NOT NULL,
    size_bytes INTEGER NOT NULL CHECK (size_bytes >= 0),
    PRIMARY KEY (run, disk)
);
CREATE INDEX IF NOT EXISTS grants_of_storage ON grants (storage);
"""
LOST = "then also restart the VMs whose backup was cut off, since their QEMUs may hold fleecing images"


class SqliteLedger(Ledger):
    """See the contract, `Ledger`. Each call is one transaction, in a thread."""

    def __init__(self, path: Path) -> None:
        self._database = Database(path, SCHEMA, version=VERSION, lost=LOST, stays_open=True)

    @staticmethod
    def path(state_dir: Path) -> Path:
        """Where it is."""
        return state_dir / "ledger.sqlite"

    async def take(self, owner: Owner, grants: Mapping[str, Grant], quotas: Mapping[str, int]) -> bool:
        def transact(connection: Connection) -> bool:
            connection.execute("DELETE FROM owners WHERE run = ?", (owner.run,))
            connection.execute(
                "INSERT INTO owners (run, host, process, vm, monitor, beat_seconds) VALUES (?, ?, ?, ?, ?, ?)",
                (owner.run, owner.host, owner.process, owner.vm, owner.monitor, time.time()),
            )
            connection.executemany(
                "INSERT INTO grants (run, disk, storage, size_bytes) VALUES (?, ?, ?, ?)",
                [(owner.run, disk, grant.storage, grant.size_bytes) for disk, grant in grants.items()],
            )
            for storage in {grant.storage for grant in grants.values()}:
                if _granted_bytes(connection, storage) > quotas[storage]:
                    raise _Refused
            return True

        try:
            return await self._transact(transact)
        except _Refused:
            return False

    async def resize(self, run: str, disk: str, size_bytes: int, quota_bytes: int) -> int:
        def transact(connection: Connection) -> int:
            row = connection.execute(
                "SELECT storage, size_bytes FROM grants WHERE run = ? AND disk = ?", (run, disk)
            ).fetchone()
            if row is None:
                return 0
            storage, before_bytes = row
            free_bytes = max(0, quota_bytes - _granted_bytes(connection, storage))
            now_bytes = min(size_bytes, int(before_bytes) + free_bytes)
            connection.execute(
                "UPDATE grants SET size_bytes = ? WHERE run = ? AND disk = ?", (now_bytes, run, disk)
            )
            return now_bytes

        return await self._transact(transact)

    async def give_back(self, run: str, disk: str | None = None) -> None:
        def transact(connection: Connection) -> None:
            if disk is not None:
                connection.execute("DELETE FROM grants WHERE run = ? AND disk = ?", (run, disk))
            if disk is None or not connection.execute("SELECT 1 FROM grants WHERE run = ?", (run,)).fetchone():
                connection.execute("DELETE FROM owners WHERE run = ?", (run,))

        await self._transact(transact)

    async def beat(self, runs: Sequence[str]) -> None:
        def transact(connection: Connection) -> None:
            now = time.time()
            connection.executemany(
                "UPDATE owners SET beat_seconds = ? WHERE run = ?", [(now, run) for run in runs]
            )

        await self._transact(transact)

    async def holdings(self) -> list[Holding]:
        def transact(connection: Connection) -> list[Holding]:
            grants: dict[str, dict[str, Grant]] = {}
            for run, disk, storage, size_bytes in connection.execute(
                "SELECT run, disk, storage, size_bytes FROM grants ORDER BY run, disk"
            ):
                grants.setdefault(run, {})[disk] = Grant(storage, size_bytes)
            owners = connection.execute(
                "SELECT host, process, run, vm, monitor, beat_seconds FROM owners ORDER BY run"
            )
            return [Holding(Owner(*row[:5]), grants.get(row[2], {}), row[5]) for row in owners]

        return await self._transact(transact)

    async def close(self) -> None:
        await aio.finish(self._database.in_thread(self._database.close))

    async def _transact(self, transact: Callable[[Connection], T]) -> T:
        def work() -> T:
            with self._database.transaction() as connection:
                return transact(connection)

        return await aio.finish(self._database.in_thread(work))


class _Refused(Exception):
    """A quota forbids it: the transaction is rolled back."""


def _granted_bytes(connection: Connection, storage: str) -> int:
    question = "SELECT coalesce(sum(size_bytes), 0) FROM grants WHERE storage = ?"
    return int(connection.execute(question, (storage,)).fetchone()[0])
