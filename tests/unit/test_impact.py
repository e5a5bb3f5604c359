"""How long guests' writes take: what comes of readings of QEMU's counters."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.model import GuestWrites
from orchestrator.qemu.writes import NS_PER_MS, Counters, counters, together
from orchestrator.run.impact import RECENT, Impact

MS = NS_PER_MS
BOUNDARIES = (1 * MS, 2 * MS, 5 * MS)
READINGS = st.builds(
    lambda latencies: Counters(
        len(latencies),
        sum(latencies),
        BOUNDARIES,
        tuple(
            sum(low <= latency < high for latency in latencies)
            for low, high in zip((0, *BOUNDARIES), (*BOUNDARIES, 10**12), strict=True)
        ),
    ),
    st.lists(st.integers(1, 10 * MS), max_size=50),
)


def described(qdev: str | None, *, writes: int = 0, failed: int = 0, ns: int = 0, **more: Any) -> dict[str, Any]:
    stats = {"wr_operations": writes, "failed_wr_operations": failed, "wr_total_time_ns": ns, **more}
    return {"stats": stats, **({"qdev": qdev} if qdev else {}), "node-name": "drive"}


def reading(count: int, mean_ms: float, *bins: int) -> dict[str, Counters]:
    return {"/vda": Counters(count, int(count * mean_ms * MS), BOUNDARIES if bins else (), bins)}


def impact(first: dict[str, Counters], begun: dict[str, Counters]) -> Impact:
    made = Impact()
    made.devices = ["/vda"]
    made.meet(first)
    made.begin(begun)
    return made


def told(made: Impact) -> GuestWrites:
    writes = made.writes()
    assert writes is not None
    return writes


# --- what QEMU says ---


def test_counters_are_found_by_the_devices_path_whatever_qemu_calls_it() -> None:
    found = counters(
        [
            described("/machine/peripheral/vda/virtio-backend", writes=7, failed=2, ns=18 * MS),
            described("nvme0", writes=1),
            described("/machine/peripheral-anon/device[1]"),
            described(None, writes=5),  # a drive that no device is on
        ]
    )
    assert found == {
        "/machine/peripheral/vda": Counters(9, 18 * MS),
        "/machine/peripheral/nvme0": Counters(1, 0),
        "/machine/peripheral-anon/device[1]": Counters(),
    }


def test_a_histogram_that_somebody_keeps_is_read() -> None:
    histogram = {"boundaries": [1, 2], "bins": [5, 4, 3]}
    (found,) = counters([described("vda", wr_latency_histogram=histogram)]).values()
    assert (found.boundaries_ns, found.bins) == ((1, 2), (5, 4, 3))


# --- how it is counted ---


@given(READINGS, READINGS)
def test_what_has_come_since_and_what_was_before_are_all(before: Counters, more: Counters) -> None:
    now = before.beside(more)
    assert now.since(before) == more
    assert now.since(Counters(0, 0, BOUNDARIES, (0, 0, 0, 0))) == now


@given(READINGS)
def test_a_quantile_is_a_boundary_that_so_many_stay_below(read: Counters) -> None:
    found = read.quantile_ms(0.99)
    if not read.count:
        assert found is None
        return
    assert found is not None
    below = sum(read.bins[: BOUNDARIES.index(int(found * MS)) + 1])
    assert below >= 0.99 * read.count or found * MS == BOUNDARIES[-1]


@pytest.mark.parametrize(
    ("now", "before"),
    [
        (Counters(9, 9, (1, 2), (1, 2, 3)), Counters(5, 5, (1, 3), (1, 2, 3))),  # other boundaries
        (Counters(9, 9, (1, 2), (1, 0, 0)), Counters(5, 5, (1, 2), (1, 2, 3))),  # begun anew
        (Counters(9, 9), Counters(5, 5, (1, 2), (1, 2, 3))),  # taken away
        (Counters(9, 9, (1, 2), (1, 2, 3)), Counters(5, 5)),  # set meanwhile
    ],
)
def test_a_histogram_that_was_changed_meanwhile_tells_nothing(now: Counters, before: Counters) -> None:
    assert now.since(before) == Counters(4, 4)


def test_histograms_with_other_boundaries_are_not_added_up() -> None:
    one, other = Counters(1, 5, (1,), (0, 1)), Counters(2, 6, (2,), (0, 2))
    assert one.beside(other) == Counters(3, 11)


def test_only_the_wanted_devices_count_as_long_as_they_are_there() -> None:
    before = {"/vda": Counters(1, 10), "/vdb": Counters(2, 20), "/vdc": Counters(3, 30)}
    now = {"/vda": Counters(2, 15), "/vdb": Counters(4, 90)}
    assert together(now, before, ["/vda", "/vdc"]) == Counters(1, 5)
    assert together(now, before, ["/vdc"]).mean_ms is None


# --- what a run says of it ---


def test_a_run_tells_what_writes_took_before_and_during_it() -> None:
    made = impact(reading(100, 1), reading(200, 1))
    for at in (reading(210, 1), reading(220, 2)):
        made.take(at)
    assert made.writes() == GuestWrites(count=20, mean_ms=12.0, worst_ms=23.0, p99_ms=None, before_ms=1.0)
    assert made.recent_ms == (1.0, 23.0)


def test_a_quiet_guest_tells_nothing_of_how_long_it_would_take() -> None:
    made = impact(reading(5, 1), reading(5, 1))
    made.take(reading(5, 1))
    assert made.writes() == GuestWrites(0, None, None, None, None)
    assert made.recent_ms == (None,)


def test_quantiles_are_told_where_a_histogram_is_kept() -> None:
    made = impact(reading(0, 1, 0, 0, 0, 0), reading(100, 1, 0, 0, 0, 100))
    made.take(reading(200, 1, 98, 2, 0, 100))
    assert told(made).p99_ms == 2.0


def test_nothing_is_told_before_the_snapshot() -> None:
    made = Impact()
    made.meet(reading(1, 1))
    assert made.writes() is None


def test_what_could_not_be_asked_at_the_snapshot_is_counted_from_the_first_sample_on() -> None:
    made = Impact()
    made.devices = ["/vda"]
    made.take(reading(5, 9))
    made.take(reading(7, 9))
    assert made.writes() == GuestWrites(2, 9.0, 9.0, None, None)


@given(st.lists(st.integers(0, 3), max_size=3 * RECENT))
def test_as_many_samples_as_are_told_are_kept(counts: Sequence[int]) -> None:
    made = impact(reading(0, 1), reading(0, 1))
    total = 0
    for count in counts:
        total += count
        made.take(reading(total, 2))
    assert made.recent_ms == tuple(2.0 if count else None for count in counts)[-RECENT:]
    assert told(made).count == total
