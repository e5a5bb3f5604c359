"""What an NBD server needs of whatever it serves: a backup's sink, a snapshot that is read back. A contract.

Concurrency: all methods of one export are called side by side on one event loop, from several connections too, as
many as `connection.Limits` allows; requests that overlap have no order. They may take as long as they
like: QEMU waits for ever, so an answer held back is back-pressure. Work that blocks belongs to a thread.

Errors: an OSError is told to the client by its errno (`protocol.errno_of`; with ENOSPC a job of QEMU's pauses if
it was started so), anything else as EIO. Errors go to the server's `report`, too.

Cancellation: the client vanished or the server ends. What the range of a cancelled write holds is undefined.

Source: doc/proto.md of NetworkBlockDevice/nbd, "Request types", "Block size constraints".
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from orchestrator.nbd.protocol import Piece
from orchestrator.units import MIB

LONGEST_PAYLOAD_BYTES = 32 * MIB
"""Of one request; what QEMU and libnbd assume where nothing is said."""

Data = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """What offsets and lengths of requests should be. Raises ValueError for what the protocol does not allow.

    `minimum` (a power of two) divides all offsets and lengths, the export's size too, so it is 1 where disks of
    odd sizes are served. `preferred` (a power of two) is what is efficient. `maximum` bounds reads and writes.
    """

    minimum: int = 1
    preferred: int = 4096
    maximum: int = LONGEST_PAYLOAD_BYTES

    def __post_init__(self) -> None:
        powers = all(size > 0 and size & (size - 1) == 0 for size in (self.minimum, self.preferred))
        ordered = self.minimum <= self.preferred <= self.maximum <= LONGEST_PAYLOAD_BYTES
        if not (powers and ordered and self.preferred >= 512 and self.maximum % self.minimum == 0):
            raise ValueError(f"no client understands these block sizes: {self}")


class Export(ABC):
    """One disk. The server has checked before each call: 0 < length, within the disk, block sizes, writable."""

    read_only: bool = False
    block_sizes: BlockSizes = BlockSizes()
    description: str = ""
    """For people, in the list of exports; 4096 bytes at most."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Exactly the disk's size; constant while it is served."""

    @abstractmethod
    async def read(self, offset: int, length: int) -> Data:
        """`length` bytes from `offset` on. They are sent from where they are, so they must not change any more."""

    @contextlib.asynccontextmanager
    async def buffer(self, offset: int, length: int) -> AsyncIterator[memoryview]:  # noqa: ARG002  for those who pool
        """Where the `length` bytes of a write to `offset` are received: writable, so long, lent for the block.

        The block ends after `write`, or without it if the client vanishes. Waiting here, for a free buffer of
        a pool, say, holds up this connection's requests behind it, so it must not wait for any of those.
        """
        yield memoryview(bytearray(length))

    async def write(self, offset: int, data: memoryview) -> None:
        """Write `data`, which came by `buffer` and is not the export's any more when this returns.

        It is durable only after a `flush` that is called after this returned.
        """
        raise NotImplementedError

    async def write_zeroes(self, offset: int, length: int, *, may_be_hole: bool) -> None:
        """Make a range read as zero, 4 GiB at most at once; the space may be given back if it `may_be_hole`."""
        raise NotImplementedError

    async def trim(self, offset: int, length: int) -> None:
        """The client does not need a range any more, 4 GiB at most at once; it may read as anything."""
        del offset, length  # a hint only

    @abstractmethod
    async def flush(self) -> None:
        """Make durable all writes, zeroes and trims, of all connections, that returned before this was called.

        It also follows each write that has to be durable at once (FUA).
        """

    async def status(self, offset: int, length: int) -> Sequence[Piece]:
        """What is data there: pieces (`protocol.Allocation`) from `offset` on, at least one, none of them empty.

        They may cover less than `length` bytes: who has many of them returns the first thousands.
        """
        del offset
        return [Piece(length, 0)]
