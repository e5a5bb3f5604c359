"""JSON from a repository, taken apart field by field: each is checked before it is used. Pure.

Unknown fields are allowed: newer versions of restic add some.
"""

import base64
import binascii
import struct
from datetime import UTC, datetime
from typing import Any

import msgspec

from orchestrator.target.restic.errors import Damaged

ID_BYTES = 32
_ID = struct.Struct(f"{ID_BYTES}s")
UINT32 = 2**32 - 1
UINT64 = 2**64 - 1


class Fields:
    """A JSON object of the file named `file`. Every method raises Damaged that names the file and the field."""

    def __init__(self, value: Any, *, file: str) -> None:
        if not isinstance(value, dict):
            raise Damaged(file, "an object is missing where one must be")
        self._value: dict[str, Any] = value
        self.file = file

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._value.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._value.get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "text")
        return value

    def integer(self, name: str, default: int | None = None, *, largest: int = UINT64) -> int:
        """A whole number from 0 to `largest`."""
        value = self._value.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
            raise self._wrong(name, f"whole number from 0 to {largest}")
        return value

    def truth(self, name: str) -> bool:
        """True or false; absent is false."""
        value = self._value.get(name, False)
        if not isinstance(value, bool):
            raise self._wrong(name, "truth value")
        return value

    def identity(self, name: str) -> bytes:
        """The 32 bytes of an id."""
        return identities([self._value.get(name)], name, file=self.file)[0]

    def identities(self, name: str) -> list[bytes]:
        """A list of ids; null and absent are an empty one."""
        return identities(self._list(name), name, file=self.file)

    def binary(self, name: str) -> bytes:
        """What is in base64."""
        try:
            return base64.b64decode(self.text(name), validate=True)
        except (binascii.Error, ValueError):
            raise self._wrong(name, "base64") from None

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; null and absent are an empty one."""
        values = self._list(name)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(name, "list of texts")
        return tuple(values)

    def objects(self, name: str) -> list["Fields"]:
        """A list of objects; null and absent are an empty one."""
        return [Fields(value, file=self.file) for value in self._list(name)]

    def object(self, name: str) -> "Fields":
        """An object."""
        return Fields(self._value.get(name), file=self.file)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object as it is, unchecked; null and absent are an empty one."""
        value = self._value.get(name)
        return value if isinstance(value, dict) else {}

    def time(self, name: str) -> datetime:
        """An RFC 3339 time with its zone, in UTC, cut off to microseconds."""
        try:
            when = datetime.fromisoformat(self.text(name))
            if when.tzinfo is not None:
                return when.astimezone(UTC)
        except (ValueError, OverflowError):
            pass
        raise self._wrong(name, "time with a zone")

    def _list(self, name: str) -> list[Any]:
        value = self._value.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(name, "list")
        return value

    def _wrong(self, name: str, wanted: str) -> Damaged:
        return _wrong(name, wanted, file=self.file)


def identities(values: list[Any], name: str, *, file: str) -> list[bytes]:
    """Return the 32 bytes of each id. All at once: a disk has hundreds of thousands, a repository millions."""
    if set(map(type, values)) <= {str} and set(map(len, values)) <= {2 * ID_BYTES}:
        digits = "".join(values)
        try:
            content = bytes.fromhex(digits)
        except ValueError:
            content = b""
        if content.hex() == digits:  # else there are capitals, or blanks
            return [identity for (identity,) in _ID.iter_unpack(content)]
    raise _wrong(name, "id of 64 hexadecimal digits", file=file)


def _wrong(name: str, wanted: str, *, file: str) -> Damaged:
    return Damaged(file, f"its field {name!r} is no {wanted}")


def parse(text: bytes, *, file: str) -> Fields:
    """Read a JSON object. Raises Damaged."""
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        raise Damaged(file, "it is no JSON") from None
    return Fields(value, file=file)


def write_time(when: datetime) -> str:
    """Return a time as Go writes it: UTC, a fraction without its last zeros. Raises ValueError without a zone."""
    if when.tzinfo is None:
        raise ValueError(f"a time without a zone: {when}")
    utc = when.astimezone(UTC).replace(tzinfo=None)
    whole = utc.isoformat(timespec="seconds")
    fraction = f".{utc.microsecond:06}".rstrip("0").rstrip(".")
    return f"{whole}{fraction}Z"
