"""A seed is a plan, and a plan has everything in it."""

import random

import pytest

from tests.faults import plan
from tests.faults.plan import Kind, When


@pytest.mark.parametrize("repository", [False, True])
def test_a_seed_is_a_plan(*, repository: bool) -> None:
    one, same, other = (plan.make(seed, kills=60, repository=repository) for seed in (1, 1, 2))
    assert one == same != other
    assert sum(fault.kind is Kind.DAEMON for fault in one) == 60
    assert {fault.kind for fault in one} == set(plan.kinds(repository=repository))
    assert {fault.moment.when for fault in one if fault.kind is Kind.DAEMON} == set(When)
    assert (Kind.MOVER in plan.kinds(repository=repository)) is repository


def test_nothing_is_done_to_a_place_that_is_not_there() -> None:
    rng = random.Random(1)  # noqa: S311
    of_both = {Kind.DAEMON, Kind.QEMU, Kind.STOP, Kind.CUT, Kind.STATE}
    for kind in Kind:
        machines = {plan.one(rng, kind).vm for _ in range(50)}
        assert machines == ({0, 1} if kind in of_both else {0})
