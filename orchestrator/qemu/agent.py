"""The guest agent (qemu-guest-agent) over its own socket: freezing a guest's file systems, and thawing them.

Its protocol has traps, all tried: it greets nobody; what an earlier client left unread comes to the next one; a
command that nobody waited for may be carried out later; whoever closes the socket leaves the guest frozen. So
each connection is synchronised with a random number, and a freeze without an answer is followed by a thaw on the
same connection at once. An agent that is not there is silent, so every wait has a deadline.

Source: qga/qapi-schema.json; docs/interop/qemu-ga.rst.
"""

import asyncio
import contextlib
import errno
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from orchestrator import aio
from orchestrator.errors import AgentError

SYNC_SECONDS = 5.0
FREEZE_SECONDS = 30.0
"""How long file systems may take to write out what they have; a database's hook script, too."""
THAW_SECONDS = 30.0
ABSENT = "agent-absent"
"""Code of the error that nobody listens at the socket: no QEMU of that VM lives."""
_DELIMITER = b"\xff"
_LONGEST_LINE_BYTES = 1 << 20


class GuestAgent:
    """A connection to an agent that has answered; `connected` makes one. One client at a time."""

    def __init__(self, vm: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._vm = vm
        self._reader = reader
        self._writer = writer

    async def freeze(self, *, deadline_seconds: float = FREEZE_SECONDS) -> int:
        """Freeze all file systems; returns how many. Whoever calls it calls `thaw`, whatever comes of it.

        Raises AgentError. If there was no answer, a thaw was sent behind it. Cancellation leaves it unknown.
        """
        try:
            frozen = await self._execute("guest-fsfreeze-freeze", deadline_seconds)
            if not isinstance(frozen, int) or frozen < 1:
                raise AgentError(
                    f"VM {self._vm}: its guest agent froze no file system",
                    hint="see that some are mounted in the guest, and not all on its agent's list of exceptions",
                )
        except AgentError:
            # It may be carried out yet: then the thaw is, too.
            with contextlib.suppress(AgentError):
                await aio.finish(self.thaw())
            raise
        return frozen

    async def thaw(self, *, deadline_seconds: float = THAW_SECONDS) -> int:
        """Thaw what is frozen, whatever the agent says of its state; returns how many file systems were.

        Raises AgentError if that is not known to be done.
        """
        self._send("guest-fsfreeze-thaw")
        await self.synchronise(deadline_seconds=deadline_seconds)
        return int(await self._execute("guest-fsfreeze-thaw", deadline_seconds))

    async def synchronise(self, *, deadline_seconds: float) -> None:
        """Make sure that the next answer is to what is sent next. Raises AgentError ("agent-silent")."""
        number = secrets.randbits(50)
        self._send("guest-sync-delimited", before=_DELIMITER, id=number)
        async with self._deadline("guest-sync-delimited", deadline_seconds):
            while True:
                await self._reader.readuntil(_DELIMITER)
                if (await self._answer()).get("return") == number:
                    return

    async def _execute(self, command: str, deadline_seconds: float) -> Any:
        number = secrets.randbits(50)
        self._send(command, number=number)
        async with self._deadline(command, deadline_seconds):
            while True:
                answer = await self._answer()
                if answer.get("id") != number:
                    continue  # to somebody before us, or to garbage that was there before us
                if "error" in answer:
                    said = answer["error"].get("desc", "")
                    raise AgentError(f"VM {self._vm}: its guest agent refused {command}: {said}", hint=said)
                return answer.get("return")

    async def _answer(self) -> dict[str, Any]:
        line = await self._reader.readline()
        if not line:
            raise EOFError
        answer = json.loads(line)
        return answer if isinstance(answer, dict) else {}

    def _send(self, command: str, *, before: bytes = b"", number: int | None = None, **arguments: Any) -> None:
        said: dict[str, Any] = {"execute": command}
        if arguments:
            said["arguments"] = arguments
        if number is not None:
            said["id"] = number
        self._writer.write(before + json.dumps(said).encode() + b"\n")

    @contextlib.asynccontextmanager
    async def _deadline(self, command: str, seconds: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds):
                await self._writer.drain()
                yield
        except TimeoutError as error:
            raise AgentError(
                f"VM {self._vm}: its guest agent did not answer {command} within {seconds:g} s",
                hint="start qemu-guest-agent in the guest, and let nobody else use its socket",
                code="agent-silent",
            ) from error
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise AgentError(
                f"VM {self._vm}: the connection to its guest agent failed: {error or type(error).__name__}",
                hint="see whether the VM was shut down or started anew",
                code="agent-gone",
            ) from error


@contextlib.asynccontextmanager
async def connected(path: Path, *, vm: str) -> AsyncIterator[GuestAgent]:
    """A connection for the block, to an agent that answers. Raises AgentError."""
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=_LONGEST_LINE_BYTES)
    except OSError as error:
        raise AgentError(
            f"VM {vm}: no guest agent at {path}: {error.strerror}",
            hint="check vm.NAME.agent, and that the VM runs and has such a port",
            code=ABSENT if error.errno in (errno.ENOENT, errno.ECONNREFUSED) else "agent-gone",
        ) from error
    try:
        agent = GuestAgent(vm, reader, writer)
        await agent.synchronise(deadline_seconds=SYNC_SECONDS)
        yield agent
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
