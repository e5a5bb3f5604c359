"""Making whole chunks of what QEMU writes: pieces of any size, in any order, zeroes among them. Pure.

QEMU 9.1 and later write whole chunks, so that nothing is held here; older ones write 64 KiB at a time, and each
chunk is held until it is whole. What is not whole at the end lies over what the chunk held before: the parent's
content, zeroes in a full copy, or what it was made of earlier in the same run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from orchestrator.target.restic.pack import CHUNK_BYTES

Range = tuple[int, int]
"""Start and end in bytes."""


@dataclass(slots=True)
class Overlay:
    """A chunk of which a part was written: the ranges `written`, in order, which neither overlap nor touch."""

    content: bytearray
    written: list[Range] = field(default_factory=list)

    def add(self, start: int, data: bytes | bytearray | memoryview) -> None:
        """Put data over a part of it."""
        self.content[start : start + len(data)] = data
        self._note(start, start + len(data))

    def zero(self, start: int, end: int) -> None:
        """Put zeroes over a part of it."""
        self.content[start:end] = bytes(end - start)
        self._note(start, end)

    def over(self, before: bytes) -> bytearray:
        """The whole chunk, given what it held before."""
        whole = bytearray(before)
        for start, end in self.written:
            whole[start:end] = self.content[start:end]
        return whole

    @property
    def whole(self) -> bool:
        """Whether all of it was written."""
        return self.written == [(0, len(self.content))]

    def _note(self, start: int, end: int) -> None:
        apart = []
        for left, right in self.written:
            if right < start or left > end:
                apart.append((left, right))
            else:
                start, end = min(start, left), max(end, right)
        self.written = sorted([*apart, (start, end)])


@dataclass(frozen=True, slots=True)
class Whole:
    """A chunk that is whole: its number, and its content; None: nothing but zeroes.

    A bytearray was held here, a memoryview is a part of the request.
    """

    number: int
    content: bytearray | memoryview | None


class Assembly:
    """One disk's chunks. Sizes in bytes; the last chunk ends where the disk does."""

    def __init__(self, size_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._size_bytes = size_bytes
        self._chunk_bytes = chunk_bytes
        self._overlays: dict[int, Overlay] = {}

    @property
    def count(self) -> int:
        """How many chunks the disk has."""
        return -(-self._size_bytes // self._chunk_bytes)

    def size_of(self, number: int) -> int:
        """How long a chunk is."""
        return min(self._chunk_bytes, self._size_bytes - number * self._chunk_bytes)

    @property
    def held_bytes(self) -> int:
        """What chunks that are not whole occupy here."""
        return sum(len(overlay.content) for overlay in self._overlays.values())

    def write(self, offset: int, data: memoryview) -> Iterator[Whole]:
        """Take data; gives the chunks that are whole now. Whole pieces of it are given as they are, not copied."""
        for number, start, end in self._pieces(offset, len(data)):
            at = number * self._chunk_bytes + start - offset
            piece = data[at : at + end - start]
            if end - start == self.size_of(number):
                self._overlays.pop(number, None)
                yield Whole(number, piece)
            else:
                overlay = self._overlay(number)
                overlay.add(start, piece)
                yield from self._if_whole(number, overlay)

    def zero(self, offset: int, length: int) -> Iterator[Whole]:
        """Take zeroes; gives the chunks that are whole now."""
        for number, start, end in self._pieces(offset, length):
            if end - start == self.size_of(number):
                self._overlays.pop(number, None)
                yield Whole(number, None)
            else:
                overlay = self._overlay(number)
                overlay.zero(start, end)
                yield from self._if_whole(number, overlay)

    @property
    def parts(self) -> tuple[int, ...]:
        """The numbers of the chunks that are held, because they are not whole."""
        return tuple(self._overlays)

    def take(self, number: int) -> Overlay:
        """What was written of such a chunk, to be put over what it held before. It is not held any more."""
        return self._overlays.pop(number)

    def put_back(self, number: int, overlay: Overlay) -> None:
        """Hold again what could not be kept, below what was written since."""
        if number in self._overlays:
            since = self._overlays[number]
            for start, end in since.written:
                overlay.add(start, since.content[start:end])
        self._overlays[number] = overlay

    def _overlay(self, number: int) -> Overlay:
        if number not in self._overlays:
            self._overlays[number] = Overlay(bytearray(self.size_of(number)))
        return self._overlays[number]

    def _if_whole(self, number: int, overlay: Overlay) -> Iterator[Whole]:
        if overlay.whole:
            del self._overlays[number]
            yield Whole(number, overlay.content)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The parts of a range, by chunk: its number, start and end in it."""
        end = offset + length
        for number in range(offset // self._chunk_bytes, -(-end // self._chunk_bytes)):
            first = number * self._chunk_bytes
            yield number, max(offset, first) - first, min(end, first + self._chunk_bytes) - first
