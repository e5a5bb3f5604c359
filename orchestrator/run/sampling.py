"""Looking once a second, while a VM is backed up, how long its guest's writes take.

QEMU has no event for it. Nothing of a run depends on an answer: what cannot be asked is asked a second later.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from orchestrator.errors import MonitorError
from orchestrator.model import Disk
from orchestrator.qemu import commands, writes
from orchestrator.qemu.monitor import Monitor
from orchestrator.run.impact import Impact, Reading

SAMPLE_SECONDS = 1.0

Heed = Callable[[float | None], Awaitable[None]]
"""Is told what the guest's writes took on average since the last sample, None if there was none; may raise
MonitorError."""


class Sampler:
    """Takes the samples of one run's `impact`."""

    def __init__(self, monitor: Monitor, impact: Impact, on_sample: Callable[[], None]) -> None:
        self._monitor = monitor
        self._impact = impact
        self._on_sample = on_sample

    async def meet(self) -> None:
        """Look for the first time, before anything of the run is in QEMU."""
        with contextlib.suppress(MonitorError):
            self._impact.meet(await self._read())

    async def begin(self, disks: Sequence[Disk]) -> None:
        """Look just before the snapshot of these disks."""
        self._impact.devices = [disk.device_path for disk in disks]
        with contextlib.suppress(MonitorError):
            self._impact.begin(await self._read())

    async def look(self, heed: Heed | None = None) -> None:
        """Take one sample, and have it heeded."""
        with contextlib.suppress(MonitorError):
            write_ms = self._impact.take(await self._read()).mean_ms
            if heed is not None:
                await heed(write_ms)
        self._on_sample()

    async def serve(self, heed: Heed | None) -> None:
        """Take a sample each second. Runs until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            await self.look(heed)

    async def _read(self) -> Reading:
        return writes.counters(await self._monitor.execute(commands.QUERY_DEVICE_STATS))
