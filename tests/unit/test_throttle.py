"""How fast a run may copy while its guest's writes have a budget."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.run.throttle import CALM, FLOOR_BYTES_PER_SECOND, IDLE_SECONDS, Throttle
from orchestrator.units import MIB

BUDGET_MS = 20.0
ABOVE, BETWEEN, BELOW = 2 * BUDGET_MS, (CALM + 0.1) * BUDGET_MS, 0.5 * BUDGET_MS
RATES = st.floats(0, 4e9)
CEILINGS = st.one_of(st.just(0), st.integers(1, 1 << 32))
SECONDS = st.lists(st.tuples(st.one_of(st.none(), st.floats(0, 10 * BUDGET_MS)), RATES), min_size=1, max_size=80)


def after(throttle: Throttle, *seconds: float | None, copied: float = 100 * MIB) -> Throttle:
    for write_ms in seconds:
        throttle = throttle.after(write_ms, copied)
    return throttle


def slowed(*, ceiling: int = 0) -> Throttle:
    """One that was lowered once, from 100 MiB/s, a second ago."""
    return after(Throttle(BUDGET_MS, ceiling), ABOVE, BELOW)


def test_what_stays_within_its_budget_is_not_slowed() -> None:
    assert after(Throttle(BUDGET_MS), BELOW, None, BETWEEN, BUDGET_MS).speed == 0
    assert after(Throttle(BUDGET_MS, 7 * MIB), BELOW, None, BETWEEN).speed == 7 * MIB


def test_it_begins_with_half_of_what_is_copied() -> None:
    assert after(Throttle(BUDGET_MS), ABOVE).speed == 50 * MIB
    assert after(Throttle(BUDGET_MS, 40 * MIB), ABOVE).speed == 20 * MIB


def test_what_does_not_copy_yet_is_not_slowed() -> None:
    assert after(Throttle(BUDGET_MS), ABOVE, copied=0).limit is None


def test_the_second_after_is_not_counted() -> None:
    lowered = after(Throttle(BUDGET_MS), ABOVE)
    assert after(lowered, ABOVE).speed == 50 * MIB
    assert after(lowered, ABOVE, ABOVE).speed == 25 * MIB
    assert after(lowered, ABOVE, ABOVE, ABOVE, ABOVE).speed == 12.5 * MIB


def test_it_rises_by_steps_and_holds_near_the_budget() -> None:
    assert after(slowed(), BELOW).speed == (50 + 100 / 16) * MIB
    assert after(slowed(), BELOW, BELOW).speed == (50 + 200 / 16) * MIB
    assert after(slowed(), BETWEEN, BETWEEN).speed == 50 * MIB


def test_with_a_limit_it_is_let_go_there_and_without_where_nothing_is_limited_any_more() -> None:
    assert after(slowed(ceiling=60 * MIB), *[BELOW] * 7).limit is not None
    assert after(slowed(ceiling=60 * MIB), *[BELOW] * 8) == Throttle(BUDGET_MS, 60 * MIB)
    assert after(slowed(), *[BELOW] * 23).limit is not None
    assert after(slowed(), *[BELOW] * 24) == Throttle(BUDGET_MS)


def test_a_guest_that_hangs_is_no_calm_one_for_a_while() -> None:
    assert after(slowed(), *[None] * IDLE_SECONDS).speed == 50 * MIB
    assert after(slowed(), *[None] * (IDLE_SECONDS + 1)).speed > 50 * MIB
    hanging = (ABOVE, None, None, None)  # writes that take seconds
    assert after(slowed(), *hanging * 8).speed == FLOOR_BYTES_PER_SECOND


@given(CEILINGS, SECONDS)
def test_the_limit_is_never_above_the_ceiling_nor_below_the_floor(
    ceiling: int, seconds: Sequence[tuple[float | None, float]]
) -> None:
    throttle = Throttle(BUDGET_MS, ceiling)
    for write_ms, copied in seconds:
        throttle = throttle.after(write_ms, copied)
        if throttle.limit is None:
            assert throttle.speed == ceiling
            continue
        assert throttle.floor <= throttle.limit
        assert not ceiling or throttle.limit <= ceiling
        assert throttle.floor == min(FLOOR_BYTES_PER_SECOND, ceiling or FLOOR_BYTES_PER_SECOND)


@given(CEILINGS, SECONDS)
def test_a_calm_guest_is_let_go_in_the_end(ceiling: int, seconds: Sequence[tuple[float | None, float]]) -> None:
    throttle = Throttle(BUDGET_MS, ceiling)
    for write_ms, copied in seconds:
        throttle = throttle.after(write_ms, copied)
    calm = 0
    while throttle.limit is not None:
        throttle, calm = throttle.after(BELOW, 0.0), calm + 1
        assert calm <= 1 + max(2 * 16, 4 * FLOOR_BYTES_PER_SECOND // (256 << 10))
    assert throttle == Throttle(BUDGET_MS, ceiling)


@pytest.mark.parametrize("capacity", [3 * MIB, 40 * MIB, 700 * MIB])
@pytest.mark.parametrize("ceiling", [0, 1000 * MIB])
def test_it_finds_what_the_disk_can_give(capacity: int, ceiling: int) -> None:
    """A disk that serves its guest well as long as the copy leaves it some of what it can do."""
    throttle, speeds, above = Throttle(BUDGET_MS, ceiling), [], 0
    for second in range(300):
        copied = min(throttle.speed or capacity, capacity)
        write_ms = ABOVE if copied > 0.7 * capacity else BELOW
        throttle = throttle.after(write_ms, copied)
        if second > 30:
            speeds.append(copied)
            above += write_ms > BUDGET_MS
    assert above <= 0.35 * len(speeds)
    assert sum(speeds) / len(speeds) >= 0.35 * capacity
