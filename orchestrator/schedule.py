"""When jobs are due. Pure: expression and times in, times out; nothing here reads a clock.

Expressions are systemd's and mean local time unless they name a zone. A `ZoneInfo` in the `after`
that is passed in is that local time; any other tzinfo (UTC, as times are stored) means the host's.

Where clocks change, a night must neither lose its backup nor get two of them:

* A time in the hour that is skipped comes as much later as the clocks jump: 02:30 becomes 03:30.
  This is where we differ from systemd's timers, which leave it out.
* A time in the hour that comes twice is due the first time only, as with systemd.

Times are compared in UTC: Python compares two times of the same zone by their wall clock, which
goes wrong in exactly these hours.
"""

import hashlib
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from oncalendar import BaseIterator

from orchestrator.units import parse_calendar

# Longer than clocks ever jump: how far before `after` a wall clock's time may lie and still be due
# later than it.
_LONGEST_JUMP = timedelta(hours=3)


def next_due(expression: str, after: datetime) -> datetime | None:
    """Return the first due time later than `after` (aware), None if there is none any more.

    The result is in the zone of `after` if that is a ZoneInfo, else in the host's. Raises
    ValueError as `units.parse_calendar` does.
    """
    calendar = parse_calendar(expression)
    shown_in = after.tzinfo if isinstance(after.tzinfo, ZoneInfo) else None
    zone = calendar.zone or shown_in
    after_utc = after.astimezone(UTC)
    # astimezone(None) and a naive datetime both mean the host's zone.
    start = after_utc.astimezone(zone).replace(tzinfo=None) - _LONGEST_JUMP
    earliest: datetime | None = None
    for wall in BaseIterator(calendar.rule, start):
        # Not astimezone: for the host's zone it takes the wrong offset in the skipped hour.
        due = datetime.fromtimestamp(wall.replace(tzinfo=zone, fold=0).timestamp(), UTC)
        if due <= after_utc:
            continue
        earliest = due if earliest is None else min(earliest, due)
        # Only a time in the skipped hour can come later than one with a later wall clock.
        if due.astimezone(zone).replace(tzinfo=None, fold=0) == wall:
            break
    return earliest.astimezone(shown_in) if earliest else None


def missed(expression: str, last: datetime | None, now: datetime) -> bool:
    """Say whether a due time passed after `last`, the last one that was served, and up to `now`.

    `last` None: the job is new and has missed nothing.
    """
    if last is None:
        return False
    due = next_due(expression, last)
    return due is not None and due.astimezone(UTC) <= now.astimezone(UTC)


def delay(job: str, due: datetime, *, randomized_delay_seconds: float, seed: str) -> float:
    """Return the seconds to wait after `due`: at least 0, less than `randomized_delay_seconds`.

    The same for the same job, due time and `seed` (the host's identity), so that a restart does not
    roll again; spread evenly over hosts, jobs and days. Add it in UTC.
    """
    text = "\0".join((seed, job, due.astimezone(UTC).isoformat()))
    roll = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])
    return randomized_delay_seconds * (roll / 2**48)
