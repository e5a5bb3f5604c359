"""Which line of a TOML file says what, as tomllib does not tell. Pure.

The text is known to be good TOML, so this only has to find the keys: table headers, dotted and
quoted keys, elements of arrays, keys of inline tables.
"""

import json
import re
import tomllib
from bisect import bisect_right

KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


def shown(path: KeyPath) -> str:
    """Return `path` as a dotted key; indexes of arrays are left out."""
    keys = (part for part in path if isinstance(part, str))
    return ".".join(key if _BARE_KEY.fullmatch(key) else json.dumps(key, ensure_ascii=False) for key in keys)


class Places:
    """The lines of a TOML text's keys, counted from 1."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self._lines: dict[KeyPath, int] = {}
        self._scan()

    def line(self, path: KeyPath) -> int:
        """Return the line of `path`, or of the nearest thing around it that has one."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def paths(self) -> set[KeyPath]:
        """Return everything that has a line."""
        return set(self._lines)

    def _scan(self) -> None:
        table: KeyPath = ()
        tables_seen: dict[KeyPath, int] = {}
        self._skip(_BLANK)
        while self._at < len(self._text):
            start = self._at
            if self._text[start] == "[":
                brackets = 2 if self._text.startswith("[[", start) else 1
                self._at += brackets
                table = self._resolve(self._key(), tables_seen)
                if brackets == 2:
                    tables_seen[table] = tables_seen.get(table, -1) + 1
                    self._record(table, start)
                    table = (*table, tables_seen[table])
                self._at += brackets
                self._record(table, start)
            else:
                self._pair(table)
            self._skip(_BLANK)

    @staticmethod
    def _resolve(key: KeyPath, tables_seen: dict[KeyPath, int]) -> KeyPath:
        # [a.b] below [[a]] means the b of the latest a.
        resolved: KeyPath = ()
        for part in key[:-1]:
            resolved = (*resolved, part)
            if resolved in tables_seen:
                resolved = (*resolved, tables_seen[resolved])
        return (*resolved, *key[-1:])

    def _pair(self, table: KeyPath) -> None:
        start = self._at
        path = (*table, *self._key())
        self._record(path, start)
        self._at += 1  # the equals sign
        self._skip(_SPACE)
        self._value(path)

    def _key(self) -> KeyPath:
        parts: list[str] = []
        while True:
            self._skip(_SPACE)
            if self._text[self._at] in "\"'":
                parts.append(tomllib.loads(f"key = {self._take(_STRING)}")["key"])
            else:
                parts.append(self._take(_BARE_KEY))
            self._skip(_SPACE)
            if self._text[self._at] != ".":
                return tuple(parts)
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        opening = self._text[self._at]
        if opening in "\"'":
            self._skip(_STRING)
        elif opening in "[{":
            self._at += 1
            self._items(path, "]" if opening == "[" else "}")
        else:
            self._skip(_SCALAR)

    def _items(self, path: KeyPath, closing: str) -> None:
        index = 0
        self._skip(_BLANK)
        while self._text[self._at] != closing:
            if self._text[self._at] == ",":
                self._at += 1
            elif closing == "}":
                self._pair(path)
            else:
                element: KeyPath = (*path, index)
                self._record(element, self._at)
                self._value(element)
                index += 1
            self._skip(_BLANK)
        self._at += 1

    def _record(self, path: KeyPath, at: int) -> None:
        line = bisect_right(self._line_starts, at)
        for length in range(1, len(path) + 1):
            self._lines.setdefault(path[:length], line)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        self._take(pattern)

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:  # not good TOML: do not look on for ever
            raise ValueError(f"unexpected text at offset {self._at}")
        self._at = match.end()
        return match[0]
