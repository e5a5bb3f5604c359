"""How much space is granted: held against QEMU's own arithmetic, and against guests that fill it."""

import json
import math
import subprocess
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.admission import estimate
from orchestrator.admission.estimate import Fill, Need
from orchestrator.qemu.commands import CLUSTER_BYTES as CLUSTER
from orchestrator.units import GIB, KIB, MIB, Share

TIB = 1024 * GIB
EDGES = (64 * KIB, MIB, 512 * MIB, 2 * GIB, 64 * GIB, TIB, 4 * TIB, 16 * TIB)  # cluster, L2, refcount block, …
SIZES = sorted(
    {
        *(512, 528 * KIB, MIB + 512, 100 * GIB, 20 * TIB, 20 * TIB - 512),
        *(edge + step for edge in EDGES for step in (-512, 0, 512)),
    }
)
TENTH = Share(10)

disk_sizes = st.integers(1, 20 * TIB // 512).map(lambda sectors: sectors * 512)
shares = st.floats(0, 99).map(Share) | st.integers(0, 30 * TIB)
needs = st.builds(Need, disk_sizes, shares, st.none() | st.integers(0, 30 * TIB))
disks_of_a_run = st.dictionaries(st.text("abc", min_size=1), needs, min_size=1, max_size=6)
lengths = st.integers(0, 40 * TIB)
rates = st.just(0.0) | st.floats(0, 1e11)


# --- lengths and grants ---


@pytest.mark.parametrize("size", SIZES)
def test_the_worst_length_is_what_qemu_says(size: int) -> None:
    argv = ["qemu-img", "measure", "--output=json", "-O", "qcow2", "--size", str(size)]
    measured = json.loads(subprocess.check_output(argv))
    assert estimate.worst_length(size) == measured["fully-allocated"]


@pytest.mark.parametrize("size", SIZES)
def test_the_smallest_grant_holds_more_than_an_empty_image(tmp_path: Path, size: int) -> None:
    image = tmp_path / "empty.qcow2"
    subprocess.check_call(["qemu-img", "create", "-q", "-f", "qcow2", image, str(size)])
    smallest = estimate.smallest_grant(size)
    assert image.stat().st_size < estimate.limit(smallest)
    assert smallest <= estimate.worst_case(size)


@given(lengths, st.integers(0, GIB))
def test_a_limit_leaves_room_for_the_file_systems_metadata(grant: int, more: int) -> None:
    limit = estimate.limit(grant)
    assert limit % CLUSTER == 0
    assert 0 <= limit <= estimate.limit(grant + more)
    assert 0 <= grant - grant / 256 - limit < CLUSTER + 1


@given(lengths, st.integers(0, GIB))
def test_the_grant_for_a_length_is_the_smallest(length: int, more: int) -> None:
    grant = estimate.grant_for(length)
    assert grant % CLUSTER == 0
    assert grant <= estimate.grant_for(length + more)
    assert length <= estimate.limit(grant) <= length + 2 * CLUSTER
    assert length == 0 or estimate.limit(grant - CLUSTER) < length


@given(disk_sizes, disk_sizes)
def test_a_larger_disk_never_needs_less(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert estimate.worst_length(small) <= estimate.worst_length(large)
    assert estimate.worst_case(small) <= estimate.worst_case(large)
    assert estimate.smallest_grant(small) <= estimate.smallest_grant(large)


@given(disk_sizes)
def test_nothing_outgrows_the_worst_case(size: int) -> None:
    assert estimate.limit(estimate.worst_case(size)) >= estimate.worst_length(size)


# --- first grants ---


def least_of(disks: Mapping[str, Need]) -> dict[str, int]:
    return {disk: estimate.smallest_grant(need.size_bytes) for disk, need in disks.items()}


@given(disks_of_a_run, st.integers(0, 40 * TIB))
def test_first_grants_fit_the_quota_or_are_none(disks: dict[str, Need], quota: int) -> None:
    granted = estimate.first_grants(disks, quota)
    least = least_of(disks)
    if granted is None:
        assert sum(least.values()) > quota
        return
    assert granted.keys() == disks.keys()
    assert sum(granted.values()) <= quota
    for disk, need in disks.items():
        assert least[disk] <= granted[disk] <= estimate.worst_case(need.size_bytes)
        assert granted[disk] % CLUSTER == 0


@given(disks_of_a_run)
def test_the_smallest_quota_that_can_do_does(disks: dict[str, Need]) -> None:
    least = sum(least_of(disks).values())
    assert estimate.first_grants(disks, least) is not None
    assert estimate.first_grants(disks, least - 1) is None


@pytest.mark.parametrize(
    ("need", "granted"),
    [
        (Need(528 * KIB, TENTH), estimate.worst_case(528 * KIB)),
        (Need(100 * MIB, TENTH), estimate.worst_case(100 * MIB)),
        (Need(1 * GIB, TENTH), 256 * MIB),
        (Need(10 * GIB, TENTH), GIB),
        (Need(20 * TIB, TENTH), 2 * TIB),
        (Need(10 * GIB, 3 * GIB + 1), 3 * GIB),
        (Need(10 * GIB, 0), 256 * MIB),
        (Need(10 * GIB, TIB), estimate.worst_case(10 * GIB)),
        (Need(100 * GIB, TENTH, 3 * GIB), 3 * GIB),
        (Need(100 * GIB, TENTH, 30 * GIB), 30 * GIB),
        (Need(100 * GIB, TENTH, 0), 256 * MIB),
        (Need(10 * GIB, TENTH, 30 * GIB), estimate.worst_case(10 * GIB)),
    ],
)
def test_a_first_grant_is_what_is_expected_or_a_share(need: Need, granted: int) -> None:
    assert estimate.first_grants({"vda": need}, 100 * TIB) == {"vda": granted}


def test_a_short_quota_is_shared_by_what_each_disk_wanted() -> None:
    disks = {"large": Need(100 * GIB, TENTH), "small": Need(10 * GIB, TENTH)}
    granted = estimate.first_grants(disks, 2 * GIB)
    assert granted is not None
    assert 9 < granted["large"] / granted["small"] < 11


# --- one step of growth ---


@st.composite
def filling(draw: st.DrawFn) -> tuple[int, int, Fill]:
    """A disk, a grant that it may have, and how full the image may be."""
    size = draw(disk_sizes)
    clusters = st.integers(estimate.smallest_grant(size) // CLUSTER, estimate.worst_case(size) // CLUSTER)
    grant = draw(clusters) * CLUSTER
    return size, grant, Fill(0.0, draw(st.integers(0, estimate.limit(grant) - 2)), draw(rates))


@given(filling())
def test_a_next_grant_is_no_less_and_at_most_the_worst_case(drawn: tuple[int, int, Fill]) -> None:
    size, grant, fill = drawn
    larger = estimate.next_grant(grant, fill, disk_bytes=size)
    assert grant <= larger <= estimate.worst_case(size)
    assert larger % CLUSTER == 0
    assert estimate.limit(larger) <= fill.high_bytes + max(2 * estimate.limit(grant), 448 * MIB) + 2 * CLUSTER
    if larger < estimate.worst_case(size):
        assert estimate.limit(larger) >= fill.high_bytes + 448 * MIB


@given(filling())
def test_a_threshold_lies_between_what_was_reached_and_the_limit(drawn: tuple[int, int, Fill]) -> None:
    _, grant, fill = drawn
    assert fill.high_bytes < estimate.threshold(grant, fill) < estimate.limit(grant)


@given(filling())
def test_a_first_threshold_is_none_of_those_that_qemu_takes_for_off(drawn: tuple[int, int, Fill]) -> None:
    _, grant, _ = drawn
    assert estimate.limit(grant) // 4 <= estimate.threshold(grant) < estimate.limit(grant)


@pytest.mark.parametrize("clusters", [3, 4, 5])
def test_a_grant_of_a_few_clusters_has_thresholds_up_to_its_end(clusters: int) -> None:
    grant, fill, levels = clusters * CLUSTER, Fill(0.0), []
    while estimate.limit(grant) - fill.high_bytes > 1:
        levels.append(estimate.threshold(grant, fill))
        fill = fill.seen(0.0, levels[-1])
    assert levels == sorted(set(levels))
    assert levels[-1] == estimate.limit(grant) - 1


@pytest.mark.parametrize(
    ("high", "rate", "limit", "look"),
    [
        (64, 1, 64 + 448, 64 + 192),
        (64, 36, 64 + 448, 64 + 192),
        (64, 40, 64 + 480, 64 + 192),
        (64, 9999, 64 + 2 * 255, 574 / 4),  # no burst more than triples it
        (255, 9999, 3 * 255, 2 * 255),
        (4000, 100, 4000 + 1200, 4000 + 200),
        (4000, 400, 4000 + 4800, 4000 + 800),
        (3600, 1, 4080, 3600 + 192),  # enough is left
        (3600, 120, 4080, 3600 + 240),
        (3600, 121, 3600 + 12 * 121, 3600 + 242),
    ],
)
def test_growth(high: int, rate: int, limit: int, look: float) -> None:
    fill = Fill(0.0, high * MIB, float(rate * MIB))
    before = 4 * GIB if high > 255 else 256 * MIB
    grant = estimate.next_grant(before, fill, disk_bytes=TIB)
    assert estimate.limit(grant) == pytest.approx(limit * MIB, abs=2 * CLUSTER)
    assert estimate.threshold(grant, fill) == pytest.approx(look * MIB, abs=2 * CLUSTER)


@pytest.mark.parametrize(
    ("grant", "look"),
    [
        (2 * MIB, 31 * CLUSTER // 4),
        (256 * MIB, 255 * MIB // 4),
        (512 * MIB, 192 * MIB),
        (640 * MIB, 192 * MIB),
        (1 * GIB, 255 * MIB),
        (100 * GIB, 255 * 100 * MIB),
    ],
)
def test_a_first_look(grant: int, look: int) -> None:
    """A quarter of the limit, or a headroom's worth, if that is more: the rate is known from then on."""
    assert estimate.threshold(grant) == look


def test_a_refused_extension_is_asked_for_again_before_the_end() -> None:
    """Each refusal halves what is left, so that room that comes free late is still used."""
    fill, asked = Fill(0.0), 0
    while estimate.limit(GIB) - fill.high_bytes > MIB:
        fill = fill.seen(60.0 * (asked + 1), estimate.threshold(GIB, fill))
        asked += 1
    assert asked == 12


def test_a_rate_is_the_last_one_seen_or_half_of_what_was_known() -> None:
    fill = Fill(10.0).seen(12.0, 600)
    assert fill == Fill(12.0, 600, 300.0)
    assert (fill := fill.seen(13.0, 1600)).rate_bytes_per_second == 1000
    assert (fill := fill.seen(14.0, 1601)).rate_bytes_per_second == 500
    assert (fill := fill.seen(15.0, 1601)).rate_bytes_per_second == 250


def test_looks_at_the_same_time_or_out_of_order_do_no_harm() -> None:
    fill = Fill(10.0, MIB, 300.0)
    assert fill.seen(10.0, 2 * MIB) == Fill(10.0, 2 * MIB, 100.0 * MIB)
    assert fill.seen(9.0, MIB - 1) == Fill(10.0, MIB, 150.0)


# --- guests that fill it ---


@dataclass(frozen=True, slots=True)
class End:
    """How a fill ended. `excess_bytes` is the most that a limit was above what the image held when it grew."""

    outrun: bool
    limit: int
    looks: int
    used: int
    excess_bytes: int


class Guest:
    """One that fills an image at given speeds, each for some seconds."""

    def __init__(self, phases: Iterable[tuple[float, float]]) -> None:
        phases = list(phases)
        self._seconds = [0.0, *accumulate(seconds for seconds, _ in phases)]
        self._bytes = [0.0, *accumulate(seconds * speed for seconds, speed in phases)]

    def written(self, seconds: float) -> float:
        return _interpolate(self._seconds, self._bytes, seconds)

    def reaches(self, size: float) -> float:
        """When it has written so much: infinite if never."""
        return _interpolate(self._bytes, self._seconds, size) if size <= self._bytes[-1] else math.inf

    def fill(self, first: int, react: Callable[[], tuple[float, float]], *, disk: int = TIB) -> End:
        """Fill an image from its first grant on.

        `react` says how long after each event the new limit and threshold are in force, and at what part of that
        time the image is looked at.
        """
        grant, fill, since, looks, excess = first, Fill(0.0), 0.0, 0, 0
        while estimate.limit(grant) < estimate.worst_length(disk):
            level = estimate.threshold(grant, fill)
            event = max(since, self.reaches(level))
            if event == math.inf:
                break
            reaction, part = react()
            since, looks = event + reaction, looks + 1
            if self.written(since) >= estimate.limit(grant):
                return End(True, estimate.limit(grant), looks, round(self.written(since)), excess)
            look = event + part * reaction
            fill = fill.seen(look, max(level + 1, int(self.written(look))))
            larger = estimate.next_grant(grant, fill, disk_bytes=disk)
            if larger > grant:
                excess = max(excess, estimate.limit(larger) - fill.high_bytes)
            grant = larger
        return End(False, estimate.limit(grant), looks, round(self._bytes[-1]), excess)


def _interpolate(known: list[float], wanted: list[float], at: float) -> float:
    index = bisect_left(known, at)
    if index == len(known):
        return wanted[-1]
    if known[index] == at or index == 0:
        return wanted[index]
    part = (at - known[index - 1]) / (known[index] - known[index - 1])
    return wanted[index - 1] + part * (wanted[index] - wanted[index - 1])


FASTEST = 2e9
WALK = 50.0 * MIB
"""Any guest may start with this."""


def doubling(speed: float, seconds: float = 60) -> list[tuple[float, float]]:
    """Phases of a guest whose speed doubles every second up to the fastest, which it then keeps."""
    edges = [min(FASTEST, speed * 2 ** (eighth / 8)) for eighth in range(round(8 * seconds) + 1)]
    return [(1 / 8, (start + end) / 2) for start, end in pairwise(edges)]


@st.composite
def accelerating(draw: st.DrawFn) -> list[tuple[float, float]]:
    """Phases of a guest that slows down or idles, then doubles its speed every second, again and again."""
    phases, speed = [], draw(st.floats(0, WALK))
    for _ in range(draw(st.integers(1, 5))):
        speed *= draw(st.sampled_from([0, 0.1, 1]) | st.floats(0, 1))
        phases.append((draw(some_seconds | idle), speed))
        speed = max(speed, draw(st.floats(1, WALK) | st.just(WALK)))
        phases += doubling(speed, draw(st.floats(0, 20)))
        speed = phases[-1][1]
    return phases


firsts = st.integers(256 * MIB // CLUSTER, 300 * GIB // CLUSTER).map(lambda clusters: clusters * CLUSTER)
firsts = st.just(256 * MIB) | st.sampled_from([300 * MIB, GIB, 3 * GIB, 10 * GIB]) | firsts
parts = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
some_seconds = st.sampled_from([0.01, 0.1, 0.5, 1.0, 5.0, 30.0]) | st.floats(0, 3)
idle = st.sampled_from([0.0, 1.0, 3600.0]) | st.floats(0, 100)


def reacting(data: st.DataObject, longest: float) -> Callable[[], tuple[float, float]]:
    """Reactions that all take longest, or up to that."""
    part = data.draw(parts)
    if data.draw(st.booleans()):
        return lambda: (longest, part)
    random = data.draw(st.randoms(use_true_random=False))
    return lambda: (random.uniform(0, longest), part)


@given(st.data(), firsts, st.sampled_from([0.01, 0.1, 0.3, 0.5]) | st.floats(0.01, 2))
def test_no_guest_outruns_growth_that_fills_less_than_the_least_headroom_in_a_reaction(
    data: st.DataObject, first: int, longest: float
) -> None:
    """Whatever it did before: bursts and pauses in any order, up to 2 GB/s."""
    fastest = min(FASTEST, 191 * MIB / longest)
    speeds = st.sampled_from([0.0, fastest]) | st.floats(0, fastest)
    guest = Guest(data.draw(st.lists(st.tuples(some_seconds, speeds), max_size=30)))
    assert not guest.fill(first, reacting(data, longest)).outrun


@given(st.data(), idle, st.sampled_from([0.01, 0.1]))
def test_2_gb_a_second_out_of_nothing_is_fine_if_we_react_in_100_ms(
    data: st.DataObject, before: float, longest: float
) -> None:
    guest = Guest([(before, 0), (40, FASTEST)])
    assert not guest.fill(256 * MIB, reacting(data, longest)).outrun


@given(st.data(), firsts, st.floats(0.01, 1.999), st.floats(0, 0.999))
def test_no_constant_guest_outruns_growth_that_fills_less_than_half_the_first_grant(
    data: st.DataObject, first: int, longest: float, part: float
) -> None:
    fastest = min(FASTEST, estimate.limit(first) / 2 / longest)
    guest = Guest([(60, part * fastest)])
    assert not guest.fill(first, reacting(data, longest)).outrun


@given(st.data(), firsts, accelerating(), st.sampled_from([0.01, 0.1, 0.3]))
def test_a_guest_that_accelerates_is_followed(
    data: st.DataObject, first: int, phases: list[tuple[float, float]], longest: float
) -> None:
    assert not Guest(phases).fill(first, reacting(data, longest)).outrun


@pytest.mark.parametrize("first", [256 * MIB, 400 * MIB, 658 * MIB, 839 * MIB, GIB])
@pytest.mark.parametrize("part", [0.0, 1.0])
def test_a_guest_that_idled_since_any_look_and_accelerates_is_followed(first: int, part: float) -> None:
    """The worst case: what was observed of its rate is worth nothing."""
    for earlier in range(0, 1600, 20):
        guest = Guest([(earlier, MIB), (36_000, 0), *doubling(WALK)])
        assert not guest.fill(first, lambda: (0.3, part)).outrun, earlier


def test_the_simulation_sees_a_guest_that_is_too_fast() -> None:
    assert Guest([(60, 200 * MIB)]).fill(256 * MIB, lambda: (1.0, 0.0)).outrun
    assert Guest([(9, 0), (60, 500 * MIB)]).fill(256 * MIB, lambda: (0.5, 0.0)).outrun
    assert Guest([(9, 0), *doubling(1000)]).fill(256 * MIB, lambda: (0.8, 0.0)).outrun


@given(st.data(), st.lists(st.tuples(some_seconds, st.floats(0, 37 * MIB)), max_size=30), st.floats(0.01, 2))
def test_a_slow_guest_hoards_no_quota(
    data: st.DataObject, phases: list[tuple[float, float]], longest: float
) -> None:
    end = Guest(phases).fill(256 * MIB, reacting(data, longest))
    assert not end.outrun
    assert end.excess_bytes <= 448 * MIB + 2 * CLUSTER
    assert end.limit <= max(255 * MIB, end.used + 448 * MIB + 2 * CLUSTER)


@pytest.mark.parametrize("use", [10 * MIB, 63 * MIB, 64 * MIB, 200 * MIB, GIB, 20 * GIB])
def test_a_guest_of_1_mb_a_second_holds_little_more_than_it_needs(use: int) -> None:
    end = Guest([(use / 1e6, 1e6)]).fill(256 * MIB, lambda: (0.01, 0.5))
    grant = estimate.grant_for(end.limit)
    assert grant <= 2 * use + 2 * estimate.FIRST_LEAST
    if use < 63 * MIB or use >= 200 * MIB:
        assert grant <= 2 * use + estimate.FIRST_LEAST
    assert end.looks <= use / estimate.HEADROOM_LEAST + 1


def test_a_slow_guest_with_a_large_first_grant_asks_for_more_only_at_its_end() -> None:
    assert Guest([(9000, 1e6)]).fill(10 * GIB, lambda: (0.01, 0.5)).limit == estimate.limit(10 * GIB)


def test_a_burst_does_not_make_a_slow_guest_hoard() -> None:
    burst_then_slow = Guest([(0.05, FASTEST), (100_000, 1e5)])
    end = burst_then_slow.fill(256 * MIB, lambda: (0.005, 0.5))
    assert end.limit <= end.used + GIB
