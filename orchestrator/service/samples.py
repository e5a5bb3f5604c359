"""What storages held over time: a bounded row of points, which gets coarser as it gets longer.

A point is the most that was granted and used in its interval, so no peak is lost, however coarse it is.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from orchestrator.service.documents import History, StorageHistory
from orchestrator.service.status import StorageStatus

POINTS = 360
FINEST_SECONDS = 10
COARSEST_SECONDS = 320
"""Then the oldest go: that many points are 32 hours, a night and the day before."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes of a storage."""

    granted: int
    used: int

    def most(self, other: "Sample") -> "Sample":
        """The larger of each."""
        return Sample(max(self.granted, other.granted), max(self.used, other.used))


@dataclass(frozen=True, slots=True)
class Point:
    """All storages, at their fullest from `at` (in seconds) on; by name."""

    at: int
    most: Mapping[str, Sample]

    def with_(self, later: "Point") -> "Point":
        """Both as one."""
        nothing = Sample(0, 0)
        names = self.most.keys() | later.most.keys()
        return Point(
            self.at,
            {name: self.most.get(name, nothing).most(later.most.get(name, nothing)) for name in names},
        )


class Samples:
    """The points, oldest first."""

    def __init__(self, *, points: int = POINTS, coarsest_seconds: int = COARSEST_SECONDS) -> None:
        self._most_points = points
        self._coarsest_seconds = coarsest_seconds
        self._points: deque[Point] = deque()
        self.interval_seconds = FINEST_SECONDS

    def add(self, point: Point) -> None:
        """Take what is now; later than all before."""
        if self._points and point.at < self._points[-1].at + self.interval_seconds:
            self._points[-1] = self._points[-1].with_(point)
            return
        self._points.append(point)
        while len(self._points) > self._most_points:
            if self.interval_seconds < self._coarsest_seconds:
                self._halve()
            else:
                self._points.popleft()

    def _halve(self) -> None:
        self.interval_seconds *= 2
        finer, self._points = self._points, deque()
        for point in finer:
            self.add(point)

    def history(self) -> History:
        """All of it, by storage."""
        names = dict.fromkeys(name for point in self._points for name in point.most)
        nothing = Sample(0, 0)
        return History(
            interval_seconds=self.interval_seconds,
            at=tuple(point.at for point in self._points),
            storages=tuple(
                StorageHistory(
                    name,
                    tuple(point.most.get(name, nothing).granted for point in self._points),
                    tuple(point.most.get(name, nothing).used for point in self._points),
                )
                for name in names
            ),
        )


async def serve(samples: Samples, storages: Callable[[], Iterable[StorageStatus]]) -> None:
    """Look at the storages from time to time, until cancelled."""
    while True:
        now = int(datetime.now(UTC).timestamp())
        samples.add(Point(now, {one.name: Sample(one.granted_bytes, one.used_bytes) for one in storages()}))
        await asyncio.sleep(FINEST_SECONDS)
