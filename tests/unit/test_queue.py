"""The order in which requests wait, the lines that they form, and that none is passed for ever."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.admission.queue import AGEING_SECONDS, HOST, Line, Queue, Request, Slot

FAST, SLOW, MAIN = Slot("storage", "fast"), Slot("storage", "slow"), Slot("target", "main")
LIMITS = {HOST: 4, MAIN: 3, FAST: 2}


def request(
    run: str,
    *storages: str,
    priority: int = 50,
    asked_seconds: float = 0.0,
    arrival: int = 0,
    target: str = "main",
) -> Request:
    return Request(run, f"vm-{run}", target, priority, asked_seconds, arrival, dict.fromkeys(storages, 1))


def queue_of(*requests: Request) -> Queue:
    queue = Queue(LIMITS)
    for one in requests:
        queue.add(one)
    return queue


seconds = st.integers(0, 100_000).map(float)
priorities = st.integers(0, 100)
drawn = st.tuples(
    st.sampled_from(["main", "other"]),
    st.sets(st.sampled_from(["fast", "slow"])),
    st.sampled_from([0, 1, 2, 100]),
    st.sampled_from([0.0, 1.0, AGEING_SECONDS - 1, AGEING_SECONDS, 2 * AGEING_SECONDS]),
)
several = st.lists(drawn, max_size=12).map(
    lambda wanted: [
        request(f"r{at}", *storages, priority=priority, asked_seconds=asked, arrival=at, target=target)
        for at, (target, storages, priority, asked) in enumerate(wanted)
    ]
)


# --- order ---


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(request("a", arrival=0), request("b", arrival=1), id="who asked first"),
        pytest.param(
            request("a", arrival=1, asked_seconds=1.0), request("b", arrival=0, asked_seconds=2.0), id="the clock"
        ),
        pytest.param(request("a", arrival=1, priority=51), request("b", arrival=0), id="priority"),
        pytest.param(
            request("a", arrival=1, priority=51, asked_seconds=AGEING_SECONDS - 1),
            request("b", arrival=0),
            id="priority, asked a little earlier than its worth later",
        ),
        pytest.param(
            request("a", arrival=0),
            request("b", arrival=1, priority=51, asked_seconds=AGEING_SECONDS),
            id="a point of priority is worth so much waiting, and no more",
        ),
        pytest.param(
            request("a", arrival=0, priority=0),
            request("b", arrival=1, priority=100, asked_seconds=100 * AGEING_SECONDS),
            id="all of them together, too",
        ),
        pytest.param(
            request("a", "fast", arrival=0),
            request("b", "slow", arrival=1, target="other"),
            id="whatever they need",
        ),
    ],
)
def test_who_comes_first(first: Request, second: Request) -> None:
    for queue in (queue_of(first, second), queue_of(second, first)):
        assert list(queue) == [first, second]


@given(st.tuples(seconds, priorities), st.tuples(seconds, priorities))
def test_only_who_asks_soon_after_can_ever_be_ahead(one: tuple[float, int], other: tuple[float, int]) -> None:
    (earlier_seconds, earlier), (later_seconds, later) = sorted(
        (asked, priority) for priority, asked in (one, other)
    )
    queue = queue_of(
        request("earlier", priority=earlier, asked_seconds=earlier_seconds, arrival=0),
        request("later", priority=later, asked_seconds=later_seconds, arrival=1),
    )
    passes = next(iter(queue)).run == "later"
    assert passes is (later_seconds - earlier_seconds < (later - earlier) * AGEING_SECONDS)


# --- lines ---


@given(several, st.data())
def test_lines_hold_exactly_who_waits_in_order(requests: list[Request], data: st.DataObject) -> None:
    queue, waiting = Queue(LIMITS), dict[str, Request]()
    for one in requests:
        queue.add(one)
        waiting[one.run] = one
        for run in data.draw(st.sets(st.sampled_from(sorted(waiting)))):
            queue.remove(run)
            del waiting[run]
        check(queue, waiting)
    for run in data.draw(st.permutations(sorted(waiting))):
        queue.remove(run)
        del waiting[run]
        check(queue, waiting)
    assert queue.lanes == {}


def check(queue: Queue, waiting: dict[str, Request]) -> None:
    in_order = sorted(waiting.values(), key=lambda one: one.rank)
    lines: dict[Line, list[Request]] = defaultdict(list)
    for one in in_order:
        assert queue.ahead(one) == len(lines[one.line])
        lines[one.line].append(one)
    assert list(queue) == in_order
    assert len(queue) == len(waiting)
    assert {name: [entry[1] for entry in lane.entries] for name, lane in queue.lanes.items()} == lines
    assert queue.storages() == {storage for one in in_order for storage in one.grants}


def test_a_line_is_of_those_that_need_the_same() -> None:
    same = [request("a", "slow", "fast"), request("b", "fast", "slow", arrival=1, priority=0)]
    others = [
        request("c", "fast", arrival=2),
        request("d", "fast", "slow", arrival=3, target="other"),
        request("e", arrival=4),
    ]
    queue = queue_of(*same, *others)
    assert [len(lane.entries) for lane in queue.lanes.values()] == [2, 1, 1, 1]
    assert [queue.ahead(one) for one in (*same, *others)] == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("one", "slots"),
    [
        (request("a", "fast"), {FAST, MAIN, HOST}),
        (request("a", "fast", "slow"), {FAST, MAIN, HOST}),
        (request("a", "slow", target="other"), {HOST}),
        (request("a"), {MAIN, HOST}),
    ],
)
def test_a_line_needs_those_of_its_slots_that_are_limited(one: Request, slots: set[Slot]) -> None:
    assert set(Queue(LIMITS).lane(one.line).slots) == slots
    assert Queue({}).lane(one.line).slots == ()


@pytest.mark.parametrize(
    ("limits", "scarcest"),
    [
        ({}, None),
        ({HOST: 4}, HOST),
        ({HOST: 4, MAIN: 3, FAST: 2}, FAST),
        ({HOST: 4, MAIN: 2, FAST: 3}, MAIN),
        ({HOST: 1, MAIN: 2, FAST: 3}, HOST),
        ({MAIN: 3, FAST: 2, SLOW: 1}, SLOW),
        ({MAIN: 2, FAST: 2, SLOW: 2}, MAIN),
    ],
)
def test_a_line_is_counted_by_its_scarcest_slot(limits: dict[Slot, int], scarcest: Slot | None) -> None:
    lane = Queue(limits).lane(request("a", "fast", "slow").line)
    assert [lane.counted_by(slot) for slot in lane.slots if slot != scarcest] == [scarcest] * (
        len(lane.slots) - (scarcest is not None)
    )
    assert scarcest is None or lane.counted_by(scarcest) is None


def test_slots_are_named_as_operators_know_them() -> None:
    assert [str(slot) for slot in (HOST, MAIN, FAST)] == ["host", "target main", "storage fast"]
