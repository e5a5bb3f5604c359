"""A file's chunks: where each begins, which are zero, and their content for many readers at once.

Chunks are read and decoded in threads, each once however many wait for it, and kept for a while: a reader's
requests are shorter than a chunk. Memory: `CACHE_BYTES`, and what `THREADS` chunks take while they are decoded.
"""

import asyncio
import contextlib
import functools
import hashlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator import aio
from orchestrator.target.restic.errors import Damaged
from orchestrator.target.restic.pack import CHUNK_BYTES
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.tree import FileContent
from orchestrator.units import KIB, MIB

CACHE_BYTES = 64 * MIB
THREADS = 8
RESTICS_ZERO_BYTES = 512 * KIB
"""restic cuts zeroes into chunks of its least length."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A part of a file that lies in one chunk: `length` bytes, `skip` bytes after the chunk's beginning."""

    identity: bytes
    skip: int
    length: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A file's chunks, where each begins (and the last one ends), and the ids of those known to be zero."""

    chunks: Sequence[bytes]
    starts: Sequence[int]
    zeroes: frozenset[bytes]

    @classmethod
    def of(cls, repository: Repository, content: FileContent) -> "Layout":
        """Look up how long chunks are: microseconds each, blocking. Raises Damaged if it cannot be known."""
        lengths = {identity: repository.chunk_bytes(identity) for identity in set(content.chunks)}
        starts, end = array("Q", [0]), 0
        for identity in content.chunks:
            length = lengths[identity]
            if length is None:
                raise Damaged(f"data blob {identity.hex()}", "no index file says where it is")
            end += length
            starts.append(end)
        if end != content.size_bytes:
            raise Damaged("a file", f"it has {end} bytes where its tree says {content.size_bytes}")
        known = {CHUNK_BYTES, RESTICS_ZERO_BYTES, end - starts[-2] if content.chunks else 0}
        return cls(content.chunks, starts, frozenset(zero_identity(length) for length in known))

    @property
    def size_bytes(self) -> int:
        """The file's length."""
        return self.starts[-1]

    def length(self, number: int) -> int:
        """How long a chunk is."""
        return self.starts[number + 1] - self.starts[number]

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, Extent]]:
        """The numbers of the chunks that hold a part of the file, and what of each, in order."""
        number, end = bisect_right(self.starts, offset) - 1, offset + length
        while offset < end:
            stop = min(end, self.starts[number + 1])
            yield number, Extent(self.chunks[number], offset - self.starts[number], stop - offset)
            number, offset = number + 1, stop


@functools.lru_cache(maxsize=64)
def zero_identity(length: int) -> bytes:
    """The id of a chunk of so many zeroes."""
    return hashlib.sha256(bytes(length)).digest()


def wrong_length(identity: bytes, found_bytes: int, expected_bytes: int) -> Damaged:
    """The error of a chunk that is right and not as long as its file's layout says: an index file is wrong."""
    return Damaged(f"data blob {identity.hex()}", f"{found_bytes} bytes instead of {expected_bytes}")


class Chunks:
    """See the module. Made by `chunks_of`."""

    def __init__(self, repository: Repository, threads: Executor) -> None:
        self.repository = repository
        self._threads = threads
        self._decoding: dict[bytes, asyncio.Future[bytes]] = {}
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self._kept_bytes = 0

    async def read(self, identity: bytes) -> bytes:
        """A chunk's content. Raises as `Repository.read_blob`. Cancelling it is nothing to others who wait."""
        kept = self._kept.get(identity)
        if kept is not None:
            self._kept.move_to_end(identity)
            return kept
        decoding = self._decoding.get(identity)
        if decoding is None:
            loop = asyncio.get_running_loop()
            decoding = loop.run_in_executor(self._threads, self.repository.read_blob, identity)
            self._decoding[identity] = decoding
            decoding.add_done_callback(functools.partial(self._decoded, identity))
        return await asyncio.shield(decoding)

    def _decoded(self, identity: bytes, decoding: "asyncio.Future[bytes]") -> None:
        del self._decoding[identity]
        if decoding.cancelled() or decoding.exception() is not None:
            return  # for whoever waits, if somebody still does
        self._kept[identity] = decoding.result()
        self._kept_bytes += len(decoding.result())
        while self._kept_bytes > CACHE_BYTES:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])


@contextlib.asynccontextmanager
async def chunks_of(repository: Repository) -> AsyncIterator[Chunks]:
    """A repository's chunks for the block. At its end it waits for those that are being decoded."""
    threads = ThreadPoolExecutor(THREADS)
    try:
        yield Chunks(repository, threads)
    finally:
        await aio.finish(asyncio.to_thread(threads.shutdown, cancel_futures=True))
