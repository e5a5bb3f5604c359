"""How much space is granted: held against QEMU's own arithmetic, and against what the rest relies on."""

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.admission import estimate
from orchestrator.units import GIB, KIB, MIB

TIB = 1024 * GIB
EDGES = (64 * KIB, MIB, 512 * MIB, 2 * GIB, 64 * GIB, TIB, 4 * TIB, 16 * TIB)  # cluster, L2, refcount block, …
SIZES = sorted(
    {
        *(512, 528 * KIB, MIB + 512, 100 * GIB, 20 * TIB, 20 * TIB - 512),
        *(edge + step for edge in EDGES for step in (-512, 0, 512)),
    }
)

disk_sizes = st.integers(1, 20 * TIB // 512).map(lambda sectors: sectors * 512)
disks_of_a_run = st.dictionaries(st.text("abc", min_size=1), disk_sizes, min_size=1, max_size=6)


@pytest.mark.parametrize("size", SIZES)
def test_the_worst_case_is_what_qemu_says(size: int) -> None:
    argv = ["qemu-img", "measure", "--output=json", "-O", "qcow2", "--size", str(size)]
    measured = json.loads(subprocess.check_output(argv))
    assert estimate.worst_case(size) == measured["fully-allocated"]


@pytest.mark.parametrize("size", SIZES)
def test_the_smallest_grant_holds_more_than_an_empty_image(tmp_path: Path, size: int) -> None:
    image = tmp_path / "empty.qcow2"
    subprocess.check_call(["qemu-img", "create", "-q", "-f", "qcow2", image, str(size)])
    smallest = estimate.smallest_grant(size)
    assert image.stat().st_size < smallest <= estimate.worst_case(size)


@given(disk_sizes, disk_sizes)
def test_a_larger_disk_never_needs_less(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert estimate.worst_case(small) <= estimate.worst_case(large)
    assert estimate.smallest_grant(small) <= estimate.smallest_grant(large)


@given(disks_of_a_run, st.integers(0, 40 * TIB))
def test_first_grants_fit_the_quota_or_are_none(disks: dict[str, int], quota: int) -> None:
    granted = estimate.first_grants(disks, quota)
    least = {disk: estimate.smallest_grant(size) for disk, size in disks.items()}
    if granted is None:
        assert sum(least.values()) > quota
        return
    assert granted.keys() == disks.keys()
    assert sum(granted.values()) <= quota
    for disk, size in disks.items():
        assert least[disk] <= granted[disk] <= estimate.worst_case(size)


@given(disks_of_a_run)
def test_the_smallest_quota_that_can_do_does(disks: dict[str, int]) -> None:
    least = sum(map(estimate.smallest_grant, disks.values()))
    assert estimate.first_grants(disks, least) is not None
    assert estimate.first_grants(disks, least - 1) is None


@pytest.mark.parametrize(
    ("size", "granted"),
    [
        (528 * KIB, estimate.worst_case(528 * KIB)),
        (100 * MIB, estimate.worst_case(100 * MIB)),
        (1 * GIB, 256 * MIB),
        (10 * GIB, GIB),
        (20 * TIB, 2 * TIB),
    ],
)
def test_a_first_grant_is_a_tenth_but_useful(size: int, granted: int) -> None:
    assert estimate.first_grants({"vda": size}, 100 * TIB) == {"vda": granted}


@given(st.dictionaries(st.text(max_size=3), disk_sizes, min_size=1), st.integers(0, 40 * TIB))
def test_a_grant_is_whole_clusters(disks: dict[str, int], quota: int) -> None:
    """It becomes the size of a node: QEMU refuses one that splits a sector."""
    granted = estimate.first_grants(disks, quota) or {}
    for disk, size in disks.items():
        assert granted.get(disk, 0) % estimate.CLUSTER == 0
        assert estimate.next_grant(estimate.smallest_grant(size), size) % estimate.CLUSTER == 0


def test_a_short_quota_is_shared_by_what_each_disk_wanted() -> None:
    granted = estimate.first_grants({"large": 100 * GIB, "small": 10 * GIB}, 2 * GIB)
    assert granted is not None
    assert 9 < granted["large"] / granted["small"] < 11


@given(disk_sizes)
def test_growing_ends_at_the_worst_case(size: int) -> None:
    worst = estimate.worst_case(size)
    grant, steps = estimate.smallest_grant(size), 0
    while grant < worst:
        larger = estimate.next_grant(grant, size)
        assert grant < larger <= worst
        assert larger in (worst, grant + max(grant, 256 * MIB))
        grant, steps = larger, steps + 1
    assert estimate.next_grant(worst, size) == worst
    assert steps <= 50


@given(st.integers(2, 40 * TIB), st.data())
def test_a_threshold_lies_between_what_was_crossed_and_the_grant(grant: int, data: st.DataObject) -> None:
    assert 0 < estimate.threshold(grant) < grant
    crossed = data.draw(st.integers(0, grant - 2))
    assert crossed < estimate.threshold(grant, crossed_bytes=crossed) < grant


def test_a_refused_extension_is_asked_for_again_before_the_end() -> None:
    """Each refusal halves what is left, so that room that comes free late is still used."""
    crossed, asked = 0, 0
    while GIB - crossed > MIB:
        crossed = estimate.threshold(GIB, crossed_bytes=crossed)
        asked += 1
    assert asked == 11
