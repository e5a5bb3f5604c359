"""The oracle of the multi-disk tests must itself be beyond doubt: it passes every moment that ever
was, and catches each way in which a backup can show a moment that never was."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.guest.sequence import (
    RECORD,
    STRIDE,
    Record,
    SequenceVerdict,
    check,
    newest,
    pack,
    slot_of,
    slots_of,
    unpack,
)

RUN = 4711
CLUSTER = 16 * RECORD  # 64 KiB


def record(seq: int, disk: int, disks: int, slots: int, run: int = RUN) -> bytes:
    return pack(Record(run, seq, disk, disks, slot_of(seq, slots), slots, ns=seq * 1000))


def make_disk(path: Path, size: int, last: int, *, disk: int = 0, disks: int = 2) -> Path:
    """Write a disk as it is when its newest record is `last`."""
    slots = slots_of(size)
    with path.open("wb") as file:
        file.truncate(size)
        for slot in range(slots):
            if seq := newest(slot, slots, last):
                file.seek(slot * RECORD)
                file.write(record(seq, disk, disks, slots))
    return path


def make_pair(folder: Path, last: tuple[int, int], size: int = 1 << 20) -> list[Path]:
    return [make_disk(folder / f"disk{at}", size, last[at], disk=at) for at in range(2)]


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def piece(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def judged(images: list[Path]) -> SequenceVerdict:
    return check(images, run=RUN)


def test_records_survive_packing() -> None:
    made = Record(RUN, 12, 1, 2, 3, 4, 5)
    block = pack(made)
    assert len(block) == RECORD
    assert unpack(block) == made
    assert unpack(block[:-1] + bytes([block[-1] ^ 1])) is None
    assert unpack(bytes(RECORD)) is None


@given(slots=st.integers(1, 9000).filter(lambda n: n % STRIDE), last=st.integers(0, 30000))
def test_the_newest_number_of_a_slot_is_what_writing_one_by_one_gives(slots: int, last: int) -> None:
    for slot in {0, slots // 2, slots - 1}:
        seq = newest(slot, slots, last)
        if seq:
            assert slot_of(seq, slots) == slot
            assert last - slots < seq <= last
    written = {slot_of(seq, slots) for seq in range(max(1, last - slots + 1), last + 1)}
    assert sum(bool(newest(slot, slots, last)) for slot in range(slots)) == len(written)


def test_a_size_that_the_stride_divides_loses_a_slot() -> None:
    assert slots_of(STRIDE * RECORD) == STRIDE - 1
    assert slots_of(1 << 20, 65536) == 16
    assert slots_of((1 << 20) + 512) == 256


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    disks=st.integers(1, 4),
    slots=st.integers(1, 40),
    last=st.integers(1, 120),
    ahead=st.integers(0, 3),
    torn=st.booleans(),
)
def test_every_moment_that_ever_was_passes(
    tmp_path: Path, *, disks: int, slots: int, last: int, ahead: int, torn: bool
) -> None:
    ahead = min(ahead, disks - 1)
    numbers = [last + (disk < ahead) for disk in range(disks)]
    images = [
        make_disk(tmp_path / f"d{at}", slots * RECORD + 512, numbers[at], disk=at, disks=disks)
        for at in range(disks)
    ]
    if torn and slots > 1:  # the write under way: on the first disk that lacks the next record
        half = record(last + 1, ahead, disks, slots)[: RECORD // 2]
        patch(images[ahead], slot_of(last + 1, slots) * RECORD, half)
    verdict = judged(images)
    assert verdict.problems == []
    assert verdict.ok
    assert verdict.last == numbers


@pytest.mark.parametrize("last", [(5, 5), (700, 699), (700, 700)])
def test_good_pairs_pass(tmp_path: Path, last: tuple[int, int]) -> None:
    assert judged(make_pair(tmp_path, last)).ok


@pytest.mark.parametrize("disk", [0, 1])
def test_a_stale_cluster_is_caught(tmp_path: Path, disk: int) -> None:
    images = make_pair(tmp_path, (700, 700))
    older = make_disk(tmp_path / "older", 1 << 20, 400, disk=disk)
    patch(images[disk], 3 * CLUSTER, piece(older, 3 * CLUSTER, CLUSTER))
    assert not judged(images).ok


def test_a_single_stale_record_is_caught(tmp_path: Path) -> None:
    images = make_pair(tmp_path, (700, 700))
    slot = slot_of(690, 256)
    patch(images[1], slot * RECORD, record(690 - 256, 1, 2, 256))
    verdict = judged(images)
    assert verdict.problems == [
        f"disk 1, slot {slot}: record {690 - 256} instead of record 690",
    ]


def test_a_cluster_from_the_future_is_caught(tmp_path: Path) -> None:
    images = make_pair(tmp_path, (700, 700))
    newer = make_disk(tmp_path / "newer", 1 << 20, 702, disk=0)
    slot = slot_of(702, 256)
    patch(images[0], slot * RECORD, piece(newer, slot * RECORD, RECORD))
    assert not judged(images).ok


def test_a_zero_cluster_is_caught(tmp_path: Path) -> None:
    images = make_pair(tmp_path, (700, 700))
    patch(images[0], 5 * CLUSTER, bytes(CLUSTER))
    assert not judged(images).ok


def test_a_foreign_cluster_is_caught(tmp_path: Path) -> None:
    images = make_pair(tmp_path, (700, 700))
    patch(images[0], 5 * CLUSTER, piece(images[0], 6 * CLUSTER, CLUSTER))  # another place
    assert not judged(images).ok
    images = make_pair(tmp_path, (700, 700))
    patch(images[0], 5 * CLUSTER, piece(images[1], 5 * CLUSTER, CLUSTER))  # another disk
    assert not judged(images).ok
    images = make_pair(tmp_path, (700, 700))
    patch(images[0], 5 * CLUSTER, b"\xa5" * CLUSTER)  # garbage
    assert not judged(images).ok
    assert not check(make_pair(tmp_path, (700, 700)), run=RUN + 1).ok  # another VM


@pytest.mark.parametrize("last", [(700, 698), (698, 700), (700, 701), (700, 400)])
def test_disks_from_different_moments_are_caught(tmp_path: Path, last: tuple[int, int]) -> None:
    assert not judged(make_pair(tmp_path, last)).ok


def test_swapped_disks_are_caught(tmp_path: Path) -> None:
    assert not judged(make_pair(tmp_path, (700, 700))[::-1]).ok


def test_one_disk_twice_is_caught(tmp_path: Path) -> None:
    images = make_pair(tmp_path, (700, 700))
    shutil.copy(images[0], images[1])
    assert not judged(images).ok


def test_a_torn_record_is_allowed_only_where_a_write_was_under_way(tmp_path: Path) -> None:
    half = record(701, 0, 2, 256)[: RECORD // 2]
    images = make_pair(tmp_path, (700, 700))
    patch(images[0], slot_of(701, 256) * RECORD, half)
    assert judged(images).ok
    patch(images[1], slot_of(701, 256) * RECORD, half)
    assert not judged(images).ok
    images = make_pair(tmp_path, (700, 700))
    patch(images[0], slot_of(650, 256) * RECORD, half)
    assert not judged(images).ok


def test_data_behind_the_slots_is_caught(tmp_path: Path) -> None:
    images = make_pair(tmp_path, (700, 700), size=(1 << 20) + 512)
    assert judged(images).ok
    patch(images[1], (1 << 20) + 511, b"x")
    assert not judged(images).ok


def test_an_empty_or_too_old_state_is_no_success(tmp_path: Path) -> None:
    assert not judged(make_pair(tmp_path, (0, 0))).ok
    images = make_pair(tmp_path, (700, 700))
    assert check(images, run=RUN, at_least=700).ok
    assert not check(images, run=RUN, at_least=701).ok
