"""How long the guest's I/O is held for a snapshot, beside its number of disks: `python -m benchmarks.pause`.

A guest that writes all the time is backed up again and again; each run is ended as soon as it copies, for it is
only the moment of the snapshot that counts.
"""

import asyncio
import tempfile
from pathlib import Path

from benchmarks import bed, report
from benchmarks.report import Bound, Section, Table, percentile
from orchestrator.model import Fleecing, Phase, Progress, RunOptions
from orchestrator.run.backup import new_run_id
from orchestrator.service.engine import Engine
from tests.guest.vm import MIB, DiskSpec, Workload

DISKS = (1, 2, 4, 8)
IOTHREADS = 4
WRITTEN = 4
"""The guest's writer takes no more disks."""
WRITES_PER_SECOND = 1000
BOUND_DISKS, BOUND_MS = 2, 5.0
COLUMNS = ("disks", "iothreads", "median ms", "p99 ms", "most ms", "the guest's longest write, ms")


async def pauses_ms(opened: Engine, count: int) -> list[float]:
    """So many snapshots' pauses, by the runs' results."""
    found = []
    while len(found) < count:
        run = new_run_id()

        def end_soon(progress: Progress, run: str = run) -> None:
            if progress.phase is Phase.COPYING:
                opened.end_run(run)

        options = RunOptions("main", Fleecing(storage="local"), full=True)
        result = await opened.back_up(bed.VM, options, run=run, on_progress=end_soon)
        if result.pause_ms is None:
            raise RuntimeError(f"no snapshot was taken: {result.error}")
        found.append(result.pause_ms)
        await asyncio.sleep(0.05)
    return found


async def measure(pauses: int) -> Section:
    """A row for each number of disks, without iothreads and with."""
    rows, bounded = [], []
    for disks in DISKS:
        for iothreads in (0, IOTHREADS):
            report.say(f"{disks} disks, {iothreads} iothreads at most")
            specs = [
                DiskSpec(f"vd{letter}", MIB, iothread=at < iothreads)
                for at, letter in enumerate("abcdefgh"[:disks])
            ]
            written = tuple(spec.id for spec in specs[:WRITTEN])
            workload = Workload("sequence", disks=written, rate=WRITES_PER_SECOND)
            with tempfile.TemporaryDirectory(prefix="vmf-pause-") as folder:
                async with bed.made(Path(folder), specs, workload) as (vm, opened):
                    found = await pauses_ms(opened, pauses)
                    await vm.assert_healthy()
                    longest_ms = max(line.max_us for line in vm.stats()) / 1e3
            if disks == BOUND_DISKS:
                bounded += found
            percentiles = (f"{percentile(found, percent):.1f}" for percent in (50, 99, 100))
            rows.append((str(disks), str(min(disks, iothreads)), *percentiles, f"{longest_ms:.0f}"))
    return Section(
        "How long the guest's I/O is held for a snapshot",
        f"""
        {pauses} snapshots each of a guest that writes {WRITES_PER_SECOND} times a second, to four of
        its disks at most. virtio-blk, one iothread for each disk, {IOTHREADS} at most. The guest is not
        stopped: its disks' I/O is held for so many milliseconds (`pause_ms` of the runs' results). The
        last column is the longest that any write of the guest took by its own clock, for whatever
        reason: it boots and shares two processors with all else.
        """,
        (
            Table(
                ("disks", "iothreads", "median ms", "p99 ms", "most ms", "the guest's longest write, ms"),
                tuple(rows),
            ),
        ),
        (
            Bound(
                f"pause for {BOUND_DISKS} disks, p99",
                percentile(bounded, 99),
                most=BOUND_MS,
                unit="ms",
                cause="what the guest has in flight is waited for, and it shares two processors with all else",
            ),
        ),
    )


if __name__ == "__main__":
    report.main(measure, pauses=40)
