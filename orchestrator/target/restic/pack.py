"""Packs: many sealed blobs in one file, and a sealed header that lists them at its end. Pure.

    sealed blobs, one after the other from 0 | sealed header | length of that, uint32 little-endian

An entry of the header: type, sealed length (uint32), for compressed blobs plain length (uint32), SHA-256 of the
plain content. So a repository can be read without any index.
"""

import hashlib
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.target.restic import compression
from orchestrator.target.restic.crypto import OVERHEAD_BYTES, Key
from orchestrator.target.restic.errors import Damaged
from orchestrator.target.restic.fields import UINT32
from orchestrator.units import MIB

SMALLEST_TARGET_BYTES = 16 * MIB
LARGEST_TARGET_BYTES = 64 * MIB
CHUNK_BYTES = 4 * MIB
"""How long the chunks are that we make of a file; its last one may be shorter."""
LARGEST_BLOB_BYTES = 1 << 30
"""Of a blob's plain content: what is longer is not read, so that nobody can have us take all memory."""
_LARGEST_HEADER_BYTES = 16 * MIB
_ABOVE_TARGET_BYTES = CHUNK_BYTES + MIB
"""What a pack of chunks may be longer than it is to be: the last chunk, and a header."""

_LENGTH = struct.Struct("<I")
_RAW = struct.Struct("<BI32s")
_COMPRESSED = struct.Struct("<BII32s")


class BlobKind(StrEnum):
    """What a blob is: a piece of a file, or a folder."""

    DATA = "data"
    TREE = "tree"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a blob lies in its pack. `plain_bytes` is None if it is not compressed, `length` is as sealed."""

    kind: BlobKind
    identity: bytes
    offset: int
    length: int
    plain_bytes: int | None

    @property
    def content_bytes(self) -> int:
        """How long its content is."""
        return self.length - OVERHEAD_BYTES if self.plain_bytes is None else self.plain_bytes

    def problem(self) -> str:
        """Why there can be no such blob, or ""."""
        if self.length < OVERHEAD_BYTES or self.offset < 0 or self.offset + self.length > UINT32:
            return f"a blob of {self.length} bytes at {self.offset}"
        if self.plain_bytes is not None and not 0 < self.plain_bytes <= LARGEST_BLOB_BYTES:
            return f"a blob of {self.plain_bytes} bytes once decompressed"
        return ""


@dataclass(frozen=True, slots=True)
class SealedBlob:
    """A blob as it goes into a pack."""

    kind: BlobKind
    identity: bytes
    sealed: bytes | bytearray
    plain_bytes: int | None


@dataclass(frozen=True, slots=True)
class Pack:
    """A complete pack: the first `length` bytes of `memory`. Its name is `identity`, the SHA-256 of these."""

    identity: bytes
    memory: mmap.mmap
    length: int
    entries: tuple[Entry, ...]

    @property
    def content(self) -> memoryview:
        """All of it. It begins at the beginning of a page, so that it can be written past the host's cache."""
        return memoryview(self.memory)[: self.length]


def seal_blob(kind: BlobKind, identity: bytes, plain: bytes | memoryview, key: Key) -> SealedBlob:
    """Compress and seal a blob; raw if that is not smaller. `identity` is the SHA-256 of `plain`.

    Trees are always compressed: `restic prune` writes those anew that are not.
    """
    compressed = compression.compress(plain)
    if len(compressed) < len(plain) or (kind is BlobKind.TREE and plain):
        return SealedBlob(kind, identity, key.seal(compressed), len(plain))
    return SealedBlob(kind, identity, key.seal(plain), None)


def open_blob(sealed: bytes | bytearray, entry: Entry, key: Key, *, file: str) -> bytes:
    """Return a blob's content, which is what its id says. Raises Damaged that names `file`, the pack."""
    where = f"the blob at {entry.offset} in {file}"
    if len(sealed) != entry.length:
        raise Damaged(where, f"{len(sealed)} of its {entry.length} bytes are there")
    plain = key.open(sealed, file=where)
    if entry.plain_bytes is not None:
        plain = compression.decompress(plain, length=entry.plain_bytes, file=where)
    if hashlib.sha256(plain).digest() != entry.identity:
        raise Damaged(where, f"its content is not that of {entry.identity.hex()}")
    return plain


class PackBuilder:
    """A pack that fills up. Blobs of one kind only: `restic prune` writes mixed ones anew.

    `memory` is that of a pack that is not needed any more. New memory is dear: the kernel clears each page of it.
    """

    def __init__(self, kind: BlobKind, target_bytes: int, memory: mmap.mmap | None = None) -> None:
        self.kind = kind
        self._target_bytes = target_bytes
        self._memory = memory or mmap.mmap(-1, target_bytes + _ABOVE_TARGET_BYTES)
        self._length = 0
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return self._length

    @property
    def full(self) -> bool:
        """Whether it has reached the size that packs are to have."""
        return self._length >= self._target_bytes

    def add(self, blob: SealedBlob) -> Entry:
        """Put a blob at its end; return where it is."""
        entry = Entry(blob.kind, blob.identity, self._length, len(blob.sealed), blob.plain_bytes)
        self._append(blob.sealed)
        self._entries.append(entry)
        return entry

    def sealed(self, entry: Entry) -> bytes:
        """Return a copy of a blob in it. From any thread, until its memory is somebody else's."""
        return self._memory[entry.offset : entry.offset + entry.length]

    def finish(self, key: Key) -> Pack:
        """Return the pack. It must have a blob, and cannot be used afterwards."""
        header = key.seal(encode_header(self._entries))
        self._append(header)
        self._append(_LENGTH.pack(len(header)))
        with memoryview(self._memory) as view:
            identity = hashlib.sha256(view[: self._length]).digest()
        return Pack(identity, self._memory, self._length, tuple(self._entries))

    def _append(self, part: bytes | bytearray) -> None:
        end = self._length + len(part)
        if end > len(self._memory):  # for a large tree
            larger = mmap.mmap(-1, 2 * end)
            larger[: self._length] = self._memory[: self._length]
            self._memory = larger
        self._memory[self._length : end] = part
        self._length = end


def encode_header(entries: Sequence[Entry]) -> bytes:
    """Return a header before it is sealed."""
    return b"".join(
        _RAW.pack(_type(entry), entry.length, entry.identity)
        if entry.plain_bytes is None
        else _COMPRESSED.pack(_type(entry), entry.length, entry.plain_bytes, entry.identity)
        for entry in entries
    )


def decode_header(header: bytes, *, blobs_bytes: int, file: str) -> tuple[Entry, ...]:
    """Return what a header lists. Raises Damaged if that is not exactly the `blobs_bytes` bytes before it."""
    entries: list[Entry] = []
    at = offset = 0
    while at < len(header):
        compressed = header[at] in (2, 3)
        layout = _COMPRESSED if compressed else _RAW
        if header[at] > 3 or len(header) - at < layout.size:
            raise Damaged(file, f"entry {len(entries) + 1} of its header is none")
        number, length, *plain, identity = layout.unpack_from(header, at)
        kind = BlobKind.TREE if number & 1 else BlobKind.DATA
        entry = Entry(kind, identity, offset, length, plain[0] if compressed else None)
        if problem := entry.problem():
            raise Damaged(file, f"its header lists {problem}")
        entries.append(entry)
        at += layout.size
        offset += length
    if offset != blobs_bytes or not entries:
        raise Damaged(file, f"its header lists {offset} bytes of blobs, and {blobs_bytes} are there")
    return tuple(entries)


def header_bytes(tail: bytes, *, pack_bytes: int, file: str) -> int:
    """Return the sealed header's length from a pack's last 4 bytes. Raises Damaged."""
    length = _LENGTH.unpack(tail)[0] if len(tail) == _LENGTH.size else 0
    if not OVERHEAD_BYTES < length <= min(pack_bytes - len(tail), _LARGEST_HEADER_BYTES):
        raise Damaged(file, f"a header of {length} bytes at the end of {pack_bytes} bytes")
    return length


def list_pack(content: bytes | bytearray, key: Key, *, file: str) -> tuple[Entry, ...]:
    """Return what a whole pack holds, from its header. Raises Damaged."""
    view = memoryview(content)
    length = header_bytes(bytes(view[-_LENGTH.size :]), pack_bytes=len(view), file=file)
    blobs_bytes = len(view) - _LENGTH.size - length
    header = key.open(view[blobs_bytes : -_LENGTH.size], file=file)
    return decode_header(header, blobs_bytes=blobs_bytes, file=file)


def _type(entry: Entry) -> int:
    return (entry.kind is BlobKind.TREE) + 2 * (entry.plain_bytes is not None)
