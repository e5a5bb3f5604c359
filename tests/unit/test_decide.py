"""Who may start: properties over any requests, and the reasons that operators read."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.admission.decide import (
    Decision,
    Request,
    Slots,
    State,
    StorageState,
    admissible,
    growth,
)
from orchestrator.units import GIB

STORAGES = ("fast", "slow")
TARGETS = ("main", "other")


def storage(quota: int = 10 * GIB, **changes: int) -> StorageState:
    return replace(StorageState(quota, 0, 1000 * GIB, 0, None), **changes)


FREE = Slots(0, None)


def state(host: Slots = FREE, **storages: StorageState) -> State:
    return State(host, dict.fromkeys(TARGETS, FREE), {name: storage() for name in STORAGES} | storages)


def request(run: str, *, priority: int = 50, target: str = "main", arrival: int = 0, **grants: int) -> Request:
    return Request(run, f"vm-{run}", target, priority, arrival, grants)


def runs(decision: Decision) -> list[str]:
    return [one.run for one in decision.admitted]


sizes = st.integers(0, 20 * GIB)
limits = st.none() | st.integers(1, 3)
slots = st.builds(Slots, st.integers(0, 3), limits)
storage_states = st.builds(StorageState, sizes, sizes, st.integers(-GIB, 20 * GIB), st.integers(0, 3), limits)
states = st.builds(
    State,
    slots,
    st.fixed_dictionaries(dict.fromkeys(TARGETS, slots)),
    st.fixed_dictionaries(dict.fromkeys(STORAGES, storage_states)),
)
requests = st.lists(
    st.tuples(
        st.sampled_from(TARGETS),
        st.integers(0, 3),
        st.dictionaries(st.sampled_from(STORAGES), st.integers(1, 8 * GIB), max_size=2),
    ),
    max_size=8,
).map(
    lambda wanted: [
        Request(f"r{at}", f"vm{at}", target, priority, at, grants)
        for at, (target, priority, grants) in enumerate(wanted)
    ]
)


@given(states, requests)
def test_what_is_admitted_fits_everywhere(before: State, wanted: list[Request]) -> None:
    admitted = admissible(before, wanted).admitted
    for name, one in before.storages.items():
        using = [each for each in admitted if name in each.grants]
        granted = sum(each.grants[name] for each in using)
        if using:
            assert one.granted_bytes + granted <= one.quota_bytes
            assert granted <= one.spare_bytes
            assert one.max_runs is None or one.runs + len(using) <= one.max_runs
    for name, one in [("host", before.host), *before.targets.items()]:
        using = [each for each in admitted if name in ("host", each.target)]
        assert not using or one.limit is None or one.used + len(using) <= one.limit


@given(states, requests)
def test_everybody_starts_or_knows_why_not(before: State, wanted: list[Request]) -> None:
    decision = admissible(before, wanted)
    assert {*runs(decision), *decision.waiting} == {one.run for one in wanted}
    assert not set(runs(decision)) & decision.waiting.keys()
    assert all(decision.waiting.values())


@given(states, requests)
def test_the_order_is_priority_then_arrival_however_they_are_given(before: State, wanted: list[Request]) -> None:
    decision = admissible(before, wanted)
    rank = [(-one.priority, one.arrival) for one in decision.admitted]
    assert rank == sorted(rank)
    assert admissible(before, wanted[::-1]) == decision


@given(states, requests)
def test_a_later_request_shares_no_storage_with_an_earlier_one_that_waits(
    before: State, wanted: list[Request]
) -> None:
    decision = admissible(before, wanted)
    for waiting in (one for one in wanted if one.run in decision.waiting):
        for passing in decision.admitted:
            if (-passing.priority, passing.arrival) > (-waiting.priority, waiting.arrival):
                assert not waiting.grants.keys() & passing.grants.keys()


@given(states, requests)
def test_a_lone_request_that_fits_starts(before: State, wanted: list[Request]) -> None:
    for one in wanted:
        fits = (
            not before.host.full
            and not before.targets[one.target].full
            and all(
                size <= before.storages[name].free_bytes
                and (
                    before.storages[name].max_runs is None
                    or before.storages[name].runs < before.storages[name].max_runs
                )
                for name, size in one.grants.items()
            )
        )
        assert bool(admissible(before, [one]).admitted) is fits


@pytest.mark.parametrize(
    ("wanted", "started"),
    [
        pytest.param([request("a", fast=6), request("b", arrival=1, fast=4)], ["a", "b"], id="both fit"),
        pytest.param([request("a", fast=6), request("b", arrival=1, fast=5)], ["a"], id="the second does not"),
        pytest.param([request("a", fast=11), request("b", arrival=1, fast=1)], [], id="small one does not pass"),
        pytest.param([request("a", fast=11), request("b", arrival=1, slow=1)], ["b"], id="other storage passes"),
        pytest.param([request("a", fast=11), request("b", arrival=1)], ["b"], id="without fleecing passes"),
        pytest.param(
            [request("a", fast=11), request("b", arrival=1, priority=51, fast=1)], ["b"], id="priority first"
        ),
        pytest.param(
            [request("a", fast=11, slow=1), request("b", arrival=1, slow=10)],
            [],
            id="what the first needs beside is kept",
        ),
        pytest.param(
            [request("a", fast=11), request("b", arrival=1, fast=1, slow=1), request("c", arrival=2, slow=9)],
            [],
            id="waiting passes on",
        ),
    ],
)
def test_who_starts(wanted: list[Request], started: list[str]) -> None:
    ten = {name: storage(10) for name in STORAGES}
    assert runs(admissible(state(**ten), wanted)) == started


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (state(Slots(4, 4)), "host: 4 of 4 runs under way"),
        (State(Slots(0, 1), {"main": Slots(2, 2)}, state().storages), "target main: 2 of 2 runs under way"),
        (state(fast=storage(runs=2, max_runs=2)), "storage fast: 2 of 2 runs under way"),
        (
            state(fast=storage(granted_bytes=7 * GIB)),
            "storage fast: 4.0 GiB wanted, 3.0 GiB free of 10.0 GiB",
        ),
        (state(fast=storage(spare_bytes=GIB)), "storage fast: 4.0 GiB wanted, 1.0 GiB free of 10.0 GiB"),
        (state(fast=storage(spare_bytes=-GIB)), "storage fast: 4.0 GiB wanted, 0 B free of 10.0 GiB"),
        (
            state(Slots(4, 4), fast=storage(granted_bytes=10 * GIB)),
            "host: 4 of 4 runs under way; storage fast: 4.0 GiB wanted, 0 B free of 10.0 GiB",
        ),
    ],
)
def test_reasons_name_the_place_and_the_numbers(before: State, reason: str) -> None:
    assert admissible(before, [request("a", fast=4 * GIB)]).waiting == {"a": reason}


def test_what_fits_but_came_later_says_so() -> None:
    wanted = [request("a", fast=11 * GIB), request("b", arrival=1, fast=GIB)]
    assert admissible(state(), wanted).waiting["b"] == "runs that came first"


@pytest.mark.parametrize(
    ("granted", "spare", "wanted", "more"),
    [(0, 100, 5, 5), (8, 100, 5, 2), (10, 100, 5, 0), (0, 3, 5, 3), (0, -3, 5, 0), (12, 100, 5, 0)],
)
def test_growth_gives_what_there_is(granted: int, spare: int, wanted: int, more: int) -> None:
    assert growth(storage(10, granted_bytes=granted, spare_bytes=spare), wanted) == more
