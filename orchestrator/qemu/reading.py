"""Reading content once, in order, while somebody takes it in another thread."""

import asyncio
import hashlib
import io
import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orchestrator import aio

READ_BYTES = 1 << 20

Update = Callable[[memoryview], object]
"""Takes content in pieces, in order, each of which is there during the call only. Blocks."""


async def file_sha256(path: Path) -> str:
    """The SHA-256 of a file as it is, in hex, as sha256sum prints it. Raises OSError."""
    digest = hashlib.sha256()
    opening = asyncio.to_thread(_Stoppable, path)
    with await aio.acquire(opening, lambda source: asyncio.to_thread(source.close)) as source:
        await aio.in_thread(lambda source: feed(source, digest.update), source, end=source.stop)
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
    """A file that can be made to end wherever it is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def readinto(self, buffer: Any) -> int:
        return 0 if self._stopped else super().readinto(buffer) or 0
