"""A fleecing image: a nameless qcow2 file that QEMU may fill up to its grant.

    qcow2 ── raw{size=grant} ── file(/dev/fdset/N)

The file is as long as the image can become at most, sparse: QEMU caches its length, the raw layer is the limit.
"""

import asyncio
import os

from orchestrator import aio
from orchestrator.errors import ToolError
from orchestrator.fleecing.names import DiskNames
from orchestrator.qemu import commands, tools
from orchestrator.qemu.monitor import Monitor
from orchestrator.storage.base import ImageFile, Storage


async def create(storage: Storage, *, disk_bytes: int, length_bytes: int) -> ImageFile:
    """An empty image for a disk, open. Raises StorageError, ToolError; cancellation leaves nothing."""
    file = await aio.acquire(asyncio.to_thread(storage.create), _close)
    try:
        await tools.create_qcow2(file.descriptor, disk_bytes)
        try:
            # Closed only once the thread is done with it: its number may be another file's by then.
            await aio.finish(asyncio.to_thread(os.ftruncate, file.descriptor, length_bytes))
        except OSError as error:
            raise ToolError(
                f"storage {storage.name}: cannot make a sparse file of {length_bytes} bytes: {error.strerror}",
                hint="its file system must allow sparse files as large as the VM's largest disk",
            ) from error
    except BaseException:
        file.close()
        raise
    return file


async def _close(file: ImageFile) -> None:
    file.close()


async def attach_file(monitor: Monitor, name: str, descriptor: int) -> None:
    """Give QEMU an open file as a node. Undone by `graph.dismantle`."""
    fdset = await monitor.pass_descriptor(descriptor, opaque=name)
    await monitor.execute(commands.blockdev_add(commands.file_node(name, fdset)))
    # The node has its own duplicate; the set goes when the node does.
    await monitor.execute(commands.remove_fd(fdset))


async def attach(monitor: Monitor, names: DiskNames, file: ImageFile, grant_bytes: int) -> None:
    """Give the image to QEMU, limited to the grant. Undone by `graph.dismantle`."""
    await attach_file(monitor, names.file, file.descriptor)
    grant = commands.grant_node(names.grant, file=names.file, size_bytes=grant_bytes)
    await monitor.execute(commands.blockdev_add(grant))
    await monitor.execute(commands.blockdev_add(commands.image_node(names.image, file=names.grant)))


async def extend(monitor: Monitor, names: DiskNames, grant_bytes: int) -> None:
    """Set the limit anew, while guest and job go on (not on a QEMU without discard-source: it aborts)."""
    grant = commands.grant_node(names.grant, file=names.file, size_bytes=grant_bytes)
    await monitor.execute(commands.reopen(grant))


async def high_water_bytes(monitor: Monitor, names: DiskNames) -> int:
    """The highest offset that was ever written in the image: at least what it held at its fullest.

    Discarded clusters are used again, so it stays near the largest amount held at once.
    """
    for node in await monitor.execute(commands.QUERY_NODE_STATS):
        if node.get("node-name") == names.grant:
            return int(node["stats"]["wr_highest_offset"])
    return 0
