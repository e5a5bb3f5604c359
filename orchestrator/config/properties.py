"""Property strings as vzdump writes them: `enabled=1,storage=local`, `keep-last=3,keep-daily=13`. Pure."""

import re
from dataclasses import fields

from orchestrator.model import Keep

_TRUE = ("1", "on", "yes", "true")
_FALSE = ("0", "off", "no", "false")

FLEECING_ALLOWED = (
    '"enabled=1", "enabled=1,storage=NAME" or "enabled=0", or a table {enabled = true, storage = "NAME"}'
)

_KEEPS = {f"keep-{field.name}": field.name for field in fields(Keep)}
KEEP_ALLOWED = (
    '"keep-last=3,keep-daily=13" (any of keep-last, keep-hourly, keep-daily, keep-weekly, keep-monthly,'
    ' keep-yearly, each with a whole number), or "keep-all=1"'
)


def parse_fleecing_properties(text: str) -> dict[str, bool | str]:
    """Return `enabled` and `storage` as far as `text` gives them. ValueError says what is wrong.

    As with vzdump, `enabled=` may be left out: "1,storage=local".
    """
    found: dict[str, bool | str] = {}
    for position, part in enumerate(text.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and position == 0 and key.lower() in _TRUE + _FALSE:
            key, value = "enabled", key
        elif not equals or not value:
            raise ValueError(f"{text!r}: {part!r} is no property; allowed: {FLEECING_ALLOWED}")
        if key in found:
            raise ValueError(f"{text!r} gives {key} twice; allowed: {FLEECING_ALLOWED}")
        if key == "storage":
            found[key] = value
        elif key == "enabled":
            found[key] = _parse_boolean(text, value)
        else:
            raise ValueError(f"{text!r}: {key!r} is not known; allowed: {FLEECING_ALLOWED}")
    return found


def parse_keep(text: str) -> Keep:
    """Read retention as vzdump writes it: `keep-last=3,keep-daily=13`. ValueError says what is wrong.

    Zeros alone are refused: vzdump takes them for keep-all=1, but whoever reads them expects the opposite.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"{text!r}: {part!r} is no property; allowed: {KEEP_ALLOWED}")
        if key not in _KEEPS:
            raise ValueError(f"{text!r}: {key!r} is not known; allowed: {KEEP_ALLOWED}")
        if _KEEPS[key] in found:
            raise ValueError(f"{text!r} gives {key} twice; allowed: {KEEP_ALLOWED}")
        allowed, pattern = ("1 or 0", "[01]") if key == "keep-all" else ("a whole number", "[0-9]+")
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{text!r}: {key} is {value!r}; allowed: {allowed}")
        found[_KEEPS[key]] = int(value)
    everything = bool(found.pop("all", 0))
    if everything and any(found.values()):
        raise ValueError(f"{text!r} keeps all and gives numbers too; allowed: keep-all=1 alone, or numbers alone")
    if not everything and not any(found.values()):
        raise ValueError(f"{text!r} would keep nothing; allowed: a number above 0, or keep-all=1 for everything")
    return Keep(**found, all=everything)


def read_keep(given: object) -> Keep:
    """Return what a value of the configuration says is kept. ValueError says what is wrong."""
    if not isinstance(given, str):
        raise ValueError(f"{given!r} says nothing about what is kept; allowed: {KEEP_ALLOWED}")  # noqa: TRY004
    return parse_keep(given)


def _parse_boolean(text: str, value: str) -> bool:
    if value.lower() not in _TRUE + _FALSE:
        raise ValueError(f"{text!r}: enabled is {value!r}; allowed: 1 or 0")
    return value.lower() in _TRUE
