"""How long a guest's writes take, by what QEMU counts at its devices. Pure.

The counters (query-blockstats; block/accounting.c) belong to the device, not to the node that it is on: a filter
below is part of what they measure, and they go on when it comes and goes. They are never reset, so only
differences say something. A write counts when it ends: one that hangs shows afterwards.

Nothing is set in QEMU for this. A histogram (block-latency-histogram-set) would tell quantiles, but until it was
given a lock QEMU frees it while a disk's iothread counts in it: 7.2.22 aborted after 205 changes under load, and
the guest with it. Where somebody has had QEMU keep one, it is read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

from orchestrator.qemu.inventory import device_path

NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Counters:
    """Writes that ended, the failed ones included, and what they took together.

    `bins`: how many took less than the first of `boundaries_ns`, the second, …, and not less than the last; empty
    where no histogram is kept.
    """

    count: int = 0
    time_ns: int = 0
    boundaries_ns: tuple[int, ...] = ()
    bins: tuple[int, ...] = ()

    def since(self, before: "Counters") -> "Counters":
        """What has come to it. A histogram that was set anew meanwhile tells nothing."""
        same = self.boundaries_ns == before.boundaries_ns
        bins = tuple(now - was for now, was in zip(self.bins, before.bins, strict=True)) if same else ()
        if any(count < 0 for count in bins):
            bins = ()
        return Counters(
            self.count - before.count,
            self.time_ns - before.time_ns,
            self.boundaries_ns if bins else (),
            bins,
        )

    def beside(self, other: "Counters") -> "Counters":
        """Both together. Histograms with other boundaries cannot be added up."""
        same = self.boundaries_ns == other.boundaries_ns
        bins = tuple(map(sum, zip(self.bins, other.bins, strict=True))) if same else ()
        return Counters(
            self.count + other.count,
            self.time_ns + other.time_ns,
            self.boundaries_ns if bins else (),
            bins,
        )

    @property
    def mean_ms(self) -> float | None:
        """What one took on average; None: there was none."""
        return self.time_ns / self.count / NS_PER_MS if self.count > 0 else None

    def quantile_ms(self, share: float) -> float | None:
        """What so many of them stayed below: the boundary above; where that is open, the last one.

        None without a histogram, or where there was no write.
        """
        counted = sum(self.bins)
        if not counted:
            return None
        place = next(at for at, so_far in enumerate(accumulate(self.bins)) if so_far >= share * counted)
        return self.boundaries_ns[min(place, len(self.boundaries_ns) - 1)] / NS_PER_MS


def counters(query_blockstats: Iterable[Mapping[str, Any]]) -> dict[str, Counters]:
    """Those of each guest device, by its path in QEMU's tree (`model.Disk.device_path`)."""
    return {
        device_path(entry["qdev"]): _counters(entry["stats"]) for entry in query_blockstats if entry.get("qdev")
    }


def together(devices: Mapping[str, Counters], before: Mapping[str, Counters], wanted: Iterable[str]) -> Counters:
    """What has come to the wanted devices since `before`, as far as they are in both."""
    grown = [devices[path].since(before[path]) for path in wanted if path in devices and path in before]
    return reduce(Counters.beside, grown) if grown else Counters()


def _counters(stats: Mapping[str, Any]) -> Counters:
    histogram = stats.get("wr_latency_histogram", {})
    return Counters(
        count=stats["wr_operations"] + stats["failed_wr_operations"],
        time_ns=stats["wr_total_time_ns"],
        boundaries_ns=tuple(histogram.get("boundaries", ())),
        bins=tuple(histogram.get("bins", ())),
    )
