"""Who may start, what the others are told, and, on a simulated host, that nobody is delayed or forgotten."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.admission.decide import Decision, Holder, State, StorageState, decide, growth
from orchestrator.admission.queue import AGEING_SECONDS, HOST, Line, Queue, Request, Slot
from orchestrator.units import GIB

FAST, SLOW, THIRD = (Slot("storage", name) for name in ("fast", "slow", "third"))
MAIN, OTHER = Slot("target", "main"), Slot("target", "other")
SLOTS = (HOST, MAIN, OTHER, FAST, SLOW, THIRD)
STORAGES = ("fast", "slow", "third")
PLENTY = 10**6

Resource = Slot | str
"""Slots, or, by a storage's name, its bytes."""


def request(
    run: str,
    arrival: int = 0,
    *,
    target: str = "main",
    priority: int = 50,
    asked_seconds: float = 0.0,
    **grants: int,
) -> Request:
    return Request(run, f"vm-{run}", target, priority, asked_seconds, arrival, grants)


def storage(quota_bytes: int = 10 * GIB, **changes: int | tuple[Holder, ...]) -> StorageState:
    return replace(StorageState(quota_bytes, 0, 1000 * GIB), **changes)


def needs(one: Request) -> Counter[Resource]:
    """How much of what a request needs, limited or not."""
    slots = (HOST, Slot("target", one.target), *(Slot("storage", name) for name in one.grants))
    return Counter({**dict.fromkeys(slots, 1), **one.grants})


def queue_of(limits: Mapping[Resource, int], requests: Iterable[Request]) -> Queue:
    queue = Queue({slot: limit for slot, limit in limits.items() if isinstance(slot, Slot)})
    for one in requests:
        queue.add(one)
    return queue


def runs(decision: Decision) -> list[str]:
    return [one.run for one in decision.admitted]


# --- a simulated host ---


@dataclass(frozen=True, slots=True)
class Job:
    """A run: what it asks for, how long it lasts, and after how long it gives the bytes of storages back."""

    request: Request
    lasts: int
    gives_back: Mapping[str, int] = field(default_factory=dict)


class Host:
    """It has so much of everything, and each job that `decide` admits lasts its time. Without a limit: plenty."""

    def __init__(self, has: Mapping[Resource, int], under_way: Iterable[Job] = ()) -> None:
        self.has = has
        self.queue = queue_of(has, ())
        self.now = 0
        self.started: dict[str, int] = {}
        self._jobs: dict[str, Job] = {}
        self._held: dict[str, dict[str, int]] = {}
        for job in under_way:
            self._start(job)

    def ask(self, job: Job) -> None:
        self._jobs[job.request.run] = job
        self.queue.add(job.request)

    def settle(self) -> Decision:
        decision = decide(self._state(), self.queue)
        for one in decision.admitted:
            self.queue.remove(one.run)
            self._start(self._jobs[one.run])
        return decision

    def play(self, jobs: Iterable[Job]) -> dict[str, int]:
        """When each of the jobs starts if they ask at their times and nobody else comes."""
        coming = sorted(jobs, key=lambda job: job.request.asked_seconds)
        while True:
            while coming and coming[0].request.asked_seconds <= self.now:
                self.ask(coming.pop(0))
            self.settle()
            events = [*self._events(), *(int(job.request.asked_seconds) for job in coming[:1])]
            if not events:
                assert not len(self.queue), f"nothing runs, but {list(self.queue)} wait"
                return self.started
            self._advance(min(events))

    def _start(self, job: Job) -> None:
        self._jobs[job.request.run] = job
        self._held[job.request.run] = dict(job.request.grants)
        self.started[job.request.run] = self.now
        used = sum((self._uses(run) for run in self._held), Counter[Resource]())
        assert all(used[needed] <= self.has.get(needed, PLENTY) for needed in used)

    def _uses(self, run: str) -> Counter[Resource]:
        slots = {needed: one for needed, one in needs(self._jobs[run].request).items() if isinstance(needed, Slot)}
        return Counter({**slots, **self._held[run]})

    def _events(self) -> Iterator[int]:
        for run in self._held:
            job = self._jobs[run]
            yield self.started[run] + job.lasts
            yield from (
                self.started[run] + job.gives_back[name] for name in self._held[run] & job.gives_back.keys()
            )

    def _advance(self, now: int) -> None:
        self.now = now
        for run in list(self._held):
            job, started = self._jobs[run], self.started[run]
            if started + job.lasts <= now:
                del self._held[run]
                continue
            for name, after in job.gives_back.items():
                if started + after <= now:
                    self._held[run].pop(name, None)

    def _state(self) -> State:
        running: dict[Line, list[Mapping[str, int]]] = defaultdict(list)
        granted: Counter[str] = Counter()
        for run, held in self._held.items():
            running[self._jobs[run].request.line].append(dict(held))
            granted.update(held)
        names = self.queue.storages()
        return State(
            running, {name: StorageState(self.has.get(name, PLENTY), granted[name], PLENTY) for name in names}
        )


@dataclass(frozen=True, slots=True)
class Scene:
    """A host, what is under way there, and what waits, in order."""

    has: Mapping[Resource, int]
    under_way: Sequence[Job]
    waiting: Sequence[Job]

    def starts(self, count: int) -> dict[str, int]:
        """When each starts if only the first so many wait."""
        return Host(self.has, self.under_way).play(self.waiting[:count])

    def otherwise(self) -> Iterator["Scene"]:
        """The same with the durations dealt out differently, but for the last one's."""
        everybody = (*self.under_way, *self.waiting[:-1])
        lasts = [job.lasts for job in everybody]
        for turn in range(len(everybody)):
            jobs = [
                replace(job, lasts=after, gives_back={name: min(at, after) for name, at in job.gives_back.items()})
                for job, after in zip(everybody, lasts[turn:] + lasts[:turn], strict=True)
            ]
            cut = len(self.under_way)
            yield replace(self, under_way=jobs[:cut], waiting=[*jobs[cut:], self.waiting[-1]])

    def tightened(self, order: Sequence[Resource]) -> "Scene":
        """With the least of each of these, one after the other, that lets the last one pass all others at once."""
        everybody = (*self.under_way, *self.waiting)
        has = {**self.has, **{needed: sum(needs(job.request)[needed] for job in everybody) for needed in order}}
        for needed in order:
            least = max(needs(job.request)[needed] for job in everybody)
            under_way = sum(needs(job.request)[needed] for job in self.under_way)
            has[needed] = next(
                amount
                for amount in range(max(least, under_way), has[needed] + 1)
                if self._last_passes({**has, needed: amount})
            )
        return replace(self, has=has)

    def _last_passes(self, has: Mapping[Resource, int]) -> bool:
        host = Host(has, self.under_way)
        for job in self.waiting:
            host.ask(job)
        return self.waiting[-1].request in host.settle().admitted


@st.composite
def scenes(draw: st.DrawFn, *, gives_back: bool = False) -> Scene:
    """What is limited is as good as used up by what is under way, so that the others have something to wait for.

    Jobs of few kinds, since those who need the same stand in each other's way.
    """
    needed = st.tuples(st.sampled_from(["main", "other"]), st.sets(st.sampled_from(STORAGES), max_size=2))
    kinds = draw(st.lists(needed, min_size=3, max_size=3))

    def job(run: str, arrival: int, target: str, storages: Iterable[str]) -> Job:
        grants = {name: draw(st.integers(1, 4)) for name in sorted(storages)}
        lasts = draw(st.sampled_from([1, 2, 3, 5, 8]))
        early = {name: draw(st.integers(1, lasts)) for name in grants if gives_back and draw(st.booleans())}
        return Job(request(run, arrival, target=target, **grants), lasts, early)

    under_way = [job(f"u{at}", at, *draw(st.sampled_from(kinds))) for at in range(draw(st.integers(1, 4)))]
    waiting = [job(f"w{at}", at, *draw(st.sampled_from(kinds))) for at in range(draw(st.integers(2, 6)))]
    waiting.append(replace(job("last", len(waiting), *draw(needed)), lasts=100, gives_back={}))
    has = {}
    for resource in (*SLOTS, *STORAGES):
        if isinstance(resource, str) or draw(st.integers(0, 4)):
            amounts = [needs(one.request)[resource] for one in (*under_way, *waiting)]
            has[resource] = max(1, sum(amounts[: len(under_way)]), *amounts)
    of_the_last = needs(waiting[-1].request)
    order = draw(st.permutations([resource for resource in (*SLOTS, *STORAGES) if resource in has]))
    return Scene(has, under_way, waiting).tightened([resource for resource in order if of_the_last[resource]])


def scene(has: Mapping[Resource, int], under_way: Sequence[Job], *waiting: Job) -> Scene:
    in_order = [replace(job, request=replace(job.request, arrival=at)) for at, job in enumerate(waiting)]
    return Scene(has, under_way, in_order)


LARGER_ONE_IN_LINE = scene(
    {MAIN: 1, SLOW: 1, "fast": 10},
    [Job(request("u0"), 1), Job(request("u1", target="other", slow=1), 2)],
    Job(request("a", fast=3), 5),
    Job(request("b", fast=3), 5),
    Job(request("c", target="other", fast=4, slow=1), 5),
    Job(request("last", target="other", fast=3), 20),
)
"""Once `a` holds main's only slot, `b` cannot hold its bytes as well: they are not kept for both."""
SAME_EXCUSE_TWICE = scene(
    {HOST: 3, MAIN: 1, OTHER: 1, FAST: 1, "slow": 2},
    [Job(request("u0", fast=5, slow=1), 1)],
    Job(request("a", target="other", slow=2), 3),
    Job(request("b", slow=2, fast=1), 3),
    Job(request("last", fast=6), 4),
)
"""`b` and `last` need one slot of main and one of fast each. No excuse for one is that the other has only one."""
BYTES_BACK_EARLY = scene(
    {HOST: 3, OTHER: 1, FAST: 2, "fast": 5, "slow": 6},
    [
        Job(request("u0", target="other", slow=2, fast=2), 3, {"fast": 1}),
        Job(request("u1", slow=4, fast=3), 2, {"slow": 1}),
    ],
    Job(request("a", target="other", fast=4, slow=3), 6, {"slow": 4}),
    Job(request("b", fast=1, slow=1), 5, {"fast": 5, "slow": 1}),
    Job(request("c", slow=5, fast=1), 6),
    Job(request("d", target="other", slow=1, fast=4), 2, {"slow": 2, "fast": 2}),
    Job(request("last"), 6),
)
"""Bytes that come back early let `b` start as soon as there is a slot, whoever took one meanwhile."""


@settings(max_examples=400, deadline=None)
@given(scenes())
@example(LARGER_ONE_IN_LINE)
@example(SAME_EXCUSE_TWICE)
def test_who_comes_last_delays_nobody(scene: Scene) -> None:
    check_last_delays_nobody(scene)


@settings(max_examples=400, deadline=None)
@given(scenes(gives_back=True))
@example(BYTES_BACK_EARLY)
def test_who_comes_last_delays_nobody_where_bytes_come_back_early(scene: Scene) -> None:
    check_last_delays_nobody(scene)


def check_last_delays_nobody(scene: Scene) -> None:
    for one in scene.otherwise():
        without, starts = one.starts(-1), one.starts(len(one.waiting))
        delayed = {run: (at, starts[run]) for run, at in without.items() if starts[run] > at}
        assert not delayed, f"{one}: started (without, with the last one) {delayed}"


# --- nobody starves ---


@st.composite
def streams(draw: st.DrawFn) -> tuple[Mapping[Resource, int], list[Job]]:
    """Requests of any priority that come one after the other, and a host on which each of them fits alone."""
    jobs = []
    for arrival in range(draw(st.integers(2, 12))):
        grants = draw(st.dictionaries(st.sampled_from(STORAGES), st.integers(1, 6), max_size=2))
        target, priority = draw(st.sampled_from(["main", "other"])), draw(st.integers(0, 3))
        asked_seconds = draw(st.integers(0, 8)) * AGEING_SECONDS / 2
        asked = request(
            f"r{arrival}", arrival, target=target, priority=priority, asked_seconds=asked_seconds, **grants
        )
        jobs.append(Job(asked, draw(st.sampled_from([100, 200, 500, 1000]))))
    has: dict[Resource, int] = {name: draw(st.integers(6, 12)) for name in STORAGES}
    return has | draw(st.dictionaries(st.sampled_from(SLOTS), st.integers(1, 3))), jobs


@settings(max_examples=150, deadline=None)
@given(streams())
def test_each_starts_once_those_ran_that_can_be_ahead_of_it(
    stream: tuple[Mapping[Resource, int], list[Job]],
) -> None:
    has, jobs = stream
    started = Host(has).play(jobs)
    for job in jobs:
        last_ahead = job.request.asked_seconds + (3 - job.request.priority) * AGEING_SECONDS
        before = sum(one.lasts for one in jobs if one.request.asked_seconds <= last_ahead)
        assert started[job.request.run] <= last_ahead + before - job.lasts


def test_a_large_run_starts_however_many_small_urgent_ones_keep_coming() -> None:
    large = Job(request("large", priority=0, fast=10), 100)
    urgent = [
        Job(request(f"u{at}", at, priority=2, asked_seconds=100.0 * at, fast=4), 150) for at in range(1, 100)
    ]
    first = Job(request("u0", fast=4), 150)
    started = Host({"fast": 10}, [first]).play([large, *urgent])
    passed = [run for run, at in started.items() if 0 < at < started["large"]]
    assert passed == ["u1", "u2", "u3", "u4", "u5"], "what two points of priority are worth: 600 s"
    assert started["large"] == 650


# --- a single decision ---


sizes = st.integers(0, 8)
limits = st.dictionaries(st.sampled_from(SLOTS), st.integers(1, 3))
storage_states = st.builds(StorageState, sizes, sizes, st.integers(-2, 8), st.integers(0, 3))
states = st.builds(
    State,
    st.dictionaries(
        st.builds(
            Line,
            st.sampled_from(["main", "other"]),
            st.sets(st.sampled_from(STORAGES)).map(lambda names: tuple(sorted(names))),
        ),
        st.lists(st.just({}), max_size=2),
    ),
    st.fixed_dictionaries(dict.fromkeys(STORAGES, storage_states)),
)
requests = st.lists(
    st.tuples(
        st.sampled_from(["main", "other"]),
        st.integers(0, 2),
        st.dictionaries(st.sampled_from(STORAGES), st.integers(1, 4), max_size=3),
    ),
    max_size=8,
).map(
    lambda wanted: [
        request(f"r{at}", at, target=target, priority=priority, **grants)
        for at, (target, priority, grants) in enumerate(wanted)
    ]
)


def under_way(before: State) -> Counter[Slot]:
    used: Counter[Slot] = Counter()
    for line, held in before.running.items():
        for slot in (HOST, Slot("target", line.target), *(Slot("storage", name) for name in line.storages)):
            used[slot] += len(held)
    return used


@given(limits, states, requests)
def test_what_is_admitted_fits_everywhere(limits: dict[Slot, int], before: State, wanted: list[Request]) -> None:
    admitted = decide(before, queue_of(limits, wanted)).admitted
    taken = sum(map(needs, admitted), Counter[Resource]())
    used = under_way(before)
    assert all(used[slot] + taken[slot] <= limit for slot, limit in limits.items() if taken[slot])
    for name, one in before.storages.items():
        if taken[name]:
            assert one.granted_bytes + one.unmet_bytes + taken[name] <= one.quota_bytes
            assert one.unmet_bytes + taken[name] <= one.spare_bytes


@given(limits, states, requests)
def test_a_lone_request_that_fits_starts(limits: dict[Slot, int], before: State, wanted: list[Request]) -> None:
    used = under_way(before)
    for one in wanted:
        free = {slot: limit - used[slot] for slot, limit in limits.items()} | {
            name: storage.admittable_bytes for name, storage in before.storages.items()
        }
        fits = all(amount <= free.get(needed, PLENTY) for needed, amount in needs(one).items())
        assert bool(decide(before, queue_of(limits, [one])).admitted) is fits


@given(limits, states, requests)
def test_of_each_line_the_first_ones_start_and_the_next_one_says_what_it_lacks(
    limits: dict[Slot, int], before: State, wanted: list[Request]
) -> None:
    queue = queue_of(limits, wanted)
    decision = decide(before, queue)
    assert sorted(decision.admitted, key=lambda one: one.rank) == list(decision.admitted)
    stopped = {one.line: one for one in decision.stopped()}
    for name, lane in queue.lanes.items():
        in_order = [request for _, request in lane.entries]
        started = [one for one in decision.admitted if one.line == name]
        assert in_order[: len(started)] == started
        assert in_order[len(started) : len(started) + 1] == ([stopped.pop(name)] if name in stopped else [])
    assert not stopped
    assert all(decision.obstacles(one) for one in decision.stopped())


@given(limits, states, requests)
def test_a_decision_changes_nothing_and_is_made_again_the_same_in_any_order(
    limits: dict[Slot, int], before: State, wanted: list[Request]
) -> None:
    queue = queue_of(limits, wanted)
    entries = {name: list(lane.entries) for name, lane in queue.lanes.items()}
    decision = decide(before, queue)
    said = [list(map(str, decision.obstacles(one))) for one in decision.stopped()]
    assert {name: lane.entries for name, lane in queue.lanes.items()} == entries
    assert list(queue) == sorted(wanted, key=lambda one: one.rank)
    for again in (decide(before, queue), decide(before, queue_of(limits, wanted[::-1]))):
        assert again.admitted == decision.admitted
        assert sorted(list(map(str, again.obstacles(one))) for one in again.stopped()) == sorted(said)


# --- who passes whom ---


def numbered(requests: Sequence[Request]) -> list[Request]:
    return [replace(one, arrival=at) for at, one in enumerate(requests)]


def busy(*jobs: Request) -> list[Job]:
    return [Job(one, 100) for one in jobs]


LONG_LINE = [request(f"fast{at}", fast=1) for at in range(5)]
TWO_ON_FAST = busy(request("u0", fast=1), request("u1", fast=1))


@pytest.mark.parametrize(
    ("has", "under_way", "wanted", "started"),
    [
        pytest.param({"fast": 10}, [], [request("a", fast=6), request("b", fast=4)], "a b", id="both fit"),
        pytest.param({"fast": 10}, [], [request("a", fast=6), request("b", fast=5)], "a", id="only one fits"),
        pytest.param(
            {"fast": 10},
            busy(request("u", fast=4)),
            [request("large", fast=7), request("small", fast=1)],
            "",
            id="a small one does not pass a large one that waits for its bytes",
        ),
        pytest.param(
            {"fast": 10},
            busy(request("u", fast=4)),
            [request("large", fast=7), request("small", target="other", fast=1)],
            "",
            id="not on its way to another target, either",
        ),
        pytest.param(
            {"fast": 10, MAIN: 1},
            busy(request("u", fast=2)),
            [request("large", fast=7), request("small", target="other", fast=3)],
            "small",
            id="it passes one that waits for its target only, if both fit",
        ),
        pytest.param(
            {"fast": 10, MAIN: 1},
            busy(request("u", fast=2)),
            [request("large", fast=7), request("small", target="other", fast=4)],
            "",
            id="and not if they do not",
        ),
        pytest.param(
            {"fast": 10},
            busy(request("u", fast=4)),
            [request("large", fast=7), request("small", priority=51, fast=1)],
            "small",
            id="priority comes first",
        ),
        pytest.param(
            {"fast": 10, HOST: 2},
            busy(request("u", fast=4)),
            [request("large", fast=7), request("b")],
            "",
            id="the host's last slot is kept",
        ),
        pytest.param(
            {"fast": 10},
            busy(request("u", fast=4)),
            [request("large", fast=7), request("slow", slow=1), request("none")],
            "slow none",
            id="runs on other storages and on none start",
        ),
        pytest.param(
            {"fast": 10, "slow": 10},
            busy(request("u", fast=4)),
            [request("large", fast=7, slow=1), request("b", slow=10), request("c", slow=9)],
            "",
            id="what the first needs beside is kept, and a line stays a line",
        ),
        pytest.param(
            {"fast": 10, "slow": 10},
            busy(request("u", fast=4)),
            [request("large", fast=7, slow=1), request("b", slow=9)],
            "b",
            id="and no more than that",
        ),
        pytest.param(
            {HOST: 4, FAST: 2},
            TWO_ON_FAST,
            [*LONG_LINE, request("slow", slow=1)],
            "slow",
            id="a long line for one storage holds up no other storage",
        ),
        pytest.param(
            {HOST: 4, FAST: 2},
            TWO_ON_FAST,
            [*LONG_LINE, *(request(f"slow{at}", slow=1) for at in range(3))],
            "slow0 slow1",
            id="up to the host's limit",
        ),
        pytest.param(
            {HOST: 4, FAST: 2},
            TWO_ON_FAST[:1],
            [request("large", fast=PLENTY), *LONG_LINE, *(request(f"slow{at}", slow=1) for at in range(3))],
            "slow0 slow1",
            id="but for the slots that the line could fill",
        ),
        pytest.param(
            {MAIN: 4, FAST: 2, HOST: 9},
            TWO_ON_FAST,
            [*LONG_LINE, request("slow", slow=1)],
            "slow",
            id="nor does it hold up others on their way to its target",
        ),
        pytest.param(
            {HOST: 4, MAIN: 2},
            busy(request("u0"), request("u1", fast=1)),
            [*LONG_LINE, request("other", target="other", fast=1)],
            "other",
            id="nor one for a target a run to another target",
        ),
        pytest.param(
            {FAST: 2, "fast": 12},
            busy(request("u0", fast=2, slow=1), request("u1", fast=3)),
            [*(request(f"w{at}", fast=3) for at in range(5)), request("none")],
            "none",
            id="who needs no storage waits for none",
        ),
        pytest.param(
            {MAIN: 2, "fast": 12},
            busy(request("u0", fast=2), request("u1", fast=3)),
            [*(request(f"w{at}", fast=3) for at in range(5)), request("other", target="other", fast=6)],
            "other",
            id="only those bytes are kept that a line can hold at once, a larger one after a smaller one",
        ),
        pytest.param(
            {MAIN: 2, "fast": 12},
            busy(request("u0", fast=2), request("u1", fast=3)),
            [*(request(f"w{at}", fast=3) for at in range(5)), request("other", target="other", fast=7)],
            "",
            id="and those are kept",
        ),
    ],
)
def test_who_starts(
    has: Mapping[Resource, int], under_way: list[Job], wanted: list[Request], started: str
) -> None:
    host = Host({"fast": PLENTY // 2} | has, under_way)
    for one in numbered(wanted):
        host.ask(Job(one, 100))
    assert runs(host.settle()) == started.split()
    assert runs(host.settle()) == []


# --- what the others are told ---


HELD = tuple(Holder(f"vm{size}", f"r{size}", size * GIB) for size in (1, 3, 2, 5, 4))
FOUR_GIB = request("a", fast=4 * GIB)
LINE = FOUR_GIB.line


def told(limits: Mapping[Resource, int], running: int, wanted: Sequence[Request], **changes: object) -> list[str]:
    """What stands in the last one's way."""
    storages = {"fast": storage(**changes), "slow": storage()}  # type: ignore[arg-type]  (passed on)
    requests = numbered(wanted)
    decision = decide(State({LINE: [{}] * running}, storages), queue_of(limits, requests))
    assert requests[-1] in decision.stopped()
    return [str(obstacle) for obstacle in decision.obstacles(requests[-1])]


@pytest.mark.parametrize(
    ("limits", "running", "texts"),
    [
        ({HOST: 4}, 4, ["host: 4 of 4 runs under way"]),
        ({MAIN: 1, HOST: 2}, 1, ["target main: 1 of 1 runs under way"]),
        ({FAST: 2}, 2, ["storage fast: 2 of 2 runs under way"]),
        ({FAST: 2}, 3, ["storage fast: 3 of 2 runs under way"]),
        (
            {FAST: 2, MAIN: 2, HOST: 2},
            2,
            [
                "host: 2 of 2 runs under way",
                "target main: 2 of 2 runs under way",
                "storage fast: 2 of 2 runs under way",
            ],
        ),
    ],
)
def test_slots_in_use_are_told(limits: Mapping[Resource, int], running: int, texts: list[str]) -> None:
    assert told(limits, running, [FOUR_GIB]) == texts


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        pytest.param({"granted_bytes": 7 * GIB}, "4.0 GiB wanted, 3.0 GiB free of 10.0 GiB", id="nobody named"),
        pytest.param({"granted_bytes": 12 * GIB}, "4.0 GiB wanted, 0 B free of 10.0 GiB", id="a lowered quota"),
        pytest.param({"quota_bytes": 3 * GIB}, "4.0 GiB wanted, 3.0 GiB free of 3.0 GiB", id="a small quota"),
        pytest.param(
            {"granted_bytes": 7 * GIB, "holders": (Holder("db01", "4f3e2d1c", 7 * GIB),)},
            "4.0 GiB wanted, 3.0 GiB free of 10.0 GiB; run 4f3e2d1c of db01 holds 7.0 GiB",
            id="who holds it",
        ),
        pytest.param(
            {"granted_bytes": 9 * GIB, "holders": (*HELD[:1], replace(HELD[1], over=True), HELD[3])},
            "4.0 GiB wanted, 1.0 GiB free of 10.0 GiB; run r5 of vm5 holds 5.0 GiB,"
            " run r3 of vm3, which is over, holds 3.0 GiB, run r1 of vm1 holds 1.0 GiB",
            id="three, largest first, one of which is over",
        ),
        pytest.param(
            {"quota_bytes": 16 * GIB, "granted_bytes": 15 * GIB, "holders": HELD},
            "4.0 GiB wanted, 1.0 GiB free of 16.0 GiB; run r5 of vm5 holds 5.0 GiB,"
            " run r4 of vm4 holds 4.0 GiB, run r3 of vm3 holds 3.0 GiB, 2 more hold the rest",
            id="no more than three",
        ),
        pytest.param(
            {"granted_bytes": 2 * GIB, "spare_bytes": GIB},
            "4.0 GiB wanted, 1.0 GiB free of 10.0 GiB (8.0 GiB of its quota, but its file system has no more)",
            id="its file system is smaller than its quota",
        ),
        pytest.param(
            {"spare_bytes": -GIB},
            "4.0 GiB wanted, 0 B free of 10.0 GiB (10.0 GiB of its quota, but its file system has no more)",
            id="its file system is below its floor",
        ),
        pytest.param(
            {"granted_bytes": 4 * GIB, "unmet_bytes": 3 * GIB, "holders": (Holder("db01", "4f3e2d1c", 4 * GIB),)},
            "4.0 GiB wanted, 6.0 GiB free of 10.0 GiB, 3.0 GiB kept for runs that must grow;"
            " run 4f3e2d1c of db01 holds 4.0 GiB",
            id="what is free is for growing grants",
        ),
    ],
)
def test_bytes_in_use_are_told(changes: dict[str, object], text: str) -> None:
    assert told({}, 1, [FOUR_GIB], **changes) == [f"storage fast: {text}"]


@pytest.mark.parametrize(
    ("limits", "changes", "wanted", "texts"),
    [
        pytest.param(
            {HOST: 4},
            {"granted_bytes": 9 * GIB},
            [FOUR_GIB, request("b", slow=1), request("c", target="other", slow=1)],
            ["host: 3 of 4 runs under way, 1 kept for those that came first"],
            id="slots",
        ),
        pytest.param(
            {MAIN: 1},
            {"granted_bytes": 9 * GIB},
            [FOUR_GIB, request("b")],
            ["target main: 0 of 1 runs under way, 1 kept for those that came first"],
            id="a slot that nobody uses",
        ),
        pytest.param(
            {},
            {"granted_bytes": 7 * GIB, "holders": (Holder("db01", "4f3e2d1c", 7 * GIB),)},
            [FOUR_GIB, request("b", fast=2 * GIB, target="other")],
            [
                (
                    "storage fast: 2.0 GiB wanted, 3.0 GiB free of 10.0 GiB,"
                    " 4.0 GiB kept for those that came first; run 4f3e2d1c of db01 holds 7.0 GiB"
                ),
            ],
            id="bytes",
        ),
        pytest.param(
            {HOST: 3},
            {"granted_bytes": 9 * GIB},
            [FOUR_GIB, request("b", target="other", fast=2 * GIB), request("c", target="other", slow=1)],
            ["host: 2 of 3 runs under way, 1 kept for those that came first"],
            id="no more slots than there are",
        ),
        pytest.param(
            {},
            {"granted_bytes": 7 * GIB},
            [FOUR_GIB, request("b", target="other", fast=5 * GIB), request("c", target="third", fast=GIB)],
            ["storage fast: 1.0 GiB wanted, 3.0 GiB free of 10.0 GiB, 9.0 GiB kept for those that came first"],
            id="the bytes of all that came first",
        ),
        pytest.param(
            {MAIN: 1},
            {"granted_bytes": 9 * GIB, "unmet_bytes": GIB},
            [request("a", slow=8 * GIB, fast=GIB), request("b", slow=3 * GIB)],
            [
                "target main: 0 of 1 runs under way, 1 kept for those that came first",
                "storage slow: 3.0 GiB wanted, 10.0 GiB free of 10.0 GiB, 8.0 GiB kept for those that came first",
            ],
            id="both",
        ),
    ],
)
def test_what_is_kept_for_others_is_told(
    limits: Mapping[Resource, int], changes: dict[str, object], wanted: list[Request], texts: list[str]
) -> None:
    running = 2 if HOST in limits else 0
    assert told(limits, running, wanted, **changes) == texts


def test_what_starts_in_the_same_decision_counts_as_used() -> None:
    wanted = [request("a", fast=7 * GIB), request("b", fast=4 * GIB)]
    assert told({MAIN: 1}, 0, wanted) == [
        "target main: 1 of 1 runs under way",
        "storage fast: 4.0 GiB wanted, 3.0 GiB free of 10.0 GiB",
    ]


@pytest.mark.parametrize(
    ("changes", "wanted_bytes", "more_bytes"),
    [
        ({}, 5, 5),
        ({"granted_bytes": 8}, 5, 2),
        ({"granted_bytes": 10}, 5, 0),
        ({"granted_bytes": 12}, 5, 0),
        ({"spare_bytes": 3}, 5, 3),
        ({"spare_bytes": -3}, 5, 0),
        ({"granted_bytes": 8, "unmet_bytes": 2}, 5, 2),
    ],
)
def test_growth_gives_what_there_is(changes: dict[str, int], wanted_bytes: int, more_bytes: int) -> None:
    assert growth(storage(10, **changes), wanted_bytes) == more_bytes
