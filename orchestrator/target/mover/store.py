"""A repository as the place where chunks go: hashed, compressed and sealed by threads."""

import asyncio
import errno
import os
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from orchestrator import aio
from orchestrator.target.mover.sink import ChunkStore
from orchestrator.target.restic.errors import BackendError
from orchestrator.target.restic.lock import Lock
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.writer import Writer

T = TypeVar("T")


class RepositoryStore(ChunkStore):
    """See the contract, `ChunkStore`. What QEMU is told of a full target is ENOSPC: its job waits, then."""

    def __init__(self, repository: Repository, writer: Writer, lock: Lock, threads: Executor) -> None:
        self._repository = repository
        self._lock = lock
        self._writer = writer
        self._threads = threads

    def check(self) -> None:
        self._lock.check()

    async def put(self, content: bytes | bytearray | memoryview) -> tuple[bytes, int]:
        return await self._in_thread(lambda: self._writer.add_chunk(memoryview(content)))

    async def get(self, chunk: bytes) -> bytes:
        def read() -> bytes:
            pending = self._writer.read_pending(chunk)
            return self._repository.read_blob(chunk) if pending is None else pending

        return await self._in_thread(read)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        # Finished in any case: the buffer that a thread reads must not be used for something else meanwhile.
        try:
            return await aio.finish(_run(self._threads, work))
        except BackendError as error:
            if error.code == "target-full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise


async def _run(threads: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work)
