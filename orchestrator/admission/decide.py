"""Who may start now, and what the others wait for. Pure: state in, decisions out.

Invariant: admitting what `admissible` returns keeps the grants of each storage within its quota and within what
its file system can give. A run gets everything it needs at once or nothing, so runs cannot block each other.
Order: priority, then arrival. A later request passes an earlier one only if it uses no storage of that one, and no
slot that that one waits for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.units import format_size


@dataclass(frozen=True, slots=True)
class Request:
    """What a run needs to start. `grants` is bytes by storage; empty for a run without fleecing."""

    run: str
    vm: str
    target: str
    priority: int
    arrival: int
    grants: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class StorageState:
    """A storage right now. `spare_bytes` is what its file system can give beyond its floor and what is granted."""

    quota_bytes: int
    granted_bytes: int
    spare_bytes: int
    runs: int
    max_runs: int | None

    @property
    def free_bytes(self) -> int:
        """What can be granted."""
        return max(0, min(self.quota_bytes - self.granted_bytes, self.spare_bytes))


@dataclass(frozen=True, slots=True)
class Slots:
    """Runs under way and how many there may be; None: as many as ask."""

    used: int
    limit: int | None

    @property
    def full(self) -> bool:
        return self.limit is not None and self.used >= self.limit


@dataclass(frozen=True, slots=True)
class State:
    """Everything a decision depends on."""

    host: Slots
    targets: Mapping[str, Slots]
    storages: Mapping[str, StorageState]


@dataclass(frozen=True, slots=True)
class Decision:
    """Requests that start now, in order, and why each other one waits (by run)."""

    admitted: tuple[Request, ...]
    waiting: Mapping[str, str] = field(default_factory=dict)


def admissible(state: State, requests: Sequence[Request]) -> Decision:
    """Decide over all waiting requests at once."""
    admitted: list[Request] = []
    waiting: dict[str, str] = {}
    contended: set[str] = set()
    for request in sorted(requests, key=lambda request: (-request.priority, request.arrival)):
        obstacles = _obstacles(state, request)
        if not obstacles and contended.isdisjoint(_resources(request)):
            admitted.append(request)
            state = _after_admitting(state, request)
            continue
        waiting[request.run] = "; ".join(obstacles.values()) or "runs that came first"
        # What it waits for, and what it needs beside that, is not given to later ones meanwhile.
        contended |= obstacles.keys() | {f"storage {name}" for name in request.grants}
    return Decision(tuple(admitted), waiting)


def growth(storage: StorageState, wanted_bytes: int) -> int:
    """How many of the wanted bytes a growing grant gets. Growing comes before admitting."""
    return min(wanted_bytes, storage.free_bytes)


def _resources(request: Request) -> set[str]:
    return {"host", f"target {request.target}", *(f"storage {name}" for name in request.grants)}


def _obstacles(state: State, request: Request) -> dict[str, str]:
    """Why it cannot start, by resource."""
    obstacles = {}
    if state.host.full:
        obstacles["host"] = f"host: {state.host.used} of {state.host.limit} runs under way"
    target = state.targets[request.target]
    if target.full:
        obstacles[f"target {request.target}"] = (
            f"target {request.target}: {target.used} of {target.limit} runs under way"
        )
    for name, wanted_bytes in request.grants.items():
        storage = state.storages[name]
        if storage.max_runs is not None and storage.runs >= storage.max_runs:
            obstacles[f"storage {name}"] = f"storage {name}: {storage.runs} of {storage.max_runs} runs under way"
        elif wanted_bytes > storage.free_bytes:
            obstacles[f"storage {name}"] = (
                f"storage {name}: {format_size(wanted_bytes)} wanted,"
                f" {format_size(storage.free_bytes)} free of {format_size(storage.quota_bytes)}"
            )
    return obstacles


def _after_admitting(state: State, request: Request) -> State:
    storages = dict(state.storages)
    for name, grant_bytes in request.grants.items():
        storage = storages[name]
        storages[name] = replace(
            storage,
            granted_bytes=storage.granted_bytes + grant_bytes,
            spare_bytes=storage.spare_bytes - grant_bytes,
            runs=storage.runs + 1,
        )
    targets = dict(state.targets)
    targets[request.target] = replace(targets[request.target], used=targets[request.target].used + 1)
    return State(replace(state.host, used=state.host.used + 1), targets, storages)
