"""The monitor over a real QMP socket; the only importer of the qemu.qmp library.

What that library does not do is done here: deadlines, one error type for a lost connection, event streams that
end when it is lost, reconnecting, and passing descriptors under uvloop. We connect a socket that we own, so that
a QEMU that stopped reading can be left (`shutdown`), and so that `send_fds` can use it.
"""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from qemu.qmp import (
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
)
from qemu.qmp.protocol import StateError

from orchestrator import aio
from orchestrator.errors import (
    CommandFailed,
    CommandTimeout,
    ConnectFailed,
    ConnectionLost,
    MonitorError,
    NobodyThere,
)
from orchestrator.qemu.commands import QUERY_STATUS, Command, add_fd, get_fd
from orchestrator.qemu.monitor import (
    DEADLINE_SECONDS,
    OUTCOME_UNKNOWN,
    Event,
    EventRouter,
    Monitor,
)

CONNECT_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
SUN_PATH_BYTES = 107

# It logs an ERROR for every ordinary disconnect; we report those ourselves.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


@contextlib.asynccontextmanager
async def connect(
    path: Path, *, vm: str, deadline_seconds: float = CONNECT_SECONDS
) -> AsyncIterator["QmpMonitor"]:
    """A monitor connected to the socket at `path`, closed at the end of the block. Raises ConnectFailed."""
    monitor = QmpMonitor(path, vm=vm)
    try:
        await monitor.open(deadline_seconds=deadline_seconds)
        async with aio.background(monitor.watch()):
            yield monitor
    finally:
        await aio.finish(monitor.close())


class QmpMonitor(Monitor):
    """See the contract, `Monitor`."""

    def __init__(self, path: Path, *, vm: str) -> None:
        super().__init__()
        self._path = path
        self._vm = vm
        self._client = _Client(vm)
        self._client.events.event_filter = lambda _event: False
        self._client.register_listener(_Forwarder(self._router))
        self._socket: socket.socket | None = None
        self._process = ""
        self._descriptor_lock = asyncio.Lock()
        self._descriptor_astray = False
        self._connect_lock = asyncio.Lock()

    @property
    def connected(self) -> bool:
        return bool(self._client.runstate == Runstate.RUNNING)

    @property
    def process(self) -> str:
        return self._process

    async def open(self, *, deadline_seconds: float) -> None:
        """Connect once. Raises ConnectFailed; cancellation leaves nothing open."""
        await self.close()
        self._socket = self._dial()
        try:
            async with asyncio.timeout(deadline_seconds):
                await self._client.connect(self._socket)
        except TimeoutError as error:
            raise ConnectFailed(
                f"VM {self._vm}: {self._path} accepted the connection but sent no greeting"
                f" within {deadline_seconds:g} s",
                hint="give vmfleece a monitor socket of its own: it serves one client at a time, and another"
                " one may be connected to this one; else, QEMU hangs",
            ) from error
        except QMPError as error:
            raise ConnectFailed(
                f"VM {self._vm}: {self._path} did not answer as a QMP monitor: {error}",
                hint="make the socket a QMP monitor: -qmp unix:PATH,server=on,wait=off",
            ) from error

    def _dial(self) -> socket.socket:
        if len(str(self._path).encode()) > SUN_PATH_BYTES:
            raise ConnectFailed(
                f"VM {self._vm}: the path {self._path} is longer than a unix socket's may be"
                f" ({SUN_PATH_BYTES} bytes)",
                hint="move the monitor's socket to a shorter path, such as /run/qemu",
            )
        dialled = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        dialled.setblocking(False)
        try:
            # Looked at before, too: QEMU has room for one that knocks, and does not see at once that it left.
            self._same_process()
            # Never blocks: a unix socket connects at once, or fails (EAGAIN if its backlog is full).
            dialled.connect(str(self._path))
            self._process = self._same_process()
        except OSError as error:
            dialled.close()
            failure = NobodyThere if error.errno in (errno.ENOENT, errno.ECONNREFUSED) else ConnectFailed
            raise failure(
                f"VM {self._vm}: cannot connect to {self._path}: {error.strerror}",
                hint="see that the VM runs, with -qmp unix:PATH,server=on,wait=off, and that this user"
                " may open the socket",
            ) from error
        except NobodyThere:
            dialled.close()
            raise
        return dialled

    def _same_process(self) -> str:
        """Which process it is: each start of a VM makes a new socket. Who listens would not do: it may be libvirt.

        Raises NobodyThere if it was another one, OSError.
        """
        made = self._path.stat()
        process = f"{made.st_ino}-{made.st_mtime_ns}"
        if self._process not in ("", process):
            raise NobodyThere(
                f"VM {self._vm}: another QEMU process listens at {self._path} now",
                hint="back it up again: the VM was started anew",
            )
        return process

    async def close(self) -> None:
        """Disconnect if connected. Never raises and never hangs, even if QEMU stopped reading."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        # It raises whatever ended the connection; callers have learned of that already.
        with contextlib.suppress(Exception):
            await self._client.disconnect()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def watch(self) -> None:
        """End all event streams as soon as the connection is lost. Runs until cancelled."""
        while True:
            if await self._client.runstate_changed() == Runstate.DISCONNECTING:
                self._router.lose(self._lost())

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(f"VM {self._vm}: the connection to {self._path} was lost", hint=OUTCOME_UNKNOWN)

    async def reconnect(self, *, deadline_seconds: float) -> None:
        async with self._connect_lock:  # everybody who uses the monitor notices a loss at once
            await self._reconnect(deadline_seconds)

    async def _reconnect(self, deadline_seconds: float) -> None:
        pause_seconds = FIRST_PAUSE_SECONDS
        loop = asyncio.get_running_loop()
        give_up = loop.time() + deadline_seconds
        while not self.connected:
            left_seconds = give_up - loop.time()
            try:
                await self.open(deadline_seconds=max(0.1, min(CONNECT_SECONDS, left_seconds)))
            except NobodyThere as error:
                raise NobodyThere(
                    f"VM {self._vm}: its QEMU has ended: {error.message}",
                    hint="see in its own log whether it was shut down or crashed; back it up again when it runs",
                    code="vm-gone",
                ) from error
            except ConnectFailed:
                if loop.time() + pause_seconds >= give_up:
                    raise
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)

    async def pipeline(
        self, commands: Sequence[Command], *, deadline_seconds: float = DEADLINE_SECONDS
    ) -> list[Any]:
        names = ", ".join(command.name for command in commands)
        try:
            async with asyncio.timeout(deadline_seconds):
                # gather starts all of them in one turn of the loop, in order: that is the order on the wire.
                return list(await asyncio.gather(*(self._reply(command) for command in commands)))
        except TimeoutError as error:
            raise CommandTimeout(
                f"VM {self._vm}: no reply to {names} within {deadline_seconds:g} s",
                hint=OUTCOME_UNKNOWN,
            ) from error
        except (ExecInterruptedError, StateError) as error:
            raise self._lost() from error
        except QMPError as error:
            raise MonitorError(
                f"VM {self._vm}: malformed reply to {names}: {error}",
                hint="make it a QMP monitor (-qmp), not a human one (-monitor)",
            ) from error

    async def _reply(self, command: Command) -> Any:
        try:
            return await self._client.execute(command.name, command.arguments)
        except ExecuteError as error:
            return CommandFailed(command.name, str(error))

    async def pass_descriptor(self, descriptor: int, *, opaque: str) -> int:
        reply = await self._hand_over(descriptor, add_fd(opaque=opaque))
        return int(reply["fdset-id"])

    async def lend_descriptor(self, descriptor: int, *, name: str) -> None:
        await self._hand_over(descriptor, get_fd(name))

    async def _hand_over(self, descriptor: int, taking: Command) -> Any:
        # QEMU keeps the last descriptor it received until a command takes it: one sender at a time.
        async with self._descriptor_lock:
            if self._descriptor_astray:
                # A command that nobody waited for may still be under way: it must not take this descriptor.
                await self.execute(QUERY_STATUS)
            self._descriptor_astray = True
            await self._send(descriptor)
            reply = await self.execute(taking)
            self._descriptor_astray = False
        return reply

    async def _send(self, descriptor: int) -> None:
        """Send a descriptor with a blank, which JSON ignores between two messages.

        The library's writer is idle here: commands are far smaller than the socket's buffer, so none of them
        can be half sent.
        """
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while self._socket is not None and self.connected:
                    try:
                        socket.send_fds(self._socket, [b" "], [descriptor])
                    except BlockingIOError:
                        await asyncio.sleep(FIRST_PAUSE_SECONDS)
                    else:
                        return
        except TimeoutError as error:
            raise CommandTimeout(
                f"VM {self._vm}: QEMU reads nothing from {self._path}", hint=OUTCOME_UNKNOWN
            ) from error
        except OSError as error:
            raise self._lost() from error
        raise self._lost()


class _Client(QMPClient):
    """Formats no message for the library's debug log, which nobody reads: that took half of the daemon's time.

    QEMU's schema, which each run asks for, is 300 KB of JSON; of 300 runs that began together 284 were not
    answered within their deadline, since all of it was written out anew.
    """

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        return msg


class _Forwarder(EventListener):
    """Routes events to our streams; accepts none, so that the library keeps none of them."""

    def __init__(self, router: EventRouter) -> None:
        super().__init__()
        self._router = router

    def accept(self, event: Message) -> bool:
        # An exception here would end the connection.
        stamp = event.get("timestamp")
        seconds = 0.0
        if isinstance(stamp, dict):
            seconds = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
        data = event.get("data")
        self._router.publish(Event(str(event["event"]), data if isinstance(data, dict) else {}, seconds))
        return False
