"""What we are about to do to a guest that must not stay so, written before it is done. SQLite in state_dir.

An entry that is there after a restart, or although its run is over, says what has to be put right: whether the act
was done is not known, so putting it right must do no harm either way.
"""

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from orchestrator import aio
from orchestrator.state.database import Database

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
    """The file. Its methods block, each for one short durable transaction. Raises StateError."""

    def __init__(self, state_dir: Path) -> None:
        path = state_dir / "journal.sqlite"
        lost = "what a killed vmfleece left is then not put right by itself"
        self._database = Database(path, SCHEMA, version=VERSION, lost=lost, stays_open=False)

    def intend(self, act: Act, *, vm: str, run: str, subject: str) -> Intent:
        """Enter what is about to be done."""
        with self._database.transaction() as connection:
            cursor = connection.execute(
                "INSERT INTO intents (act, vm, run, subject) VALUES (?, ?, ?, ?)", (act, vm, run, subject)
            )
            assert cursor.lastrowid is not None  # noqa: S101  it was inserted
            return Intent(cursor.lastrowid, act, vm, run, subject)

    def settled(self, intent: Intent) -> None:
        """Remove what was undone. Nothing to do if it is gone."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM intents WHERE id = ?", (intent.id,))

    def open(self) -> list[Intent]:
        """What is not known to be undone, oldest first."""
        with self._database.transaction() as connection:
            rows = connection.execute("SELECT id, act, vm, run, subject FROM intents ORDER BY id").fetchall()
        return [Intent(number, Act(act), vm, run, subject) for number, act, vm, run, subject in rows]


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
        entering = asyncio.to_thread(self.journal.intend, self.act, vm=self.vm, run=self.run, subject=self.subject)
        return await aio.acquire(entering, self.settled)

    async def settled(self, intent: Intent) -> None:
        """Raises StateError."""
        await asyncio.to_thread(self.journal.settled, intent)
