"""An NBD client for a server on this host, over a connected unix socket: block status and trim, one at a time."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Self

from orchestrator.errors import NbdError
from orchestrator.nbd import protocol
from orchestrator.nbd.protocol import Act, ChunkKind, Option, OptionReply, Piece, ProtocolError

LONGEST_REQUEST_BYTES = 1 << 30
"""A length has 32 bits; a multiple of any block size."""
LONGEST_CHUNK_BYTES = 32 << 20


class NbdClient:
    """One export, used by one task. Enter it to connect, with a deadline of the caller's.

    Everything raises NbdError where the server refuses, ends the connection or sends nonsense.
    """

    def __init__(self, connected: socket.socket, export: str, *, context: str) -> None:
        """`connected` is taken over; `context` is what `status` asks for, such as "base:allocation"."""
        self._socket = connected
        self._export = export
        self._context = context
        self._cookie = 0
        self.size_bytes = 0

    async def __aenter__(self) -> Self:
        try:
            self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        except BaseException:
            self._socket.close()
            raise
        try:
            with self._explained():
                await self._negotiate()
        except BaseException:
            self._writer.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            if error is None:
                self._writer.write(protocol.encode_request(Act.DISCONNECT, self._cookie, 0, 0))
            self._writer.close()
            await self._writer.wait_closed()

    async def status(self) -> list[Piece]:
        """The status of all of the export in the context, in order, without a gap."""
        found: list[Piece] = []
        offset = 0
        while offset < self.size_bytes:
            before = offset
            with self._explained():
                async for piece in self._status(offset, min(self.size_bytes - offset, LONGEST_REQUEST_BYTES)):
                    found.append(piece)
                    offset += piece.length
                if not before < offset <= self.size_bytes:
                    raise ProtocolError(f"the status of {before} to {offset} of {self.size_bytes} bytes")
        return found

    async def trim(self, offset: int, length: int) -> None:
        """Discard a part of the export."""
        with self._explained():
            while length:
                step = min(length, LONGEST_REQUEST_BYTES)
                async for _ in self._ask(Act.TRIM, offset, step):
                    raise ProtocolError("an answer to a trim")
                offset, length = offset + step, length - step

    async def _negotiate(self) -> None:
        password, have_option, flags = protocol.GREETING.unpack(await self._read(protocol.GREETING.size))
        if (password, have_option) != (protocol.PASSWORD, protocol.HAVE_OPTION):
            raise ProtocolError("no NBD server")
        if not flags & protocol.FIXED_NEWSTYLE:
            raise ProtocolError("a server of an old style")
        self._writer.write(protocol.CLIENT_FLAGS.pack(protocol.FIXED_NEWSTYLE | (flags & protocol.NO_ZEROES)))
        await self._option(Option.STRUCTURED_REPLY)
        contexts = await self._option(
            Option.SET_META_CONTEXT, protocol.set_meta_context(self._export, self._context)
        )
        if not contexts:
            raise NbdError(f"export {self._export} has no {self._context}")
        for kind, data in await self._option(Option.GO, protocol.go(self._export)):
            if kind == OptionReply.INFO and data[:2] == struct.pack(">H", protocol.INFO_EXPORT):
                (self.size_bytes,) = struct.unpack_from(">Q", data, 2)

    async def _option(self, option: Option, data: bytes = b"") -> list[tuple[int, bytes]]:
        """What the server says to an option before it acknowledges it."""
        self._writer.write(protocol.encode_option(option, data))
        found: list[tuple[int, bytes]] = []
        while True:
            header = await self._read(protocol.OPTION_REPLY.size)
            kind, length = protocol.decode_option_reply(header, option)
            payload = await self._read(length)
            if kind & protocol.OPTION_ERROR:
                said = payload.decode(errors="replace") or f"error {kind & ~protocol.OPTION_ERROR}"
                raise NbdError(f"the NBD server refuses {option.name} for export {self._export}: {said}")
            if kind == OptionReply.ACK:
                return found
            found.append((kind, payload))

    async def _status(self, offset: int, length: int) -> AsyncIterator[Piece]:
        async for payload in self._ask(Act.BLOCK_STATUS, offset, length):
            for piece in protocol.decode_pieces(payload):
                yield piece

    async def _ask(self, act: Act, offset: int, length: int) -> AsyncIterator[bytes]:
        """The payloads of the chunks that answer a request."""
        self._cookie += 1
        self._writer.write(protocol.encode_request(act, self._cookie, offset, length))
        while True:
            (magic,) = protocol.MAGIC.unpack(await self._read(protocol.MAGIC.size))
            if magic == protocol.SIMPLE_MAGIC:
                rest = await self._read(protocol.SIMPLE.size - protocol.MAGIC.size)
                error, cookie = struct.unpack(">IQ", rest)
                self._check(cookie)
                if error:
                    raise NbdError(f"the NBD server refuses {act.name} at {offset}: error {error}")
                return
            if magic != protocol.CHUNK_MAGIC:
                raise ProtocolError(f"no reply begins with {magic:x}")
            flags, kind, cookie, size = protocol.CHUNK_REST.unpack(await self._read(protocol.CHUNK_REST.size))
            self._check(cookie)
            if size > LONGEST_CHUNK_BYTES:
                raise ProtocolError(f"a chunk of {size} bytes")
            payload = await self._read(size)
            if kind & protocol.CHUNK_ERROR:
                said = protocol.decode_error(payload)
                raise NbdError(f"the NBD server refuses {act.name} at {offset}: {said}")
            if kind != ChunkKind.NONE:
                yield payload
            if flags & protocol.DONE:
                return

    def _check(self, cookie: int) -> None:
        if cookie != self._cookie:
            raise ProtocolError(f"a reply to request {cookie}, not {self._cookie}")

    async def _read(self, size: int) -> bytes:
        return await self._reader.readexactly(size)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ProtocolError as error:
            raise NbdError(
                f"what an NBD server sent makes no sense: {error}",
                hint="please report this, with the versions of QEMU and vmfleece",
            ) from error
        except (asyncio.IncompleteReadError, OSError) as error:
            raise NbdError(
                f"the connection to an NBD server ended: {error}",
                hint="its process has ended, or was ended: see the log before this",
            ) from error
