"""SQLite files in state_dir: durable, one short transaction at a time, and errors that say what to do."""

import asyncio
import contextlib
import contextvars
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from orchestrator.errors import StateDamaged, StateError

P = ParamSpec("P")
T = TypeVar("T")

BUSY_SECONDS = 10.0
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Where several open a new file at once, SQLite refuses some without waiting (sqlite3PagerSharedLock)."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


class Database:
    """One file. Its methods block; threads take turns. What many tasks do at once is best done `in_thread`.

    `schema` may be run more than once, by those who open a new file at the same time.
    `lost` is what is lost with the file if somebody moves it away, for the message about a damaged one.
    `stays_open`: for a file that is written often, since closing it costs another write to the disk.
    """

    def __init__(self, path: Path, schema: str, *, version: int, lost: str, stays_open: bool) -> None:
        self._path = path
        self._schema = schema
        self._version = version
        self._lost = lost
        self._stays_open = stays_open
        self._connection: sqlite3.Connection | None = None
        self._turn = threading.RLock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=path.name)

    async def in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `asyncio.to_thread`, but in the file's own thread.

        A thousand runs that begin together would else take all threads, each to wait for its turn with the file,
        and an image that must grow would come after them.
        """
        run = partial(contextvars.copy_context().run, work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction that writes: committed at the end of the block, rolled back if it raises.

        Raises StateError where the file cannot be used, StateDamaged if what is in it is the reason.
        """
        with self._turn:
            try:
                connection = self._connection = self._connection or self._open()
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                except BaseException:
                    if connection.in_transaction:  # a full disk has rolled it back already
                        connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
            except sqlite3.Error as error:
                self.close()  # what it was in the middle of is rolled back
                damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED
                raise (StateDamaged if damaged else StateError)(
                    f"cannot use {self._path}: {error}",
                    hint=f"see whether its file system is full; a damaged file can be moved away: {self._lost}",
                    code="state-unusable",
                ) from error
            finally:
                if not self._stays_open:
                    self.close()

    def _open(self) -> sqlite3.Connection:
        with contextlib.suppress(OSError):  # SQLite says better what is wrong
            self._path.touch(mode=0o600)  # whatever umask says: names of VMs and what befell them
        # Autocommit: transactions are begun by us.
        connection = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False, timeout=BUSY_SECONDS
        )
        try:
            _use_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            if found > self._version:
                raise StateError(
                    f"{self._path} was written by a newer vmfleece (format {found}, here {self._version})",
                    hint="use that one; an older vmfleece would damage it",
                    code="state-unusable",
                )
            if found < self._version:
                connection.executescript(
                    f"BEGIN IMMEDIATE; {self._schema}; PRAGMA user_version = {self._version}; COMMIT"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close the file; it is opened again when it is needed again."""
        with self._turn:
            if self._connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.close()
                self._connection = None

    def set_aside(self) -> Path:
        """Give a damaged file another name, by which it can be looked at, and return that. Raises StateError."""
        aside = self._path.with_name(f"{self._path.name}.damaged")
        with self._turn:
            self.close()
            try:
                self._path.replace(aside)
                for suffix in ("-wal", "-shm"):
                    self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            except OSError as error:
                raise StateError(
                    f"cannot rename {self._path}, which is damaged: {error.strerror}",
                    hint="vmfleece must be able to write there",
                    code="state-unusable",
                ) from error
        return aside
