"""Who may start now, and what the others wait for. Pure: state in, decisions out.

A run gets everything it needs at once or nothing, so runs cannot block each other. Order: see `queue`.

A request passes one that is ahead of it only where that delays nobody: for each thing that it needs, there must be
enough for all that could have it at once of those that have it, that are ahead, and itself. How much that is does
not grow when one of them starts, gives back or ends; so what was enough once stays enough, for each of them.
"""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from orchestrator.admission.queue import Lane, Line, Queue, Rank, Request, Slot
from orchestrator.units import format_size

HOLDERS_NAMED = 3


@dataclass(frozen=True, slots=True)
class Holder:
    """How much of a storage a run holds; `over`: the run is, but a QEMU may still use its images."""

    vm: str
    run: str
    size_bytes: int
    over: bool = False

    def __str__(self) -> str:
        over = ", which is over," if self.over else ""
        return f"run {self.run} of {self.vm}{over} holds {format_size(self.size_bytes)}"


@dataclass(frozen=True, slots=True)
class StorageState:
    """A storage right now; sizes in bytes.

    `spare_bytes` is what its file system can give beyond its floor and beyond what is granted. `unmet_bytes` is
    what growing grants were refused: they come before new runs. `holders` says how much which run holds.
    """

    quota_bytes: int
    granted_bytes: int
    spare_bytes: int
    unmet_bytes: int = 0
    holders: tuple[Holder, ...] = ()

    @property
    def free_bytes(self) -> int:
        """What can be granted."""
        return max(0, min(self.quota_bytes - self.granted_bytes, self.spare_bytes))

    @property
    def admittable_bytes(self) -> int:
        """What new runs can be granted."""
        return max(0, self.free_bytes - self.unmet_bytes)


@dataclass(frozen=True, slots=True)
class State:
    """Everything that a decision depends on, beside the queue.

    `running` is the runs under way, by what they use: how many bytes of each storage each one holds. `storages`
    are those that the queue's requests need.
    """

    running: Mapping[Line, Sequence[Mapping[str, int]]]
    storages: Mapping[str, StorageState]


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing that a request waits for.

    Bytes of a storage if `wanted_bytes` is set, else a slot. `kept` (bytes or slots) is for requests ahead of it,
    `growing_bytes` for growing grants.
    """

    resource: str
    used: int
    limit: int
    kept: int = 0
    wanted_bytes: int | None = None
    free_bytes: int = 0
    growing_bytes: int = 0
    holders: tuple[Holder, ...] = ()

    def __str__(self) -> str:
        if self.wanted_bytes is None:
            kept = f", {self.kept} kept for those that came first" if self.kept else ""
            return f"{self.resource}: {self.used} of {self.limit} runs under way{kept}"
        kept = f", {format_size(self.growing_bytes)} kept for runs that must grow" if self.growing_bytes else ""
        kept += f", {format_size(self.kept)} kept for those that came first" if self.kept else ""
        others = ""
        if self.free_bytes < self.limit - self.used:
            others = f" ({format_size(self.limit - self.used)} of its quota, but its file system has no more)"
        text = (
            f"{self.resource}: {format_size(self.wanted_bytes)} wanted,"
            f" {format_size(self.free_bytes)} free of {format_size(self.limit)}{others}{kept}"
        )
        largest = sorted(self.holders, key=lambda holder: -holder.size_bytes)
        named = [str(holder) for holder in largest[:HOLDERS_NAMED]]
        if len(largest) > HOLDERS_NAMED:
            named.append(f"{len(largest) - HOLDERS_NAMED} more hold the rest")
        return f"{text}; {', '.join(named)}" if named else text


class Decision:
    """Requests that start now, in order; and, if asked, what each other one waits for."""

    def __init__(self, room: "_Room", admitted: tuple[Request, ...]) -> None:
        self.admitted = admitted
        self._room = room

    def stopped(self) -> list[Request]:
        """The first one of each line that has to wait."""
        return self._room.stopped()

    def obstacles(self, request: Request) -> tuple[Obstacle, ...]:
        """What a request lacks that was decided about and has to wait; nothing if it is behind others only."""
        return self._room.obstacles(request)


def decide(state: State, queue: Queue) -> Decision:
    """Decide over all waiting requests at once. The queue is left as it is."""
    room = _Room(state, queue)
    heads: list[tuple[Rank, Line, int]] = []
    for name, lane in queue.lanes.items():
        rank, request = lane.entries[0]
        # It will not fit any better once others were admitted.
        if room.suffices(request, lane):
            heads.append((rank, name, 0))
        else:
            room.stop(lane, 0)
    heapq.heapify(heads)
    admitted: list[Request] = []
    while heads:
        rank, name, at = heapq.heappop(heads)
        lane = queue.lanes[name]
        request = lane.entries[at][1]
        if not (room.suffices(request, lane) and room.delays_nobody(request, lane, rank)):
            room.stop(lane, at)
            continue
        admitted.append(request)
        room.give(request, lane)
        if at + 1 < len(lane.entries):
            heapq.heappush(heads, (lane.entries[at + 1][0], name, at + 1))
    return Decision(room, tuple(admitted))


def growth(storage: StorageState, wanted_bytes: int) -> int:
    """How many of the wanted bytes a growing grant gets. Growing comes before admitting."""
    return min(wanted_bytes, storage.free_bytes)


class _Room:
    """What is left while a decision is made. What is stopped is a lane and the place from which on it waits."""

    def __init__(self, state: State, queue: Queue) -> None:
        self._stopped: list[tuple[Lane, int]] = []
        self._stopped_at: defaultdict[Slot | str, list[tuple[Lane, int]]] = defaultdict(list)
        self._storages = state.storages
        self._queue = queue
        self._limits = queue.limits
        self._free_slots = dict(queue.limits)
        self._free_bytes = {name: storage.admittable_bytes for name, storage in state.storages.items()}
        self._both: Counter[tuple[Slot, Slot]] = Counter()
        self._running: defaultdict[Line, list[Mapping[str, int]]] = defaultdict(list)
        for name, runs in state.running.items():
            self._use(queue.lane(name), runs)

    def _use(self, lane: Lane, runs: Sequence[Mapping[str, int]]) -> None:
        self._running[lane.name] += runs
        for slot in lane.slots:
            self._free_slots[slot] -= len(runs)
            if other := lane.counted_by(slot):
                self._both[slot, other] += len(runs)

    def stop(self, lane: Lane, start: int) -> None:
        """None of a lane can run from that place on: what they need is kept for them."""
        self._stopped.append((lane, start))
        needs: tuple[Slot | str, ...] = (*lane.slots, *lane.name.storages)
        for needed in needs:
            self._stopped_at[needed].append((lane, start))

    def stopped(self) -> list[Request]:
        """The first one of each line that has to wait."""
        return [lane.entries[start][1] for lane, start in self._stopped]

    def give(self, request: Request, lane: Lane) -> None:
        """Let it run."""
        self._use(lane, [request.grants])
        for storage, size_bytes in request.grants.items():
            self._free_bytes[storage] -= size_bytes

    def suffices(self, request: Request, lane: Lane) -> bool:
        """Whether there is enough of everything that a request needs."""
        for slot in lane.slots:
            if self._free_slots[slot] <= 0:
                return False
        for storage, wanted_bytes in request.grants.items():  # noqa: SIM110  a generator takes twice as long
            if wanted_bytes > self._free_bytes[storage]:
                return False
        return True

    def delays_nobody(self, request: Request, lane: Lane, rank: Rank) -> bool:
        """Whether enough remains for all that are ahead, once a request for which it suffices runs."""
        return all(
            self._kept_bytes(storage, rank, left_bytes) <= left_bytes
            for storage, wanted_bytes in request.grants.items()
            for left_bytes in (self._free_bytes[storage] - wanted_bytes,)
        ) and not any(self._kept_slots(slot, rank, self._free_slots[slot]) for slot in lane.slots)

    def obstacles(self, request: Request) -> tuple[Obstacle, ...]:
        """Everything that keeps a request from starting: what is used up, or else what is kept for others."""
        lane = self._queue.lane(request.line)
        found = [self._slot_obstacle(slot) for slot in reversed(lane.slots) if self._free_slots[slot] <= 0]
        found += [
            self._bytes_obstacle(name, wanted_bytes)
            for name, wanted_bytes in request.grants.items()
            if wanted_bytes > self._free_bytes[name]
        ]
        if found:
            return tuple(found)
        rank = request.rank
        found += [
            self._slot_obstacle(slot, kept)
            for slot in reversed(lane.slots)
            if (kept := self._kept_slots(slot, rank, self._free_slots[slot]))
        ]
        found += [
            self._bytes_obstacle(name, wanted_bytes, kept)
            for name, wanted_bytes in request.grants.items()
            if (kept := self._kept_bytes(name, rank)) > self._free_bytes[name] - wanted_bytes
        ]
        return tuple(found)

    def _slot_obstacle(self, slot: Slot, kept: int = 0) -> Obstacle:
        limit = self._limits[slot]
        return Obstacle(str(slot), limit - self._free_slots[slot], limit, kept)

    def _bytes_obstacle(self, name: str, wanted_bytes: int, kept_bytes: int = 0) -> Obstacle:
        storage = self._storages[name]
        given_bytes = storage.admittable_bytes - self._free_bytes[name]
        return Obstacle(
            f"storage {name}",
            storage.granted_bytes + given_bytes,
            storage.quota_bytes,
            kept_bytes,
            wanted_bytes,
            max(0, storage.free_bytes - given_bytes),
            storage.unmet_bytes,
            storage.holders,
        )

    def _kept_slots(self, slot: Slot, rank: Rank, free: int) -> int:
        """How many of the `free` ones of a slot those that are ahead could have at once, if that is all; else 0.

        Of those that are counted by another slot, such as their storage's, no more can run at once than that one
        allows, together with the runs under way that use both, since only these give back both when they end.
        """
        kept = 0
        kept_by: Counter[Slot] = Counter()
        for lane, start in self._stopped_at[slot]:
            count = max(0, lane.position(rank) - start)
            if other := lane.counted_by(slot):
                most = self._limits[other] - self._both[slot, other] - kept_by[other]
                count = max(0, min(count, most))
                kept_by[other] += count
            kept += count
            if kept >= free:
                return free
        return 0

    def _kept_bytes(self, storage: str, rank: Rank, enough_bytes: float = math.inf) -> int:
        """What those ahead could get of a storage beyond what their lines hold; counted until that is enough.

        Of a line, no more can run at once than its slots allow. It may be its largest ones, and a run under way
        may make room for a larger one.
        """
        kept_bytes = 0
        for lane, start in self._stopped_at[storage]:
            held = [grants.get(storage, 0) for grants in self._running[lane.name]]
            end = max(start, lane.position(rank))
            at_once = self._limits[lane.scarcest] if lane.scarcest else end - start + len(held)
            least_bytes = kept_bytes
            for _, request in islice(lane.entries, start, min(end, start + max(0, at_once - len(held)))):
                least_bytes += request.grants[storage]
                if least_bytes > enough_bytes:
                    return least_bytes
            sizes = [request.grants[storage] for _, request in islice(lane.entries, start, end)]
            # More may hold than run at once, once fewer may: those ahead get what they give back.
            kept_bytes += max(0, sum(heapq.nlargest(at_once, sizes + held)) - sum(held))
            if kept_bytes > enough_bytes:
                return kept_bytes
        return kept_bytes
