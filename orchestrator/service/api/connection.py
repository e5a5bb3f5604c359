"""Connections that cannot starve others: aiohttp's, under deadlines and a limit.

aiohttp waits for the rest of a request for ever. Here whoever does not send a whole head in time is disconnected,
and where there are too many connections already, the one that has sent nothing useful for longest makes room. So
clients that only hold connections open, however many, keep nobody out.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from aiohttp import web

HEAD_SECONDS = 10.0
ANSWER_SECONDS = 300.0
"""From the head to the last byte of the answer; a stream has deadlines of its own."""
CONNECTIONS = 200


class Connections:
    """Those of one listener. `on_refused` is told why one was ended."""

    def __init__(self, make: Callable[[], web.RequestHandler], on_refused: Callable[[str], None]) -> None:
        self._make = make
        self._on_refused = on_refused
        self._open: dict[web.RequestHandler, Connection] = {}
        self._mute: dict[Connection, None] = {}

    def __call__(self) -> "Connection":
        return Connection(self._make(), self)

    def of(self, request: web.BaseRequest) -> "Connection | None":
        """The connection that a request came by; None if it is gone, or another listener's."""
        return self._open.get(request.protocol)

    def opened(self, connection: "Connection") -> None:
        """Count one more; whoever has been mute for longest makes room for it."""
        if len(self._open) >= CONNECTIONS:
            self._on_refused("too many connections")
            next(iter(self._mute), connection).abort()
        self._open[connection.handler] = connection
        self._mute[connection] = None

    def spoke(self, connection: "Connection") -> None:
        """It has sent a whole head."""
        self._mute.pop(connection, None)

    def closed(self, connection: "Connection") -> None:
        """Count one less."""
        self._open.pop(connection.handler, None)
        self._mute.pop(connection, None)

    def late(self, connection: "Connection", why: str) -> None:
        """It has taken too long."""
        self._on_refused(why)
        connection.abort()


class Connection(asyncio.Protocol):
    """One connection: everything goes to aiohttp's handler, and a deadline stands over it."""

    def __init__(self, handler: web.RequestHandler, all_of_them: Connections) -> None:
        self.handler = handler
        self._all = all_of_them
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._due(HEAD_SECONDS, "no request came in time")
        self.handler.connection_made(transport)
        self._all.opened(self)

    def data_received(self, data: bytes) -> None:
        self.handler.data_received(data)

    def eof_received(self) -> None:
        self.handler.eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.unlimited()
        self._all.closed(self)
        self.handler.connection_lost(exc)

    def pause_writing(self) -> None:
        self.handler.pause_writing()

    def resume_writing(self) -> None:
        self.handler.resume_writing()

    def asked(self) -> None:
        """A request has come: the answer has a deadline now."""
        self._all.spoke(self)
        self._due(ANSWER_SECONDS, "the answer was not taken in time")

    def unlimited(self) -> None:
        """No deadline stands over it any more."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def abort(self) -> None:
        """End it at once, whatever is still to be sent."""
        if self._transport is not None:
            self._transport.abort()

    def _due(self, seconds: float, why: str) -> None:
        self.unlimited()
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._all.late, self, why)
