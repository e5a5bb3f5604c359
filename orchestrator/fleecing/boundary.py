"""The copy-before-write boundary of a disk that is copied window by window. Pure.

    |  done  |  done  | copied now |  waits  |  done  |  waits  |

What is done is on the target: its old data is discarded, and the guest's writes there are not copied any more.
Windows can be done in any order. Those of one disk are copied strictly one at a time; disks side by side.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.units import MIB

WINDOW_BYTES = 512 * MIB
"""A whole number of clusters of any image. Chosen by benchmarks/windows.py: smaller ones cost time."""

CELLS = 64
"""Into so many equal pieces a disk is cut to be drawn."""


class Cell(StrEnum):
    """What a piece of a disk is drawn as: backed up, being copied, held in fleecing, or only waiting."""

    DONE = "#"
    COPYING = ">"
    HELD = "o"
    WAITING = "."


Extent = tuple[int, int]
"""A piece of a disk: offset and length in bytes."""


@dataclass(frozen=True, slots=True)
class Window:
    """A contiguous part of a disk that one block job copies. `number` counts from 0 in the disk's order."""

    number: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Boundary:
    """How far a disk is: the numbers of the windows that are done, and of the one that is copied now.

    `held`: those that held old data when a window was last chosen.
    """

    disk_bytes: int
    window_bytes: int
    done: frozenset[int] = frozenset()
    current: int | None = None
    held: frozenset[int] = frozenset()

    @property
    def count(self) -> int:
        """How many windows the disk has."""
        return -(-self.disk_bytes // self.window_bytes)

    def window(self, number: int) -> Window:
        """One of them."""
        offset_bytes = number * self.window_bytes
        return Window(number, offset_bytes, min(self.window_bytes, self.disk_bytes - offset_bytes))

    def next(self, held_bytes: Mapping[int, int]) -> Window | None:
        """The window to copy next: the one that holds most old data, of equal ones the first; None: all are done.

        `held_bytes` is by window; those that it does not name hold nothing.
        """
        waiting = (number for number in range(self.count) if number not in self.done)
        number = max(waiting, key=lambda number: (held_bytes.get(number, 0), -number), default=None)
        return None if number is None else self.window(number)

    def holding(self, held_bytes: Mapping[int, int]) -> "Boundary":
        """The same, once it is known which windows hold old data; by number."""
        return replace(self, held=frozenset(number for number, size in held_bytes.items() if size))

    def started(self, window: Window) -> "Boundary":
        """Where it is once this window is being copied."""
        return replace(self, current=window.number)

    def finished(self) -> "Boundary":
        """Where it is once the current window is on the target."""
        assert self.current is not None  # noqa: S101
        return replace(self, done=self.done | {self.current}, current=None)

    def failed(self) -> "Boundary":
        """Where it is if that failed: the window waits again."""
        return replace(self, current=None)

    @property
    def done_bytes(self) -> int:
        """How much is on the target."""
        return sum(self.window(number).size_bytes for number in self.done)

    @property
    def started_bytes(self) -> int:
        """The same with all of the current window."""
        return self.done_bytes + (self.window(self.current).size_bytes if self.current is not None else 0)

    def strip(self) -> str:
        """The disk from its beginning to its end, drawn in cells. What is not done nowhere looks done."""
        return "".join(map(self._cell, range(CELLS)))

    def _cell(self, at: int) -> Cell:
        first = at * self.disk_bytes // CELLS // self.window_bytes
        last = max(first, (((at + 1) * self.disk_bytes - 1) // CELLS) // self.window_bytes)
        left = set(range(first, last + 1)) - self.done
        if not left:
            return Cell.DONE
        if self.current in left:
            return Cell.COPYING
        return Cell.WAITING if left.isdisjoint(self.held) else Cell.HELD


def swept(size_bytes: int, copied_bytes: int) -> str:
    """The same of what one job copies from its beginning to its end."""
    done = copied_bytes * CELLS // size_bytes
    now = Cell.COPYING if copied_bytes else Cell.WAITING
    return (Cell.DONE * done + now + Cell.WAITING * CELLS)[:CELLS]


def may_go_on(disk: str, boundaries: Mapping[str, Boundary]) -> bool:
    """Whether a disk is not ahead of the VM's other disks: in proportion to its size, by one window at most.

    So no disk waits whole, holding the old data of all that its guest writes, while others are copied. The one
    that is furthest behind may always go on.
    """
    mine = boundaries[disk]
    return all(
        mine.done_bytes * other.disk_bytes <= other.started_bytes * mine.disk_bytes
        for other in boundaries.values()
    )


def by_window(extents: Iterable[Extent], window_bytes: int) -> Counter[int]:
    """How many bytes of the extents are in each window, by its number."""
    found: Counter[int] = Counter()
    for offset, length in extents:
        end = offset + length
        for number in range(offset // window_bytes, -(-end // window_bytes)):
            first, last = number * window_bytes, (number + 1) * window_bytes
            found[number] += min(end, last) - max(offset, first)
    return found
