"""NBD on the wire, for both sides: fixed newstyle negotiation, simple and structured replies, block status. Pure.

Source: doc/proto.md of NetworkBlockDevice/nbd, whose chapters are named below; for the contexts of dirty bitmaps
docs/interop/nbd.txt of QEMU. All numbers are big-endian; lengths and offsets are bytes. Whatever is decoded here
comes from the other side and is not trusted: nothing is allocated by a length that was not compared first.
"""

import errno
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag

# Newstyle negotiation -----------------------------------------------------------------------------------------

GREETING = struct.Struct(">8s8sH")
PASSWORD, HAVE_OPTION = b"NBDMAGIC", b"IHAVEOPT"
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
CLIENT_FLAGS = struct.Struct(">I")

OPTION = struct.Struct(">8sII")
OPTION_REPLY = struct.Struct(">QIII")
OPTION_REPLY_MAGIC = 0x0003E889045565A9
LONGEST_OPTION_BYTES = 64 << 10
"""Longer options, and longer replies to them, are refused: names and messages have 4096 bytes at most."""
LONGEST_NAME_BYTES = 4096
"""Of any string ("String handling")."""

# Transmission -------------------------------------------------------------------------------------------------

REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC = 0x25609513
SIMPLE = struct.Struct(">IIQ")
SIMPLE_MAGIC = 0x67446698
CHUNK_REST = struct.Struct(">HHQI")
CHUNK_MAGIC = 0x668E33EF
MAGIC = struct.Struct(">I")
CHUNK = struct.Struct(">IHHQI")
DONE = 1

ALLOCATION = "base:allocation"
ALLOCATION_ID = 1
"""How block status names its context; ours to choose."""


class Option(IntEnum):
    """What is negotiated ("Option types")."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReply(IntEnum):
    """What a server says to an option ("Option reply types"); an error has the highest bit set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERROR_UNSUPPORTED = (1 << 31) + 1
    ERROR_INVALID = (1 << 31) + 3
    ERROR_UNKNOWN = (1 << 31) + 6


OPTION_ERROR = 1 << 31
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3


class Can(IntFlag):
    """What an export offers ("Transmission flags")."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    FLUSH = 1 << 2
    FUA = 1 << 3
    TRIM = 1 << 5
    WRITE_ZEROES = 1 << 6
    DF = 1 << 7
    MULTI_CONN = 1 << 8


class Act(IntEnum):
    """What a request asks for ("Request types")."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


_NAMES: dict[int, str] = {act.value: act.name for act in Act}


class RequestFlag(IntFlag):
    """How it is to be done ("Command flags")."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3


class ChunkKind(IntEnum):
    """What a chunk of a structured reply is ("Structured reply types")."""

    NONE = 0
    OFFSET_DATA = 1
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


CHUNK_ERROR = 1 << 15


class Allocation(IntFlag):
    """The status in the context base:allocation ("Metadata querying"). Data is neither."""

    HOLE = 1
    ZERO = 2


class Errno(IntEnum):
    """The errors that may be on the wire ("Error values")."""

    PERM = 1
    IO = 5
    NOMEM = 12
    INVAL = 22
    NOSPC = 28
    OVERFLOW = 75
    NOTSUP = 95
    SHUTDOWN = 108


_ERRNOS = {
    errno.EPERM: Errno.PERM,
    errno.EACCES: Errno.PERM,
    errno.EROFS: Errno.PERM,
    errno.ENOMEM: Errno.NOMEM,
    errno.EINVAL: Errno.INVAL,
    errno.ENOSPC: Errno.NOSPC,
    errno.EDQUOT: Errno.NOSPC,
    errno.EFBIG: Errno.NOSPC,
    errno.EOVERFLOW: Errno.OVERFLOW,
    errno.ENOTSUP: Errno.NOTSUP,
    errno.ESHUTDOWN: Errno.SHUTDOWN,
}


class ProtocolError(Exception):
    """What the other side sent is no NBD."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an export and its status in one context: `length` bytes, from where the one before ended."""

    length: int
    status: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `act` and `flags` are whatever the client sent, known or not."""

    flags: int
    act: int
    cookie: int
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{_NAMES.get(self.act, self.act)} of {self.length} bytes at {self.offset}"


# What a client sends, and how it understands the answers ------------------------------------------------------


def encode_option(option: Option, data: bytes = b"") -> bytes:
    """A client's option."""
    return OPTION.pack(HAVE_OPTION, option, len(data)) + data


def go(export: str, *infos: int) -> bytes:
    """The data of GO and INFO: this export; say its size, and `infos` about it."""
    return _text(export) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def set_meta_context(export: str, *contexts: str) -> bytes:
    """The data of SET_META_CONTEXT and LIST_META_CONTEXT."""
    queries = b"".join(_text(context) for context in contexts)
    return _text(export) + struct.pack(">I", len(contexts)) + queries


def decode_option_reply(header: bytes, option: Option) -> tuple[int, int]:
    """Type and length in bytes of a reply to an option. Raises ProtocolError."""
    magic, answered, kind, length = OPTION_REPLY.unpack(header)
    if magic != OPTION_REPLY_MAGIC or answered != option or length > LONGEST_OPTION_BYTES:
        raise ProtocolError(f"this is no reply to option {option}: {header.hex()}")
    return kind, length


def encode_request(act: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    """A request of the transmission phase; the data of a write follows it."""
    return REQUEST.pack(REQUEST_MAGIC, flags, act, cookie, offset, length)


def decode_pieces(payload: bytes) -> Iterator[Piece]:
    """What a chunk of block status holds: pieces from the request's offset on. Raises ProtocolError."""
    if len(payload) < 12 or len(payload) % 8 != 4:
        raise ProtocolError(f"block status in {len(payload)} bytes")
    for length, status in struct.iter_unpack(">II", payload[4:]):
        if length == 0:
            raise ProtocolError("block status of nothing")
        yield Piece(length, status)


def decode_error(payload: bytes) -> str:
    """What a chunk of an error says. Raises ProtocolError."""
    if len(payload) < 6:
        raise ProtocolError(f"an error in {len(payload)} bytes")
    number, length = struct.unpack_from(">IH", payload)
    return payload[6 : 6 + length].decode(errors="replace") or f"error {number}"


# What a server sends, and how it understands the questions ----------------------------------------------------


def encode_greeting() -> bytes:
    """What a server says first."""
    return GREETING.pack(PASSWORD, HAVE_OPTION, FIXED_NEWSTYLE | NO_ZEROES)


def decode_client_flags(data: bytes) -> int:
    """What the client understands. Raises ProtocolError for what this server never offered."""
    (flags,) = CLIENT_FLAGS.unpack(data)
    if flags & ~(FIXED_NEWSTYLE | NO_ZEROES):
        raise ProtocolError(f"client flags {flags:x}")
    return int(flags)


def decode_option(header: bytes) -> tuple[int, int]:
    """Type and length in bytes of a client's option. Raises ProtocolError."""
    magic, option, length = OPTION.unpack(header)
    if magic != HAVE_OPTION:
        raise ProtocolError(f"this is no option: {header.hex()}")
    if length > LONGEST_OPTION_BYTES:
        raise ProtocolError(f"option {option} has {length} bytes")
    return option, length


def encode_option_reply(option: int, kind: OptionReply, data: bytes = b"") -> bytes:
    """One reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def encode_server(name: str, description: str) -> bytes:
    """The data of a reply to LIST: one export."""
    return _text(name) + description.encode()[:LONGEST_NAME_BYTES]


def encode_info(kind: int, data: bytes) -> bytes:
    """The data of a reply to INFO and GO."""
    return struct.pack(">H", kind) + data


def encode_export_info(size_bytes: int, flags: int) -> bytes:
    """What EXPORT_NAME, and the information about an export in INFO and GO, tell."""
    return struct.pack(">QH", size_bytes, flags)


def encode_block_sizes(minimum_bytes: int, preferred_bytes: int, maximum_bytes: int) -> bytes:
    """The data of the information about block sizes ("Block size constraints")."""
    return struct.pack(">III", minimum_bytes, preferred_bytes, maximum_bytes)


def encode_context(number: int, name: str) -> bytes:
    """The data of a reply to SET_META_CONTEXT and LIST_META_CONTEXT."""
    return struct.pack(">I", number) + name.encode()


def decode_name(data: bytes) -> str:
    """A string of the whole of `data`. Raises ProtocolError."""
    if len(data) > LONGEST_NAME_BYTES:
        raise ProtocolError(f"a string of {len(data)} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"a string that is not UTF-8: {error}") from error


def decode_go(data: bytes) -> tuple[str, tuple[int, ...]]:
    """Export and wanted information of INFO and GO. Raises ProtocolError."""
    name, rest = _take_text(data)
    count, rest = _take_number(rest, 2)
    if len(rest) != 2 * count:
        raise ProtocolError(f"{count} kinds of information in {len(rest)} bytes")
    return name, struct.unpack(f">{count}H", rest)


def decode_meta_context(data: bytes) -> tuple[str, list[str]]:
    """Export and queries of SET_META_CONTEXT and LIST_META_CONTEXT. Raises ProtocolError."""
    name, rest = _take_text(data)
    count, rest = _take_number(rest, 4)
    queries: list[str] = []
    while rest and len(queries) < count:
        query, rest = _take_text(rest)
        queries.append(query)
    if rest or len(queries) != count:
        raise ProtocolError(f"{len(queries)} of {count} queries, and {len(rest)} bytes more")
    return name, queries


def decode_request(header: bytes) -> Request:
    """A request of the transmission phase. Raises ProtocolError: where the next one begins is then unknown."""
    magic, flags, act, cookie, offset, length = REQUEST.unpack(header)
    if magic != REQUEST_MAGIC:
        raise ProtocolError(f"this is no request: {header.hex()}")
    return Request(flags, act, cookie, offset, length)


def encode_simple(cookie: int, error: int = 0) -> bytes:
    """A simple reply; the data of a read follows it."""
    return SIMPLE.pack(SIMPLE_MAGIC, error, cookie)


def encode_data_chunk(cookie: int, offset: int, length: int) -> bytes:
    """The only chunk of an answer to a read; its data follows. One chunk only is what DF asks for."""
    return CHUNK.pack(CHUNK_MAGIC, DONE, ChunkKind.OFFSET_DATA, cookie, 8 + length) + struct.pack(">Q", offset)


def encode_status_chunk(cookie: int, pieces: Iterable[Piece]) -> bytes:
    """The only chunk of an answer to a block status in base:allocation."""
    body = b"".join(struct.pack(">II", piece.length, piece.status) for piece in pieces)
    header = CHUNK.pack(CHUNK_MAGIC, DONE, ChunkKind.BLOCK_STATUS, cookie, 4 + len(body))
    return header + struct.pack(">I", ALLOCATION_ID) + body


def encode_error_chunk(cookie: int, error: int, message: str = "") -> bytes:
    """The only chunk of an answer that is an error."""
    said = message.encode()[:LONGEST_NAME_BYTES]
    header = CHUNK.pack(CHUNK_MAGIC, DONE, ChunkKind.ERROR, cookie, 6 + len(said))
    return header + struct.pack(">IH", error, len(said)) + said


def errno_of(error: BaseException) -> Errno:
    """How an error is told to a client: by the errno of an OSError if the protocol has it, else as EIO."""
    if isinstance(error, MemoryError):
        return Errno.NOMEM
    return _ERRNOS.get(error.errno or 0, Errno.IO) if isinstance(error, OSError) else Errno.IO


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">I", len(data)) + data


def _take_text(data: bytes) -> tuple[str, bytes]:
    length, rest = _take_number(data, 4)
    if length > len(rest):
        raise ProtocolError(f"a string of {length} bytes in {len(rest)}")
    return decode_name(rest[:length]), rest[length:]


def _take_number(data: bytes, size: int) -> tuple[int, bytes]:
    if len(data) < size:
        raise ProtocolError(f"a number of {size} bytes in {len(data)}")
    return int.from_bytes(data[:size], "big"), data[size:]
