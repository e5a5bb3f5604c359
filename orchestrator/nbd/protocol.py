"""NBD on the wire: fixed newstyle negotiation, structured replies, block status. Pure.

Source: doc/proto.md of NetworkBlockDevice/nbd; for the contexts of dirty bitmaps docs/interop/nbd.txt of QEMU.
All numbers are big-endian.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

GREETING = struct.Struct(">8s8sH")
PASSWORD, HAVE_OPTION = b"NBDMAGIC", b"IHAVEOPT"
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
CLIENT_FLAGS = struct.Struct(">I")

OPTION = struct.Struct(">8sII")
OPTION_REPLY = struct.Struct(">QIII")
OPTION_REPLY_MAGIC = 0x0003E889045565A9
LONGEST_OPTION_BYTES = 64 << 10
"""Longer replies to options are refused: names and messages have 4096 bytes at most."""

REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC = 0x25609513
SIMPLE = struct.Struct(">IIQ")
SIMPLE_MAGIC = 0x67446698
CHUNK_REST = struct.Struct(">HHQI")
CHUNK_MAGIC = 0x668E33EF
MAGIC = struct.Struct(">I")
DONE = 1


class Option(IntEnum):
    """What is negotiated."""

    GO = 7
    STRUCTURED_REPLY = 8
    SET_META_CONTEXT = 10


class OptionReply(IntEnum):
    """What a server says to an option; an error has the highest bit set."""

    ACK = 1
    INFO = 3
    META_CONTEXT = 4


OPTION_ERROR = 1 << 31
INFO_EXPORT = 0


class Act(IntEnum):
    """What a request asks for."""

    DISCONNECT = 2
    TRIM = 4
    BLOCK_STATUS = 7


class ChunkKind(IntEnum):
    """What a chunk of a structured reply is."""

    NONE = 0
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


CHUNK_ERROR = 1 << 15


class ProtocolError(Exception):
    """What the other side sent is no NBD."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an export and its status in one context: `length` bytes, from where the one before ended."""

    length: int
    status: int


def encode_option(option: Option, data: bytes = b"") -> bytes:
    """A client's option."""
    return OPTION.pack(HAVE_OPTION, option, len(data)) + data


def go(export: str) -> bytes:
    """The data of GO: use this export, and say nothing about it but its size."""
    name = export.encode()
    return struct.pack(">I", len(name)) + name + struct.pack(">H", 0)


def set_meta_context(export: str, context: str) -> bytes:
    """The data of SET_META_CONTEXT, for one context."""
    name, query = export.encode(), context.encode()
    return struct.pack(">I", len(name)) + name + struct.pack(">II", 1, len(query)) + query


def decode_option_reply(header: bytes, option: Option) -> tuple[int, int]:
    """Type and length in bytes of a reply to an option. Raises ProtocolError."""
    magic, answered, kind, length = OPTION_REPLY.unpack(header)
    if magic != OPTION_REPLY_MAGIC or answered != option or length > LONGEST_OPTION_BYTES:
        raise ProtocolError(f"this is no reply to option {option}: {header.hex()}")
    return kind, length


def encode_request(act: Act, cookie: int, offset: int, length: int) -> bytes:
    """A request of the transmission phase."""
    return REQUEST.pack(REQUEST_MAGIC, 0, act, cookie, offset, length)


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
