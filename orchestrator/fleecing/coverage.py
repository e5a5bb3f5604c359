"""Limiting copy-before-write to what an incremental backup copies, on QEMU 9.1 and later.

There the filters are made before the point in time, when nobody knows yet what will have changed until it, so at
first they copy everything. Once the bitmaps stand still, what is clean in them is read over NBD and discarded from
the snapshot-access nodes: guest writes there cost nothing from then on. The images ignore that: they are empty
there, or hold little. It is done before the jobs start, since nothing else may be on those nodes then.

It only saves space. QEMU has one NBD server: if somebody else is using it, or anything goes wrong, the filters
simply go on copying everything.
"""

import asyncio
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import structlog

from orchestrator.errors import CommandFailed, NbdError
from orchestrator.fleecing.boundary import Extent
from orchestrator.fleecing.graph import CHANGED
from orchestrator.fleecing.names import DiskNames
from orchestrator.nbd.client import NbdClient
from orchestrator.nbd.protocol import Piece
from orchestrator.qemu import commands
from orchestrator.qemu.monitor import Monitor, raise_first
from orchestrator.units import MIB

log = structlog.get_logger(__name__)

DEADLINE_SECONDS = 30.0
LEAST_BYTES = MIB
"""A smaller clean part is left: what it could take is not worth a request."""
DIRTY = 1
"""In the status of a dirty bitmap's context (docs/interop/nbd.txt)."""


async def limit(monitor: Monitor, disks: Sequence[DiskNames]) -> None:
    """Discard what is clean in the disks' bitmaps from their snapshot-access nodes, as far as that can be done.

    Raises MonitorError if the monitor is gone. Undone by `graph.dismantle`.
    """
    try:
        clients = await _serve(monitor, disks)
    except CommandFailed as error:  # somebody else's server
        log.info("coverage.whole", reason=error.description)
        return
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            for names, connected in zip(disks, clients, strict=True):
                await _limit(names, connected)
    except (NbdError, TimeoutError) as error:
        log.warning("coverage.whole", reason=str(error) or f"it took longer than {DEADLINE_SECONDS:g} s")
    finally:
        for connected in clients:
            connected.close()
        # It waits until nobody uses the exports any more; the jobs need their nodes.
        await monitor.execute(commands.NBD_SERVER_STOP)


async def _serve(monitor: Monitor, disks: Sequence[DiskNames]) -> list[socket.socket]:
    """Have QEMU serve the disks' nodes to nobody but us; returns a connection for each.

    Raises CommandFailed if it does not; then nothing is left.
    """
    name = disks[0].server
    listening, clients = _connected_pairs(len(disks))
    try:
        with listening:
            await monitor.lend_descriptor(listening.fileno(), name=name)
        # It is refused if somebody else has started one: then the descriptor was not taken.
        started, _ = await monitor.pipeline([commands.nbd_server_start(name), commands.close_fd(name)])
        raise_first([started])
        exports = [commands.export(names.export, node=names.snapshot, bitmap=CHANGED) for names in disks]
        try:
            raise_first(await monitor.pipeline(exports))
        except CommandFailed:
            await monitor.execute(commands.NBD_SERVER_STOP)
            raise
    except BaseException:
        for connected in clients:
            connected.close()
        raise
    return clients


def _connected_pairs(count: int) -> tuple[socket.socket, list[socket.socket]]:
    """A listening socket without a name, and connections that wait there to be accepted."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    clients: list[socket.socket] = []
    try:
        with tempfile.TemporaryDirectory(prefix="vmfleece-") as folder:  # whose mode is 0700
            path = str(Path(folder) / "nbd.sock")
            listening.bind(path)
            listening.listen(count)
            for _ in range(count):
                clients.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                clients[-1].connect(path)
                clients[-1].setblocking(False)
    except BaseException:
        for one in (listening, *clients):
            one.close()
        raise
    return listening, clients


async def _limit(names: DiskNames, connected: socket.socket) -> None:
    async with NbdClient(connected, names.export, context=f"qemu:dirty-bitmap:{CHANGED}") as client:
        clean = list(clean_extents(await client.status()))
        for offset, length in clean:
            await client.trim(offset, length)
        log.debug(
            "coverage.limited", disk=names.snapshot, parts=len(clean), clean_bytes=sum(one[1] for one in clean)
        )


def clean_extents(pieces: Iterable[Piece], least_bytes: int = LEAST_BYTES) -> Iterator[Extent]:
    """The clean parts that are long enough, as long as they can be. Pure."""
    start = end = 0
    for piece in pieces:
        if piece.status & DIRTY:
            if end - start >= least_bytes:
                yield start, end - start
            start = end + piece.length
        end += piece.length
    if end - start >= least_bytes:
        yield start, end - start
