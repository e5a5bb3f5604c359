"""Lock files: who works on the repository, and who may do so beside them. Pure.

Locks are hints among those who keep to them: write one, wait a moment, and look whether somebody else did, too. An
exclusive lock stands beside no other; others stand beside each other. Each is written anew every few minutes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from orchestrator.target.restic import envelope, fields
from orchestrator.target.restic.crypto import Key
from orchestrator.target.restic.fields import UINT32

STALE_AFTER = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class LockFile:
    """Who holds a lock, and since when (or since when it was written anew)."""

    time: datetime
    exclusive: bool
    hostname: str
    username: str
    pid: int
    uid: int = 0
    gid: int = 0

    def described(self) -> str:
        """Who, where and since when, for messages."""
        kind = "an exclusive lock" if self.exclusive else "a lock"
        since = fields.write_time(self.time.replace(microsecond=0))
        who = f"process {self.pid} of {self.username or 'unknown'}"
        return f"{kind} of {who} on {self.hostname or 'unknown'} since {since}"


def seal(lock: LockFile, key: Key) -> bytes:
    """Return a lock's file."""
    document: dict[str, Any] = {
        "time": fields.write_time(lock.time),
        "exclusive": lock.exclusive,
        "hostname": lock.hostname,
        "username": lock.username,
        "pid": lock.pid,
    }
    document |= {name: value for name, value in (("uid", lock.uid), ("gid", lock.gid)) if value}
    return envelope.seal(key, document)


def open_sealed(stored: bytes, key: Key, *, identity: bytes, file: str) -> LockFile:
    """Read a lock's file. Raises Damaged."""
    envelope.check_name(stored, identity=identity, file=file)
    document = envelope.open_sealed(key, stored, file=file)
    return LockFile(
        document.time("time"),
        document.truth("exclusive"),
        document.text("hostname", ""),
        document.text("username", ""),
        document.integer("pid", 0, largest=UINT32),
        document.integer("uid", 0, largest=UINT32),
        document.integer("gid", 0, largest=UINT32),
    )


def conflicts(ours: LockFile, other: LockFile) -> bool:
    """Whether two locks may not be held at once, however old: restic does not look at that either."""
    return ours.exclusive or other.exclusive


def stale(lock: LockFile, *, now: datetime, hostname: str, alive: Callable[[int], bool]) -> bool:
    """Whether whoever held a lock is gone: not written anew for half an hour, or of a dead process of this host.

    `alive` says whether a process of this host lives.
    """
    return now - lock.time > STALE_AFTER or abandoned(lock, hostname=hostname, alive=alive)


def abandoned(lock: LockFile, *, hostname: str, alive: Callable[[int], bool]) -> bool:
    """Whether a lock is surely nobody's: of a process of this host that is dead.

    Age alone is not sure: a host that slept may go on with what it began, and not all of restic's versions look.
    """
    return lock.hostname == hostname and not alive(lock.pid)
