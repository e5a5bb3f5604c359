"""Reading content once, hashing it, and having somebody else take it meanwhile, in two threads."""

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


async def file_sha256(path: Path, update: Update | None = None, *, most_bytes: int = sys.maxsize) -> str:
    """The SHA-256 of a file as it is, or of its beginning, in hex, as sha256sum prints it. Raises OSError."""
    with await asyncio.to_thread(_Stoppable, path, most_bytes) as file:
        return await aio.in_thread(lambda source: sha256(source, update), file, end=file.stop)


def sha256(file: io.FileIO, update: Update | None = None) -> str:
    """Read a file from where it is, have `update` take all of it, and return its SHA-256 in hex. Blocks."""
    digest = hashlib.sha256()
    taking: Future[object] | None = None
    with ThreadPoolExecutor(1) as beside:
        for buffer in itertools.cycle([memoryview(bytearray(READ_BYTES)) for _ in range(2)]):
            piece = buffer[: file.readinto(buffer)]
            if taking is not None:
                taking.result()
            if not piece:
                return digest.hexdigest()
            if update is not None:
                taking = beside.submit(update, piece)
            digest.update(piece)
    raise AssertionError("a cycle has no end")


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
