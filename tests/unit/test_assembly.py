"""What is assembled of pieces is what was written, whatever their size and order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.target.mover.assembly import Assembly, Overlay, Whole
from orchestrator.target.restic.pack import CHUNK_BYTES

CHUNK = 8
SIZES = st.integers(1, 5 * CHUNK)
MIB = 1 << 20


@st.composite
def requests(draw: st.DrawFn, size: int) -> list[tuple[int, int, bool]]:
    """Offset, length, and whether it is zeroes."""
    found = []
    for _ in range(draw(st.integers(0, 12))):
        offset = draw(st.integers(0, size - 1))
        found.append((offset, draw(st.integers(1, size - offset)), draw(st.booleans())))
    return found


@given(SIZES, st.data())
def test_every_byte_arrives(size: int, data: st.DataObject) -> None:
    assembly, disk = Assembly(size, CHUNK), bytearray(b"P" * size)
    chunks = {number: bytes(disk[number * CHUNK :][:CHUNK]) for number in range(assembly.count)}
    for at, (offset, length, zeroes) in enumerate(data.draw(requests(size))):
        content = bytes(length) if zeroes else bytes([at + 1]) * length
        disk[offset : offset + length] = content
        given = assembly.zero(offset, length) if zeroes else assembly.write(offset, memoryview(content))
        for whole in given:
            chunks[whole.number] = bytes(
                assembly.size_of(whole.number) if whole.content is None else whole.content
            )
    for number in assembly.parts:
        chunks[number] = bytes(assembly.take(number).over(chunks[number]))
    assert b"".join(chunks[number] for number in sorted(chunks)) == disk
    assert assembly.held_bytes == 0


@given(SIZES, st.permutations(range(5 * CHUNK)))
def test_a_disk_in_single_bytes_holds_nothing_at_its_end(size: int, order: list[int]) -> None:
    assembly = Assembly(size, CHUNK)
    seen = []
    for offset in (one for one in order if one < size):
        seen += [whole.number for whole in assembly.write(offset, memoryview(b"x"))]
        assert assembly.held_bytes <= size
    assert sorted(seen) == list(range(assembly.count))
    assert assembly.parts == ()


def test_whole_chunks_are_not_copied() -> None:
    data = bytearray(3 * CHUNK)
    given = list(Assembly(3 * CHUNK, CHUNK).write(CHUNK, memoryview(data)[CHUNK:]))
    assert [whole.number for whole in given] == [1, 2]
    data[CHUNK] = 7
    assert isinstance(given[0].content, memoryview)
    assert given[0].content[0] == 7


def test_zeroes_of_a_whole_disk_cost_nothing() -> None:
    assembly = Assembly(1 << 40)
    assert sum(1 for _ in assembly.zero(0, 4 << 30)) == (4 << 30) // CHUNK_BYTES
    assert assembly.held_bytes == 0


def test_a_chunk_is_held_until_it_is_whole() -> None:
    assembly = Assembly(2 * CHUNK_BYTES + 512)
    assert list(assembly.write(0, memoryview(bytes(MIB)))) == []
    assert list(assembly.zero(2 * CHUNK_BYTES, 256)) == []
    assert assembly.held_bytes == CHUNK_BYTES + 512
    assert [one.number for one in assembly.write(2 * CHUNK_BYTES + 256, memoryview(bytes(256)))] == [2]
    assert [one.number for one in assembly.zero(MIB, 3 * MIB)] == [0]
    assert list(assembly.zero(CHUNK_BYTES, CHUNK_BYTES)) == [Whole(1, None)]
    assert assembly.parts == ()


def test_what_is_put_back_lies_below_what_came_meanwhile() -> None:
    assembly = Assembly(CHUNK, CHUNK)
    (whole,) = [*assembly.write(0, memoryview(b"aaaa")), *assembly.write(4, memoryview(b"bbbb"))]
    assert isinstance(whole.content, bytearray)
    assert list(assembly.write(2, memoryview(b"new"))) == []
    assembly.put_back(0, Overlay(whole.content, [(0, CHUNK)]))
    (again,) = assembly.write(7, memoryview(b"!"))
    assert again.content == b"aanewbb!"


@pytest.mark.parametrize(
    ("ranges", "written"),
    [
        ([(0, 2), (2, 4)], [(0, 4)]),
        ([(4, 6), (0, 2)], [(0, 2), (4, 6)]),
        ([(0, 2), (4, 6), (1, 5)], [(0, 6)]),
        ([(2, 6), (3, 4)], [(2, 6)]),
    ],
)
def test_ranges_are_merged(ranges: list[tuple[int, int]], written: list[tuple[int, int]]) -> None:
    overlay = Overlay(bytearray(8))
    for start, end in ranges:
        overlay.zero(start, end)
    assert overlay.written == written
    assert not overlay.whole
