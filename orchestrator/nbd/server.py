"""An NBD server on unix sockets of this host: several exports by name, several clients, bounded in all they take.

    server = NbdServer({"disk": export}, report=report)
    async with server.at(path):  # it listens
        ...                      # here it is closed, its clients are cut off, the socket's file is gone

It answers structured replies, base:allocation and block sizes, and neither TLS nor extended headers.
See `export.Export` for what is served, and `connection.Limits` for the bounds.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

from orchestrator import aio
from orchestrator.errors import NbdError
from orchestrator.nbd.connection import Connection, Limits, Report, Trouble
from orchestrator.nbd.export import Export
from orchestrator.nbd.stream import Stream

BACKLOG = 16
OWNER_ONLY = 0o600
_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
FULL_SECONDS = 0.5


class NbdServer:
    """Serves `exports`, which the caller may change meanwhile: it counts for those who choose one later.

    `report` is called for each error of an export and each client that did not leave in order. It must not raise.
    """

    def __init__(self, exports: Mapping[str, Export], *, report: Report, limits: Limits | None = None) -> None:
        self._exports = exports
        self._report = report
        self._limits = limits or Limits()
        self._connections = 0

    @contextlib.asynccontextmanager
    async def at(self, path: Path, *, mode: int = OWNER_ONLY) -> AsyncIterator[None]:
        """Serve at a new socket `path` of that mode beside the block. Raises NbdError if it cannot be made.

        At the block's end clients are cut off, and nothing is left: no task, no descriptor, no file.
        """
        with _listening(path, mode) as listening:
            async with aio.background(self.serve(listening)):
                yield

    async def serve(self, listening: socket.socket) -> None:
        """Serve whoever connects to a listening socket, until cancelled. The socket is taken over.

        More clients than the limit are turned away at once: a guest stands still while its QEMU waits.
        """
        listening.setblocking(False)
        with listening:
            async with asyncio.TaskGroup() as clients:
                while True:
                    connected = await self._accept(listening)
                    if connected is None:
                        continue
                    if self._connections >= self._limits.connections:
                        connected.close()
                        self._report(Trouble("", None, ConnectionRefusedError("too many clients")))
                        continue
                    self._connections += 1
                    task = clients.create_task(self.converse(connected))
                    task.add_done_callback(self._left)

    async def converse(self, connected: socket.socket) -> None:
        """Serve the client at the other end of a connected socket, which is taken over, until it leaves.

        Cancellation cuts it off.
        """
        try:
            stream = await Stream.over(connected)
        except OSError as error:
            self._report(Trouble("", None, error))
            return
        await Connection(stream, self._exports, report=self._report, limits=self._limits).run()

    def _left(self, _task: asyncio.Task[None]) -> None:
        self._connections -= 1

    async def _accept(self, listening: socket.socket) -> socket.socket | None:
        """The next client's socket. None if that failed for now: for want of descriptors, or since it has left.

        Not the loop's sock_accept, which loses a client's socket if it is cancelled in the moment it gets one.
        """
        await _readable(listening)
        try:
            connected, _ = listening.accept()
        except (BlockingIOError, ConnectionError):
            return None
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._report(Trouble("", None, error))
            await asyncio.sleep(FULL_SECONDS)
            return None
        return connected


async def _readable(listening: socket.socket) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listening.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(listening.fileno())


@contextlib.contextmanager
def _listening(path: Path, mode: int) -> Iterator[socket.socket]:
    """A socket that listens at `path` within the block. Nobody can connect before the file has its mode."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        with _explained(path):
            listening.bind(str(path))
        try:
            with _explained(path):
                path.chmod(mode)
                listening.listen(BACKLOG)
            yield listening
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NbdError(f"no NBD server can listen at {path}: {error}") from error
