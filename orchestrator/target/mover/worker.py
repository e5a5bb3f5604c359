"""The worker's side: does what it is asked, one thing after the other, and tells how far QEMU is.

It ends when the other end of its socket is closed, whatever it was doing: then nothing was committed, or all was.
"""

import asyncio
import base64
import contextlib
import socket
import threading
from collections import deque
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any

from orchestrator import aio
from orchestrator.errors import TargetError, VmfleeceError
from orchestrator.target.mover import messages
from orchestrator.target.mover.messages import Lines, Message
from orchestrator.target.mover.session import Session
from orchestrator.target.restic.place import backend_at
from orchestrator.target.restic.snapshot import ResticSnapshot

RECEIVE_BYTES = 64 * 1024
DESCRIPTORS = 16
PROGRESS_SECONDS = 1.0


@dataclass(slots=True)
class Inbox:
    """What has come by a socket, which a thread reads, since asyncio receives no descriptors."""

    control: socket.socket
    loop: asyncio.AbstractEventLoop
    messages: "asyncio.Queue[Message | None]" = field(default_factory=asyncio.Queue)
    descriptors: deque[int] = field(default_factory=deque)

    def read(self) -> None:
        """Read until the other end is closed. Blocks."""
        lines = Lines()
        with contextlib.suppress(OSError):
            while True:
                data, descriptors, _, _ = socket.recv_fds(self.control, RECEIVE_BYTES, DESCRIPTORS)
                self.descriptors.extend(descriptors)
                if not data:
                    break
                for message in lines.feed(data):
                    self.loop.call_soon_threadsafe(self.messages.put_nowait, message)
        with contextlib.suppress(RuntimeError):  # the loop is over
            self.loop.call_soon_threadsafe(self.messages.put_nowait, None)


class Worker:
    """See the module."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    async def run(self) -> None:
        """Serve until the other end is closed, or the repository cannot be opened."""
        inbox = Inbox(self._control, asyncio.get_running_loop())
        threading.Thread(target=inbox.read, daemon=True).start()
        asked = await inbox.messages.get()
        if asked is None:
            return
        try:
            backend = backend_at(asked["place"], patience=timedelta(seconds=asked["patience_seconds"]))
            async with Session.opened(backend, messages.to_opened(asked["opened"])) as session:
                await self._send({"number": asked["number"], "value": None})
                async with aio.background(self._tell_progress(session), self._tell_loss(session)):
                    await self._serve(inbox, session)
        except VmfleeceError as error:
            await self._send({"number": asked["number"], "error": messages.of_error(error)})

    async def _serve(self, inbox: Inbox, session: Session) -> None:
        """Answer requests side by side; those that are not done when nobody waits for them are cancelled."""
        answering: set[asyncio.Task[None]] = set()
        while (asked := await inbox.messages.get()) is not None:
            descriptor = inbox.descriptors.popleft() if asked.get("descriptor") else None
            task = asyncio.create_task(self._answer(asked, descriptor, session))
            answering.add(task)
            task.add_done_callback(answering.discard)
        for task in answering:
            task.cancel()
        if answering:
            await asyncio.wait(answering)

    async def _answer(self, asked: Message, descriptor: int | None, session: Session) -> None:
        try:
            answer: Message = {"value": await _do(asked, descriptor, session)}
        except Exception as error:  # noqa: BLE001  whoever asked is told, and decides
            answer = {"error": messages.of_error(error)}
        await self._send({"number": asked["number"], **answer})

    async def _tell_progress(self, session: Session) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            await self._send({"progress": session.written_bytes()})

    async def _tell_loss(self, session: Session) -> None:
        try:
            await session.lost()
        except TargetError as error:
            await self._send({"lost": messages.of_error(error)})

    async def _send(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # nobody is there to be told
            await asyncio.to_thread(self._control.sendall, messages.encode(message))


async def _do(asked: Message, descriptor: int | None, session: Session) -> Any:
    match asked["ask"]:
        case "add":
            connected = socket.socket(fileno=descriptor)
            try:
                parent = await session.parent_of(asked["disk"], _identity(asked["parent"]))
            except BaseException:
                connected.close()
                raise
            session.add(asked["disk"], asked["size_bytes"], connected, parent=parent)
            return None
        case "seal":
            return asdict(await session.seal(asked["disk"]))
        case "trouble":
            trouble = session.trouble(asked["disk"])
            return None if trouble is None else messages.of_error(trouble)
        case "commit":
            made = ResticSnapshot(
                time=datetime.fromisoformat(asked["time"]),
                tree=b"",
                hostname=asked["vm"],
                paths=(f"/{asked['vm']}",),
                tags=tuple(asked["tags"]),
                parent=_identity(asked["parent"]),
                note=asked["note"],
            )
            committed = await session.commit(made, base64.b64decode(asked["vm_json"]))
            assert committed.identity is not None  # noqa: S101  it was just saved
            return committed.identity.hex()
        case other:
            raise ValueError(f"nobody knows how to {other}")


def _identity(text: str) -> bytes | None:
    return bytes.fromhex(text) or None
