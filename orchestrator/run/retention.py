"""Which snapshots of a VM stay and which may go, each with its reasons. Pure.

A rule (`keep-daily=13`) looks at periods that hold a snapshot, newest first, and keeps the newest snapshot of
each. Rules go from last to yearly. A period that holds something kept by an earlier rule is passed without being
counted. As with both peers, periods are those of the wall clock, weeks are ISO's (a week's Monday to Sunday,
whatever year or month they are in), and the hour that comes twice when clocks are set back is one hour.

`vzdump --prune-backups` and `restic forget` differ. From one backup a night, keep-last=3,keep-daily=13 keeps 13
with restic, whose rules overlap: each is applied on its own. It keeps 16 with vzdump, whose rules follow on each
other: a period that an earlier rule covers is not counted. They agree where only one rule is given, unless it is
not used up yet: then restic keeps the oldest snapshot too, so that a young history already reaches back.
Users of either must not lose what they expect to find, so we keep what either keeps:

- We count as vzdump does, so that no rule ends earlier than restic's would: all that restic keeps stays.
- We keep the oldest, as restic does, while any rule is not used up.
- Protected snapshots are vzdump's: always kept, and as if they were not there for the rules.
- A week over the end of a month is where neither has all of the other's. With snapshots on 29 and 30 November and
  on 6 December, keep-weekly=2,keep-monthly=2 keeps 29 November (its week's newest) and 6 December. For restic,
  30 November is November's newest and stays; for vzdump November is covered and it goes. We keep it, uncounted.
- For the same reason, where vzdump keeps an older snapshot of a month or year because its rule for weeks gave up
  the newest, we keep the newest instead. It is the only thing of vzdump's that we do not keep.

What holds, whatever the snapshots (the tests have it as properties): a larger number never keeps less; what was
kept is kept by the next decision, whether the removal went through, stopped half-way or never began; the newest
stays; nothing goes that anything kept is based on.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo

_PERIODS = {
    "hourly": "%Y-%m-%d %H:00",
    "daily": "%Y-%m-%d",
    "weekly": "%G-W%V",
    "monthly": "%Y-%m",
    "yearly": "%Y",
}
_KEYS = {f"keep-{name}": name for name in ("last", *_PERIODS, "all")}

KEEP_ALLOWED = (
    '"keep-last=3,keep-daily=13" (any of keep-last, keep-hourly, keep-daily, keep-weekly, keep-monthly,'
    ' keep-yearly, each with a whole number), or "keep-all=1"'
)


@dataclass(frozen=True, slots=True)
class Keep:
    """How many snapshots each rule keeps; 0: there is no such rule. No rule at all keeps everything."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    all: bool = False

    def rules(self) -> Iterator[tuple[str, int]]:
        """Those there are, in the order in which they are applied; none if everything is kept."""
        if not self.all:
            for name in ("last", *_PERIODS):
                if (count := getattr(self, name)) > 0:
                    yield name, count


@dataclass(frozen=True, slots=True)
class Point:
    """A snapshot, as far as retention goes. `time` is aware.

    `parent` is the one that its files have as backing files; one that is not among the points is ignored.
    """

    id: str
    time: datetime
    parent: str | None = None
    protected: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a snapshot stays. There is always a reason."""

    id: str
    keep: bool
    reasons: tuple[str, ...]


def decide(points: Sequence[Point], keep: Keep, zone: tzinfo | None) -> tuple[Verdict, ...]:
    """A verdict on each snapshot of one VM on one target, oldest first, in whatever order they are given.

    Remove in the reverse order: what is based on others goes before them, so that an interruption breaks no chain.
    `zone` is where periods begin and end; None: the host's. ValueError: an id is there twice.
    """
    oldest_first = sorted(points, key=lambda point: (point.time.astimezone(UTC), point.id))
    by_id = {point.id: point for point in oldest_first}
    if len(by_id) < len(points):
        raise ValueError(f"{len(points)} snapshots have only {len(by_id)} different ids")
    if not any(keep.rules()):
        reason = "keep-all" if keep.all else "no retention configured"
        return tuple(Verdict(point.id, keep=True, reasons=(reason,)) for point in oldest_first)

    reasons: dict[str, list[str]] = {point.id: ["protected"] for point in oldest_first if point.protected}
    counted = [point for point in reversed(oldest_first) if not point.protected]
    for kept, reason in _kept_by_rules(counted, keep, zone).items():
        reasons[kept] = [reason]
    parents = {point.id: point.parent for point in oldest_first if point.parent in by_id}
    for parent, children in _needs(parents, reasons).items():
        reasons.setdefault(parent, []).extend(f"needed by {child}" for child in children)
    return tuple(
        Verdict(point.id, point.id in reasons, tuple(reasons.get(point.id, ["no rule keeps it"])))
        for point in oldest_first
    )


def parse_keep(text: str) -> Keep:
    """Read retention as vzdump writes it: `keep-last=3,keep-daily=13`. ValueError says what is wrong.

    Zeros alone are refused: vzdump takes them for keep-all=1, but whoever reads them expects the opposite.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"{text!r}: {part!r} is no property; allowed: {KEEP_ALLOWED}")
        if key not in _KEYS:
            raise ValueError(f"{text!r}: {key!r} is not known; allowed: {KEEP_ALLOWED}")
        if _KEYS[key] in found:
            raise ValueError(f"{text!r} gives {key} twice; allowed: {KEEP_ALLOWED}")
        allowed, pattern = ("1 or 0", "[01]") if key == "keep-all" else ("a whole number", "[0-9]+")
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{text!r}: {key} is {value!r}; allowed: {allowed}")
        found[_KEYS[key]] = int(value)
    everything = bool(found.pop("all", 0))
    if everything and any(found.values()):
        raise ValueError(f"{text!r} keeps all and gives numbers too; allowed: keep-all=1 alone, or numbers alone")
    if not everything and not any(found.values()):
        raise ValueError(f"{text!r} would keep nothing; allowed: a number above 0, or keep-all=1 for everything")
    return Keep(**found, all=everything)


def _kept_by_rules(newest_first: Sequence[Point], keep: Keep, zone: tzinfo | None) -> dict[str, str]:
    """What any rule keeps, and as what the first such rule does."""
    kept: dict[str, str] = {}
    not_used_up = []
    for rule, count in keep.rules():
        left = count
        for label, ids in _periods(rule, newest_first, zone).items():
            if left == 0:
                break
            if kept.keys().isdisjoint(ids):
                left -= 1
            kept.setdefault(ids[0], f"{rule} {label}")
        if left > 0:
            not_used_up.append(rule)
    if newest_first and not_used_up:
        kept.setdefault(newest_first[-1].id, f"oldest, {' and '.join(not_used_up)} not used up")
    return kept


def _periods(rule: str, newest_first: Sequence[Point], zone: tzinfo | None) -> dict[str, list[str]]:
    """The ids of each period, all newest first. For `last`, each snapshot is a period."""
    periods: dict[str, list[str]] = {}
    for number, point in enumerate(newest_first, start=1):
        label = str(number) if rule == "last" else point.time.astimezone(zone).strftime(_PERIODS[rule])
        periods.setdefault(label, []).append(point.id)
    return periods


def _needs(parents: Mapping[str, str], kept: Iterable[str]) -> dict[str, list[str]]:
    """What has to stay, and of which of the staying it is the parent."""
    staying = set(kept)
    for last in kept:
        child = last
        while (parent := parents.get(child)) is not None and parent not in staying:
            staying.add(parent)
            child = parent
    needs: dict[str, list[str]] = {}
    for child, parent in parents.items():
        if child in staying:
            needs.setdefault(parent, []).append(child)
    return needs
