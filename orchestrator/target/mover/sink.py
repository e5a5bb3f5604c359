"""One disk's sink: what QEMU writes over NBD becomes whole chunks, and those go into a store.

A write is answered once its chunks are in the store, so a slow store holds up QEMU's job, and never the guest.
Memory: the buffers of the pool, which all disks of a run share, and `HELD_BYTES` a disk of chunks that are not yet
whole. A write that failed may be repeated, as QEMU does once a full target has space again.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from orchestrator.nbd.export import BlockSizes, Data, Export
from orchestrator.target.mover.assembly import Assembly, Overlay, Whole
from orchestrator.target.restic.pack import CHUNK_BYTES

HELD_BYTES = 8 * CHUNK_BYTES
"""QEMU before 9.1 has a few chunks in progress at a time; more than that are completed as they are."""
SMALL_BYTES = CHUNK_BYTES // 8
"""Smaller writes get memory of their own."""


class ChunkStore(Protocol):
    """Where chunks go. All of it raises VmfleeceError, `put` OSError too."""

    def check(self) -> None:
        """Raise if nothing that is put will ever be of use."""
        ...

    async def put(self, content: bytes | bytearray | memoryview) -> tuple[bytes, int]:
        """Keep a chunk, unless there is one like it; returns its id, and the bytes that it takes if it is new.

        `content` is the caller's again then.
        """
        ...

    async def get(self, chunk: bytes) -> bytes:
        """The content of a chunk that is kept."""
        ...


class IncompleteError(Exception):
    """A full copy ended without having written all of the disk: it must not become a snapshot."""


class BufferPool:
    """Buffers of a chunk each, made once, as many as `count`. Who finds none free waits."""

    def __init__(self, count: int) -> None:
        self._count = asyncio.Semaphore(count)
        self._free: list[bytearray] = []

    @contextlib.asynccontextmanager
    async def lent(self, length: int) -> AsyncIterator[memoryview]:
        """A buffer of at most a chunk, for the block."""
        async with self._count:
            buffer = self._free.pop() if self._free else bytearray(CHUNK_BYTES)
            try:
                yield memoryview(buffer)[:length]
            finally:
                self._free.append(buffer)


class DiskSink(Export):
    """A disk of a run. `parent`: the chunks of the snapshot that it lies over if it is incremental, else None.

    `written_bytes`: by QEMU; `stored_bytes`: what the store took for them.
    """

    block_sizes = BlockSizes(preferred=CHUNK_BYTES, maximum=CHUNK_BYTES)

    def __init__(
        self, size_bytes: int, store: ChunkStore, pool: BufferPool, *, parent: Sequence[bytes] | None = None
    ) -> None:
        self._size_bytes = size_bytes
        self._store = store
        self._pool = pool
        self._assembly = Assembly(size_bytes)
        self._chunks: list[bytes | None] = list(parent) if parent is not None else [None] * self._assembly.count
        self._zeroes: dict[int, bytes] = {}
        self._queues: dict[int, list[asyncio.Event]] = {}
        self.written_bytes = 0
        self.stored_bytes = 0

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    async def read(self, offset: int, length: int) -> Data:
        raise PermissionError(f"a backup's sink is not read ({length} bytes at {offset})")

    @contextlib.asynccontextmanager
    async def buffer(self, offset: int, length: int) -> AsyncIterator[memoryview]:  # noqa: ARG002
        if length < SMALL_BYTES:
            yield memoryview(bytearray(length))
            return
        async with self._pool.lent(length) as lent:
            yield lent

    async def write(self, offset: int, data: memoryview) -> None:
        self._store.check()
        await self._keep(list(self._assembly.write(offset, data)))
        self.written_bytes += len(data)

    async def write_zeroes(self, offset: int, length: int, *, may_be_hole: bool) -> None:  # noqa: ARG002
        self._store.check()
        await self._keep(list(self._assembly.zero(offset, length)))
        self.written_bytes += length

    async def flush(self) -> None:
        """Nothing: what a run wrote is durable once it is committed, all at once."""

    async def finish(self) -> list[bytes]:
        """The disk's chunks, in order, once QEMU has written all. Raises IncompleteError, VmfleeceError."""
        await self._complete(self._assembly.parts)
        chunks = [chunk for chunk in self._chunks if chunk is not None]
        if len(chunks) != len(self._chunks):
            missing = len(self._chunks) - len(chunks)
            raise IncompleteError(f"{missing} of {len(self._chunks)} chunks were not written")
        return chunks

    async def _keep(self, wholes: Sequence[Whole]) -> None:
        kept = 0
        try:
            async with self._turn([whole.number for whole in wholes]):
                for whole in wholes:
                    if whole.content is None:
                        chunk = await self._zero(self._assembly.size_of(whole.number))
                    else:
                        chunk = await self._put(whole.content)
                    self._chunks[whole.number] = chunk
                    kept += 1
        except BaseException:
            self._miss(wholes[kept:])
            raise
        if self._assembly.held_bytes > HELD_BYTES:
            # In a full copy there is nothing yet that they could lie over: they become whole soon.
            await self._complete([one for one in self._assembly.parts if self._chunks[one] is not None])

    def _miss(self, wholes: Sequence[Whole]) -> None:
        """Until the request is repeated nobody knows what these chunks hold; earlier ones are not sent again."""
        for whole in wholes:
            if isinstance(whole.content, bytearray):
                self._assembly.put_back(whole.number, Overlay(whole.content, [(0, len(whole.content))]))
            self._chunks[whole.number] = None

    async def _complete(self, numbers: Sequence[int]) -> None:
        """Put what was written of chunks over what they held before."""
        for number in numbers:
            async with self._turn([number]):
                before = self._chunks[number]
                if before is None or number not in self._assembly.parts:  # else it has become whole meanwhile
                    continue
                overlay = self._assembly.take(number)
                try:
                    self._chunks[number] = await self._put(overlay.over(await self._store.get(before)))
                except BaseException:
                    self._assembly.put_back(number, overlay)
                    raise

    @contextlib.asynccontextmanager
    async def _turn(self, numbers: Sequence[int]) -> AsyncIterator[None]:
        """One thing at a time is done to a chunk, in the order in which it was begun.

        A request lines up for all of its chunks at once: what is written to one of them while another is put comes
        after it. Who is cancelled while it waits leaves the queue, and nobody's turn comes sooner by that than it
        may: the one at the head is still at it.
        """
        turns = {number: asyncio.Event() for number in numbers}
        for number, turn in turns.items():
            queue = self._queues.setdefault(number, [])
            queue.append(turn)
            queue[0].set()
        try:
            for turn in turns.values():
                await turn.wait()
            yield
        finally:
            for number, turn in turns.items():
                queue = self._queues[number]
                queue.remove(turn)
                if queue:
                    queue[0].set()
                else:
                    del self._queues[number]

    async def _zero(self, length: int) -> bytes:
        if length not in self._zeroes:
            self._zeroes[length] = await self._put(bytes(length))
        return self._zeroes[length]

    async def _put(self, content: bytes | bytearray | memoryview) -> bytes:
        chunk, added_bytes = await self._store.put(content)
        self.stored_bytes += added_bytes
        return chunk
