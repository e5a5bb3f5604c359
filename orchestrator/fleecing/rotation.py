"""Settling the bitmaps of a VM's disks with what their target lists. What that means: see `bitmaps`."""

from collections.abc import Sequence
from dataclasses import replace

import structlog

from orchestrator.errors import CommandFailed
from orchestrator.fleecing import bitmaps
from orchestrator.fleecing.bitmaps import Settlement
from orchestrator.qemu import commands, inventory
from orchestrator.qemu.monitor import Monitor

log = structlog.get_logger(__name__)

UNSETTLED = Settlement(None, "its bitmaps could not be put right", ())


async def look(monitor: Monitor, target: str, listed: Sequence[str]) -> dict[str, Settlement]:
    """What each disk's bitmaps of a target are good for, by disk. `listed` are its snapshots, oldest first."""
    block = await monitor.execute(commands.QUERY_BLOCK)
    described = inventory.bitmaps(block)
    return {
        disk.id: bitmaps.settle(disk.node, bitmaps.of_node(described.get(disk.id, [])), target, listed)
        for disk in inventory.disks(block)
        if not disk.empty
    }


async def settle(monitor: Monitor, target: str, listed: Sequence[str]) -> dict[str, Settlement]:
    """Do what has to be done with them; may be called at any time and again. Raises MonitorError.

    Returns what they are good for now; where that is nothing, with the reason from before.
    A disk under a filter of ours is left alone: its bitmaps are below that.
    """
    found = await look(monitor, target, listed)
    for disk, settlement in found.items():
        if settlement.actions:
            try:
                await monitor.execute(commands.transaction(settlement.actions))
            except CommandFailed as error:  # they stay as they are, which loses nothing
                log.warning("bitmaps.unsettled", disk=disk, target=target, error=error.description)
    settled = await look(monitor, target, listed)
    for disk, one in settled.items():
        if one.actions:
            settled[disk] = UNSETTLED
        elif one.base is None and disk in found:
            settled[disk] = replace(one, reason=found[disk].reason or one.reason)
    return settled
