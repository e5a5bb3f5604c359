"""The contract of a ledger: who holds which grants of which storages.

Written so that several hosts that share storages can share a ledger (a database server): whether a grant fits is
decided inside the ledger's own transaction, never by what a client remembers. What an implementation promises:

- *Within the quota.* However many clients call at once, a call never makes the grants of a storage add up to more
  than the quota that it passes.
- *All or nothing.* `take` grants everything or nothing, `resize` and `give_back` take effect as a whole.
- *Durable.* What a call returned survives the death of any process, and power loss (but of the ledger in memory).
- *Idempotent.* Every call may be made again after an error, with the same arguments: nothing is granted twice.
- *Cancellation.* A cancelled call has taken effect as a whole or not at all when CancelledError is raised; who
  needs to know which asks `holdings`.
- *Dead owners.* A grant stays until it is given back, however long its owner is dead: a QEMU may still hold the
  image. Only who knows that nothing of a run lives any more may give its grants back. `beat` says when an owner
  was last alive.

Errors: StateError where the ledger cannot be used; nothing was changed then, or it was changed as a whole.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grant:
    """The bytes of a storage that one disk's fleecing image may occupy at most."""

    storage: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a grant is. `process` is the process id on `host`; `monitor` is where its VM can be asked."""

    host: str
    process: int
    run: str
    vm: str
    monitor: str


@dataclass(frozen=True, slots=True)
class Holding:
    """All that a run holds, by disk. `beat_seconds` is when its owner last said that it lives (Unix time)."""

    owner: Owner
    grants: Mapping[str, Grant]
    beat_seconds: float

    @property
    def granted_bytes(self) -> int:
        """All of it."""
        return sum(grant.size_bytes for grant in self.grants.values())


class Ledger(abc.ABC):
    """See the module for what it promises. Run ids are unique over all hosts, sizes are bytes."""

    @abc.abstractmethod
    async def take(self, owner: Owner, grants: Mapping[str, Grant], quotas: Mapping[str, int]) -> bool:
        """Grant a run all that it asks for, by disk; False, and nothing is granted, if a quota forbids it.

        What the run held before is replaced.
        """

    @abc.abstractmethod
    async def resize(self, run: str, disk: str, size_bytes: int, quota_bytes: int) -> int:
        """Make a grant larger, as far as the quota allows, or smaller. Returns its size now.

        0 if the disk holds no grant.
        """

    @abc.abstractmethod
    async def give_back(self, run: str, disk: str | None = None) -> None:
        """End one disk's grant, or all of a run's. What is not held is no error."""

    @abc.abstractmethod
    async def beat(self, runs: Sequence[str]) -> None:
        """Say that the owners of these runs live."""

    @abc.abstractmethod
    async def holdings(self) -> list[Holding]:
        """Who holds what, ordered by run."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go of it; what is held stays held."""
