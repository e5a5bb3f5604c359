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

A chain that never ends keeps its oldest snapshots for ever, since all later ones need them. `merges` says which
snapshot of a chain could hold all of its content itself so that they may go: the first of it that is kept for its
own sake. Those before it go only for that; a later one would need as much space again and free less.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, tzinfo

from orchestrator.model import Keep

_PERIODS = {
    "hourly": "%Y-%m-%d %H:00",
    "daily": "%Y-%m-%d",
    "weekly": "%G-W%V",
    "monthly": "%Y-%m",
    "yearly": "%Y",
}


@dataclass(frozen=True, slots=True)
class Point:
    """A snapshot, as far as retention goes. `time` is aware.

    `parents` are those that its files have as backing files, each disk's its own; one that is not among the points
    is ignored.
    """

    id: str
    time: datetime
    parents: tuple[str, ...] = ()
    protected: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a snapshot stays. There is always a reason."""

    id: str
    keep: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Merge:
    """A snapshot that is to stand alone, and the older ones (`older`, oldest first) that may go then."""

    into: str
    older: tuple[str, ...]


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
    parents = {point.id: [one for one in point.parents if one in by_id] for point in oldest_first}
    for parent, children in _needs(parents, reasons).items():
        reasons.setdefault(parent, []).extend(f"needed by {child}" for child in children)
    return tuple(
        Verdict(point.id, point.id in reasons, tuple(reasons.get(point.id, ["no rule keeps it"])))
        for point in oldest_first
    )


def decide_all(points: Sequence[Point], keeps: Iterable[Keep], zone: tzinfo | None) -> tuple[Verdict, ...]:
    """As `decide`, of several policies for the same VM and target: what any of them keeps, stays.

    None at all keeps everything. What holds of one decision holds of this one.
    """
    decisions = [decide(points, keep, zone) for keep in dict.fromkeys(keeps) or [Keep()]]
    return tuple(_either(verdicts) for verdicts in zip(*decisions, strict=True))


def merges(points: Sequence[Point], keeps: Sequence[Keep], zone: tzinfo | None) -> tuple[Merge, ...]:
    """What is worth merging so that more may go, oldest first: none of it if nothing would go for it."""
    bare = standing_alone(points, (point.id for point in points))
    kept = {verdict.id: verdict.keep for verdict in decide_all(bare, keeps, zone)}
    parents = {point.id: [one for one in point.parents if one in kept] for point in points}
    older = {id_: _before(id_, parents, kept) for id_, keep in kept.items() if keep}
    into = [id_ for id_, ids in older.items() if ids]
    while True:
        verdicts = decide_all(standing_alone(points, into), keeps, zone)
        going = [verdict.id for verdict in verdicts if not verdict.keep]
        found = [Merge(one, tuple(id_ for id_ in going if id_ in older[one])) for one in into]
        useful = [one.into for one in found if one.older]
        if useful == into:
            return tuple(found)
        into = useful


def standing_alone(points: Iterable[Point], ids: Iterable[str]) -> list[Point]:
    """The points as they would be, were those merged."""
    merged = set(ids)
    return [replace(point, parents=()) if point.id in merged else point for point in points]


def _before(id_: str, parents: Mapping[str, Sequence[str]], kept: Mapping[str, bool]) -> set[str]:
    """All that a snapshot is based on; nothing if any of that is kept for its own sake."""
    found: set[str] = set()
    to_follow = [id_]
    while to_follow:
        for parent in parents[to_follow.pop()]:
            if kept[parent]:
                return set()
            if parent not in found:
                found.add(parent)
                to_follow.append(parent)
    return found


def _either(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict on a snapshot out of several: it stays if any says so, for all of their reasons."""
    keep = any(verdict.keep for verdict in verdicts)
    reasons = (reason for verdict in verdicts if verdict.keep == keep for reason in verdict.reasons)
    return Verdict(verdicts[0].id, keep, tuple(dict.fromkeys(reasons)))


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


def _needs(parents: Mapping[str, Iterable[str]], kept: Iterable[str]) -> dict[str, list[str]]:
    """What has to stay, and of which of the staying it is a parent."""
    staying = set(kept)
    to_follow = list(staying)
    while to_follow:
        found = set(parents[to_follow.pop()]) - staying
        staying |= found
        to_follow += found
    needs: dict[str, list[str]] = {}
    for child, its_parents in parents.items():
        if child in staying:
            for parent in its_parents:
                needs.setdefault(parent, []).append(child)
    return needs
