"""The run's side: starts the worker process, and asks it.

    async with Mover.started(place, repository.opened) as mover:
        await mover.add("vda", size_bytes, theirs, parent=…)   `theirs`: the other end of QEMU's socket
        await mover.seal("vda")
        snapshot = await mover.commit(…)

The repository's key goes over the socket that only the two have. When the block ends, so does the process, and
nothing is listed unless `commit` returned. Errors are those that the repository raises, ParentUnusable, and
"mover-died" (TargetError).
"""

import asyncio
import base64
import contextlib
import itertools
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NoReturn

from orchestrator import aio
from orchestrator.errors import TargetError, VmfleeceError
from orchestrator.target.mover import messages
from orchestrator.target.mover.messages import Lines, Message, Sealed
from orchestrator.target.restic.access import Opened
from orchestrator.target.restic.backend.base import PATIENCE

RECEIVE_BYTES = 64 * 1024
END_SECONDS = 30.0
TELL_SECONDS = 10.0
SILENCE_SECONDS = 300.0
"""A worker that has opened its repository tells its progress each second; one that does not hangs."""
LAST_WORDS = 2000


class Mover:
    """See the module. `Mover.started` makes one."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        control: socket.socket,
        on_progress: Callable[[Mapping[str, int]], None],
    ) -> None:
        self._process = process
        self._control = control
        self._on_progress = on_progress
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._turn = asyncio.Lock()
        self._telling = False
        self._dead: TargetError | None = None
        self._lost: asyncio.Future[VmfleeceError] = asyncio.get_running_loop().create_future()

    @classmethod
    @contextlib.asynccontextmanager
    async def started(
        cls,
        place: str,
        opened: Opened,
        *,
        patience: timedelta = PATIENCE,
        on_progress: Callable[[Mapping[str, int]], None] = lambda _written: None,
    ) -> AsyncIterator["Mover"]:
        """A process that has locked the repository at `place`, for the block. Raises TargetError.

        `place` and `patience`: `backend_at`; the process inherits the environment. `on_progress` gets, each
        second, how many bytes QEMU has written of each disk.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours:
            with theirs:
                process = await aio.acquire(
                    asyncio.create_subprocess_exec(
                        *(sys.executable, "-m", "orchestrator.target.mover", str(theirs.fileno())),
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=asyncio.subprocess.DEVNULL,
                        stderr=asyncio.subprocess.PIPE,
                        pass_fds=(theirs.fileno(),),
                        start_new_session=True,  # the terminal's signals are for the run
                    ),
                    _end,
                )
            mover = cls(process, ours, on_progress)
            try:
                async with aio.background(mover._listen()):
                    seconds = patience.total_seconds()
                    told = messages.of_opened(opened)
                    await mover._ask("open", place=place, opened=told, patience_seconds=seconds)
                    mover._telling = True
                    yield mover
            finally:
                ours.close()  # that ends it
                await aio.finish(_end_in_order(process))

    async def add(
        self, disk: str, size_bytes: int, connected: socket.socket, *, parent: bytes | None = None
    ) -> None:
        """Have it serve a disk to QEMU at the other end of `connected`, which is taken over.

        With a `parent`, the id of a snapshot, the disk is as it is there but for what is written. Raises
        ParentUnusable if that cannot be.
        """
        with connected:
            await self._ask("add", connected.fileno(), disk=disk, size_bytes=size_bytes, parent=_hex(parent))

    async def seal(self, disk: str) -> Sealed:
        """Wait until QEMU has left the disk; raises TargetError unless its content is whole."""
        return Sealed(**await self._ask("seal", disk=disk))

    async def trouble(self, disk: str) -> TargetError | None:
        """Why QEMU could not write to the disk's sink, if the worker knows or is gone; asks for 10 s at most."""
        try:
            async with asyncio.timeout(TELL_SECONDS):
                told = await self._ask("trouble", disk=disk)
        except TimeoutError:
            return None
        except TargetError as error:
            return error
        return None if told is None else messages.to_error(told)

    async def commit(
        self,
        vm: str,
        time: datetime,
        vm_json: bytes,
        *,
        tags: Sequence[str],
        parent: bytes | None = None,
        note: Mapping[str, Any],
    ) -> bytes:
        """List a snapshot of all disks that were sealed; returns its id. `note`: `ResticSnapshot`.

        After Unreachable and "mover-died" it may be listed all the same.
        """
        document = base64.b64encode(vm_json).decode()
        committed = await self._ask(
            "commit",
            vm=vm,
            time=time.isoformat(),
            vm_json=document,
            tags=list(tags),
            parent=_hex(parent),
            note=dict(note),
        )
        return bytes.fromhex(committed)

    async def lost(self) -> NoReturn:
        """Raise TargetError once nothing that is written can be committed any more."""
        raise await asyncio.shield(self._lost)

    def kill(self) -> None:
        """End the process at once, whatever it does: QEMU's requests fail, and nothing more is listed."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _ask(self, what: str, descriptor: int | None = None, **details: Any) -> Any:
        if self._dead is not None:
            raise self._dead
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        asked: Message = {"number": number, "ask": what, "descriptor": descriptor is not None, **details}
        try:
            async with self._turn:
                await aio.finish(self._send(messages.encode(asked), descriptor))
            return await answer
        finally:
            del self._waiting[number]

    async def _send(self, data: bytes, descriptor: int | None) -> None:
        loop = asyncio.get_running_loop()
        try:
            if descriptor is not None:  # it goes with the first byte; a blank is ignored before a message
                socket.send_fds(self._control, [b" "], [descriptor])
            await loop.sock_sendall(self._control, data)
        except ConnectionError:
            return  # it is gone: `_listen` says why
        except OSError as error:
            raise TargetError(
                f"the process that writes to the repository cannot be asked: {error}",
                hint="back it up again; the kernel's log may say what ended it, such as too little memory",
                code="mover-died",
            ) from error

    async def _listen(self) -> None:
        """Hand out answers until the worker is gone, and then what became of it."""
        loop, lines = asyncio.get_running_loop(), Lines()
        silent = ""
        try:
            while data := await self._received(loop):
                for message in lines.feed(data):
                    self._take(message)
        except TimeoutError:
            silent = f", since it had said nothing for {SILENCE_SECONDS:g} s"
            self.kill()
        except OSError:
            pass
        stderr = await self._process.stderr.read() if self._process.stderr else b""
        code = await self._process.wait()
        said = stderr.decode(errors="replace").strip()[-LAST_WORDS:]
        self._dead = TargetError(
            f"the process that writes to the repository ended too early (exit code {code}){silent}"
            + (f": {said.splitlines()[-1]}" if said else ""),
            hint="see in the host's log whether it was killed, for want of memory say; back up again:"
            " nothing of the run is listed",
            code="mover-died",
        )
        self._note_loss(self._dead)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(self._dead)

    async def _received(self, loop: asyncio.AbstractEventLoop) -> bytes:
        async with asyncio.timeout(SILENCE_SECONDS if self._telling else None):
            return await loop.sock_recv(self._control, RECEIVE_BYTES)

    def _note_loss(self, error: VmfleeceError) -> None:
        if not self._lost.done():
            self._lost.set_result(error)

    def _take(self, message: Message) -> None:
        if "progress" in message:
            self._on_progress(message["progress"])
            return
        if "lost" in message:
            self._note_loss(messages.to_error(message["lost"]))
            return
        waiting = self._waiting.get(message["number"])
        if waiting is None or waiting.done():
            return  # whoever asked was cancelled
        if "error" in message:
            waiting.set_exception(messages.to_error(message["error"]))
        else:
            waiting.set_result(message["value"])


def _hex(identity: bytes | None) -> str:
    return identity.hex() if identity is not None else ""


async def _end_in_order(process: asyncio.subprocess.Process) -> None:
    """It gives its lock back first."""
    try:
        async with asyncio.timeout(END_SECONDS):
            await process.wait()
    except TimeoutError:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
