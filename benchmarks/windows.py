"""`python -m benchmarks.windows`: what copying by windows costs, and what it saves.

1. Time: a full copy of a disk by one job, and by windows of several sizes, in turn, nothing else going on. Disk,
   fleecing image and target are in memory, so that what is done between windows shows most.
2. Space: what the fleecing image holds, at its fullest and on average, while the guest writes all the time, most
   of it to the disk's last fifth, which comes last in its order: by one job that gives nothing back (all that
   QEMU before 9.1 can do), by QEMU's own job, by windows in the disk's order, and by windows of which the one that
   holds most goes first.
"""

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from benchmarks import demo, report
from benchmarks.report import Section, Table
from orchestrator import config
from orchestrator.fleecing import boundary, image
from orchestrator.model import Discard, Fleecing, Progress, RunOptions
from orchestrator.qemu import commands
from orchestrator.service import engine
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload

MEMORY = Path("/dev/shm")  # a folder of its own is made there
WINDOWS = (64, 256, 512, 1024)
SPACE_BYTES = 320 * MIB
SPACE_WINDOW = 16 * MIB
SPACE_LIMIT = 16 * MIB
SPACE_WORKLOAD = Workload("random", rate=100, skew=80)


class Bed:
    """A guest with a disk full of data in memory, and an engine that backs it up."""

    def __init__(self, vm: GuestVm, opened: engine.Engine, settings: Path) -> None:
        self.vm = vm
        self._opened = opened
        self._target = engine.targets(config.load(settings))["slow"]

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

    async def copy(self, how: Discard, *, bwlimit: int = 0, held: "Held | None" = None) -> None:
        """One full backup, removed again."""
        options = RunOptions(
            "slow", Fleecing(storage="local"), full=True, discard=how, bwlimit_bytes_per_second=bwlimit
        )
        on_progress = held.note if held is not None else lambda _progress: None
        result = await self._opened.back_up("demo", options, on_progress=on_progress)
        if result.error is not None:
            sys.exit(f"the backup failed: {result.error}")
        for snapshot in await self._target.snapshots():
            await self._target.remove(snapshot)


@dataclass
class Held:
    """What a run's fleecing image held, each time that it said how far it is."""

    seen: list[int] = field(default_factory=list)

    def note(self, progress: Progress) -> None:
        """Take one more sample; they come about evenly."""
        self.seen += [disk.fleecing_bytes for disk in progress.disks if progress.phase == "copying"]


async def costs(size_bytes: int, rounds: int) -> Table:
    """Part 1."""
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


async def space() -> Table:
    """Part 2."""
    kinds = {
        "one job, nothing given back before its end": (Discard.JOB, nothing_given_back()),
        "one job with discard-source": (Discard.JOB, contextlib.nullcontext()),
        "windows, in the disk's order": (Discard.WINDOW, in_disks_order()),
        "windows, the one that holds most first": (Discard.WINDOW, contextlib.nullcontext()),
    }
    rows = []
    first: tuple[float, float] | None = None
    async with Bed.made(SPACE_BYTES, SPACE_WORKLOAD) as bed:
        for name, (how, changed) in kinds.items():
            report.say(name)
            held = Held()
            with changed, mock.patch.object(boundary, "WINDOW_BYTES", SPACE_WINDOW):
                await bed.copy(how, bwlimit=SPACE_LIMIT, held=held)
            peak, mean = max(held.seen), statistics.mean(held.seen)
            first = first or (peak, mean)
            sizes = (f"{peak / MIB:.0f} MiB", f"{mean / MIB:.0f} MiB")
            rows.append((name, *sizes, f"{peak / first[0]:.2f}", f"{mean / first[1]:.2f}"))
    return Table(
        ("while the guest writes", "fleecing peak", "mean", "peak, times the first", "mean, times the first"),
        tuple(rows),
        f"What the fleecing image holds while the guest writes 6 MiB/s all the time, {SPACE_WORKLOAD.skew} % of "
        f"it to the last fifth of the disk; {SPACE_BYTES // MIB} MiB at {SPACE_LIMIT // MIB} MiB/s, windows of "
        f"{SPACE_WINDOW // MIB} MiB:",
    )


async def measure(mib: int, rounds: int) -> Section:
    """Both parts."""
    return Section(
        "What copying by windows costs, and what it saves",
        f"Full backups of a raw disk in an iothread. vmfleece uses windows of {boundary.WINDOW_BYTES // MIB} MiB.",
        (await costs(mib * MIB, rounds), await space()),
    )


if __name__ == "__main__":
    report.main(measure, mib=2048, rounds=3)
