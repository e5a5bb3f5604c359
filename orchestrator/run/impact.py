"""What a run costs its guest, of readings of the counters that QEMU keeps at the guest's devices. Pure.

Before: from the run's begin to its snapshot. During: from there, sample by sample, until its disks are released.
"""

from collections import deque
from collections.abc import Mapping, Sequence

from orchestrator.model import GuestWrites
from orchestrator.qemu.writes import Counters, together

Reading = Mapping[str, Counters]
"""By device."""
RECENT = 60
"""Samples that are told of a run under way."""
DIGITS = 3


class Impact:
    """How long the guest's writes take, before and during a run."""

    def __init__(self) -> None:
        self.devices: Sequence[str] = ()
        """Those of the run's disks."""
        self._before_ms: float | None = None
        self._first: Reading | None = None
        self._begun: Reading | None = None
        self._last: Reading = {}
        self._worst_ms: float | None = None
        self._recent_ms: deque[float | None] = deque(maxlen=RECENT)

    @property
    def recent_ms(self) -> tuple[float | None, ...]:
        """The mean of each of the last samples; None: nothing was written."""
        return tuple(self._recent_ms)

    def meet(self, reading: Reading) -> None:
        """The run has nothing in QEMU yet."""
        self._first = reading

    def begin(self, reading: Reading) -> None:
        """The run is about to take its snapshot."""
        if self._first is not None:
            self._before_ms = _rounded(together(reading, self._first, self.devices).mean_ms)
        self._begun = self._last = reading

    def take(self, reading: Reading) -> Counters:
        """Take a sample: what was written since the last one."""
        if self._begun is None:  # it could not be asked then
            self._begun = self._last = reading
        written = together(reading, self._last, self.devices)
        self._last = reading
        mean_ms = _rounded(written.mean_ms)
        self._recent_ms.append(mean_ms)
        if mean_ms is not None:
            self._worst_ms = max(mean_ms, self._worst_ms or 0.0)
        return written

    def writes(self) -> GuestWrites | None:
        """All of it so far; None before the snapshot."""
        if self._begun is None:
            return None
        written = together(self._last, self._begun, self.devices)
        return GuestWrites(
            count=max(0, written.count),
            mean_ms=_rounded(written.mean_ms),
            worst_ms=self._worst_ms,
            p99_ms=_rounded(written.quantile_ms(0.99)),
            before_ms=self._before_ms,
        )


def _rounded(milliseconds: float | None) -> float | None:
    return round(milliseconds, DIGITS) if milliseconds is not None else None
