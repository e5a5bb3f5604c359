"""What QEMU writes a disk's content to: a target's file, or its NBD server, as a node.

A file is passed as a descriptor, a connection to the server is lent: QEMU opens neither by a name.
"""

from collections.abc import Mapping

from orchestrator.errors import CommandFailed, TargetError
from orchestrator.fleecing import image
from orchestrator.fleecing.names import DiskNames
from orchestrator.qemu import commands
from orchestrator.qemu.capabilities import Capabilities
from orchestrator.qemu.monitor import Monitor, raise_first
from orchestrator.target.base import FileSink, NbdSink, Sink
from orchestrator.target.restic.pack import CHUNK_BYTES


async def attach(monitor: Monitor, names: DiskNames, sink: Sink, *, incremental: bool) -> None:
    """Give QEMU the sink as the node `names.target`. Undone by `graph.dismantle`. Raises MonitorError."""
    match sink:
        case FileSink():
            await image.attach_file(monitor, names.target_file, sink.descriptor)
            node = commands.target_node(names.target, file=names.target_file, incremental=incremental)
            await monitor.execute(commands.blockdev_add(node))
        case NbdSink():
            lent = names.connection
            await monitor.lend_descriptor(sink.descriptor, name=lent)
            added, _ = await monitor.pipeline(
                [
                    commands.blockdev_add(commands.nbd_node(names.target, fd=lent, export=sink.export)),
                    commands.close_fd(lent),  # refused, unless it was not taken
                ]
            )
            raise_first([added])


async def write_out(monitor: Monitor, names: DiskNames, sink: Sink, *, incremental: bool) -> None:
    """Have QEMU write out what it still caches of what was written there.

    Raises TargetError if it could not: deleting the node alone would hide that.
    """
    if isinstance(sink, NbdSink):
        return  # QEMU caches nothing, and every write was answered
    try:
        # Reopening writes out the format driver's caches and reports errors (block.c, bdrv_reopen_prepare).
        target = commands.target_node(names.target, file=names.target_file, incremental=incremental)
        await monitor.execute(commands.reopen(target))
    except CommandFailed as error:
        raise TargetError(
            f"the backup could not be written out: {error.description}",
            hint="see whether the target's file system is full or failing",
            code="target-write-failed",
        ) from error


def requests(sink: Sink, can: Capabilities) -> Mapping[str, int]:
    """What a job's requests to it are like (`x-perf`)."""
    if not can.discard_source:
        return commands.IN_FLIGHT_BY_CLUSTER
    if isinstance(sink, FileSink):
        return commands.IN_FLIGHT
    return commands.chunks_in_flight(CHUNK_BYTES, whole=can.job_cluster_size)
