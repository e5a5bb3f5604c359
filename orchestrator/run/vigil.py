"""Looking, while a VM is backed up, whether it is still the one that the run began with.

What is copied is the past, and little can touch that: the guest may be stopped, reset or shut down, its disks may
grow or be unplugged, others may begin jobs and make snapshots below our filters (tried on QEMU 7.2 to 11.1).
Two things can: before the snapshot, disks that change; and a migration, after which the guest writes to its disks
on another host, past our filters, and a copy would be of two different times without anybody noticing.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import NoReturn

from orchestrator.errors import CommandTimeout, ConnectionLost, RefusedError
from orchestrator.model import Disk
from orchestrator.qemu import commands, inventory
from orchestrator.qemu.monitor import Monitor
from orchestrator.run.plan import GONE_ELSEWHERE, MIGRATING

LOOK_SECONDS = 2.0
"""How often; QEMU has no event for it, unless somebody has asked for one."""


async def migrating(monitor: Monitor, vm: str) -> NoReturn:
    """Raise RefusedError ("vm-migrating") as soon as a migration is seen. Silence and losses are for others."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        with contextlib.suppress(CommandTimeout, ConnectionLost):
            await check_here(monitor, vm)


async def check_here(monitor: Monitor, vm: str) -> None:
    """Raise RefusedError if the VM is being, or was, migrated to another host; else MonitorError."""
    migration = (await monitor.execute(commands.QUERY_MIGRATE)).get("status")
    status = (await monitor.execute(commands.QUERY_STATUS))["status"]
    if migration in MIGRATING or status in GONE_ELSEWHERE:
        raise RefusedError(
            f"VM {vm}: it is being migrated to another host (migration {migration}, VM {status})",
            hint="back it up on the other host, or here when it is back",
            code="vm-migrating",
        )


async def check_disks(monitor: Monitor, vm: str, disks: Sequence[Disk]) -> None:
    """Raise RefusedError ("disks-changed") if these are not as they were planned with; else MonitorError."""
    now = {disk.id: disk for disk in inventory.disks(await monitor.execute(commands.QUERY_BLOCK))}
    changed = [disk.id for disk in disks if disk != now.get(disk.id)]
    if changed:
        raise RefusedError(
            f"VM {vm}: before its snapshot, disks were resized, unplugged or changed: {', '.join(changed)}",
            hint="back up again",
            code="disks-changed",
        )


async def unplugged(monitor: Monitor, disks: Sequence[Disk]) -> list[str]:
    """Those that the VM does not have any more. Raises MonitorError."""
    left = {disk.id for disk in inventory.disks(await monitor.execute(commands.QUERY_BLOCK))}
    return [disk.id for disk in disks if disk.id not in left]
