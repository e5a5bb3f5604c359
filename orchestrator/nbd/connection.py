"""One client of an NBD server, from the greeting to the end: a bounded number of requests side by side.

Each of its workers waits for its turn to receive, receives one request with its data, lets the next worker
receive, and answers. When all are busy, or too much memory is held, nothing is received: that is back-pressure.

Whatever a client does costs its own connection at most. Errors of an export, and what is wrong with a client, go
to `report`; nothing is logged here. Source: doc/proto.md of NetworkBlockDevice/nbd, "Transmission".
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from orchestrator.nbd import protocol, requests
from orchestrator.nbd.export import Data, Export
from orchestrator.nbd.handshake import Agreed, Handshake
from orchestrator.nbd.protocol import Act, Errno, ProtocolError, Request, RequestFlag
from orchestrator.nbd.stream import Stream
from orchestrator.units import KIB, MIB

DRAIN_BYTES = 256 * KIB


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may take: of a server (`connections`), and each connection for itself.

    `handshake_seconds`: from connecting to the end of the negotiation. `stall_seconds`: to send the rest of a
    request that it began, or to receive an answer; between requests, a client may be silent for ever.
    `held_bytes`: of the data of reads and writes under way; one request may be larger.
    """

    connections: int = 16
    requests: int = 16
    held_bytes: int = 64 * MIB
    handshake_seconds: float = 10.0
    stall_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """An error that a client got from an export, or the reason why a client was thrown out or is gone.

    `export` is empty before one was chosen; `request` is None where it is about the whole connection.
    """

    export: str
    request: Request | None
    error: Exception


Report = Callable[[Trouble], None]


class Connection:
    """A client at the other end of `stream`."""

    def __init__(self, stream: Stream, exports: Mapping[str, Export], *, report: Report, limits: Limits) -> None:
        self._stream = stream
        self._exports = exports
        self._report = report
        self._limits = limits

    async def run(self) -> None:
        """Converse until the client leaves, or is thrown out, which is reported. Closes the stream.

        Cancellation cancels what is under way in the export, and cuts the client off.
        """
        export = ""
        try:
            agreed = await self._negotiate()
            if agreed is not None:
                export = agreed.name
                await _Transmission(self._stream, agreed, report=self._report, limits=self._limits).run()
            await self._stream.close(within_seconds=self._limits.stall_seconds)
        except (ProtocolError, TimeoutError, ConnectionError) as error:
            self._report(Trouble(export, None, error))
        finally:
            await self._stream.abort()

    async def _negotiate(self) -> Agreed | None:
        machine = Handshake(self._exports)
        limit = self._limits.handshake_seconds
        try:
            async with asyncio.timeout(limit):
                self._stream.send(machine.greeting)
                while machine.wants:
                    received = await self._stream.receive(machine.wants, within_seconds=limit)
                    self._stream.send(machine.take(received))
                    if machine.wants:  # else it may be gone already, after ABORT
                        await self._stream.drained(within_seconds=limit)
        except TimeoutError as error:
            raise TimeoutError(f"the client did not negotiate within {limit:g} s") from error
        return machine.agreed


class _Transmission:
    """What follows the negotiation."""

    def __init__(self, stream: Stream, agreed: Agreed, *, report: Report, limits: Limits) -> None:
        self._stream = stream
        self._agreed = agreed
        self._export = agreed.export
        self._report = report
        self._limits = limits
        self._turn = asyncio.Lock()
        self._memory = _Memory(limits.held_bytes)
        self._leaving = False
        self._workers: list[asyncio.Task[None]] = []
        self._failure: Exception | None = None

    async def run(self) -> None:
        """Until the client has left and all of its requests are answered.

        Raises ProtocolError, TimeoutError or ConnectionError if it is to be cut off instead.
        """
        async with asyncio.TaskGroup() as group:
            self._workers = [group.create_task(self._work()) for _ in range(self._limits.requests)]
        if self._failure is not None:
            raise self._failure

    async def _work(self) -> None:
        try:
            while not self._leaving:
                await self._one()
        except (ProtocolError, TimeoutError, ConnectionError) as error:
            self._end(error)

    def _end(self, error: Exception) -> None:
        """Give up the other requests under way, since nobody waits for their answers.

        If the client took its leave, they are done even if it is gone ("Terminating the transmission phase").
        """
        if self._failure is None and not self._leaving:
            self._failure = error
            for worker in self._workers:
                if worker is not asyncio.current_task():
                    worker.cancel()

    async def _one(self) -> None:
        async with contextlib.AsyncExitStack() as lease:
            async with self._turn:
                if self._leaving:
                    return
                request = await self._next()
                if request.act == Act.DISCONNECT:
                    self._leaving = True
                    return
                refused, data = await self._receive(request, lease)
            await self._answer(request, refused, data)

    async def _next(self) -> Request:
        if not await self._stream.begins():
            raise ConnectionResetError("the client ended the connection without a word")
        limit = self._limits.stall_seconds
        return protocol.decode_request(await self._stream.receive(protocol.REQUEST.size, within_seconds=limit))

    async def _receive(
        self, request: Request, lease: contextlib.AsyncExitStack
    ) -> tuple[Errno | None, memoryview | None]:
        """Why the request is refused, if it is, and the data that followed it."""
        size = requests.payload_bytes(request, self._agreed)
        refused = requests.refusal(request, self._agreed)
        if refused is None:
            await lease.enter_async_context(self._memory.hold(requests.held_bytes(request)))
        if not size:
            return refused, None
        buffer = None
        if refused is None:
            try:
                buffer = await lease.enter_async_context(self._export.buffer(request.offset, size))
            except Exception as error:  # noqa: BLE001  whatever it is, it costs this request only
                refused = self._failed(request, error)
        if buffer is None:
            await self._skip(size)
        else:
            await self._stream.receive_into(buffer, within_seconds=self._limits.stall_seconds)
        return refused, buffer

    async def _skip(self, size: int) -> None:
        scratch = memoryview(bytearray(min(size, DRAIN_BYTES)))
        while size:
            step = scratch[:size]
            await self._stream.receive_into(step, within_seconds=self._limits.stall_seconds)
            size -= len(step)

    async def _answer(self, request: Request, refused: Errno | None, data: memoryview | None) -> None:
        found: list[Data] = []
        if refused is None:
            try:
                found = await self._perform(request, data)
            except Exception as error:  # noqa: BLE001  whatever it is, it costs this request only
                refused = self._failed(request, error)
        if refused is not None:
            found = [self._refusal(request, refused)]
        self._stream.send(*found)
        await self._stream.drained(within_seconds=self._limits.stall_seconds)

    def _failed(self, request: Request, error: Exception) -> Errno:
        self._report(Trouble(self._agreed.name, request, error))
        return protocol.errno_of(error)

    def _refusal(self, request: Request, error: Errno) -> bytes:
        if self._agreed.structured and request.act in (Act.READ, Act.BLOCK_STATUS):
            return protocol.encode_error_chunk(request.cookie, error, f"{request}: {error.name}")
        return protocol.encode_simple(request.cookie, error)

    async def _perform(self, request: Request, data: memoryview | None) -> list[Data]:
        """Have the export do it; the reply to send."""
        export, offset, length = self._export, request.offset, request.length
        match request.act:
            case Act.READ:
                return self._content(request, await export.read(offset, length))
            case Act.BLOCK_STATUS:
                pieces = requests.clipped(await export.status(offset, length), request)
                return [protocol.encode_status_chunk(request.cookie, pieces)]
            case Act.WRITE if data is not None:
                await export.write(offset, data)
            case Act.WRITE_ZEROES:
                await export.write_zeroes(offset, length, may_be_hole=not request.flags & RequestFlag.NO_HOLE)
            case Act.TRIM:
                await export.trim(offset, length)
            case Act.FLUSH:
                await export.flush()
            case _:
                _never(request)
        if request.flags & RequestFlag.FUA:
            await export.flush()
        return [protocol.encode_simple(request.cookie)]

    def _content(self, request: Request, content: Data) -> list[Data]:
        size = memoryview(content).nbytes
        if size != request.length:
            raise ValueError(f"{size} bytes were read for {request}")
        if self._agreed.structured:
            return [protocol.encode_data_chunk(request.cookie, request.offset, size), content]
        return [protocol.encode_simple(request.cookie), content]


def _never(request: Request) -> NoReturn:
    raise AssertionError(f"{request} was not refused, but cannot be done")


class _Memory:
    """How much data of one connection is held. One at a time waits for some."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held_bytes = 0
        self._released = asyncio.Event()

    @contextlib.asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Wait until there is room, or nothing else is held."""
        while self._held_bytes and self._held_bytes + size > self._most_bytes:
            self._released.clear()
            await self._released.wait()
        self._held_bytes += size
        try:
            yield
        finally:
            self._held_bytes -= size
            self._released.set()
