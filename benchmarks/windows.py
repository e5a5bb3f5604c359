"""`python -m benchmarks.windows`: what copying by windows costs.

A full copy of a disk by one job, and by windows of several sizes, in turn, nothing else going on. Disk, fleecing
image and target are in memory, so that what is done between windows shows most. What windows save: `space`.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

from benchmarks import demo, report
from benchmarks.report import Section, Table
from orchestrator import config
from orchestrator.fleecing import boundary
from orchestrator.model import Discard, Fleecing, Progress, RunOptions
from orchestrator.service import drivers, engine
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload

MEMORY = Path("/dev/shm")  # a folder of its own is made there
WINDOWS = (64, 256, 512, 1024)


OnProgress = Callable[[Progress], None]


class Bed:
    """A guest with a disk full of data in memory, and an engine that backs it up."""

    def __init__(self, vm: GuestVm, opened: engine.Engine, settings: Path) -> None:
        self.vm = vm
        self._opened = opened
        self._target = drivers.targets(config.load(settings))["slow"]

    @classmethod
    @asynccontextmanager
    async def made(cls, size_bytes: int, workload: Workload) -> AsyncIterator["Bed"]:
        """One, for the block."""
        with tempfile.TemporaryDirectory(prefix="vmfleece-bench-", dir=MEMORY) as name:
            folder = Path(name)
            path = folder / "disk.raw"
            with path.open("wb") as file:
                for _ in range(size_bytes // MIB):
                    file.write(os.urandom(MIB))
            disk = DiskSpec("vda", size_bytes, format="raw", iothread=True, image=path)
            async with GuestVm(folder / "vm", [disk], workload) as vm:
                await vm.wait_ready()
                settings = folder / "vmfleece.toml"
                settings.write_text(demo.CONFIG.format(folder=folder, socket=vm.product_socket))
                async with engine.opened(config.load(settings)) as opened:
                    yield cls(vm, opened, settings)

    async def copy(self, how: Discard, *, bwlimit: int = 0, on_progress: OnProgress | None = None) -> None:
        """One full backup, removed again."""
        options = RunOptions(
            "slow", Fleecing(storage="local"), full=True, discard=how, bwlimit_bytes_per_second=bwlimit
        )
        result = await self._opened.back_up("demo", options, on_progress=on_progress or (lambda _progress: None))
        if result.error is not None:
            sys.exit(f"the backup failed: {result.error}")
        for snapshot in await self._target.snapshots():
            await self._target.remove(snapshot)


async def costs(size_bytes: int, rounds: int) -> Table:
    """Each kind's median, and how many times one job's that is."""
    kinds = [("one job", Discard.JOB, 256)] + [(f"windows of {mib} MiB", Discard.WINDOW, mib) for mib in WINDOWS]
    taken: dict[str, list[float]] = {name: [] for name, _, _ in kinds}
    async with Bed.made(size_bytes, Workload("idle")) as bed:
        report.say("what windows cost")
        await bed.copy(Discard.JOB)
        for _ in range(rounds):
            for name, how, mib in kinds:
                with mock.patch.object(boundary, "WINDOW_BYTES", mib * MIB):
                    started = time.perf_counter()
                    await bed.copy(how)
                    taken[name].append(time.perf_counter() - started)
    alone = statistics.median(taken["one job"])
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    return Table(
        (f"full backup of {size_bytes // MIB} MiB, idle guest", "median", "times one job"),
        tuple((name, f"{median:.2f} s", f"{median / alone:.2f}") for name, median in medians.items()),
        f"Disk, fleecing image and target in memory, so that what is done between windows shows most (on disks it "
        f"shows less). {rounds} rounds in turn:",
    )


async def measure(mib: int, rounds: int) -> Section:
    """The one table."""
    how = (
        f"Full backups of a raw disk in an iothread. vmfleece uses windows of {boundary.WINDOW_BYTES // MIB} MiB."
    )
    return Section("What copying by windows costs", how, (await costs(mib * MIB, rounds),))


if __name__ == "__main__":
    report.main(measure, mib=2048, rounds=3)
