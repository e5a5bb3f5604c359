"""Extending the grants of one run's images as they fill, by event.

QEMU says once when an image is a quarter full (BLOCK_WRITE_THRESHOLD); we ask admission for more, tell QEMU the
new limit and set the next threshold. Refused growth never blocks the guest: the image runs full, the snapshot
breaks, and the run ends as fleecing-full.
"""

import asyncio
from dataclasses import dataclass, field

import structlog

from orchestrator.admission import estimate
from orchestrator.admission.controller import Controller, Lease
from orchestrator.errors import CommandFailed, MonitorError
from orchestrator.fleecing import image
from orchestrator.fleecing.names import DiskNames
from orchestrator.fleecing.quiet import Quiet
from orchestrator.model import Disk
from orchestrator.qemu import commands
from orchestrator.qemu.monitor import Event, Monitor

log = structlog.get_logger(__name__)

EVENT = "BLOCK_WRITE_THRESHOLD"
RETRY_SECONDS = 0.5


@dataclass(slots=True)
class Fleeced:
    """A disk whose grant is looked after.

    `refused`: it asked for more and did not get it. `outgrown_bytes`: the grants that it had before.
    """

    disk: Disk
    names: DiskNames
    grant_bytes: int
    threshold_bytes: int = 0
    refused: bool = False
    outgrown_bytes: list[int] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class GrantKeeper:
    """Looks after the grants of one run, until each disk is let go of."""

    def __init__(
        self, monitor: Monitor, controller: Controller, lease: Lease, quiet: Quiet, *, growable: bool
    ) -> None:
        self._monitor = monitor
        self._controller = controller
        self._lease = lease
        self._quiet = quiet
        self._growable = growable
        self._fleeced: dict[str, Fleeced] = {}

    def of(self, disk: str) -> Fleeced:
        """What is known of a disk's grant."""
        return self._fleeced[disk]

    async def take(self, disk: Disk, names: DiskNames) -> None:
        """Look after a disk's grant from now on: sets its first threshold."""
        fleeced = Fleeced(disk, names, self._lease.grants[disk.id].size_bytes)
        self._fleeced[disk.id] = fleeced
        if self._growable:
            await self._set_threshold(fleeced)

    async def serve(self) -> None:
        """Answer thresholds until cancelled, also over a lost connection (whoever copies connects again)."""
        while True:
            try:
                with self._monitor.subscribe(EVENT) as events:
                    await self._catch_up()
                    while True:
                        await self._answer(await events.next())
            except MonitorError as error:
                log.warning("grant.unattended", error=str(error))
                await asyncio.sleep(RETRY_SECONDS)

    async def _answer(self, event: Event) -> None:
        for fleeced in list(self._fleeced.values()):
            # One that was caught up already says a threshold that is not the current one.
            if (fleeced.names.grant, fleeced.threshold_bytes) == (
                event.data["node-name"],
                event.data["write-threshold"],
            ):
                await self._grow(fleeced)

    async def _catch_up(self) -> None:
        """Grow what crossed its threshold while nobody listened: QEMU resets a threshold that it reported."""
        nodes = await self._monitor.execute(commands.QUERY_NODES)
        reported = {node["node-name"] for node in nodes if node["write_threshold"] == 0}
        for fleeced in list(self._fleeced.values()):
            if self._growable and fleeced.names.grant in reported:
                await self._grow(fleeced)

    async def let_go(self, disk: str) -> None:
        """Stop looking after a disk; returns once no extension of it is under way."""
        fleeced = self._fleeced[disk]
        async with fleeced.lock:
            del self._fleeced[disk]

    async def _grow(self, fleeced: Fleeced) -> None:
        disk = fleeced.disk.id
        async with fleeced.lock:
            if disk not in self._fleeced:
                return
            wanted_bytes = estimate.next_grant(fleeced.grant_bytes, fleeced.disk.size_bytes)
            if wanted_bytes == fleeced.grant_bytes:
                return  # the worst case fits already
            granted_bytes = self._controller.grow(self._lease, disk, wanted_bytes)
            grant_bytes = estimate.whole(granted_bytes)
            if grant_bytes < granted_bytes:
                self._controller.shrink(self._lease, disk, grant_bytes)
            if grant_bytes > fleeced.grant_bytes and not await self._extend(fleeced, grant_bytes):
                grant_bytes = fleeced.grant_bytes
            fleeced.refused = grant_bytes < wanted_bytes
            log.info(
                "grant.refused" if fleeced.refused else "grant.extended",
                disk=disk,
                storage=self._lease.grants[disk].storage,
                wanted_bytes=wanted_bytes,
                grant_bytes=grant_bytes,
            )
            await self._set_threshold(fleeced)

    async def _extend(self, fleeced: Fleeced, grant_bytes: int) -> bool:
        try:
            async with self._quiet.changing_graph():
                await image.extend(self._monitor, fleeced.names, grant_bytes)
        except CommandFailed as error:
            self._controller.shrink(self._lease, fleeced.disk.id, fleeced.grant_bytes)
            log.warning("grant.failed", disk=fleeced.disk.id, error=error.description)
            return False
        fleeced.outgrown_bytes.append(fleeced.grant_bytes)
        fleeced.grant_bytes = grant_bytes
        return True

    async def _set_threshold(self, fleeced: Fleeced) -> None:
        fleeced.threshold_bytes = estimate.threshold(fleeced.grant_bytes, crossed_bytes=fleeced.threshold_bytes)
        await self._monitor.execute(commands.write_threshold(fleeced.names.grant, fleeced.threshold_bytes))
