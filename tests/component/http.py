"""Asking the API as a program does that knows nothing of vmfleece."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

SOON_SECONDS = 20.0


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def code(self) -> str:
        """Of an error, whose body is one of ours."""
        body = self.json
        assert {"code", "message", "hint"} <= body.keys(), body
        return str(body["code"])


@dataclass(frozen=True)
class Caller:
    """Asks on the control socket, or at an address."""

    session: aiohttp.ClientSession
    base: str

    async def __call__(
        self, method: str, path: str, *, body: Any = None, headers: dict[str, str] | None = None, **more: Any
    ) -> Answer:
        async with (
            asyncio.timeout(SOON_SECONDS),
            self.session.request(method, self.base + path, json=body, headers=headers, **more) as response,
        ):
            return Answer(response.status, dict(response.headers), await response.text())

    async def get(self, path: str) -> Any:
        """The body of an answer that is fine."""
        answer = await self("GET", path)
        assert answer.status == 200, answer
        return answer.json

    @contextlib.asynccontextmanager
    async def events(self, after: str | None = None) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """What is streamed, each with its `id`."""
        headers = {"Last-Event-ID": after} if after else {}
        async with self.session.get(self.base + "/api/v1/events", headers=headers) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            yield _events(response)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    identity = None
    async for line in response.content:
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field == "id":
            identity = value
        if field == "data":
            yield json.loads(value) | {"id": identity}
            identity = None


@contextlib.asynccontextmanager
async def over_socket(path: Path) -> AsyncIterator[Caller]:
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
        yield Caller(session, "http://localhost")


@contextlib.asynccontextmanager
async def over_tcp(port: int) -> AsyncIterator[Caller]:
    async with aiohttp.ClientSession() as session:
        yield Caller(session, f"http://127.0.0.1:{port}")


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
