"""What has been done: runs with their results, and jobs' turns. SQLite in state_dir.

A run is entered before it touches its VM, so that whatever is found in a QEMU later can be told to be ours. So is
each VM of a job's turn: one that is there after a restart was not done with, whatever ended vmfleece.
Every method is one short transaction; the caller owns state_dir (see `lock`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.model import RunResult
from orchestrator.state.database import Database

VERSION = 3
SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY,
    vm TEXT NOT NULL,
    job TEXT,
    started TEXT NOT NULL,
    outcome TEXT,
    result TEXT
);
CREATE INDEX IF NOT EXISTS runs_by_start ON runs (started);
CREATE INDEX IF NOT EXISTS runs_by_vm ON runs (vm, job, started, outcome);
CREATE TABLE IF NOT EXISTS due (job TEXT PRIMARY KEY, last TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS turns (
    job TEXT NOT NULL,
    vm TEXT NOT NULL,
    restarts INTEGER NOT NULL,
    PRIMARY KEY (job, vm)
);
"""


@dataclass(frozen=True, slots=True)
class Begun:
    """A run that was entered and has not ended."""

    run: str
    vm: str
    job: str | None
    started: datetime


@dataclass(frozen=True, slots=True)
class Entry:
    """A run as it was entered; `outcome` and `result` (as JSON) None: it is not known how it ended."""

    run: str
    vm: str
    job: str | None
    started: str
    outcome: str | None
    result: dict[str, Any] | None


def _entry(row: tuple[Any, ...]) -> Entry:
    run, vm, job, started, outcome, result = row
    return Entry(run, vm, job, started, outcome, None if result is None else json.loads(result))


class Catalogue:
    """The file and its questions."""

    def __init__(self, state_dir: Path) -> None:
        self._database = Database(
            self.path(state_dir),
            SCHEMA,
            version=VERSION,
            lost="history is lost, and what a killed vmfleece left in a QEMU is then taken for somebody else's",
            stays_open=False,
        )
        self.in_thread = self._database.in_thread
        with self._database.transaction():
            pass  # what is wrong with it is told now, before a run

    @staticmethod
    def path(state_dir: Path) -> Path:
        """Where it is."""
        return state_dir / "catalogue.sqlite"

    def begin(self, run: str, vm: str, job: str | None, started: datetime) -> None:
        """Enter a run that is about to start."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO runs (run, vm, job, started) VALUES (?, ?, ?, ?)",
                (run, vm, job, started.isoformat()),
            )

    def finish(self, result: RunResult) -> None:
        """Enter how a run ended."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE runs SET outcome = ?, result = ? WHERE run = ?",
                (result.outcome, json.dumps(result.as_json()), result.run),
            )

    def unended(self) -> list[Begun]:
        """The runs of which no end was entered, oldest first: those under way, and those of dead processes."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                "SELECT run, vm, job, started FROM runs WHERE outcome IS NULL ORDER BY started"
            ).fetchall()
        return [Begun(run, vm, job, datetime.fromisoformat(started)) for run, vm, job, started in rows]

    def knows(self, run: str) -> bool:
        """Whether a run was ever entered."""
        with self._database.transaction() as connection:
            found = connection.execute("SELECT 1 FROM runs WHERE run = ?", (run,)).fetchone()
        return found is not None

    def runs(self) -> set[str]:
        """All runs that were ever entered."""
        with self._database.transaction() as connection:
            return {row[0] for row in connection.execute("SELECT run FROM runs")}

    def results(self, vm: str) -> list[dict[str, Any]]:
        """The results of a VM's ended runs, oldest first."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                "SELECT result FROM runs WHERE vm = ? AND result IS NOT NULL ORDER BY started", (vm,)
            ).fetchall()
        return [json.loads(row[0]) for row in rows]

    def begin_turn(self, job: str, vms: Mapping[str, int]) -> None:
        """Enter which VMs a job is about to back up, in place of what its last turn left; see `unfinished`."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM turns WHERE job = ?", (job,))
            rows = [(job, vm, restarts) for vm, restarts in vms.items()]
            connection.executemany("INSERT INTO turns (job, vm, restarts) VALUES (?, ?, ?)", rows)

    def end_turn(self, job: str, vm: str) -> None:
        """Enter that a job is done with a VM."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM turns WHERE job = ? AND vm = ?", (job, vm))

    def unfinished(self, job: str) -> dict[str, int]:
        """The VMs that a job's turn is not done with, each with how often vmfleece was started anew meanwhile."""
        with self._database.transaction() as connection:
            return dict(connection.execute("SELECT vm, restarts FROM turns WHERE job = ?", (job,)).fetchall())

    def entries(
        self,
        *,
        vm: str | None = None,
        job: str | None = None,
        outcomes: Sequence[str | None] | None = None,
        limit: int,
    ) -> list[Entry]:
        """Runs, the latest first: of a VM, of a job, with one of these outcomes (None: it is not known)."""
        conditions = ["1"]
        values: list[str | int | None] = []
        for column, value in (("vm", vm), ("job", job)):
            if value is not None:
                conditions.append(f"{column} = ?")
                values.append(value)
        if outcomes is not None:
            conditions.append("(" + " OR ".join("outcome IS ?" for _ in outcomes) + ")")
            values += outcomes
        with self._database.transaction() as connection:
            rows = connection.execute(
                f"SELECT run, vm, job, started, outcome, result FROM runs WHERE {' AND '.join(conditions)}"  # noqa: S608  our own columns
                " ORDER BY started DESC LIMIT ?",
                (*values, limit),
            ).fetchall()
        return [_entry(row) for row in rows]

    def last_runs(self, *, outcomes: Sequence[str] | None = None) -> list[Entry]:
        """The last ended run of each VM by each job, and by hand; with one of these outcomes, if that is asked."""
        condition = "outcome IS NOT NULL" if outcomes is None else f"outcome IN ({', '.join('?' * len(outcomes))})"
        with self._database.transaction() as connection:
            # The status page asks this again and again: of a long history only the index is read, and these rows.
            rows = connection.execute(
                "SELECT run, vm, job, started, outcome, result FROM"  # noqa: S608  our own columns
                " (SELECT DISTINCT vm AS its_vm, job AS its_job FROM runs) JOIN runs ON run ="
                f" (SELECT run FROM runs WHERE vm = its_vm AND job IS its_job AND {condition}"
                " ORDER BY started DESC LIMIT 1)",
                tuple(outcomes or ()),
            ).fetchall()
        return [_entry(row) for row in rows]

    def entry(self, run: str) -> Entry | None:
        """One run, if it was ever entered."""
        with self._database.transaction() as connection:
            row = connection.execute(
                "SELECT run, vm, job, started, outcome, result FROM runs WHERE run = ?", (run,)
            ).fetchone()
        return _entry(row) if row else None

    def last_due(self, job: str) -> datetime | None:
        """The last time a job was due and was started, or came to its turn."""
        with self._database.transaction() as connection:
            row = connection.execute("SELECT last FROM due WHERE job = ?", (job,)).fetchone()
        return datetime.fromisoformat(row[0]) if row else None

    def set_last_due(self, job: str, due: datetime) -> None:
        """Remember that a job's turn at this time was taken."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO due (job, last) VALUES (?, ?) ON CONFLICT (job) DO UPDATE SET last = excluded.last",
                (job, due.isoformat()),
            )
