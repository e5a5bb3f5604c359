"""The types of single values: how each is read, and what is allowed. Pure.

A refusal is a ValueError that says what was given and what is allowed.
"""

import contextlib
import ipaddress
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from orchestrator.config.properties import FLEECING_ALLOWED, parse_fleecing_properties
from orchestrator.config.settings import Address
from orchestrator.units import (
    MIB,
    Share,
    format_size,
    parse_calendar,
    parse_duration,
    parse_rate,
    parse_share_or_size,
    parse_size,
)

# The smallest amount that a fleecing image can usefully get.
SMALLEST_QUOTA_BYTES = 2 * MIB

_LONGEST_CBW_TIMEOUT_SECONDS = 45
_SHORTEST_BUDGET_SECONDS = 0.0001
_LONGEST_BUDGET_SECONDS = 10.0
_LONGEST_SOCKET_BYTES = 107  # sun_path of unix(7), without the closing zero
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LISTEN = re.compile(r"(?:(?P<v4>[0-9.]+)|\[(?P<v6>[0-9A-Fa-f:.]+)\]):(?P<port>[0-9]{1,5})")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9!_.*'()=-]+)*/?")


def _check_name(given: str) -> str:
    if not _NAME.fullmatch(given):
        raise ValueError(
            f"{given!r} is no name; allowed: 1 to 64 letters, digits, '_', '.' or '-', "
            "beginning with a letter or digit"
        )
    return given


def _check_path(given: Any) -> Any:
    # Before it becomes a Path, which would turn '' into '.'.
    if isinstance(given, str) and not (given.startswith("/") and given.isprintable()):
        raise ValueError(f"{given!r} is no path; allowed: an absolute one, such as '/srv'")
    return given


def _check_url(given: str) -> str:
    allowed = "allowed: s3://BUCKET or s3://BUCKET/PREFIX"
    if "@" in given or "?" in given:  # not repeated: it may hold a secret
        raise ValueError(f"an address with '@' or '?'; keys of a bucket come from the environment; {allowed}")
    if not _URL.fullmatch(given):
        raise ValueError(f"{given!r} is no address of a repository; {allowed}")
    return given.rstrip("/")


def _check_socket(given: Path) -> Path:
    length = len(str(given).encode())
    if length > _LONGEST_SOCKET_BYTES:
        allowed = f"allowed for a socket: {_LONGEST_SOCKET_BYTES}"
        raise ValueError(f"{str(given)!r} is {length} bytes long; {allowed}")
    return given


def _check_quota(size_bytes: int) -> int:
    if size_bytes < SMALLEST_QUOTA_BYTES:
        least = format_size(SMALLEST_QUOTA_BYTES)
        raise ValueError(
            f"{format_size(size_bytes)} is too small; allowed: at least {least}, the smallest "
            "amount that a fleecing image can usefully get"
        )
    return size_bytes


def _parse_cbw_timeout(given: str | float) -> int:
    seconds = parse_duration(given)
    allowed = f"allowed: whole seconds from 1s to {_LONGEST_CBW_TIMEOUT_SECONDS}s"
    if seconds == 0:
        raise ValueError(f"{given!r} would let a guest's write wait without end; {allowed}")
    if seconds > _LONGEST_CBW_TIMEOUT_SECONDS:
        reason = "virtio on Windows gives up on a write after 60 s"
        raise ValueError(f"{given!r} is too long: {reason}; {allowed}")
    if not seconds.is_integer():
        raise ValueError(f"{given!r} is not in whole seconds; {allowed}")
    return int(seconds)


def _parse_latency_budget(given: str | float) -> float:
    seconds = parse_duration(given)
    if not _SHORTEST_BUDGET_SECONDS <= seconds <= _LONGEST_BUDGET_SECONDS:
        raise ValueError(f"{given!r} is no budget for a write; allowed: from 100us to 10s, such as '20ms'")
    return seconds


def _read_address(given: Any) -> Address:
    allowed = "allowed: an address and a port, such as '127.0.0.1:9321' or '[::1]:9321'"
    if isinstance(given, str) and (found := _LISTEN.fullmatch(given)) and 0 < int(found["port"]) < 1 << 16:
        with contextlib.suppress(ValueError):
            return Address(str(ipaddress.ip_address(found["v4"] or found["v6"])), int(found["port"]))
    raise ValueError(f"{given!r} is nowhere to listen; {allowed}")


def _check_host(given: str) -> str:
    if not _HOST.fullmatch(given):
        raise ValueError(f"{given!r} is no name of a host; allowed: such as 'backup.example.org', without a port")
    return given


def _check_calendar(given: str) -> str:
    parse_calendar(given)
    return given.strip()


def read_fleecing(given: Any) -> Any:
    """Return what a table of fleecing would hold, for a property string too."""
    if isinstance(given, str):
        return parse_fleecing_properties(given)
    if not isinstance(given, Mapping):
        raise ValueError(f"{given!r} says nothing about fleecing; allowed: {FLEECING_ALLOWED}")  # noqa: TRY004
    return given


def _text_or_number(number: str) -> WithJsonSchema:
    return WithJsonSchema({"type": ["string", number]})


def one_of(values: type[StrEnum]) -> WithJsonSchema:
    """Return the JSON schema of one of an enumeration's values."""
    return WithJsonSchema({"type": "string", "enum": [value.value for value in values]})


Name = Annotated[
    str,
    AfterValidator(_check_name),
    WithJsonSchema({"type": "string", "pattern": f"^{_NAME.pattern}$"}),
]
AbsolutePath = Annotated[
    Path,
    Field(strict=False),
    BeforeValidator(_check_path),
    WithJsonSchema({"type": "string", "pattern": "^/"}),
]
Url = Annotated[
    str, AfterValidator(_check_url), WithJsonSchema({"type": "string", "pattern": f"^{_URL.pattern}$"})
]
Listen = Annotated[Address, BeforeValidator(_read_address), WithJsonSchema({"type": "string"})]
HostName = Annotated[str, AfterValidator(_check_host)]
Socket = Annotated[AbsolutePath, AfterValidator(_check_socket)]
Quota = Annotated[int, AfterValidator(_check_quota), BeforeValidator(parse_size), _text_or_number("integer")]
ShareOrSize = Annotated[Share | int, BeforeValidator(parse_share_or_size), _text_or_number("integer")]
Rate = Annotated[int, BeforeValidator(parse_rate), _text_or_number("integer")]
Duration = Annotated[float, BeforeValidator(parse_duration), _text_or_number("number")]
LatencyBudget = Annotated[float, BeforeValidator(_parse_latency_budget), _text_or_number("number")]
CbwTimeout = Annotated[int, BeforeValidator(_parse_cbw_timeout), _text_or_number("number")]
Calendar = Annotated[str, AfterValidator(_check_calendar)]
Patterns = list[Annotated[str, Field(min_length=1)]]
MaxRuns = Annotated[int, Field(ge=1)]
