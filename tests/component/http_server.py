"""An HTTP server that says what it was sent, for what pings and notifies."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class Server:
    """What it was sent, and what it answers."""

    port: int = 0
    got: list[tuple[str, str]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        self.got.append((request.path, await request.text()))
        return web.Response(status=self.answers.pop(0) if self.answers else 200)


@contextlib.asynccontextmanager
async def http_server() -> AsyncIterator[Server]:
    server = Server()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.port = runner.addresses[0][1]
        yield server
    finally:
        await runner.cleanup()
