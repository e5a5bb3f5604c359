"""Reading content once, in order, while somebody takes it in another thread."""

import asyncio
import hashlib
import io
import itertools
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orchestrator import aio

READ_BYTES = 1 << 20

Update = Callable[[memoryview], object]
"""Takes content in pieces, in order, each of which is there during the call only. Blocks."""


async def file(path: Path, update: Update, *, most_bytes: int = sys.maxsize) -> None:
    """Have `update` take a file, or its beginning. Raises OSError."""
    opening = asyncio.to_thread(_Stoppable, path, most_bytes)
    with await aio.acquire(opening, lambda source: asyncio.to_thread(source.close)) as source:
        await aio.in_thread(lambda source: feed(source, update), source, end=source.stop)


async def file_sha256(path: Path) -> str:
    """The SHA-256 of a file as it is, in hex, as sha256sum prints it. Raises OSError."""
    digest = hashlib.sha256()
    await file(path, digest.update)
    return digest.hexdigest()


def feed(source: io.FileIO, update: Update) -> None:
    """Read a file from where it is, and have `update` take all of it. Blocks."""
    taking: Future[object] | None = None
    with ThreadPoolExecutor(1) as beside:
        for buffer in itertools.cycle([memoryview(bytearray(READ_BYTES)) for _ in range(2)]):
            piece = buffer[: source.readinto(buffer)]
            if taking is not None:
                taking.result()
            if not piece:
                return
            taking = beside.submit(update, piece)


class _Stoppable(io.FileIO):
    """A file that ends after `most_bytes`, and can be made to end wherever it is read."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        super().__init__(path)
        self._left_bytes = most_bytes

    def stop(self) -> None:
        self._left_bytes = 0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(memoryview(buffer)[: self._left_bytes]) or 0
        self._left_bytes -= count
        return count
