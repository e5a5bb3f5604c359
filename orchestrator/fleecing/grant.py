"""Extending the grants of one run's images as they fill, by event.

QEMU says once when an image is written up to a threshold (BLOCK_WRITE_THRESHOLD); we look how fast it fills, ask
admission for what that needs, tell QEMU the new limit and set the next threshold. Refused growth never blocks the
guest: it is asked for again when space comes back; if none does, the image runs full, the snapshot breaks, and the
run ends as fleecing-full.
"""

import asyncio
from dataclasses import dataclass, field

import structlog

from orchestrator.admission import estimate
from orchestrator.admission.controller import Controller
from orchestrator.admission.estimate import Fill
from orchestrator.admission.lease import Lease
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
    fill: Fill
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
        fleeced = Fleeced(disk, names, self._lease.grants[disk.id].size_bytes, Fill(_now()))
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

    async def ask_again(self) -> None:
        """Ask for what was refused whenever others have given space back, until cancelled."""
        while True:
            await self._lease.room.wait()
            self._lease.room.clear()
            for fleeced in list(self._fleeced.values()):
                if fleeced.disk.id in self._lease.unmet_bytes:
                    try:
                        await self._grow(fleeced)
                    except MonitorError as error:  # `serve` catches up
                        log.warning("grant.unattended", error=str(error))

    async def _answer(self, event: Event) -> None:
        for fleeced in list(self._fleeced.values()):
            # One that was caught up already says a threshold that is not the current one.
            if (fleeced.names.grant, fleeced.threshold_bytes) == (
                event.data["node-name"],
                event.data["write-threshold"],
            ):
                await self._grow(fleeced, fleeced.threshold_bytes)

    async def _catch_up(self) -> None:
        """Grow what crossed its threshold while nobody listened: QEMU resets a threshold that it reported."""
        nodes = await self._monitor.execute(commands.QUERY_NODES)
        reported = {node["node-name"] for node in nodes if node["write_threshold"] == 0}
        for fleeced in list(self._fleeced.values()):
            if self._growable and fleeced.names.grant in reported:
                await self._grow(fleeced, fleeced.threshold_bytes)

    async def let_go(self, disk: str) -> None:
        """Stop looking after a disk; returns once no extension of it is under way."""
        fleeced = self._fleeced[disk]
        async with fleeced.lock:
            del self._fleeced[disk]

    async def _grow(self, fleeced: Fleeced, reached_bytes: int = 0) -> None:
        """Look at an image, extend its grant if that is needed, and set the next threshold.

        `reached_bytes` is a threshold that was crossed: QEMU says so before it counts the write (block/io.c).
        """
        disk = fleeced.disk.id
        async with fleeced.lock:
            if disk not in self._fleeced:
                return
            high_bytes = max(reached_bytes, await image.high_water_bytes(self._monitor, fleeced.names))
            fleeced.fill = fleeced.fill.seen(_now(), min(high_bytes, estimate.limit(fleeced.grant_bytes)))
            wanted_bytes = estimate.next_grant(
                fleeced.grant_bytes, fleeced.fill, disk_bytes=fleeced.disk.size_bytes
            )
            if wanted_bytes > fleeced.grant_bytes:
                await self._extend(fleeced, wanted_bytes)
            await self._set_threshold(fleeced)

    async def _extend(self, fleeced: Fleeced, wanted_bytes: int) -> None:
        disk = fleeced.disk.id
        grant_bytes = await self._controller.grow(self._lease, disk, wanted_bytes)
        if grant_bytes > fleeced.grant_bytes:
            try:
                async with self._quiet.changing_graph():
                    await image.extend(self._monitor, fleeced.names, estimate.limit(grant_bytes))
            except CommandFailed as error:
                log.warning("grant.failed", disk=disk, error=error.description)
                await self._controller.shrink(self._lease, disk, fleeced.grant_bytes)
            else:
                fleeced.outgrown_bytes.append(fleeced.grant_bytes)
                fleeced.grant_bytes = grant_bytes
        fleeced.refused = grant_bytes < wanted_bytes
        log.info(
            "grant.refused" if fleeced.refused else "grant.extended",
            disk=disk,
            storage=self._lease.grants[disk].storage,
            wanted_bytes=wanted_bytes,
            grant_bytes=fleeced.grant_bytes,
            high_bytes=fleeced.fill.high_bytes,
            rate_bytes_per_second=round(fleeced.fill.rate_bytes_per_second),
        )

    async def _set_threshold(self, fleeced: Fleeced) -> None:
        fleeced.threshold_bytes = estimate.threshold(fleeced.grant_bytes, fleeced.fill)
        await self._monitor.execute(commands.write_threshold(fleeced.names.grant, fleeced.threshold_bytes))


def _now() -> float:
    return asyncio.get_running_loop().time()
