"""What a mover takes, whatever the disk: a large one with data all over it, written as QEMU does it."""

import os
import random
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.nbd.protocol import Act
from orchestrator.target.mover.process import Mover
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.pack import CHUNK_BYTES
from orchestrator.target.restic.repository import Repository
from orchestrator.units import GIB, KIB, MIB
from tests.component.nbd_wire import Wire
from tests.guest.restics import CHEAP
from tests.peer.test_mover_beside_restic import PASSWORD, opened

SIZE = 64 * GIB
STRIDE = 43
"""Each so many chunks there is one of data: 1.5 GiB."""
MOST_BYTES = 256 * MIB
NOISE = os.urandom(CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class Piece:
    """What is written by one request; of zeroes where `chunk` is None."""

    offset: int
    length: int
    chunk: int | None = None

    def data(self) -> bytes:
        """Of each piece other random bytes."""
        start = self.offset % CHUNK_BYTES
        return self.offset.to_bytes(8, "big") + NOISE[start + 8 : start + self.length]


def pieces(length: int) -> Iterator[Piece]:
    """All of the disk, in its order: data in pieces of that length, holes at once."""
    for chunk in range(0, SIZE // CHUNK_BYTES, STRIDE):
        start, end = chunk * CHUNK_BYTES, min(SIZE, (chunk + STRIDE) * CHUNK_BYTES)
        yield from (Piece(start + at, length, chunk) for at in range(0, CHUNK_BYTES, length))
        if start + CHUNK_BYTES < end:
            yield Piece(start + CHUNK_BYTES, end - start - CHUNK_BYTES)


def slightly_out_of_order(found: list[Piece]) -> list[Piece]:
    places = random.Random(1)  # noqa: S311
    return [piece for _, piece in sorted(enumerate(found), key=lambda one: one[0] + 16 * places.random())]


async def write(wire: Wire, requests: list[Piece], in_flight: int) -> None:
    under_way = 0
    for piece in requests:
        if piece.chunk is None:
            wire.ask(Act.WRITE_ZEROES, piece.offset, piece.length)
        else:
            wire.ask(Act.WRITE, piece.offset, data=piece.data())
        under_way += 1
        await wire.writer.drain()
        if under_way == in_flight:
            assert not (await wire.answer()).error
            under_way -= 1
    for _ in range(under_way):
        assert not (await wire.answer()).error
    await wire.leave()


def peak_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * KIB


@pytest.mark.parametrize(("length", "in_flight"), [(CHUNK_BYTES, 16), (64 * KIB, 8)], ids=["chunks", "64 KiB"])
async def test_a_large_disk_takes_no_more_than_a_small_one(tmp_path: Path, length: int, in_flight: int) -> None:
    root = tmp_path / "repository"
    await Repository.create(DirectoryBackend(root), PASSWORD, cost=CHEAP)
    requests = slightly_out_of_order(list(pieces(length)))
    try:
        async with Mover.started(str(root), await opened(root)) as mover:
            ours, theirs = socket.socketpair()
            await mover.add("vda", SIZE, theirs)
            await write(await Wire.begun(ours, "vda", structured=False), requests, in_flight)
            sealed = await mover.seal("vda")
            assert sealed.stored_bytes > 1.4 * GIB
            await mover.commit("web01", datetime.now(UTC), b"{}", tags=[], note={})
            assert peak_bytes(mover._process.pid) <= MOST_BYTES
    finally:
        shutil.rmtree(root)
