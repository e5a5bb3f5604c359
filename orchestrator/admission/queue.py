"""The requests that wait for admission, in order. Pure.

Order: by rank, that is by how long a request waits plus what its priority is worth in waiting. Ranks never change,
so nobody starves: only requests that come within a bounded time after it can ever be ahead of a request.

Requests that need the same things (target, storages) form a line. As soon as one of a line has to wait, all behind
it wait too, so a decision looks at the heads of lines, not at each request.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

AGEING_SECONDS = 300.0
"""What a point of priority is worth: 100 points are worth 8 h 20 min of waiting."""

Rank = tuple[float, int]


class Line(NamedTuple):
    """What a request needs a share of, beside the host itself."""

    target: str
    storages: tuple[str, ...]


class Slot(NamedTuple):
    """Something that a limited number of runs may use at a time: the host, a target, a storage."""

    kind: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".rstrip()


HOST = Slot("host")


@dataclass(frozen=True, slots=True)
class Request:
    """What a run needs to start. `grants` is bytes by storage; empty for a run without fleecing.

    `asked_seconds` is when it asked, on any clock that all requests share; `arrival` decides between equals.
    """

    run: str
    vm: str
    target: str
    priority: int
    asked_seconds: float
    arrival: int
    grants: Mapping[str, int]

    @property
    def rank(self) -> Rank:
        """Lower comes first."""
        return (self.asked_seconds - self.priority * AGEING_SECONDS, self.arrival)

    @property
    def line(self) -> Line:
        return Line(self.target, tuple(sorted(self.grants)))


@dataclass(slots=True)
class Lane:
    """A line of waiting requests in order, and the limited slots that they need.

    `scarcest` is the slot of which there are fewest; no more of it can run at once.
    """

    name: Line
    slots: tuple[Slot, ...]
    scarcest: Slot | None
    entries: list[tuple[Rank, Request]] = field(default_factory=list)

    def counted_by(self, slot: Slot) -> Slot | None:
        """The slot that says how many of it can need `slot` at once; None for `slot` itself.

        Always the scarcest: if `a` were excused by `b` for one line and `b` by `a` for another, both would be
        given away.
        """
        return None if self.scarcest == slot else self.scarcest

    def position(self, rank: Rank) -> int:
        """How many of it come before a rank."""
        return bisect_left(self.entries, (rank,))


class Queue:
    """The requests that wait. `limits` are those slots whose number is limited."""

    def __init__(self, limits: Mapping[Slot, int]) -> None:
        self.limits = limits
        self.lanes: dict[Line, Lane] = {}
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """All of them, in order."""
        return (entry[1] for entry in heapq.merge(*(lane.entries for lane in self.lanes.values())))

    def lane(self, name: Line) -> Lane:
        """The lane of a line, an empty one if nobody waits there."""
        found = self.lanes.get(name)
        if found is None:
            slots = (*(Slot("storage", storage) for storage in name.storages), Slot("target", name.target), HOST)
            limited = tuple(slot for slot in slots if slot in self.limits)
            found = Lane(name, limited, min(reversed(limited), key=self.limits.__getitem__, default=None))
        return found

    def add(self, request: Request) -> None:
        """Let it wait; its run must not wait already."""
        assert request.run not in self._requests, request.run  # noqa: S101  run ids are random
        self._requests[request.run] = request
        lane = self.lanes[request.line] = self.lane(request.line)
        insort(lane.entries, (request.rank, request))

    def remove(self, run: str) -> None:
        """Let it wait no more."""
        request = self._requests.pop(run)
        lane = self.lanes[request.line]
        del lane.entries[lane.position(request.rank)]
        if not lane.entries:
            del self.lanes[request.line]

    def ahead(self, request: Request) -> int:
        """How many wait for the same things and come before it."""
        return self.lanes[request.line].position(request.rank)

    def storages(self) -> set[str]:
        """Those that a request waits for."""
        return {storage for line in self.lanes for storage in line.storages}
