"""Slowing a run's copies down while its guest's writes take longer than the VM's budget. See `throttle`."""

import asyncio
from collections import deque

import structlog

from orchestrator.run.copying import Copies
from orchestrator.run.outcome import Facts
from orchestrator.run.throttle import Throttle

log = structlog.get_logger(__name__)

RATE_SAMPLES = 5
"""What is copied is told once a second, and not at the moments when it is asked for."""
QUIET_SECONDS = 60.0
"""It may be slowed and let go every few seconds: how long at least is between two that are logged."""


class Slowing:
    """Heeds the budget of one run. Make it when its copies begin."""

    def __init__(self, copies: Copies, facts: Facts, *, budget_seconds: float) -> None:
        self._copies = copies
        self._facts = facts
        self._throttle = Throttle(budget_seconds * 1000, copies.options.bwlimit_bytes_per_second)
        self._clock = asyncio.get_running_loop().time
        self._copied = deque([(self._clock(), 0)], maxlen=RATE_SAMPLES)
        self._last = self._clock()
        self._set = self._throttle.speed
        self._told: float | None = None
        facts.slowed_seconds = 0.0

    async def heed(self, write_ms: float | None) -> None:
        """Take what the guest's writes took in the last second. Raises MonitorError."""
        now = self._clock()
        before, rate = self._throttle, self._rate(now)
        if before.limit is not None:
            self._facts.slowed_seconds = (self._facts.slowed_seconds or 0.0) + now - self._last
        self._last = now
        after = self._throttle = before.after(write_ms, rate)
        self._facts.slowed_to_bytes_per_second = after.limit
        self._tell(before, now, write_ms, rate)
        if after.limit is not None or after.speed != self._set:
            # Also if it is as before: a job may have begun with another one.
            await self._copies.limit_to(after.speed)
            self._set = after.speed

    def _rate(self, now: float) -> float:
        """What was copied in the last seconds, in bytes per second."""
        copied = sum(disk.copied_bytes for disk in self._facts.disks)
        since, was = self._copied[0]
        self._copied.append((now, copied))
        return max(0, copied - was) / (now - since) if now > since else 0.0

    def _tell(self, before: Throttle, now: float, write_ms: float | None, rate: float) -> None:
        after = self._throttle
        if before.limit is None and after.limit is not None:
            if self._told is None or now - self._told >= QUIET_SECONDS:
                self._told = now
                log.info(
                    "copy.slowed",
                    write_ms=round(write_ms, 3) if write_ms is not None else None,
                    budget_ms=after.budget_ms,
                    rate_bytes_per_second=round(rate),
                    limit_bytes_per_second=after.limit,
                )
        elif before.limit is not None and after.limit is None and self._told is not None:
            log.info("copy.released", slowed_seconds=round(self._facts.slowed_seconds or 0.0, 3))
