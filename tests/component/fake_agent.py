"""A guest agent without a guest: its protocol with all its traps, as tried on the real one."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any


class FakeAgent:
    """`file_systems` are mounted. `held_seconds` is how long the answer to a command takes, by its name.

    It does one thing after the other, whatever became of who asked for it, and answers where that was asked from
    or, if that connection is gone, to whoever comes next.
    """

    def __init__(self, file_systems: int = 2) -> None:
        self.file_systems = file_systems
        self.frozen = 0
        self.done: list[str] = []
        self.held_seconds: dict[str, float] = {}
        self.errors: dict[str, str] = {}
        self.mute = False
        self.unread = b'{"return": 0}\n{"error": {"class": "GenericError", "desc": "garbage"}}\n'
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._handlers: set[asyncio.Task[None]] = set()
        self._writer: asyncio.StreamWriter | None = None

    @contextlib.asynccontextmanager
    async def serving(self, path: Path) -> AsyncIterator["FakeAgent"]:
        """Listen at a path, for the block."""
        server = await asyncio.start_unix_server(self._connected, path)
        working = asyncio.create_task(self._work())
        try:
            yield self
        finally:
            working.cancel()
            server.close()
            for handler in self._handlers:
                handler.cancel()
            await asyncio.wait([working, *self._handlers])

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        self._writer = writer
        writer.write(self.unread)
        self.unread = b""
        try:
            with contextlib.suppress(OSError):
                while line := await reader.readline():
                    self._queue.put_nowait(line)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _work(self) -> None:
        while True:
            line = await self._queue.get()
            delimited = line.startswith(b"\xff")
            asked = json.loads(line.lstrip(b"\xff"))
            command = asked["execute"]
            await asyncio.sleep(self.held_seconds.get(command, 0))
            answer: dict[str, Any] = self._do(command, asked.get("arguments", {}))
            if "id" in asked:
                answer["id"] = asked["id"]
            if self.mute:
                continue
            said = (b"\xff" if delimited and "return" in answer else b"") + json.dumps(answer).encode() + b"\n"
            if self._writer is None or self._writer.is_closing():
                self.unread += said
            else:
                self._writer.write(said)

    def _do(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.done.append(command.removeprefix("guest-").removeprefix("fsfreeze-"))
        if command in self.errors:
            return {"error": {"class": "GenericError", "desc": self.errors[command]}}
        match command:
            case "guest-sync-delimited":
                return {"return": arguments["id"]}
            case "guest-fsfreeze-freeze":
                self.frozen = self.file_systems
                return {"return": self.frozen}
            case "guest-fsfreeze-thaw":
                thawed, self.frozen = self.frozen, 0
                return {"return": thawed}
        return {"error": {"class": "CommandNotFound", "desc": "no such command"}}
