"""Index files: which blobs are in which pack, so that headers need not be read. Pure.

All of them together are the index. What restic 0.14 writes as `supersedes` is for nobody: it is ignored on
reading.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, compress, repeat
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from orchestrator.target.restic import envelope, fields
from orchestrator.target.restic.crypto import OVERHEAD_BYTES, Key
from orchestrator.target.restic.errors import Damaged
from orchestrator.target.restic.fields import UINT32
from orchestrator.target.restic.pack import LARGEST_BLOB_BYTES, Entry

Listed = tuple[bytes, Sequence[Entry]]
"""A pack's id and what it holds."""


@dataclass(frozen=True, slots=True)
class Table:
    """Some packs as they are listed, by columns, since there are millions of blobs.

    `counts`: how many blobs each pack has; `ends`: where in it the last of them ends. The others are of the blobs,
    pack by pack, as in `Entry`; `plain_bytes` is 0 for one that is not compressed.
    """

    packs: list[bytes]
    counts: list[int]
    ends: list[int]
    identities: list[bytes]
    trees: list[bool]
    offsets: list[int]
    lengths: list[int]
    plain_bytes: list[int]

    def of(self, wanted: Sequence[bool]) -> "Table":
        """Return the part that is about some of the packs."""
        rows = list(chain.from_iterable(map(repeat, wanted, self.counts)))
        return Table(
            packs=list(compress(self.packs, wanted)),
            counts=list(compress(self.counts, wanted)),
            ends=list(compress(self.ends, wanted)),
            identities=list(compress(self.identities, rows)),
            trees=list(compress(self.trees, rows)),
            offsets=list(compress(self.offsets, rows)),
            lengths=list(compress(self.lengths, rows)),
            plain_bytes=list(compress(self.plain_bytes, rows)),
        )


class _Blob(msgspec.Struct, gc=False):
    id: str
    type: Literal["data", "tree"]
    offset: Annotated[int, Meta(ge=0, le=UINT32)]
    length: Annotated[int, Meta(ge=OVERHEAD_BYTES, le=UINT32)]
    uncompressed_length: Annotated[int, Meta(ge=0, le=LARGEST_BLOB_BYTES)] = 0


class _Pack(msgspec.Struct, gc=False):
    id: str
    blobs: list[_Blob] | None = None


class _Index(msgspec.Struct, gc=False):
    packs: list[msgspec.Raw] | None = None


_INDEX = msgspec.json.Decoder(_Index)
_PACK = msgspec.json.Decoder(_Pack)
_PACKS_AT_ONCE = 100
"""More do not fit into the processor's cache, which takes half as long again."""


def seal(packs: Iterable[Listed], key: Key) -> bytes:
    """Return an index file. Each pack must be in one index file only."""
    documents = [
        {"id": identity.hex(), "blobs": [_blob(entry) for entry in entries]} for identity, entries in packs
    ]
    return envelope.seal(key, {"packs": documents})


def open_sealed(stored: bytes, key: Key, *, file: str) -> Iterator[Table]:
    """Return what an index file lists, some packs at a time. Raises Damaged, at the latest where the damage is."""
    text = envelope.open_text(key, stored, file=file)
    try:
        packs = _INDEX.decode(text).packs or []
        for at in range(0, len(packs), _PACKS_AT_ONCE):
            yield _table([_PACK.decode(pack) for pack in packs[at : at + _PACKS_AT_ONCE]], file=file)
    except (ValueError, RecursionError) as error:
        raise Damaged(file, f"it is no index: {error}") from None


def _table(packs: list[_Pack], *, file: str) -> Table:
    blobs = [blob for pack in packs for blob in pack.blobs or ()]
    counts = [len(pack.blobs or ()) for pack in packs]
    offsets, lengths = [blob.offset for blob in blobs], [blob.length for blob in blobs]
    ends = list(map(operator.add, offsets, lengths))
    starts = accumulate(counts, initial=0)
    table = Table(
        packs=fields.identities([pack.id for pack in packs], "id", file=file),
        counts=counts,
        ends=[max(ends[at : at + count], default=0) for at, count in zip(starts, counts, strict=False)],
        identities=fields.identities([blob.id for blob in blobs], "id", file=file),
        trees=[blob.type == "tree" for blob in blobs],
        offsets=offsets,
        lengths=lengths,
        plain_bytes=[blob.uncompressed_length for blob in blobs],
    )
    if max(table.ends, default=0) > UINT32:
        raise Damaged(file, "it lists a blob that ends beyond 4 GiB")
    return table


def _blob(entry: Entry) -> dict[str, Any]:
    document = {
        "id": entry.identity.hex(),
        "type": entry.kind.value,
        "offset": entry.offset,
        "length": entry.length,
    }
    if entry.plain_bytes is not None:
        document["uncompressed_length"] = entry.plain_bytes
    return document
