"""The NBD server beside a model, and with streams of bytes that are nearly right."""

import asyncio
import contextlib
import socket
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.nbd import protocol
from orchestrator.nbd.connection import Limits, Trouble
from orchestrator.nbd.protocol import Act, Allocation, Errno, Option, ProtocolError, RequestFlag
from orchestrator.nbd.server import NbdServer
from orchestrator.units import MIB
from tests.component.nbd_memory import SOON_SECONDS, MemoryExport
from tests.component.nbd_wire import HELLO, Wire, options

SLOT = 3000
"""Not a multiple of blocks."""
SLOTS = 12
SIZE = SLOT * SLOTS + 100
LIMITS = Limits(requests=3, held_bytes=2 * SLOT)


@dataclass
class Talk:
    """A server without a name, whose clients are connected by `connect`, and what it reported."""

    group: asyncio.TaskGroup
    disk: MemoryExport
    server: NbdServer
    troubles: list[Trouble]

    def connect(self) -> tuple[socket.socket, asyncio.Task[None]]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        return ours, self.group.create_task(self.server.converse(theirs))


@contextlib.asynccontextmanager
async def talking() -> AsyncIterator[Talk]:
    disk = MemoryExport(SIZE)
    troubles: list[Trouble] = []
    server = NbdServer({"disk": disk}, report=troubles.append, limits=LIMITS)
    async with asyncio.timeout(SOON_SECONDS), asyncio.TaskGroup() as group:
        yield Talk(group, disk, server, troubles)


@dataclass(frozen=True, slots=True)
class Step:
    """One request within a slot. The slots of requests that are under way together differ."""

    act: Act
    slot: int
    start: int
    length: int
    fill: int
    flags: int

    @property
    def offset(self) -> int:
        return self.slot * SLOT + self.start


steps = st.builds(
    Step,
    st.sampled_from([Act.READ, Act.WRITE, Act.WRITE_ZEROES, Act.TRIM, Act.FLUSH, Act.BLOCK_STATUS]),
    st.integers(0, SLOTS - 1),
    st.integers(0, SLOT // 2),
    st.integers(1, SLOT // 2),
    st.integers(1, 255),
    st.sampled_from([0, RequestFlag.FUA]),
)
batches = st.lists(st.lists(steps, min_size=1, max_size=8, unique_by=lambda step: step.slot), max_size=6)


@settings(max_examples=60, deadline=None)
@given(batches, st.booleans())
async def test_it_does_what_a_model_does(drawn: list[list[Step]], structured: bool) -> None:
    model = bytearray(SIZE)
    async with talking() as talk:
        ours, _ = talk.connect()
        wire = await Wire.begun(ours, structured=structured)
        for batch in drawn:
            asked = {wire.ask(**request(step)): step for step in batch}
            expected = {
                cookie: bytes(model[step.offset : step.offset + step.length]) for cookie, step in asked.items()
            }
            reads = {cookie for cookie, step in asked.items() if step.act == Act.READ}
            for _ in batch:
                answer = await wire.answer(reads=reads)
                step = asked.pop(answer.cookie)
                if step.act == Act.BLOCK_STATUS and not structured:
                    assert answer.error == Errno.INVAL
                    continue
                assert answer.error == 0
                if step.act == Act.READ:
                    assert answer.content == expected[answer.cookie]
                elif step.act == Act.BLOCK_STATUS:
                    check_status(answer.content, expected[answer.cookie])
                elif step.act == Act.WRITE:
                    model[step.offset : step.offset + step.length] = bytes([step.fill]) * step.length
                elif step.act in {Act.WRITE_ZEROES, Act.TRIM}:
                    model[step.offset : step.offset + step.length] = bytes(step.length)
            assert not asked
        assert (await wire.does(Act.READ, 0, SIZE)).content == model == talk.disk.content
        await wire.leave()
    assert talk.troubles == []
    assert talk.disk.most_under_way <= LIMITS.requests


def request(step: Step) -> dict[str, object]:
    if step.act == Act.FLUSH:
        return {"act": step.act}
    if step.act == Act.WRITE:
        data = bytes([step.fill]) * step.length
        return {"act": step.act, "offset": step.offset, "data": data, "flags": step.flags}
    return {"act": step.act, "offset": step.offset, "length": step.length, "flags": step.flags}


def check_status(payload: bytes, content: bytes) -> None:
    """What is said to be zero is; pieces are not longer than what was asked."""
    at = 0
    for piece in protocol.decode_pieces(payload):
        if piece.status & Allocation.ZERO:
            assert not any(content[at : at + piece.length])
        at += piece.length
    assert 0 < at <= len(content)


VALID = [
    protocol.encode_request(Act.WRITE, 1, 10, 50) + b"d" * 50,
    protocol.encode_request(Act.READ, 2, 0, 4000),
    protocol.encode_request(Act.BLOCK_STATUS, 3, 0, SIZE),
    protocol.encode_request(Act.WRITE_ZEROES, 4, 0, SIZE, RequestFlag.NO_HOLE),
    protocol.encode_request(Act.FLUSH, 5, 0, 0),
    protocol.encode_request(Act.WRITE, 6, SIZE, 5000) + b"e" * 5000,
    protocol.encode_request(Act.TRIM, 7, 0, 512, RequestFlag.FUA),
    protocol.encode_request(99, 8, 0, 0),
    protocol.encode_request(Act.WRITE, 9, 0, 40 * MIB),
    protocol.encode_request(Act.DISCONNECT, 10, 0, 0),
]
BEGINNINGS = [
    b"",
    HELLO,
    HELLO + protocol.encode_option(Option.LIST) * 3,
    HELLO + protocol.encode_option(Option.EXPORT_NAME, b"disk"),
    options(),
    options(structured=False),
    options("nothing"),
]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(BEGINNINGS),
    st.lists(st.sampled_from(VALID) | st.binary(max_size=60), max_size=8),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3),
    st.none() | st.integers(0, 6000),
    st.integers(1, 3000),
)
@example(options(), VALID, [], None, 7)
async def test_whatever_is_sent_it_ends_and_others_go_on(
    beginning: bytes, parts: list[bytes], flips: list[tuple[int, int]], kept: int | None, step: int
) -> None:
    sent = bytearray(beginning + b"".join(parts))[:kept]
    for at, byte in flips if sent else []:
        sent[at % len(sent)] = byte
    async with talking() as talk:
        ours, _ = talk.connect()
        other = await Wire.begun(ours)
        ours, conversation = talk.connect()
        wire = await Wire.over(ours)
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(sent), step):
                wire.writer.write(sent[start : start + step])
                await wire.writer.drain()
            wire.writer.write_eof()
        assert await wire.is_cut_off()
        await conversation
        await wire.close()
        assert talk.disk.under_way == talk.disk.lent == 0
        assert len((await other.does(Act.READ, 0, SIZE)).content) == SIZE
        await other.leave()
    errors = {type(trouble.error) for trouble in talk.troubles}
    assert errors <= {ProtocolError, ConnectionResetError, BrokenPipeError}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1 << 32), min_size=1, max_size=6), st.integers(0, 7), st.booleans())
async def test_lengths_alone_cost_no_memory(lengths: list[int], act: int, negotiating: bool) -> None:
    """Whoever claims much and sends little has got a buffer for one write at most."""
    sent = HELLO if negotiating else options()
    for length in lengths:
        size = min(length, (1 << 32) - 1)
        sent += (
            protocol.OPTION.pack(protocol.HAVE_OPTION, act, size)
            if negotiating
            else protocol.encode_request(act, 1, 0, size)
        )
    async with talking() as talk:
        ours, conversation = talk.connect()
        wire = await Wire.over(ours)
        tracemalloc.start()
        try:
            wire.writer.write(sent)
            wire.writer.write_eof()
            await wire.is_cut_off()
            await conversation
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()
            await wire.close()
