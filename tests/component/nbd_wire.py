"""An NBD client that sends what it is told to, right or wrong, many requests at once."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Container
from dataclasses import dataclass
from typing import Self

from orchestrator.nbd import protocol
from orchestrator.nbd.protocol import Act, Option, OptionReply
from tests.component.nbd_memory import SOON_SECONDS

HELLO = protocol.CLIENT_FLAGS.pack(protocol.FIXED_NEWSTYLE | protocol.NO_ZEROES)


def options(name: str = "disk", *, structured: bool = True) -> bytes:
    """All that a client says until it may send requests."""
    go = protocol.encode_option(Option.GO, protocol.go(name, protocol.INFO_BLOCK_SIZE))
    if not structured:
        return HELLO + go
    contexts = protocol.set_meta_context(name, protocol.ALLOCATION)
    return (
        HELLO
        + protocol.encode_option(Option.STRUCTURED_REPLY)
        + protocol.encode_option(Option.SET_META_CONTEXT, contexts)
        + go
    )


@dataclass(frozen=True, slots=True)
class Answer:
    cookie: int
    error: int
    content: bytes = b""


class Wire:
    """Connected, and past the negotiation once `begun`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.flags = 0
        self._lengths: dict[int, int] = {}
        self._cookie = 0

    @classmethod
    async def over(cls, connected: socket.socket) -> Self:
        return cls(*await asyncio.open_connection(sock=connected))

    @classmethod
    async def begun(cls, connected: socket.socket, name: str = "disk", *, structured: bool = True) -> Self:
        wire = await cls.over(connected)
        await wire.begin(name, structured=structured)
        return wire

    async def begin(self, name: str = "disk", *, structured: bool = True) -> None:
        """Negotiate, with structured replies and base:allocation or without both."""
        await self.reader.readexactly(protocol.GREETING.size)
        self.writer.write(options(name, structured=structured))
        option = kind = 0
        while (option, kind) != (Option.GO, OptionReply.ACK):
            header = await self.reader.readexactly(protocol.OPTION_REPLY.size)
            _, option, kind, size = protocol.OPTION_REPLY.unpack(header)
            data = await self.reader.readexactly(size)
            assert not kind & protocol.OPTION_ERROR, data
            if kind == OptionReply.INFO and data[:2] == b"\0\0":
                self.flags = struct.unpack_from(">H", data, 10)[0]

    def ask(self, act: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> int:
        """Send a request; its cookie. A write is as long as its data."""
        self._cookie += 1
        self._lengths[self._cookie] = length
        self.writer.write(
            protocol.encode_request(act, self._cookie, offset, len(data) or length, flags=flags) + data
        )
        return self._cookie

    async def answer(self, *, reads: Container[int] = ()) -> Answer:
        """The next reply; `reads` are the cookies of those that have data."""
        async with asyncio.timeout(SOON_SECONDS):
            (magic,) = protocol.MAGIC.unpack(await self.reader.readexactly(4))
        if magic == protocol.SIMPLE_MAGIC:
            error, cookie = struct.unpack(">IQ", await self.reader.readexactly(12))
            size = self._lengths[cookie] if cookie in reads and not error else 0
            return Answer(cookie, error, await self.reader.readexactly(size))
        assert magic == protocol.CHUNK_MAGIC
        flags, kind, cookie, size = protocol.CHUNK_REST.unpack(
            await self.reader.readexactly(protocol.CHUNK_REST.size)
        )
        assert flags == protocol.DONE
        payload = await self.reader.readexactly(size)
        if kind & protocol.CHUNK_ERROR:
            return Answer(cookie, struct.unpack_from(">I", payload)[0], payload[6:])
        return Answer(cookie, 0, payload[8:] if kind == protocol.ChunkKind.OFFSET_DATA else payload)

    async def does(
        self, act: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> Answer:
        """One request, and its answer."""
        cookie = self.ask(act, offset, length, flags=flags, data=data)
        answer = await self.answer(reads={cookie} if act == Act.READ else ())
        assert answer.cookie == cookie
        return answer

    async def is_cut_off(self) -> bool:
        """Whatever is still to come, the end comes then, and soon."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(SOON_SECONDS):
                await self.reader.read()
        return True

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    async def leave(self) -> None:
        self.writer.write(protocol.encode_request(Act.DISCONNECT, 0, 0, 0))
        await self.close()
