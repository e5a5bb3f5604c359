"""What we are about to do to a guest that must not stay so, written before it is done. SQLite in state_dir.

An entry that is there after a restart, or although its run is over, says what has to be put right: whether the act
was done is not known, so putting it right must do no harm either way.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from sqlite3 import Connection
from typing import TypeVar

import structlog

from orchestrator import aio
from orchestrator.errors import StateDamaged
from orchestrator.state.database import Database

log = structlog.get_logger(__name__)

T = TypeVar("T")
Row = tuple[int, str, str, str, str]

VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS intents (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    act TEXT NOT NULL,
    vm TEXT NOT NULL,
    run TEXT NOT NULL,
    subject TEXT NOT NULL
);
"""


class Act(StrEnum):
    """What is done, and has to be undone whatever happens to us."""

    FREEZE = "freeze"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True)
class Intent:
    """An entry. `subject` is what the act is done through.

    Of a freeze, the path of the agent's socket; of a pause, the QEMU process (`Monitor.process`), a blank and the
    path of its monitor.
    """

    id: int
    act: Act
    vm: str
    run: str
    subject: str


class Journal:
    """The file. Its methods block, each for one short durable transaction. Raises StateError.

    A damaged file is set aside, and what can be read of it goes on in a new one: guests are not left alone for it.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "journal.sqlite"
        lost = "what a killed vmfleece left is then not put right by itself"
        self._database = Database(self._path, SCHEMA, version=VERSION, lost=lost, stays_open=False)
        self.in_thread = self._database.in_thread
        self._turn = threading.Lock()
        self.lost = False
        """Whether this process found it damaged, and could read nothing of it."""

    def intend(self, act: Act, *, vm: str, run: str, subject: str) -> Intent:
        """Enter what is about to be done."""

        def enter(connection: Connection) -> Intent:
            cursor = connection.execute(
                "INSERT INTO intents (act, vm, run, subject) VALUES (?, ?, ?, ?)", (act, vm, run, subject)
            )
            assert cursor.lastrowid is not None  # noqa: S101  it was inserted
            return Intent(cursor.lastrowid, act, vm, run, subject)

        return self._transact(enter)

    def settled(self, intent: Intent) -> None:
        """Remove what was undone. Nothing to do if it is gone."""
        self._transact(lambda connection: connection.execute("DELETE FROM intents WHERE id = ?", (intent.id,)))

    def open(self) -> list[Intent]:
        """What is not known to be undone, oldest first."""
        return [Intent(number, Act(act), *rest) for number, act, *rest in self._transact(_rows)]

    def _transact(self, transact: Callable[[Connection], T]) -> T:
        with self._turn:
            try:
                with self._database.transaction() as connection:
                    return transact(connection)
            except StateDamaged as error:
                self._begin_anew(error)
            with self._database.transaction() as connection:
                return transact(connection)

    def _begin_anew(self, error: StateDamaged) -> None:
        kept = self._legible()
        aside = self._database.set_aside()
        with self._database.transaction() as connection:
            connection.executemany(
                "INSERT INTO intents (id, act, vm, run, subject) VALUES (?, ?, ?, ?, ?)", kept or []
            )
        self.lost = kept is None
        count = None if kept is None else len(kept)
        log.error("journal.damaged", path=str(aside), kept=count, error=error.message)

    def _legible(self) -> list[Row] | None:
        """The entries of a damaged file; None if they are what is damaged."""
        try:
            with contextlib.closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)) as connection:
                return [row for row in _rows(connection) if row[1] in set(Act)]
        except sqlite3.Error:
            return None


def _rows(connection: Connection) -> list[Row]:
    return connection.execute("SELECT id, act, vm, run, subject FROM intents ORDER BY id").fetchall()


@dataclass(frozen=True, slots=True)
class Promise:
    """An act as it will be entered: by whoever does it, right before."""

    journal: Journal
    act: Act
    vm: str
    run: str
    subject: str

    async def enter(self) -> Intent:
        """Raises StateError. Cancelled, it is not entered."""
        entering = self.journal.in_thread(
            self.journal.intend, self.act, vm=self.vm, run=self.run, subject=self.subject
        )
        return await aio.acquire(entering, self.settled)

    async def settled(self, intent: Intent) -> None:
        """Raises StateError."""
        await self.journal.in_thread(self.journal.settled, intent)
