"""Which blob is where, for millions of them: about 50 bytes a blob. Pure.

A record of 48 bytes: id (32), number of the pack with the kind as its highest bit, offset, sealed length, plain
length (0: not compressed). By the id's first byte they are in 256 shards; in each they are sorted, and the second
byte says where to start, so that a lookup searches about n / 65 536 records. What is added waits in a small
dictionary of its shard and is sorted in from time to time.
"""

import struct
import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from orchestrator.target.restic.crypto import OVERHEAD_BYTES
from orchestrator.target.restic.fields import ID_BYTES
from orchestrator.target.restic.index_file import Table
from orchestrator.target.restic.pack import BlobKind, Entry

_REST = struct.Struct(">IIII")
_RECORD = struct.Struct(f">{ID_BYTES}sIIII")
_RECORD_BYTES = _RECORD.size
_WHOLE = struct.Struct(f"{_RECORD_BYTES}s")
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
        self._starts: Sequence[int] = bytes(257)
        self._waiting: dict[bytes, list[bytes]] = {}

    def __len__(self) -> int:
        return len(self._records) // _RECORD_BYTES + sum(len(rests) for rests in self._waiting.values())

    def add(self, identity: bytes, rest: bytes) -> None:
        self._waiting.setdefault(identity, []).append(rest)
        if len(self._waiting) >= max(_SMALLEST_BATCH, len(self._records) // (32 * _RECORD_BYTES)):
            added = (identity + rest for identity, rests in self._waiting.items() for rest in rests)
            self.sort(self._records + b"".join(added))
            self._waiting = {}

    def sort(self, records: bytes | bytearray) -> None:
        """Have these records, sorted. The same record twice is kept once."""
        ordered = sorted([record for (record,) in _WHOLE.iter_unpack(records)])
        self._records = b"".join(dict.fromkeys(ordered))
        seconds = self._records[1::_RECORD_BYTES]
        starts = (bisect_left(seconds, second) * _RECORD_BYTES for second in range(257))
        self._starts = memoryview(struct.pack("257Q", *starts)).cast("Q")

    def find(self, identity: bytes) -> list[bytes]:
        """What follows the id in each of its records."""
        found = [*self._waiting.get(identity, ())]
        records, end = self._records, self._starts[identity[1] + 1]
        at = records.find(identity, self._starts[identity[1]], end)
        while at >= 0 and at % _RECORD_BYTES:  # another record's content that looks like the id
            at = records.find(identity, at + 1, end)
        while at >= 0 and records.startswith(identity, at):
            found.append(records[at + ID_BYTES : at + _RECORD_BYTES])
            at += _RECORD_BYTES
        return found


class BlobIndex:
    """All blobs of a repository. May be used by several threads at once."""

    def __init__(self, packs: Iterable[bytes] = (), records: Iterable[bytearray] = ()) -> None:
        """Of records by the first byte of their ids, which are taken over."""
        self._shards = [_Shard() for _ in range(256)]
        self._packs = bytearray().join(packs)
        self._turn = threading.Lock()
        for shard, some in zip(self._shards, records, strict=False):
            shard.sort(some)
            some.clear()

    def __len__(self) -> int:
        """Return how many places of blobs it knows."""
        return sum(len(shard) for shard in self._shards)

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

    def lengths(self, kind: BlobKind, identities: Iterable[bytes]) -> list[int | None]:
        """Return how long the content of each of these blobs is; None for one that is not there."""
        with self._turn:
            return [self._length(kind, identity) for identity in identities]

    def _length(self, kind: BlobKind, identity: bytes) -> int | None:
        for rest in self._shards[identity[0]].find(identity):
            marked, _, length, plain_bytes = _REST.unpack(rest)
            if (marked >= _TREE) is (kind is BlobKind.TREE):
                content_bytes: int = plain_bytes or length - OVERHEAD_BYTES
                return content_bytes
        return None

    def _rests(self, identity: bytes) -> list[bytes]:
        with self._turn:
            return self._shards[identity[0]].find(identity)

    def _new_pack(self, pack: bytes) -> int:
        with self._turn:
            self._packs += pack
            return len(self._packs) // ID_BYTES - 1


class IndexBuilder:
    """Makes an index of what index files list, some packs at a time."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._records = [bytearray() for _ in range(256)]

    @property
    def packs(self) -> tuple[bytes, ...]:
        """The packs that it knows."""
        return tuple(self._numbers)

    def add(self, table: Table) -> None:
        """Add what is listed. A pack that is listed twice is known once."""
        numbers = [self._numbers.setdefault(pack, len(self._numbers)) for pack in table.packs]
        of_packs = chain.from_iterable(map(repeat, numbers, table.counts))
        marked = [number | _TREE if tree else number for number, tree in zip(of_packs, table.trees, strict=True)]
        columns = table.identities, marked, table.offsets, table.lengths, table.plain_bytes
        records = self._records
        for record in map(_RECORD.pack, *columns):
            records[record[0]] += record

    def finish(self) -> BlobIndex:
        """Return the index. The builder cannot be used afterwards."""
        return BlobIndex(self._numbers, self._records)


def _rest(pack_number: int, entry: Entry) -> bytes:
    marked = pack_number | (_TREE if entry.kind is BlobKind.TREE else 0)
    return _REST.pack(marked, entry.offset, entry.length, entry.plain_bytes or 0)
