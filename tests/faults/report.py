"""What a campaign came to, in numbers."""

from collections import Counter
from dataclasses import dataclass, field

from tests.faults.plan import Fault, Kind


@dataclass(slots=True)
class Report:
    """Counts of everything. What is in `wrong` must not be."""

    seed: int
    title: str
    faults: Counter[Kind] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    """Of the daemon, by what they waited for."""
    runs: Counter[str] = field(default_factory=Counter)
    """Outcomes, and failures by code; runs that were cut off by a kill have none."""
    examples: dict[str, str] = field(default_factory=dict)
    """What the first run with each of these ends said of it."""
    kinds: Counter[str] = field(default_factory=Counter)
    restores: int = 0
    compared: int = 0
    """Restores that were held against a copy of the disks, byte for byte."""
    guest_errors: int = 0
    leftovers: int = 0
    wrong_restores: int = 0
    lost_guests: int = 0
    left_paused: int = 0
    paused_seconds: list[float] = field(default_factory=list)
    """From the daemon's start until a guest ran that its kill had left paused."""
    tidy_seconds: list[float] = field(default_factory=list)
    """From the daemon's start until nothing of dead runs was left."""
    stall_seconds: float = 0.0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def count(self, fault: Fault) -> None:
        self.faults[fault.kind] += 1
        if fault.kind is Kind.DAEMON:
            self.kills[fault.moment.when] += 1

    def __str__(self) -> str:
        kills = ", ".join(f"{count} at a {when}" for when, count in sorted(self.kills.items()))
        lines = [
            f"{self.title}, seed {self.seed}: {self.seconds / 60:.1f} minutes",
            "",
            *(f"{count:6}  {kind}" for kind, count in self.faults.most_common()),
            f"        (the daemon's kills: {kills})",
            "",
            *(f"{count:6}  runs {what}{self.examples.get(what, '')}" for what, count in sorted(self.runs.items())),
            f"        ({', '.join(f'{count} {kind}' for kind, count in sorted(self.kinds.items()))})",
            f"{self.restores:6}  restores, {self.compared} of them compared with a copy byte for byte",
            f"{self.left_paused:6}  guests left paused; they ran {_spread(self.paused_seconds)} after a start",
            f"        nothing of dead runs was left {_spread(self.tidy_seconds)} after a start",
            f"        the longest stall of a guest's write: {self.stall_seconds:.1f} s",
            "",
            f"{self.guest_errors:6}  guest errors (writes that failed or took too long, guests that stand still)",
            f"{self.leftovers:6}  leftovers",
            f"{self.wrong_restores:6}  wrong restores",
            f"{self.lost_guests:6}  guests lost that nobody killed",
            f"{len(self.wrong):6}  things that went wrong, these included",
            *(f"        {line}" for line in self.wrong),
        ]
        return "\n".join(lines)


def _spread(seconds: list[float]) -> str:
    ordered = sorted(seconds) or [0.0]
    return f"{ordered[len(ordered) // 2]:.1f} s (at most {ordered[-1]:.1f} s)"
