"""Storages over time: no peak is lost, the row stays short, and its times are right."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.service.samples import FINEST_SECONDS, Point, Sample, Samples

values = st.integers(0, 1 << 40)
steps = st.lists(st.tuples(st.integers(1, 40), values, values), min_size=1, max_size=300)


@given(steps)
def test_peaks_stay_and_the_row_is_bounded(taken: list[tuple[int, int, int]]) -> None:
    samples = Samples(points=8, coarsest_seconds=1 << 30)
    now = 1000
    for step, granted, used in taken:
        now += step
        samples.add(Point(now, {"local": Sample(granted, used)}))
        history = samples.history()
        assert 1 <= len(history.at) <= 8
    (storage,) = history.storages
    assert max(storage.granted_bytes) == max(granted for _, granted, _ in taken)
    assert max(storage.used_bytes) == max(used for _, _, used in taken)
    assert len(storage.used_bytes) == len(storage.granted_bytes) == len(history.at)
    assert history.at[0] == 1000 + taken[0][0]  # nothing was let go of
    assert all(later - earlier >= history.interval_seconds for earlier, later in pairwise(history.at))
    assert history.interval_seconds % FINEST_SECONDS == 0


def test_at_its_coarsest_the_oldest_go() -> None:
    samples = Samples(points=4, coarsest_seconds=20)
    for at in range(0, 200, 10):
        samples.add(Point(at, {"local": Sample(at, 0)}))
    history = samples.history()
    assert history.interval_seconds == 20
    assert history.at == (120, 140, 160, 180)
    assert history.storages[0].granted_bytes == (130, 150, 170, 190)


def test_a_storage_that_comes_later_held_nothing_before() -> None:
    samples = Samples()
    samples.add(Point(0, {"a": Sample(1, 1)}))
    samples.add(Point(10, {"a": Sample(2, 2), "b": Sample(3, 3)}))
    by_name = {one.storage: one.used_bytes for one in samples.history().storages}
    assert by_name == {"a": (1, 2), "b": (0, 3)}
