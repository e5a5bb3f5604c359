"""Index files: which blobs are in which pack, so that headers need not be read. Pure.

All of them together are the index. What restic 0.14 writes as `supersedes` is for nobody: it is ignored on
reading.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from orchestrator.target.restic import envelope
from orchestrator.target.restic.crypto import Key
from orchestrator.target.restic.errors import Damaged
from orchestrator.target.restic.fields import UINT32, Fields
from orchestrator.target.restic.pack import BlobKind, Entry

Listed = tuple[bytes, Sequence[Entry]]
"""A pack's id and what it holds."""


def seal(packs: Iterable[Listed], key: Key) -> bytes:
    """Return an index file. Each pack must be in one index file only."""
    documents = [
        {"id": identity.hex(), "blobs": [_blob(entry) for entry in entries]} for identity, entries in packs
    ]
    return envelope.seal(key, {"packs": documents})


def open_sealed(stored: bytes, key: Key, *, file: str) -> Iterator[Listed]:
    """Return the packs that an index file lists. Raises Damaged, at the latest where the damage is."""
    for listed in envelope.open_sealed(key, stored, file=file).objects("packs"):
        yield listed.identity("id"), [_entry(blob) for blob in listed.objects("blobs")]


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


def _entry(blob: Fields) -> Entry:
    kind = blob.text("type")
    if kind not in (BlobKind.DATA, BlobKind.TREE):
        raise Damaged(blob.file, "its field 'type' is neither data nor tree")
    entry = Entry(
        BlobKind(kind),
        blob.identity("id"),
        blob.integer("offset", largest=UINT32),
        blob.integer("length", largest=UINT32),
        blob.integer("uncompressed_length", 0, largest=UINT32) or None,
    )
    if problem := entry.problem():
        raise Damaged(blob.file, f"it lists {problem}")
    return entry
