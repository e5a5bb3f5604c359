"""What fleecing images hold while guests write: `python -m benchmarks.space`.

Three guests' ways of writing: anywhere, mostly to the last fifth of the disk (which comes last in the disk's
order), and from its beginning to its end. Full backups by one job that gives nothing back (all that QEMU before
9.1 can do), by QEMU's own job with `discard-source`, by windows in the disk's order, and by windows of which the
one that holds most goes first.

The least that anybody could hold, who knew all writes beforehand and copied at the same speed: what is about to be
written would be copied first. Of w(t) bytes that the guest has written to for the first time, c(t) could be copied
by then, so max(0, w(t) - c(t)) must be held. w(t) is counted by a bitmap in QEMU, c(t) is how far the run was.
"""

import asyncio
import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

from benchmarks import plot, report
from benchmarks.report import Section, Table
from benchmarks.windows import Bed
from orchestrator import aio
from orchestrator.fleecing import boundary, image
from orchestrator.model import Discard, Progress
from orchestrator.qemu import commands
from tests.guest.vm import MIB, GuestVm, Workload

DISK_BYTES = 160 * MIB
WINDOW_BYTES = 8 * MIB
BWLIMIT = 16 * MIB
RATE = 100
BITMAP = "written"
WRITING = {
    "anywhere": Workload("random", rate=RATE),
    "80 % to the last fifth": Workload("random", rate=RATE, skew=80),
    "from beginning to end": Workload("random", rate=RATE, sweep=True),
}
PLOTTED = "80 % to the last fifth"
LEAST = "the least possible"


@dataclass
class Held:
    """What a run's fleecing image held, and had to, each time that it said how far it is."""

    vm: GuestVm
    node: str = ""
    seen: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds since copying began, bytes held, bytes copied."""
    written: list[tuple[float, int]] = field(default_factory=list)
    """Seconds on the same clock, bytes that the guest has written to at least once."""
    _began: float | None = None

    def note(self, progress: Progress) -> None:
        """Take one more sample; they come about evenly."""
        if progress.phase == "copying":
            (disk,) = progress.disks
            self.seen.append((self._now(), disk.fleecing_bytes, disk.copied_bytes))

    async def count(self) -> None:
        """Follow what the guest writes, until cancelled."""
        while True:
            for entry in await self.vm.execute("query-named-block-nodes", {"flat": True}):
                for bitmap in entry.get("dirty-bitmaps", []):
                    if bitmap.get("name") == BITMAP and self._began is not None:
                        self.written.append((self._now(), bitmap["count"]))
            await asyncio.sleep(0.2)

    def held(self) -> list[tuple[float, float]]:
        """MiB over seconds."""
        return [(at, held / MIB) for at, held, _ in self.seen]

    def least(self) -> list[tuple[float, float]]:
        """MiB over seconds that had to be held."""
        points = []
        before = self.written[0][1]  # before the snapshot: not to be kept
        for at, count in self.written:
            written = count - before
            copied = [copied for when, _, copied in self.seen if when <= at]
            points.append((at, max(0, written - (copied[-1] if copied else 0)) / MIB))
        return points

    def _now(self) -> float:
        now = asyncio.get_running_loop().time()
        if self._began is None:
            self._began = now
        return now - self._began


@contextlib.contextmanager
def in_disks_order() -> Iterator[None]:
    """As if nobody knew what the windows hold."""

    async def held(*_: object) -> list[boundary.Extent]:
        return []

    with mock.patch.object(image, "held", held):
        yield


@contextlib.contextmanager
def nothing_given_back() -> Iterator[None]:
    """As if QEMU's job could not discard what it has copied."""
    real = commands.backup_job

    def backup_job(*arguments: object, **options: object) -> object:
        return real(*arguments, **options | {"discard_source": False})  # type: ignore[arg-type]

    with mock.patch.object(commands, "backup_job", backup_job):
        yield


WAYS = {
    "one job, nothing given back": (Discard.JOB, nothing_given_back),
    "one job with discard-source": (Discard.JOB, contextlib.nullcontext),
    "windows, in the disk's order": (Discard.WINDOW, in_disks_order),
    "windows, the one that holds most first": (Discard.WINDOW, contextlib.nullcontext),
}


async def measure() -> Section:
    """All ways of writing, each with all ways of copying."""
    tables, plotted = [], {}
    for writing, workload in WRITING.items():
        held = await compared(writing, workload)
        tables.append(table(writing, held))
        if writing == PLOTTED:
            plotted = {way: one.held() for way, one in held.items()}
            plotted[LEAST] = held["windows, the one that holds most first"].least()
    picture = plot.lines(
        "space",
        plotted,
        title=f"Fleecing space while the guest writes {RATE * 64 // 1024} MiB/s, {PLOTTED} of the disk",
        x="seconds of the copy",
        y="MiB held",
    )
    return Section(
        "What fleecing images hold",
        f"""
        Full backups of {DISK_BYTES // MIB} MiB at {BWLIMIT // MIB} MiB/s while the guest writes {RATE} blocks of
        64 KiB a second; windows of {WINDOW_BYTES // MIB} MiB (a twentieth of the disk). We take QEMU's job where
        it can discard, and windows where it cannot, or where `discard = "window"` says so. The least possible is
        for one who knows all writes beforehand and copies as fast.
        """,
        tuple(tables),
        pictures=(picture,),
    )


async def compared(writing: str, workload: Workload) -> dict[str, Held]:
    """One guest, backed up in each way."""
    found = {}
    async with Bed.made(DISK_BYTES, workload) as bed:
        for way, (how, changed) in WAYS.items():
            report.say(f"{writing}: {way}")
            found[way] = Held(bed.vm)
            node = (await bed.vm.current_nodes())["vda"]
            bitmap = {"node": node, "name": BITMAP}
            await bed.vm.execute("block-dirty-bitmap-add", bitmap | {"granularity": 64 << 10})
            with changed(), mock.patch.object(boundary, "WINDOW_BYTES", WINDOW_BYTES):
                async with aio.background(found[way].count()):
                    await bed.copy(how, bwlimit=BWLIMIT, on_progress=found[way].note)
            await bed.vm.execute("block-dirty-bitmap-remove", bitmap)
    return found


def table(writing: str, held: dict[str, Held]) -> Table:
    """Peaks and means."""
    rows = []
    for way, one in held.items():
        mib, least = [mib for _, mib in one.held()], [mib for _, mib in one.least()]
        peak, mean = max(mib), statistics.mean(mib)
        rows.append((way, f"{peak:.0f} MiB", f"{mean:.0f} MiB", f"{max(least):.0f} MiB"))
    return Table((f"guest writes {writing}", "peak", "mean", "least possible peak"), tuple(rows))


if __name__ == "__main__":
    report.main(measure)
