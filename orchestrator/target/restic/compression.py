"""zstd, bounded: what comes out is never longer than what was announced, whatever goes in. Pure."""

import threading

import zstandard

from orchestrator.target.restic.errors import Damaged

LEVEL = 1


class _Own(threading.local):
    """What each thread has for itself: making one takes a twentieth of the time that a chunk does."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL)


_own = _Own()


def compress(plain: bytes | memoryview) -> bytes:
    """Return one zstd frame."""
    return _own.compressor.compress(plain)


def decompress(compressed: bytes | memoryview, *, length: int, file: str) -> bytes:
    """Return exactly `length` bytes. Raises Damaged that names `file`."""
    plain = decompress_at_most(compressed, limit=length, file=file)
    if len(plain) != length:
        raise Damaged(file, f"{len(plain)} bytes where {length} are announced")
    return plain


def decompress_at_most(compressed: bytes | memoryview, *, limit: int, file: str) -> bytes:
    """Return what is in one frame or several. Raises Damaged, also if it is more than `limit` bytes."""
    try:
        announced = zstandard.frame_content_size(compressed)
        if announced > limit:
            raise Damaged(file, f"{announced} bytes where {limit} at most are expected")
        with zstandard.ZstdDecompressor().stream_reader(compressed, read_across_frames=True) as reader:
            plain = reader.read(limit + 1 if announced < 0 else announced + 1)
    except (zstandard.ZstdError, MemoryError, ValueError):
        raise Damaged(file, "it does not decompress") from None
    if len(plain) > limit:
        raise Damaged(file, f"more than the {limit} bytes that are expected")
    if announced >= 0 and len(plain) < announced:
        raise Damaged(file, f"it ends after {len(plain)} of {announced} bytes")
    return plain
