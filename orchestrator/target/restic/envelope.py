"""Sealed documents: snapshots, locks and index files. Pure.

    seal(0x02 || zstd(JSON)), or seal(JSON) as version 1 of the format had it, and `config` still has

A file's name is the SHA-256 of what is stored, so its name is checked before anything else.
"""

import hashlib
import json
from typing import Any

from orchestrator.target.restic import compression, fields
from orchestrator.target.restic.crypto import Key
from orchestrator.target.restic.errors import Damaged
from orchestrator.target.restic.fields import Fields

_COMPRESSED = 2
LARGEST_BYTES = 1 << 30
"""An index file of restic's has some MiB, at most."""


def dump(value: dict[str, Any]) -> bytes:
    """Return compact JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def seal(key: Key, value: dict[str, Any], *, compressed: bool = True) -> bytes:
    """Return a document as it is stored."""
    text = dump(value)
    return bytes(key.seal(bytes([_COMPRESSED]) + compression.compress(text) if compressed else text))


def open_sealed(key: Key, stored: bytes, *, file: str) -> Fields:
    """Return a document. Raises Damaged."""
    return fields.parse(open_text(key, stored, file=file), file=file)


def open_text(key: Key, stored: bytes, *, file: str) -> bytes:
    """Return a document's JSON, which may be none. Raises Damaged."""
    plain = key.open(stored, file=file)
    if plain[:1] == bytes([_COMPRESSED]):
        plain = compression.decompress_at_most(memoryview(plain)[1:], limit=LARGEST_BYTES, file=file)
    elif plain[:1] not in (b"{", b"["):
        raise Damaged(file, "it is of a version that is not known")
    return plain


def check_name(stored: bytes, *, identity: bytes, file: str) -> None:
    """Raise Damaged unless a file's content is what its name says."""
    if hashlib.sha256(stored).digest() != identity:
        raise Damaged(file, f"its {len(stored)} bytes are not those that its name is the SHA-256 of")
