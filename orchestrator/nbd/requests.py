"""Which requests are answered, and which are refused with what: before anything is allocated. Pure.

Source: doc/proto.md of NetworkBlockDevice/nbd, "Request types", "Command flags", "Error values".
"""

from collections.abc import Iterable

from orchestrator.nbd.handshake import Agreed
from orchestrator.nbd.protocol import Act, Errno, Piece, ProtocolError, Request, RequestFlag

MOST_PIECES = 1 << 14
"""In one answer to a block status."""

_WRITING = {Act.WRITE, Act.WRITE_ZEROES, Act.TRIM}
_FLAGS: dict[int, RequestFlag] = {
    Act.READ: RequestFlag.DF,
    Act.WRITE: RequestFlag(0),
    Act.FLUSH: RequestFlag(0),
    Act.TRIM: RequestFlag(0),
    Act.WRITE_ZEROES: RequestFlag.NO_HOLE,
    Act.BLOCK_STATUS: RequestFlag.REQ_ONE,
}


def payload_bytes(request: Request, agreed: Agreed) -> int:
    """How much data follows a request. Raises ProtocolError if that is more than any client may send."""
    if request.act != Act.WRITE:
        return 0
    if request.length > agreed.export.block_sizes.maximum:
        raise ProtocolError(f"{request}; at most {agreed.export.block_sizes.maximum} bytes were offered")
    return request.length


def held_bytes(request: Request) -> int:
    """How much memory a request takes while it is answered."""
    return request.length if request.act in (Act.READ, Act.WRITE) else 0


def refusal(request: Request, agreed: Agreed) -> Errno | None:
    """Why a request is not passed to the export, or None."""
    export = agreed.export
    allowed = _FLAGS.get(request.act)
    if allowed is None or _unknown_flags(request, agreed, allowed):
        return Errno.INVAL
    if request.act in _WRITING and export.read_only:
        return Errno.PERM
    if request.act == Act.FLUSH:
        return Errno.INVAL if request.offset or request.length else None
    if request.act == Act.BLOCK_STATUS and not agreed.allocation:
        return Errno.INVAL
    if request.offset + request.length > export.size_bytes:
        return Errno.NOSPC if request.act in (Act.WRITE, Act.WRITE_ZEROES) else Errno.INVAL
    if request.length == 0 or (request.offset | request.length) & (export.block_sizes.minimum - 1):
        return Errno.INVAL
    if request.act == Act.READ and request.length > export.block_sizes.maximum:
        return Errno.INVAL
    return None


def clipped(pieces: Iterable[Piece], request: Request) -> list[Piece]:
    """The pieces that are told: equal neighbours as one, not beyond the request, only the first if so wished.

    Raises ValueError for pieces that are no answer.
    """
    left = request.length
    found: list[Piece] = []
    for piece in pieces:
        if piece.length <= 0:
            raise ValueError(f"a piece of {piece.length} bytes in the status for {request}")
        length = min(piece.length, left)
        if found and found[-1].status == piece.status:
            found[-1] = Piece(found[-1].length + length, piece.status)
        elif len(found) == (1 if request.flags & RequestFlag.REQ_ONE else MOST_PIECES):
            break
        else:
            found.append(Piece(length, piece.status))
        left -= length
        if not left:
            break
    if not found:
        raise ValueError(f"no status for {request}")
    return found


def _unknown_flags(request: Request, agreed: Agreed, allowed: RequestFlag) -> bool:
    """FUA is valid with all requests where it is offered."""
    if not agreed.export.read_only:
        allowed |= RequestFlag.FUA
    if not agreed.structured:
        allowed &= ~RequestFlag.DF
    return bool(request.flags & ~int(allowed))  # ~ of an IntFlag has only the bits that have names
