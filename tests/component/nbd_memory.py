"""A disk in memory behind an NBD server, and what the tests of the server need beside it."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.nbd.connection import Limits, Trouble
from orchestrator.nbd.export import BlockSizes, Data, Export
from orchestrator.nbd.protocol import Allocation, Piece
from orchestrator.nbd.server import NbdServer

BLOCK = 4096
HOLE = Allocation.HOLE | Allocation.ZERO
SOON_SECONDS = 20.0


class MemoryExport(Export):
    """Keeps all in memory, and which blocks are holes. `seen` lists what it was asked; a write is cut in two."""

    def __init__(self, size_bytes: int, *, read_only: bool = False, sizes: BlockSizes | None = None) -> None:
        self._size_bytes = size_bytes
        self.read_only = read_only
        self.block_sizes = sizes or BlockSizes()
        self.content = bytearray(size_bytes)
        self.status_of = [int(HOLE)] * -(-size_bytes // BLOCK)
        self.seen: list[tuple[str, int, int]] = []
        self.fail: dict[str, Exception] = {}
        self.open_gate = asyncio.Event()
        self.open_gate.set()
        self.under_way = 0
        self.most_under_way = 0
        self.lent = 0

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    async def read(self, offset: int, length: int) -> Data:
        async with self._doing("read", offset, length):
            return bytes(self.content[offset : offset + length])

    @contextlib.asynccontextmanager
    async def buffer(self, offset: int, length: int) -> AsyncIterator[memoryview]:
        if "buffer" in self.fail:
            raise self.fail["buffer"]
        self.lent += 1
        try:
            async with super().buffer(offset, length) as lent:
                yield lent
        finally:
            self.lent -= 1

    async def write(self, offset: int, data: memoryview) -> None:
        async with self._doing("write", offset, len(data)):
            half = len(data) // 2
            self.content[offset : offset + half] = data[:half]
            await asyncio.sleep(0)
            self.content[offset + half : offset + len(data)] = data[half:]
            self._mark(offset, len(data), 0)

    async def write_zeroes(self, offset: int, length: int, *, may_be_hole: bool) -> None:
        async with self._doing("hole" if may_be_hole else "zero", offset, length):
            self.content[offset : offset + length] = bytes(length)
            self._mark(offset, length, HOLE if may_be_hole else Allocation.ZERO)

    async def trim(self, offset: int, length: int) -> None:
        async with self._doing("trim", offset, length):
            self.content[offset : offset + length] = bytes(length)
            self._mark(offset, length, HOLE)

    async def flush(self) -> None:
        async with self._doing("flush", 0, 0):
            pass

    async def status(self, offset: int, length: int) -> list[Piece]:
        async with self._doing("status", offset, length):
            blocks = range(offset // BLOCK, -(-(offset + length) // BLOCK))
            starts = [max(offset, block * BLOCK) for block in blocks]
            ends = [min((block + 1) * BLOCK, self._size_bytes) for block in blocks]
            return [
                Piece(end - start, self.status_of[block])
                for block, start, end in zip(blocks, starts, ends, strict=True)
            ]

    @contextlib.asynccontextmanager
    async def _doing(self, what: str, offset: int, length: int) -> AsyncIterator[None]:
        self.seen.append((what, offset, length))
        if what in self.fail:
            raise self.fail[what]
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.open_gate.wait()
            yield
        finally:
            self.under_way -= 1

    def _mark(self, offset: int, length: int, status: int) -> None:
        """A block that is zeroed in part only becomes data, if it was not zero before."""
        for block in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
            start, end = block * BLOCK, min((block + 1) * BLOCK, self._size_bytes)
            whole = offset <= start and end <= offset + length
            if whole or not status & Allocation.ZERO:
                self.status_of[block] = int(status)
            elif not self.status_of[block] & Allocation.ZERO or not status & Allocation.HOLE:
                self.status_of[block] &= ~Allocation.HOLE


@dataclass
class Rig:
    """A server that listens at `path`, and what it reported."""

    path: Path
    exports: dict[str, MemoryExport]
    server: NbdServer
    troubles: list[Trouble] = field(default_factory=list)

    def uri(self, name: str = "disk") -> str:
        return f"nbd+unix:///{name}?socket={self.path}"

    def connect(self) -> socket.socket:
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(self.path))
        one.setblocking(False)
        return one


@contextlib.asynccontextmanager
async def serving(
    folder: Path, exports: Mapping[str, MemoryExport], *, limits: Limits | None = None
) -> AsyncIterator[Rig]:
    """Serve exports in a new socket in `folder`."""
    path = folder / "server.sock"
    troubles: list[Trouble] = []
    known = dict(exports)
    server = NbdServer(known, report=troubles.append, limits=limits)
    async with server.at(path):
        yield Rig(path, known, server, troubles)
