"""What a sink's chunks hold is what was written to it, however the writes came, and however slow the store is."""

import asyncio
import errno
import hashlib
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.aio import run_process
from orchestrator.nbd.server import NbdServer
from orchestrator.target.mover import assembly, sink
from orchestrator.target.mover.sink import BufferPool, DiskSink, IncompleteError
from orchestrator.target.restic.pack import CHUNK_BYTES

MIB = 1 << 20
CHUNK = 16


class Memory:
    """A store that takes its time, as many turns of the loop as `slowness` says."""

    def __init__(self, slowness: Sequence[int] = (0,)) -> None:
        self.chunks: dict[bytes, bytes] = {}
        self.puts = 0
        self.under_way = 0
        self.most = 0
        self.full = False
        self._slowness = slowness

    def check(self) -> None:
        pass

    async def put(self, content: bytes | bytearray | memoryview) -> tuple[bytes, int]:
        self.puts += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        kept = bytes(content)
        for _ in range(self._slowness[self.puts % len(self._slowness)]):
            await asyncio.sleep(0)
        assert bytes(content) == kept, "the buffer was used for something else meanwhile"
        self.under_way -= 1
        if self.full:
            raise OSError(errno.ENOSPC, "full")
        chunk = hashlib.sha256(kept).digest()
        new = chunk not in self.chunks
        self.chunks[chunk] = kept
        return chunk, new * (len(kept) + 1)

    async def get(self, chunk: bytes) -> bytes:
        await asyncio.sleep(0)
        return self.chunks[chunk]

    def content(self, chunks: Sequence[bytes]) -> bytes:
        return b"".join(self.chunks[chunk] for chunk in chunks)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(sink, "SMALL_BYTES", 4)
    monkeypatch.setattr(sink, "HELD_BYTES", 3 * CHUNK)
    monkeypatch.setattr(assembly.Assembly.__init__, "__defaults__", (CHUNK,))


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)  # noqa: S311


async def parent_of(store: Memory, content: bytes) -> list[bytes]:
    return [(await store.put(content[at : at + CHUNK]))[0] for at in range(0, len(content), CHUNK)]


async def write(disk: DiskSink, offset: int, data: bytes) -> None:
    for at in range(0, len(data), CHUNK):  # no request is larger
        piece = data[at : at + CHUNK]
        async with disk.buffer(offset + at, len(piece)) as buffer:
            buffer[:] = piece
            await disk.write(offset + at, buffer)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[int, list[list[tuple[int, int, bool]]]]:
    """A disk's size, and rounds of requests that do not overlap: those of a round come side by side."""
    size = draw(st.integers(1, 6 * CHUNK))
    found = []
    for _ in range(draw(st.integers(1, 5))):
        cuts = sorted(draw(st.sets(st.integers(0, size), min_size=2, max_size=8)))
        pieces = [(start, end - start, draw(st.booleans())) for start, end in pairwise(cuts)]
        found.append(draw(st.permutations(pieces)))
    return size, found


@settings(max_examples=150, deadline=None)
@given(rounds(), st.lists(st.integers(0, 5), min_size=1, max_size=7))
# A chunk that became whole with one before it is completed while that one is put: its older bytes came last.
@example(
    (94, [[(1, 13, False)], [(33, 30, True)], [(80, 2, True), (7, 27, True), (34, 31, False)]]),
    [0, 3, 2],
)
def test_an_incremental_copy_lies_over_its_parent(
    drawn: tuple[int, list[list[tuple[int, int, bool]]]], slowness: list[int]
) -> None:
    size, requests = drawn

    async def run() -> None:
        store, content = Memory(slowness), bytearray(noise(size))
        disk = DiskSink(size, store, BufferPool(4), parent=await parent_of(store, bytes(content)))
        for number, side_by_side in enumerate(requests):
            works = []
            for offset, length, zeroes in side_by_side:
                data = bytes(length) if zeroes else bytes([number + 1]) * length
                content[offset : offset + length] = data
                works.append(
                    disk.write_zeroes(offset, length, may_be_hole=False) if zeroes else write(disk, offset, data)
                )
            await asyncio.gather(*works)
        assert store.content(await disk.finish()) == content

    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        asyncio.run(run())


@pytest.mark.usefixtures("small")
async def test_a_full_copy_in_pieces_of_any_order() -> None:
    store, content = Memory((0, 3, 1)), noise(5 * CHUNK + 3)
    disk = DiskSink(len(content), store, BufferPool(2))
    pieces = list(range(0, len(content), 4))
    random.Random(2).shuffle(pieces)  # noqa: S311
    await asyncio.gather(*(write(disk, at, content[at : at + 4]) for at in pieces))
    assert store.content(await disk.finish()) == content
    assert disk.written_bytes == len(content)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("missing", [(2 * CHUNK, CHUNK), (CHUNK, 1), (5 * CHUNK, 3)])
async def test_a_full_copy_that_lacks_anything_is_none(missing: tuple[int, int]) -> None:
    size, (start, length) = 5 * CHUNK + 3, missing
    disk = DiskSink(size, Memory(), BufferPool(2))
    if start:
        await write(disk, 0, b"x" * start)
    if start + length < size:
        await write(disk, start + length, b"x" * (size - start - length))
    with pytest.raises(IncompleteError, match="1 of 6 chunks"):
        await disk.finish()


@pytest.mark.usefixtures("small")
async def test_many_parts_of_chunks_are_not_held_for_ever() -> None:
    store, size = Memory(), 100 * CHUNK
    disk = DiskSink(size, store, BufferPool(2), parent=await parent_of(store, b"P" * size))
    for number in range(100):
        await write(disk, number * CHUNK + 1, b"n")
        assert disk._assembly.held_bytes <= sink.HELD_BYTES
    chunks = await disk.finish()
    assert store.content(chunks) == (b"Pn" + b"P" * (CHUNK - 2)) * 100


@pytest.mark.usefixtures("small")
async def test_whoever_finds_no_buffer_waits_for_one() -> None:
    store = Memory((5,))
    disk = DiskSink(20 * CHUNK, store, BufferPool(3))
    await asyncio.gather(*(write(disk, at * CHUNK, bytes([at + 1]) * CHUNK) for at in range(20)))
    assert store.most <= 3
    await disk.finish()


@pytest.mark.usefixtures("small")
async def test_who_is_cancelled_while_it_waits_lets_nobody_pass_the_one_before() -> None:
    disk = DiskSink(CHUNK, store := Memory((0, 9)), BufferPool(3))
    first, second, third = (asyncio.ensure_future(write(disk, 0, letter * CHUNK)) for letter in (b"a", b"b", b"c"))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(first, third)
    assert second.cancelled()
    assert (store.content(await disk.finish()), store.most) == (b"c" * CHUNK, 1)
    assert not disk._queues


@pytest.mark.usefixtures("small")
async def test_zeroes_are_kept_once() -> None:
    store = Memory()
    disk = DiskSink(6 * CHUNK + 5, store, BufferPool(2))
    await disk.write_zeroes(0, 6 * CHUNK + 5, may_be_hole=True)
    assert len(set(await disk.finish())) == store.puts == 2
    assert disk.stored_bytes == CHUNK + 1 + 5 + 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("piece", [4, CHUNK])
async def test_what_failed_is_repeated_alone_and_nothing_is_lost(incremental: bool, piece: int) -> None:
    """As QEMU does once a full target has space again: what was answered without an error never comes again."""
    store, content = Memory((0, 2)), noise(12 * CHUNK)
    parent = await parent_of(store, b"P" * len(content)) if incremental else None
    disk = DiskSink(len(content), store, BufferPool(4), parent=parent)
    waiting = [(at, content[at : at + piece]) for at in range(0, len(content), piece)]
    random.Random(piece).shuffle(waiting)  # noqa: S311
    for number in range(1000):
        store.full = number % 3 != 2
        offset, data = waiting.pop(0)
        try:
            await write(disk, offset, data)
        except OSError:
            waiting.append((offset, data))
        if not waiting:
            break
    store.full = False
    assert store.content(await disk.finish()) == content


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("incremental", [False, True])
async def test_what_failed_and_was_not_repeated_is_missing(incremental: bool) -> None:
    store = Memory()
    parent = await parent_of(store, b"P" * 3 * CHUNK) if incremental else None
    disk = DiskSink(3 * CHUNK, store, BufferPool(2), parent=parent)
    await write(disk, 0, b"x" * CHUNK)
    store.full = True
    for attempt in (write(disk, CHUNK, b"y" * CHUNK), disk.write_zeroes(CHUNK, 2 * CHUNK, may_be_hole=True)):
        with pytest.raises(OSError, match="full"):
            await attempt
    store.full = False
    with pytest.raises(IncompleteError, match="2 of 3"):
        await disk.finish()


@pytest.mark.usefixtures("small")
async def test_a_store_that_is_of_no_use_any_more_refuses_writes_that_it_need_not_see() -> None:
    class Lost(Memory):
        def check(self) -> None:
            raise PermissionError("lost")

    disk = DiskSink(3 * CHUNK, Lost(), BufferPool(2))
    for attempt in (write(disk, 0, b"x"), disk.write_zeroes(0, 1, may_be_hole=True)):
        with pytest.raises(PermissionError, match="lost"):
            await attempt


async def test_qemus_tools_write_to_it(tmp_path: Path) -> None:
    """As QEMU does: whole chunks by many requests at once, over a unix socket."""
    size = 3 * CHUNK_BYTES + 5 * 512
    content = noise(CHUNK_BYTES) + bytes(CHUNK_BYTES) + noise(size - 2 * CHUNK_BYTES)
    source = tmp_path / "disk.raw"
    source.write_bytes(content)
    store = Memory()
    disk = DiskSink(size, store, BufferPool(4))
    troubles: list[object] = []
    async with NbdServer({"vda": disk}, report=troubles.append).at(tmp_path / "nbd.sock"):
        argv = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-S", "0"]
        done = await run_process([*argv, str(source), f"nbd+unix:///vda?socket={tmp_path}/nbd.sock"])
    assert (done.returncode, done.stderr, troubles) == (0, "", [])
    assert store.content(await disk.finish()) == content
