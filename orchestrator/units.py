"""Sizes, rates, durations and calendar expressions as people write them, and back. Pure.

Sizes follow the IEC: `KiB`, `MiB`, `GiB`, `TiB` (and the bare letters K, M, G, T as QEMU reads
them) are powers of 1024; `KB`, `MB`, `GB`, `TB` are powers of 1000. `Mb` is refused: it reads as
bits.
Every parser raises ValueError with a text that says what was given and what is allowed.
"""

import re
from dataclasses import dataclass
from datetime import datetime, tzinfo
from decimal import Decimal
from zoneinfo import ZoneInfo

from oncalendar import BaseIterator, OnCalendarError

KIB = 1024
MIB = 1024**2
GIB = 1024**3
LARGEST_BYTES = 2**63 - 1  # QEMU's sizes are signed 64 bit

_NUMBER = r"([0-9]{1,20}(?:\.[0-9]{1,9})?)"
_SIZE = re.compile(_NUMBER + r"\s*([A-Za-z]*)")
_SHARE = re.compile(_NUMBER + r"\s*%")
_DURATION_PART = re.compile(_NUMBER + r"\s*([A-Za-zµμ]*)\s*")

_SIZE_FACTORS = {
    "": 1,
    "B": 1,
    **{
        spelling: 1024**power
        for power, letter in enumerate("KMGTP", start=1)
        for spelling in (letter, letter.lower(), f"{letter}iB")
    },
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", start=1)},
    "kB": 1000,
}
_DURATION_FACTORS = {
    spelling: factor
    for factor, spellings in (
        (Decimal("0.000001"), "us usec µs μs"),
        (Decimal("0.001"), "ms msec"),
        (Decimal(1), "s sec second seconds"),
        (Decimal(60), "m min minute minutes"),
        (Decimal(3600), "h hr hour hours"),
        (Decimal(86400), "d day days"),
        (Decimal(604800), "w week weeks"),
    )
    for spelling in spellings.split()
}

SIZE_ALLOWED = 'bytes as a number, or a number with KiB, MiB, GiB, TiB or PiB, such as "200GiB"'
RATE_ALLOWED = 'KiB/s as a whole number, or a number with a unit, such as "50MiB" a second; 0 is no limit'
DURATION_ALLOWED = 'seconds as a number, or numbers with us, ms, s, min, h, d or w, such as "15min"'
SHARE_OR_SIZE_ALLOWED = f'a share from 0% up to less than 100%, such as "10%", or {SIZE_ALLOWED}'
CALENDAR_ALLOWED = (
    'a systemd calendar expression, such as "mon..fri 02:30", "*-*-1..7 04:00", "daily" or '
    '"02:30 Europe/Berlin"; systemd-analyze calendar explains them'
)


def _refuse(what: str, given: object, allowed: str) -> ValueError:
    return ValueError(f"{given!r} is no {what}; allowed: {allowed}")


def parse_size(given: str | int) -> int:
    """Return the bytes that `given` means; a fraction of a byte is cut off."""
    if isinstance(given, int) and not isinstance(given, bool):
        size_bytes = given
    else:
        match = _SIZE.fullmatch(given.strip()) if isinstance(given, str) else None
        factor = _SIZE_FACTORS.get(match[2]) if match else None
        if match is None or factor is None:
            raise _refuse("size", given, SIZE_ALLOWED)
        size_bytes = int(Decimal(match[1]) * factor)
    if not 0 <= size_bytes <= LARGEST_BYTES:
        raise _refuse("size", given, f"{SIZE_ALLOWED}; at least 0 and less than 8192PiB")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Return `size_bytes` with one decimal and the unit that keeps it below 1024, as "9.0 GiB"."""
    if abs(size_bytes) < KIB:
        return f"{size_bytes} B"
    amount = float(size_bytes)
    units = iter(("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))
    unit = "B"
    while abs(round(amount, 1)) >= KIB and (larger := next(units, None)):
        amount, unit = amount / KIB, larger
    return f"{amount:.1f} {unit}"


def parse_rate(given: str | int) -> int:
    """Return bytes a second, 0 for no limit. A plain number is KiB/s, as vzdump's bwlimit."""
    text = str(given).strip()
    plain = text.isascii() and text.isdigit()
    with_unit = f"{text}KiB" if plain else text.removesuffix("/s")
    try:
        rate = parse_size(with_unit)
    except ValueError:
        raise _refuse("rate", given, RATE_ALLOWED) from None
    unit_missing = not with_unit[-1].isalpha()
    rounded_to_nothing = rate == 0 and any(digit in text for digit in "123456789")
    if unit_missing or rounded_to_nothing:
        raise _refuse("rate", given, RATE_ALLOWED)
    return rate


def parse_duration(given: str | float) -> float:
    """Return seconds. Parts add up as systemd reads them: "1h 30min"."""
    if isinstance(given, int | float) and not isinstance(given, bool):
        if not 0 <= given <= LARGEST_BYTES:  # nan too
            raise _refuse("duration", given, DURATION_ALLOWED)
        return float(given)
    if not isinstance(given, str) or not given.strip():
        raise _refuse("duration", given, DURATION_ALLOWED)
    text = given.strip()
    parts = _DURATION_PART.findall(text)
    if "".join(part[0] for part in _DURATION_PART.finditer(text)) != text:
        raise _refuse("duration", given, DURATION_ALLOWED)
    if len(parts) == 1 and not parts[0][1]:
        return float(parts[0][0])
    if any(unit not in _DURATION_FACTORS for _, unit in parts):
        raise _refuse("duration", given, DURATION_ALLOWED)
    return float(sum(Decimal(number) * _DURATION_FACTORS[unit] for number, unit in parts))


def format_duration(seconds: float) -> str:
    """Return `seconds` as `parse_duration` reads it, exact to the millisecond: "1h 30min"."""
    milliseconds = round(seconds * 1000)
    parts = []
    for unit, factor in (("d", 86400_000), ("h", 3600_000), ("min", 60_000), ("s", 1000)):
        amount, milliseconds = divmod(milliseconds, factor)
        if amount:
            parts.append(f"{amount}{unit}")
    if milliseconds:
        parts.append(f"{milliseconds}ms")
    return " ".join(parts) or "0s"


def format_age(seconds: float) -> str:
    """Return how long ago that was, or how long it still is, in its largest unit, as "13 h ago" or "in 3 d"."""
    past = seconds >= 0
    amount = abs(seconds)
    text = "now"
    for unit, factor in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if amount >= (2 if unit == "d" else 1) * factor:  # up to two days in hours: yesterday is not "1 d"
            text = f"{int(amount // factor)} {unit}"
            break
    if text == "now":
        return text
    return f"{text} ago" if past else f"in {text}"


def format_moment(moment: datetime, *, now: datetime) -> str:
    """Return a moment in the local zone and how far it is from `now`: "2026-11-23 02:30 (13 h ago)"."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M} ({format_age((now - moment).total_seconds())})"


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a whole whose size is known only later, such as a file system's."""

    percent: float

    def of(self, total_bytes: int) -> int:
        """Return this share of `total_bytes`, in whole bytes."""
        return int(total_bytes * self.percent / 100)

    def __str__(self) -> str:
        return f"{self.percent:g}%"


def parse_share_or_size(given: str | int) -> Share | int:
    """Return a Share for "10%", bytes for what `parse_size` reads."""
    match = _SHARE.fullmatch(given.strip()) if isinstance(given, str) else None
    if match and float(match[1]) < 100:
        return Share(float(match[1]))
    try:
        return parse_size(given)
    except ValueError:
        raise _refuse("share or size", given, SHARE_OR_SIZE_ALLOWED) from None


@dataclass(frozen=True, slots=True)
class Calendar:
    """A calendar expression that is known to be good and to come at least once.

    `rule` is the expression without the zone, `zone` the time zone that it names itself.
    """

    rule: str
    zone: tzinfo | None = None


_BEFORE_ALL = datetime(1969, 12, 31, 23, 59, 59)  # noqa: DTZ001  (calendars start in 1970)
_LONGEST_CALENDAR = 200  # oncalendar recurses once per comma


def parse_calendar(given: str) -> Calendar:
    """Return the calendar that a systemd expression describes.

    One line, no fractions of a second; weekdays in any case, `Mon..Fri` or `Mon-Fri`. An expression
    that can never come, such as the 30th of February, is refused; one that lies in the past is not.
    """
    if not isinstance(given, str) or not 0 < len(given.strip()) <= _LONGEST_CALENDAR:
        raise _refuse("calendar expression", given, CALENDAR_ALLOWED)
    rule, zone = given.strip(), None
    head, _, last = rule.rpartition(" ")
    if head and (zone := _zone(last)):
        rule = head.strip()
    try:
        first = next(BaseIterator(rule, _BEFORE_ALL), None)
    except OnCalendarError as error:
        reason = str(error)[:1].lower() + str(error)[1:]
        raise _refuse(f"calendar expression ({reason})", given, CALENDAR_ALLOWED) from error
    if first is None:
        raise ValueError(f"{given!r} never comes; allowed: {CALENDAR_ALLOWED}")
    return Calendar(rule, zone)


def _zone(name: str) -> tzinfo | None:
    if not name[0].isalpha():
        return None
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # unknown, not a name, a folder of zones
        return None
