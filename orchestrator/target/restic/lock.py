"""Holding a lock of the repository, so that nobody prunes what we write or read.

Ours are never exclusive: several runs, and `restic backup`, go on beside each other, while `restic prune`,
`forget` and `check` refuse. A lock is written anew every five minutes, and `restic unlock` may take away one
that was not for 30 minutes. So whoever holds one asks `check` before each write that counts, and ends by itself
once it is lost.

`restic unlock` sends SIGHUP to the process that a lock names, if its own host has that name: a process that holds
a lock must not die of SIGHUP, nor take it for a reason to stop.
"""

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NoReturn

from orchestrator import aio
from orchestrator.target.restic import lock_file
from orchestrator.target.restic.access import this_host, this_user
from orchestrator.target.restic.backend.base import Backend, File, Kind
from orchestrator.target.restic.crypto import Key
from orchestrator.target.restic.errors import BackendError, Damaged, FileMissing, LockLost, RepositoryLocked
from orchestrator.target.restic.lock_file import LockFile

_LARGEST_PID = 1 << 22


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to wait before looking again, before writing anew, before trying that again, before giving up."""

    settle_seconds: float = 0.2
    refresh_seconds: float = 5 * 60
    retry_seconds: float = 30
    give_up_seconds: float = 22 * 60


class Lock:
    """One lock that we hold. `left` is why its file could not be removed in the end, if so; None otherwise."""

    def __init__(self, backend: Backend, key: Key, pace: Pace) -> None:
        self._backend, self._key, self._pace = backend, key, pace
        self._files: list[File] = []  # what we may have written, the newest last
        self._refreshed = 0.0
        self._reason = ""
        self._changed = asyncio.Event()
        self.left: BackendError | None = None

    def check(self) -> None:
        """Raise LockLost if it does not protect us any more. May be called from any thread."""
        age_seconds = _now() - self._refreshed
        if not self._reason and age_seconds > self._pace.give_up_seconds:
            self._reason = f"it was not renewed for {age_seconds:.0f} s"
        if self._reason:
            raise LockLost(
                f"our lock of the repository at {self._backend.place} is lost: {self._reason}",
                hint="back up again; what was written is used then, or freed by `vmfleece target reclaim`",
            )

    async def lost(self) -> NoReturn:
        """Raise LockLost once that is so; for `aio.unless`. Cancelling it leaves the lock as it is."""
        while True:
            self.check()
            left_seconds = self._refreshed + self._pace.give_up_seconds - _now()
            # The loop's clock stands still while the host sleeps, ours does not: look in between.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.01, min(left_seconds, self._pace.refresh_seconds))):
                    await self._changed.wait()

    async def acquire(self) -> None:
        """List, write, wait, list. Raises RepositoryLocked and BackendError; `release` what it left."""
        await _finish(self._refuse_conflicts)
        await _finish(self._write)
        await asyncio.sleep(self._pace.settle_seconds)
        await _finish(self._refuse_conflicts)
        await _finish(self._backend.clean)

    async def keep(self) -> None:
        """Renew it until it is lost. Cancelling it ends that."""
        wait_seconds = self._pace.refresh_seconds
        while not self._reason:
            await asyncio.sleep(wait_seconds)
            try:
                await _finish(self._renew)
                wait_seconds = self._pace.refresh_seconds
            except BackendError:
                wait_seconds = self._pace.retry_seconds  # until `check` gives up
            except LockLost:
                self._changed.set()

    def release(self) -> None:
        """Remove what is left of it. Blocks; may be called again."""
        self.left = None
        for file in list(self._files):
            try:
                self._backend.remove(file)
                self._files.remove(file)
            except BackendError as error:
                self.left = error

    def _renew(self) -> None:
        self.check()
        if self._files[-1] not in {listed.file for listed in self._backend.list(Kind.LOCKS)}:
            self._reason = "somebody removed its file"
            self.check()
        old = list(self._files)
        self._write()
        for file in old:
            with contextlib.suppress(BackendError):  # tried again at the next turn
                self._backend.remove(file)
                self._files.remove(file)

    def _write(self) -> None:
        began = _now()
        content = lock_file.seal(_ours(), self._key)
        file = File(Kind.LOCKS, hashlib.sha256(content).digest())
        before = list(self._files)
        self._files.insert(0, file)  # may be written although saving fails
        self._backend.save(file, content)
        self._files = [*before, file]
        self._refreshed = began

    def _refuse_conflicts(self) -> None:
        for file, other in _others(self._backend, self._key, self._files):
            if isinstance(other, Damaged):
                raise RepositoryLocked(
                    f"the repository at {self._backend.place} is locked, and the lock cannot be read: {file}",
                    hint="if nobody works on it: `restic unlock --remove-all`",
                )
            if lock_file.conflicts(_ours(), other):
                gone = lock_file.stale(other, now=datetime.now(UTC), hostname=this_host(), alive=alive)
                raise RepositoryLocked(
                    f"the repository at {self._backend.place} is locked: {other.described()}",
                    hint="take its lock away, since it seems to be gone: `restic unlock`"
                    if gone
                    else "wait until it has ended",
                )


@contextlib.asynccontextmanager
async def held(backend: Backend, key: Key, *, pace: Pace | None = None) -> AsyncIterator[Lock]:
    """Hold a lock for the block. Raises RepositoryLocked and BackendError before it.

    The block goes on when the lock is lost: it asks `check`, or waits for `lost` beside its work. At the end the
    lock is removed whatever happened; if that fails `left` says why, and no error hides the block's.
    """
    lock = Lock(backend, key, pace or Pace())
    try:
        await lock.acquire()
        async with aio.background(lock.keep()):
            yield lock
    finally:
        await _finish(lock.release)


def remove_abandoned(backend: Backend, key: Key) -> int:
    """Remove locks of this host's dead processes; return how many. Blocks.

    restic leaves all locks to `restic unlock`, so one of ours that was killed would stop `prune` until then.
    """
    count = 0
    for file, lock in _others(backend, key, ()):
        if isinstance(lock, LockFile) and lock_file.abandoned(lock, hostname=this_host(), alive=alive):
            backend.remove(file)
            count += 1
    return count


def alive(pid: int) -> bool:
    """Whether a process of this host lives."""
    if not 0 < pid <= _LARGEST_PID:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _others(
    backend: Backend, key: Key, ours: "list[File] | tuple[()]"
) -> Iterator[tuple[File, LockFile | Damaged]]:
    """The locks that are there. One that vanished meanwhile is none, and neither is an empty file."""
    for listed in backend.list(Kind.LOCKS):
        file = listed.file
        if file in ours or not listed.size_bytes:
            continue
        try:
            yield file, lock_file.open_sealed(backend.read(file), key, identity=file.identity, file=file.path)
        except FileMissing:
            continue
        except Damaged as error:
            yield file, error


def _ours() -> LockFile:
    now = datetime.now(UTC)
    return LockFile(now, False, this_host(), this_user(), os.getpid(), os.geteuid(), os.getegid())


def _now() -> float:
    """Return seconds that go on while the host sleeps, and never jump."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def _finish(work: Callable[[], object]) -> None:
    """A thread cannot be cancelled: a lock written after we stopped waiting for it would be nobody's."""
    await aio.finish(asyncio.to_thread(work))
