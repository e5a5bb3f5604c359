"""How fast a run may copy while its guest's writes have a latency budget. Pure.

    not slowed ── a second above the budget ──→ half of what was copied, then half of that, … down to the floor
        ↑                                           │
        └──────── a step more each calm second ←────┘

Additive increase, multiplicative decrease, as TCP finds its share of a line that others use, too.
"""

from dataclasses import dataclass, replace

FLOOR_BYTES_PER_SECOND = 1 << 20
"""No run is slower than that: it has to come to an end. All disks together."""
LEAST_STEP_BYTES_PER_SECOND = 256 << 10
STEPS = 16
"""The speed rises by this part of what it was before it was slowed: from half of that to all in eight seconds."""
CALM = 0.8
"""The part of its budget that a guest's writes must stay below for the speed to rise."""
IDLE_SECONDS = 10
"""How long a guest writes nothing before that is taken for calm: it may as well be waiting for a write."""


@dataclass(frozen=True, slots=True)
class Throttle:
    """What a run may copy, in bytes per second; `limit` None: it is not slowed.

    `ceiling` is its configured limit, 0 for none. At `top` nothing is limited any more: there it is let go.
    """

    budget_ms: float
    ceiling: int = 0
    limit: int | None = None
    step: int = 0
    top: int = 0
    settling: bool = False
    silent_seconds: int = 0

    @property
    def speed(self) -> int:
        """What it may copy now; 0: there is no limit."""
        return self.ceiling if self.limit is None else self.limit

    @property
    def floor(self) -> int:
        """What it may copy at least."""
        return min(FLOOR_BYTES_PER_SECOND, self.ceiling or FLOOR_BYTES_PER_SECOND)

    def after(self, write_ms: float | None, copied: float) -> "Throttle":
        """What it may copy after a second in which the guest's writes took so long on average.

        `write_ms` None: there was none. `copied`: what was copied in the last seconds, in bytes per second.
        """
        if self.settling:  # writes that ended since it was lowered began before
            return replace(self, settling=False)
        above = write_ms is not None and write_ms > self.budget_ms
        if self.limit is None:
            return self._slowed(int(copied)) if above and copied >= 1 else self
        if above:
            return replace(self, limit=max(self.floor, self.limit // 2), settling=True, silent_seconds=0)
        silent_seconds = self.silent_seconds + 1 if write_ms is None else 0
        calm = write_ms <= CALM * self.budget_ms if write_ms is not None else silent_seconds > IDLE_SECONDS
        raised = self.limit + self.step if calm else self.limit
        if raised >= self.top:
            return Throttle(self.budget_ms, self.ceiling)
        return replace(self, limit=raised, silent_seconds=silent_seconds)

    def _slowed(self, copied: int) -> "Throttle":
        before = min(copied, self.ceiling or copied)
        top = max(2 * before, 4 * FLOOR_BYTES_PER_SECOND)
        return replace(
            self,
            limit=max(self.floor, before // 2),
            step=max(LEAST_STEP_BYTES_PER_SECOND, before // STEPS),
            top=min(top, self.ceiling or top),
            settling=True,
        )
