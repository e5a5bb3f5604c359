"""Server-sent events: what happens, to whoever keeps the connection open.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio

from aiohttp import web

from orchestrator.errors import VmfleeceError
from orchestrator.service.feed import Feed, Told

HEARTBEAT_SECONDS = 15.0
WRITE_SECONDS = 30.0
"""Who does not take what he is told for so long is disconnected."""
FOLLOWERS = 50
RETRY_MS = 2000
"""How soon a browser comes back."""
LONGEST_ID = 64


class TooMany(VmfleeceError):
    """More follow already than can be served."""

    code = "too-many-followers"


async def follow(request: web.Request, feed: Feed) -> web.StreamResponse:
    """Tell until the follower leaves, falls behind, or there is nothing more to tell. Raises TooMany."""
    if feed.followers >= FOLLOWERS:
        raise TooMany(f"{FOLLOWERS} clients follow the events already", hint="end one of them, or ask again later")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    response.force_close()
    after = request.headers.get("Last-Event-ID")
    with feed.followed(after[:LONGEST_ID] if after else None) as follower:
        await response.prepare(request)
        try:
            await _write(response, f"retry: {RETRY_MS}\n\n")
            while True:
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        told = await follower.next()
                except TimeoutError:
                    await _write(response, ": still here\n\n")
                    continue
                if not told:
                    break
                await _write(response, "".join(map(_lines, told)))
        except (ConnectionError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()
    return response


def _lines(told: Told) -> str:
    identity = f"id: {told.id}\n" if told.id else ""
    return f"{identity}data: {told.data}\n\n"  # JSON is one line


async def _write(response: web.StreamResponse, text: str) -> None:
    async with asyncio.timeout(WRITE_SECONDS):
        await response.write(text.encode())
