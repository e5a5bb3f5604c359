"""The bytes of one connection: received straight into the caller's buffers, sent with back-pressure.

What nobody waits for lands in a small buffer; when that is full, nothing is read from the socket any more. So a
client costs STAGED_BYTES here, whatever it sends. One task receives at a time, any number of them send.
"""

import asyncio
import socket
from typing import Self, cast

from orchestrator.nbd.export import Data

STAGED_BYTES = 16 << 10
"""Small, since what of a write's data lands here is copied; large enough for hundreds of requests without data."""


class Stream(asyncio.BufferedProtocol):
    """A connected stream socket. Everything raises ConnectionError once the connection is lost."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._staged = memoryview(bytearray(STAGED_BYTES))
        self._start = self._end = 0
        self._target: memoryview | None = None  # what is received past the staged bytes
        self._reading_paused = False
        self._ended = False
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._lost = asyncio.Event()
        self._given_bytes = 0

    @classmethod
    async def over(cls, connected: socket.socket) -> Self:
        """Take a connected socket over; on cancellation it is closed. Raises OSError."""
        connected.setblocking(False)
        try:
            _, stream = await asyncio.get_running_loop().connect_accepted_socket(cls, connected)
        except BaseException:
            connected.close()
            raise
        return stream

    async def begins(self) -> bool:
        """Wait, however long, until something can be received. False if nothing will come any more."""
        while self._start == self._end and not self._ended:
            await self._change()
        return self._start != self._end

    async def receive_into(self, target: memoryview, *, within_seconds: float) -> None:
        """Fill `target`. Raises ConnectionError or TimeoutError; what came is lost then, on cancellation, too."""
        ready = min(len(target), self._end - self._start)
        target[:ready] = self._staged[self._start : self._start + ready]
        self._start += ready
        if self._start == self._end:
            self._start = self._end = 0
            self._resume()
        if ready == len(target):
            return
        self._target = target[ready:]
        try:
            async with asyncio.timeout(within_seconds):
                while self._target is not None:
                    if self._ended:
                        raise ConnectionResetError("the client ended the connection in the middle")
                    await self._change()
        except TimeoutError as error:
            raise TimeoutError(f"the client did not send the rest within {within_seconds:g} s") from error
        finally:
            self._target = None

    async def receive(self, size: int, *, within_seconds: float) -> bytes:
        """Exactly `size` bytes. Raises as `receive_into`."""
        found = bytearray(size)
        await self.receive_into(memoryview(found), within_seconds=within_seconds)
        return bytes(found)

    def send(self, *parts: Data) -> None:
        """Send parts in a row, later; they must not change any more. Follow it with `drained`."""
        if not self._transport.is_closing():
            for part in parts:
                self._given_bytes += memoryview(part).nbytes
                self._transport.write(part)

    async def drained(self, *, within_seconds: float) -> None:
        """Wait until nearly all is sent. Raises ConnectionError; TimeoutError if nothing is received so long."""
        while not self._writable.is_set():
            before = self._sent_bytes()
            try:
                async with asyncio.timeout(within_seconds):
                    await self._writable.wait()
            except TimeoutError as error:
                if self._sent_bytes() == before:
                    raise TimeoutError(f"the client received nothing for {within_seconds:g} s") from error
        if self._transport.is_closing():
            raise ConnectionResetError("the client ended the connection")

    async def close(self, *, within_seconds: float) -> None:
        """Close once all is sent; what is not sent in time never will be."""
        self._transport.close()
        try:
            async with asyncio.timeout(within_seconds):
                await self._lost.wait()
        except TimeoutError:
            await self.abort()

    async def abort(self) -> None:
        """Close now. Done even if it is cancelled."""
        self._transport.abort()
        await self._lost.wait()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  the loop's guess
        return self._staged[self._end :] if self._target is None else self._target

    def buffer_updated(self, nbytes: int) -> None:
        if self._target is None:
            self._end += nbytes
            if self._end == STAGED_BYTES:
                self._transport.pause_reading()
                self._reading_paused = True
            self._arrived.set()
            return
        self._target = self._target[nbytes:]
        if not self._target:
            self._target = None
            self._arrived.set()

    def eof_received(self) -> bool:
        """Keep the connection, since answers may be under way still; who receives finds out."""
        self._ended = True
        self._arrived.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  all that counts is that it ended
        self._ended = True
        self._arrived.set()
        self._writable.set()
        self._lost.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _sent_bytes(self) -> int:
        return self._given_bytes - self._transport.get_write_buffer_size()

    async def _change(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()

    def _resume(self) -> None:
        if self._reading_paused:
            self._reading_paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()
