"""Writing a repository's file as a sparse raw image: in threads, each distinct chunk decoded once.

qemu-img, reading by NBD, takes twice the processor time for that. Hashes are not looked at here: they are those of
what was written, which is read back.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from orchestrator import aio
from orchestrator.errors import TargetError
from orchestrator.target.repository.chunks import THREADS, Layout
from orchestrator.target.restic.repository import Repository
from orchestrator.units import KIB

T = TypeVar("T")

HOLE_BYTES = 64 * KIB
_ZEROES = bytes(HOLE_BYTES)


async def write(repository: Repository, layout: Layout, to: Path) -> None:
    """Make a file of that content, holes where it is zero. The caller holds it against the chunks' hashes.

    Raises TargetError "restore-path" if it cannot be written, and as `Repository.read_blob`. Cancelling it leaves
    some of the content in the file, and no thread.
    """
    places: dict[bytes, list[int]] = {}
    for identity, start in zip(layout.chunks, layout.starts, strict=False):
        if identity not in layout.zeroes:
            places.setdefault(identity, []).append(start)
    try:
        descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.truncate(descriptor, layout.size_bytes)
            await in_threads(lambda place: _write_chunk(repository, descriptor, *place), places.items())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise TargetError(
            f"cannot write {to}: {error.strerror}",
            hint="see that there is room and that it may be written to, or give another --to",
            code="restore-path",
        ) from error


async def in_threads(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Do blocking work for each item, some side by side. Whatever comes, none of it goes on after this."""
    left = iter(items)

    async def some() -> None:
        for item in left:
            await aio.finish(asyncio.to_thread(work, item))

    await aio.all_or_first_error(some() for _ in range(THREADS))


def _write_chunk(repository: Repository, descriptor: int, identity: bytes, starts: list[int]) -> None:
    content = repository.read_blob(identity, hashed=False)
    with memoryview(content) as view:
        for begin, end in _runs(content):
            for start in starts:
                _write(descriptor, view[begin:end], start + begin)


def _runs(content: bytes) -> Iterator[tuple[int, int]]:
    """What is not zero, in blocks of HOLE_BYTES: from where to where."""
    begin = 0
    for at in range(0, len(content), HOLE_BYTES):
        if _ZEROES.startswith(content[at : at + HOLE_BYTES]):
            if begin < at:
                yield begin, at
            begin = at + HOLE_BYTES
    if begin < len(content):
        yield begin, len(content)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
