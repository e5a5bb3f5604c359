"""Writing a repository's file as a sparse raw image: in threads, each distinct chunk decoded once.

qemu-img, reading by NBD, takes twice the processor time for that. A chunk is held against its hash in the memory
that the disk then takes it from: past the host's cache where that can be done, since a new page of the cache costs
several times what decoding its content does, and the cache is for the guests.
"""

import asyncio
import errno
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from orchestrator import aio
from orchestrator.target import durable, restored
from orchestrator.target.repository.chunks import THREADS, Layout, wrong_length
from orchestrator.target.restic.repository import Repository
from orchestrator.units import KIB

T = TypeVar("T")

HOLE_BYTES = 64 * KIB
_ZEROES = bytes(HOLE_BYTES)


async def write(repository: Repository, layout: Layout, to: Path) -> None:
    """Make a durable file of that content, holes where it is zero.

    Raises TargetError "restore-path" if it cannot be written, and as `Repository.read_blob`. Cancelling it leaves
    some of the content in the file, and no thread.
    """
    places: dict[bytes, tuple[int, list[int]]] = {}
    for number, (identity, start) in enumerate(zip(layout.chunks, layout.starts, strict=False)):
        if identity not in layout.zeroes:
            places.setdefault(identity, (layout.length(number), []))[1].append(start)
    longest_bytes = max((length for length, _ in places.values()), default=0)
    buffers: SimpleQueue[mmap.mmap] = SimpleQueue()
    for _ in range(THREADS if places else 0):
        buffers.put(mmap.mmap(-1, longest_bytes))

    def write_chunk(item: tuple[bytes, tuple[int, list[int]]]) -> None:
        identity, (length, starts) = item
        content = repository.read_blob(identity)
        if len(content) != length:
            raise wrong_length(identity, len(content), length)
        buffer = buffers.get()
        try:
            buffer[:length] = content
            with memoryview(buffer) as view:
                for begin, end in _runs(content):
                    for start in starts:
                        file.write(view[begin:end], start + begin)
        finally:
            buffers.put(buffer)

    with restored.explained(to):
        file = _File(to)
        try:
            file.resize(layout.size_bytes)
            await in_threads(write_chunk, places.items())
        finally:
            file.close()
        await asyncio.to_thread(durable.sync, to)


async def in_threads(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Do blocking work for each item, some side by side. Whatever comes, none of it goes on after this."""
    left = iter(items)

    async def some() -> None:
        for item in left:
            await aio.finish(asyncio.to_thread(work, item))

    await aio.all_or_first_error(some() for _ in range(THREADS))


class _File:
    """A new file, written by several threads: whole blocks past the host's cache where that can be done."""

    def __init__(self, path: Path) -> None:
        self._cached = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # it cannot, like older tmpfs
            self._direct = os.dup(self._cached)

    def close(self) -> None:
        os.close(self._direct)
        os.close(self._cached)

    def resize(self, size_bytes: int) -> None:
        """Have it end there, with a hole where there is nothing yet. Raises OSError."""
        os.truncate(self._cached, size_bytes)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data`, which is at the beginning of a page if `offset` is. Raises OSError."""
        while data:
            written = self._write(data, offset)
            data, offset = data[written:], offset + written

    def _write(self, data: memoryview, offset: int) -> int:
        if not (offset % durable.BLOCK_BYTES or len(data) % durable.BLOCK_BYTES):
            try:
                return os.pwrite(self._direct, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Its blocks are larger, or it only seemed to be able to. Not closed: other threads are using it.
                os.dup2(self._cached, self._direct, inheritable=False)
        return os.pwrite(self._cached, data, offset)


def _runs(content: bytes) -> Iterator[tuple[int, int]]:
    """What is not zero, in blocks of HOLE_BYTES: from where to where."""
    begin = 0
    for at in range(0, len(content), HOLE_BYTES):
        if not content[at] and _ZEROES.startswith(content[at : at + HOLE_BYTES]):
            if begin < at:
                yield begin, at
            begin = at + HOLE_BYTES
    if begin < len(content):
        yield begin, len(content)
