"""What one run holds, and what it is told while it holds or wants it."""

import asyncio
from dataclasses import dataclass, field
from typing import NoReturn

from orchestrator.admission.decide import Obstacle
from orchestrator.admission.ledger.base import Grant
from orchestrator.admission.queue import Request
from orchestrator.errors import FleecingError
from orchestrator.storage.base import ImageFile


class QuotaLowered(Exception):
    """What a run waits for is more than its storages may give at all by now: it has to ask for less."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a run waits.

    `ahead` is how many come before it that need the same; `obstacles` is what the first of them lacks, or else the
    run itself.
    """

    obstacles: tuple[Obstacle, ...]
    ahead: int = 0

    @property
    def reasons(self) -> tuple[str, ...]:
        """In words."""
        obstacles = tuple(str(obstacle) for obstacle in self.obstacles)
        if not self.ahead:
            return obstacles
        runs = "run that needs" if self.ahead == 1 else "runs that need"
        return (f"{self.ahead} {runs} the same and came first", *obstacles)

    def __str__(self) -> str:
        return "; ".join(self.reasons)


@dataclass(slots=True, eq=False)
class Lease:
    """What one run holds: its slots, and a grant for each fleeced disk, by disk.

    `files` are the images in use. `unmet_bytes` is what growing grants were refused; `room` is set when asking
    again may help. Set `stranded` if a QEMU may still use the images after the run: the grants are kept then.
    """

    request: Request
    grants: dict[str, Grant]
    files: dict[str, ImageFile] = field(default_factory=dict)
    unmet_bytes: dict[str, int] = field(default_factory=dict)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    stranded: bool = False
    _must_go: asyncio.Event = field(default_factory=asyncio.Event)
    _why: FleecingError | None = None

    def used_bytes(self, storage: str) -> int:
        """What its images really occupy on a storage."""
        return sum(file.used_bytes() for disk, file in self.files.items() if self.grants[disk].storage == storage)

    def unmet_on(self, storage: str) -> int:
        """What its growing grants were refused on a storage, in bytes."""
        return sum(size for disk, size in self.unmet_bytes.items() if self.grants[disk].storage == storage)

    def drop(self, disk: str) -> None:
        """Forget one disk: it holds nothing any more."""
        del self.grants[disk]
        self.files.pop(disk, None)
        self.unmet_bytes.pop(disk, None)

    async def giving_way(self) -> NoReturn:
        """Wait until this run must end for the sake of others; raises the FleecingError that it ends with."""
        await self._must_go.wait()
        assert self._why is not None  # noqa: S101  set before the event
        raise self._why

    @property
    def gives_way(self) -> bool:
        """Whether it was told to end."""
        return self._must_go.is_set()

    def give_way(self, why: FleecingError) -> None:
        """Tell its run to end."""
        self._why = why
        self._must_go.set()
