"""Write latencies as QEMU measures them at each device, over real time and any filter below it.

The counters belong to the device, not to its node, so they go on when a filter is put in. Unlike
the guest's own figures they are measured by a clock that goes on while the VM is paused.
"""

from dataclasses import dataclass
from typing import Any

from tests.guest.vm import GuestVm


@dataclass(frozen=True, slots=True)
class DiskWrites:
    """One disk's writes between two readings.

    slow: number of writes that took longer than so many milliseconds, by bucket boundary.
    """

    writes: int
    bytes: int
    failed: int
    mean_ms: float
    slow: dict[int, int]


class LatencyMeter:
    """Reads the differences between two calls of `read`; the first one counts from VM start."""

    def __init__(self, vm: GuestVm) -> None:
        self._vm = vm
        self._before: dict[str, dict[str, Any]] = {}

    async def read(self) -> dict[str, DiskWrites]:
        """Return what each disk wrote since the last call."""
        now = await self._vm.block_stats()
        result = {disk: _difference(self._before.get(disk), stats) for disk, stats in now.items()}
        self._before = now
        return result


def _difference(before: dict[str, Any] | None, now: dict[str, Any]) -> DiskWrites:
    def grown(name: str) -> int:
        return int(now[name]) - int(before[name] if before else 0)

    boundaries = now["wr_latency_histogram"]["boundaries"]
    bins = list(now["wr_latency_histogram"]["bins"])
    if before:
        old = before["wr_latency_histogram"]["bins"]
        bins = [new - was for new, was in zip(bins, old, strict=True)]
    writes = grown("wr_operations")
    return DiskWrites(
        writes=writes,
        bytes=grown("wr_bytes"),
        failed=grown("failed_wr_operations"),
        mean_ms=grown("wr_total_time_ns") / writes / 1e6 if writes else 0.0,
        slow={boundary // 1_000_000: sum(bins[place + 1 :]) for place, boundary in enumerate(boundaries)},
    )
