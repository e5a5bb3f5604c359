"""Which blob is where, for millions of them: about 50 bytes a blob. Pure.

A record of 48 bytes: id (32), number of the pack with the kind as its highest bit, offset, sealed length, plain
length (0: not compressed). By the id's first byte they are in 256 shards; in each they are sorted, and the second
byte says where to start, so that a lookup searches about n / 65 536 records. What is added waits in a small
dictionary of its shard and is sorted in from time to time.
"""

import struct
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.target.restic.pack import ID_BYTES, BlobKind, Entry

_REST = struct.Struct(">IIII")
_RECORD_BYTES = ID_BYTES + _REST.size
_TREE = 1 << 31
_SMALLEST_BATCH = 64


@dataclass(frozen=True, slots=True)
class Location:
    """One place where a blob is."""

    pack: bytes
    entry: Entry


class _Shard:
    """The records whose ids begin with one byte."""

    __slots__ = ("_records", "_starts", "_waiting")

    def __init__(self) -> None:
        self._records = b""
        self._starts: Sequence[int] = ()
        self._waiting: dict[bytes, list[bytes]] = {}

    def __len__(self) -> int:
        return len(self._records) // _RECORD_BYTES + sum(len(rests) for rests in self._waiting.values())

    def add(self, identity: bytes, rest: bytes) -> None:
        self._waiting.setdefault(identity, []).append(rest)
        if len(self._waiting) >= max(_SMALLEST_BATCH, len(self._records) // (32 * _RECORD_BYTES)):
            self.sort([identity + rest for identity, rests in self._waiting.items() for rest in rests])
            self._waiting = {}

    def sort(self, more: list[bytes]) -> None:
        """Sort records in. The same record twice is kept once."""
        records = list(dict.fromkeys(sorted(_split(self._records) + more)))
        self._records = b"".join(records)
        seconds = bytes(record[1] for record in records)
        self._starts = memoryview(
            struct.pack("257I", *(bisect_left(seconds, second) for second in range(257)))
        ).cast("I")

    def find(self, identity: bytes) -> Iterator[bytes]:
        """What follows the id in each of its records."""
        yield from self._waiting.get(identity, ())
        if self._records:
            at = self._starts[identity[1]] * _RECORD_BYTES
            end = self._starts[identity[1] + 1] * _RECORD_BYTES
            while (at := self._records.find(identity, at, end)) >= 0:
                if at % _RECORD_BYTES:  # another record's content that looks like the id
                    at += 1
                    continue
                yield self._records[at + ID_BYTES : at + _RECORD_BYTES]
                at += _RECORD_BYTES


class BlobIndex:
    """All blobs of a repository. May be used by several threads at once."""

    def __init__(self) -> None:
        self._shards = [_Shard() for _ in range(256)]
        self._packs = bytearray()
        self._turn = threading.Lock()

    def __len__(self) -> int:
        """Return how many places of blobs it knows."""
        return sum(len(shard) for shard in self._shards)

    def load(self, packs: Iterable[tuple[bytes, Sequence[Entry]]]) -> None:
        """Add all that index files list. A pack that several of them list is known once."""
        numbers: dict[bytes, int] = {}
        shards: list[bytearray] = [bytearray() for _ in self._shards]
        for pack, entries in packs:
            number = numbers.get(pack)
            if number is None:
                number = numbers[pack] = self._new_pack(pack)
            for entry in entries:
                shards[entry.identity[0]] += entry.identity + _rest(number, entry)
        del numbers
        for shard, added in zip(self._shards, shards, strict=True):
            if added:
                with self._turn:
                    shard.sort(_split(added))
                added.clear()

    def add(self, pack: bytes, entries: Iterable[Entry]) -> None:
        """Add what a new pack holds."""
        number = self._new_pack(pack)
        with self._turn:
            for entry in entries:
                self._shards[entry.identity[0]].add(entry.identity, _rest(number, entry))

    def find(self, kind: BlobKind, identity: bytes) -> list[Location]:
        """Return all places of a blob; none if it is not there."""
        found = []
        for rest in self._rests(identity):
            marked, offset, length, plain_bytes = _REST.unpack(rest)
            if (marked & _TREE != 0) is (kind is BlobKind.TREE):
                at = (marked & ~_TREE) * ID_BYTES
                entry = Entry(kind, identity, offset, length, plain_bytes or None)
                found.append(Location(bytes(self._packs[at : at + ID_BYTES]), entry))
        return found

    def has(self, kind: BlobKind, identity: bytes) -> bool:
        """Whether a blob is somewhere."""
        wanted = kind is BlobKind.TREE
        return any((rest[0] >= _TREE >> 24) is wanted for rest in self._rests(identity))

    def _rests(self, identity: bytes) -> list[bytes]:
        with self._turn:
            return list(self._shards[identity[0]].find(identity))

    def _new_pack(self, pack: bytes) -> int:
        with self._turn:
            self._packs += pack
            return len(self._packs) // ID_BYTES - 1


def _rest(pack_number: int, entry: Entry) -> bytes:
    marked = pack_number | (_TREE if entry.kind is BlobKind.TREE else 0)
    return _REST.pack(marked, entry.offset, entry.length, entry.plain_bytes or 0)


def _split(records: bytes | bytearray) -> list[bytes]:
    return [bytes(records[at : at + _RECORD_BYTES]) for at in range(0, len(records), _RECORD_BYTES)]
