"""The boundary's laws: every byte is in one window, each is done once, and disks keep one pace."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.fleecing.boundary import CELLS, WINDOW_BYTES, Boundary, Window, by_window, may_go_on, swept

SECTOR = 512
sizes = st.integers(min_value=1, max_value=400).map(lambda sectors: sectors * SECTOR)
windows = st.sampled_from([8, 64, 100]).map(lambda sectors: sectors * SECTOR)
held = st.dictionaries(st.integers(0, 60), st.integers(0, 1000))


def order(boundary: Boundary, held_bytes: Mapping[int, int]) -> list[Window]:
    found = []
    while (window := boundary.next(held_bytes)) is not None:
        found.append(window)
        boundary = boundary.started(window).finished()
    assert boundary.done_bytes == boundary.started_bytes == boundary.disk_bytes
    return found


@given(sizes, windows, held)
def test_the_windows_are_the_disk_in_some_order(size: int, window: int, held_bytes: dict[int, int]) -> None:
    found = order(Boundary(size, window), held_bytes)
    end = 0
    for one in sorted(found, key=lambda one: one.number):
        assert one.offset_bytes == end
        end += one.size_bytes
    assert end == size
    assert all(one.size_bytes == window for one in found if one.number < len(found) - 1)


@given(sizes, windows)
def test_without_old_data_it_is_the_disks_own_order(size: int, window: int) -> None:
    found = order(Boundary(size, window), {})
    assert [one.number for one in found] == list(range(len(found)))


@given(sizes, windows, held)
def test_what_holds_most_comes_first(size: int, window: int, held_bytes: dict[int, int]) -> None:
    numbers = [one.number for one in order(Boundary(size, window), held_bytes)]
    assert numbers == sorted(numbers, key=lambda number: (-held_bytes.get(number, 0), number))


@given(sizes, windows)
def test_a_window_that_failed_waits_again(size: int, window: int) -> None:
    start = Boundary(size, window)
    first = start.next({})
    assert first is not None
    under_way = start.started(first)
    assert (under_way.done_bytes, under_way.started_bytes) == (0, first.size_bytes)
    assert under_way.failed() == start


@given(st.dictionaries(st.sampled_from("abc"), sizes, min_size=1), windows, st.data())
def test_disks_keep_one_pace(disks: dict[str, int], window: int, data: st.DataObject) -> None:
    boundaries = {disk: Boundary(size, window) for disk, size in disks.items()}
    while any(one.next({}) for one in boundaries.values()):
        ready = [
            disk
            for disk, one in boundaries.items()
            if one.current is None and one.next({}) and may_go_on(disk, boundaries)
        ]
        copied = [disk for disk, one in boundaries.items() if one.current is not None]
        assert ready or copied, "all disks wait for each other"
        disk = data.draw(st.sampled_from(sorted(ready + copied)))
        one = boundaries[disk]
        if one.current is not None:
            boundaries[disk] = one.finished()
        else:
            following = one.next({})
            assert following is not None
            for other in boundaries.values():  # ahead by no more than its own window
                assert one.done_bytes / one.disk_bytes <= other.started_bytes / other.disk_bytes + 1e-9
            boundaries[disk] = one.started(following)


def test_a_disk_that_is_ahead_waits_for_one_that_is_behind() -> None:
    whole = Boundary(1000, 100)
    first = whole.started(whole.window(0))
    assert may_go_on("a", {"a": whole, "b": whole})
    assert may_go_on("a", {"a": first.finished(), "b": first})
    assert not may_go_on("a", {"a": first.finished(), "b": whole})
    small = Boundary(100, 100)
    assert not may_go_on("b", {"a": small, "b": first.finished()})
    assert may_go_on("b", {"a": small.started(small.window(0)), "b": first.finished()})


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 3000)), max_size=8), windows)
def test_old_data_is_counted_where_it_is(extents: list[tuple[int, int]], window: int) -> None:
    wanted: Counter[int] = Counter()
    for offset, length in extents:
        wanted.update((offset + at) // window for at in range(length))
    assert by_window(extents, window) == wanted


def test_a_window_is_whole_clusters() -> None:
    assert WINDOW_BYTES % (2 << 20) == 0  # the largest cluster of a qcow2 image


# Drawn as a strip --------------------------------------------------------------------------------------------


@given(sizes, windows, held, st.data())
def test_each_cell_shows_the_worst_of_what_it_is_cut_from(
    size: int, window: int, held_bytes: dict[int, int], data: st.DataObject
) -> None:
    boundary = Boundary(size, window).holding(held_bytes)
    numbers = st.integers(0, boundary.count - 1)
    boundary = replace(boundary, done=data.draw(st.frozensets(numbers)))
    if left := sorted(set(range(boundary.count)) - boundary.done):
        boundary = boundary.started(boundary.window(data.draw(st.sampled_from(left))))
    strip = boundary.strip()
    assert len(strip) == CELLS
    for at, cell in enumerate(strip):
        windows_there = {
            byte // window
            for byte in range(at * size // CELLS, max(at * size // CELLS + 1, -(-(at + 1) * size // CELLS)))
        }
        left_there = windows_there - boundary.done
        holding = {number for number in left_there if held_bytes.get(number)}
        worst = ">" if boundary.current in left_there else "o" if holding else "." if left_there else "#"
        assert cell == worst, (at, windows_there)


def test_a_strip_of_windows_looks_as_it_is_described() -> None:
    boundary = Boundary(4 * 512, 512, done=frozenset({0}), current=2).holding({1: 100, 3: 0})
    assert boundary.strip() == "#" * 16 + "o" * 16 + ">" * 16 + "." * 16


@given(st.integers(1, 1 << 50), st.data())
def test_what_one_job_copies_is_drawn_from_the_beginning(size: int, data: st.DataObject) -> None:
    copied = data.draw(st.integers(0, size))
    strip = swept(size, copied)
    assert len(strip) == CELLS
    done, now = strip.count("#"), strip.count(">")
    assert strip == "#" * done + ">" * now + "." * (CELLS - done - now)
    assert done * size <= copied * CELLS < (done + 1) * size
    assert now == (0 < copied < size)
