"""A fleecing image: a nameless qcow2 file that QEMU may fill up to the limit of its grant.

    qcow2 ── raw{size=limit} ── file(/dev/fdset/N)

The file is as long as the image can become at most, sparse: QEMU caches its length, the raw layer is the limit.
"""

import asyncio
import fcntl
import os
from collections.abc import Sequence

import structlog

from orchestrator import aio
from orchestrator.errors import CommandFailed, ToolError
from orchestrator.fleecing.boundary import Extent
from orchestrator.fleecing.names import DiskNames
from orchestrator.fleecing.quiet import Quiet
from orchestrator.qemu import commands, tools
from orchestrator.qemu.monitor import Monitor
from orchestrator.storage.base import ImageFile, Storage

log = structlog.get_logger(__name__)


async def create(storage: Storage, *, name: str, disk_bytes: int, length_bytes: int) -> ImageFile:
    """An empty image for a disk, open. `name` is for a storage whose files need one.

    Raises StorageError, ToolError; cancellation leaves nothing.
    """
    file = await aio.acquire(asyncio.to_thread(storage.create, name, length_bytes), _close)
    try:
        await tools.create_qcow2(file.descriptor, disk_bytes)
        # Closed only once the thread is done with it: its number may be another file's by then.
        await aio.finish(asyncio.to_thread(file.extend, length_bytes))
    except BaseException:
        file.close()
        raise
    return file


async def _close(file: ImageFile) -> None:
    file.close()


async def attach_file(monitor: Monitor, name: str, descriptor: int, *, direct: bool = False) -> None:
    """Give QEMU an open file as a node; `direct`: past the host's cache. Undone by `graph.dismantle`."""
    if direct:  # QEMU looks for a descriptor that is open so (monitor/fds.c)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
    fdset = await monitor.pass_descriptor(descriptor, opaque=name)
    await monitor.execute(commands.blockdev_add(commands.file_node(name, fdset, direct=direct)))
    # The node has its own duplicate; the set goes when the node does.
    await monitor.execute(commands.remove_fd(fdset))


async def attach(monitor: Monitor, names: DiskNames, file: ImageFile, limit_bytes: int, *, discards: bool) -> None:
    """Give the image to QEMU, which keeps it below the limit. Undone by `graph.dismantle`.

    Unless it `discards`, discarding has no effect until `start_discarding`. QEMU makes tables for what is
    discarded of an empty image: 128 MiB of them for 1 TiB.
    """
    await attach_file(monitor, names.file, file.descriptor, direct=file.direct)
    grant = commands.grant_node(names.grant, file=names.file, size_bytes=limit_bytes)
    await monitor.execute(commands.blockdev_add(grant))
    image = commands.image_node(names.image, file=names.grant, discards=discards)
    await monitor.execute(commands.blockdev_add(image))


async def start_discarding(monitor: Monitor, disks: Sequence[DiskNames]) -> None:
    """Have images give back what is discarded from now on (not on a QEMU without discard-source: it aborts).

    QEMU writes out what it caches of them for that. One that it cannot write stays as it is: the snapshot has
    broken, or will, and whoever copies from it finds out why.
    """
    reopened = [commands.reopen(commands.image_node(one.image, file=one.grant)) for one in disks]
    replies = await monitor.pipeline(reopened)
    for names, reply in zip(disks, replies, strict=True):
        if isinstance(reply, CommandFailed):
            log.warning("image.unwritable", image=names.image, error=reply.description)


async def extend(monitor: Monitor, names: DiskNames, limit_bytes: int) -> None:
    """Set the limit anew, while guest and job go on (not on a QEMU without discard-source: it aborts)."""
    grant = commands.grant_node(names.grant, file=names.file, size_bytes=limit_bytes)
    await monitor.execute(commands.reopen(grant))


async def held(monitor: Monitor, names: DiskNames, file: ImageFile, quiet: Quiet) -> list[Extent]:
    """Which parts of its disk an image holds right now, as far as can be told: QEMU goes on writing it.

    Raises MonitorError.
    """
    async with quiet.changing_graph():
        # What QEMU caches of the image's tables is in its file then.
        await monitor.execute(commands.flush(names.image))
    try:
        return await tools.allocated(file.descriptor)
    except ToolError as error:
        log.debug("image.unreadable", image=names.image, error=str(error))
        return []


async def high_water_bytes(monitor: Monitor, names: DiskNames) -> int:
    """The highest offset that was ever written in the image: at least what it held at its fullest.

    Discarded clusters are used again, so it stays near the largest amount held at once.
    """
    for node in await monitor.execute(commands.QUERY_NODE_STATS):
        if node.get("node-name") == names.grant:
            return int(node["stats"]["wr_highest_offset"])
    return 0
