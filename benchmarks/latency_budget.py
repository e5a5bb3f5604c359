"""What a latency budget gains the guest, and what it costs the backup: `python -m benchmarks.latency_budget`.

One guest whose disk can do 8 MB/s, for the guest and whoever copies it together (QEMU's throttle filter in front
of its file). The same full backup of it is made again and again, in turn without a budget and within one. How long
writes took is what QEMU counted at the guest's disk, from the snapshot to the end of the copy.
"""

import asyncio
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import bed, report
from benchmarks.report import Bound, Section, Table
from orchestrator import config
from orchestrator.errors import CopyError
from orchestrator.model import Fleecing, GuestWrites, RunOptions
from orchestrator.qemu import commands, writes
from orchestrator.run.impact import Impact
from orchestrator.service import engine
from tests.guest import images
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload

DISK_BYTES_PER_SECOND = 8_000_000
WORKLOAD = Workload("random", block_bytes=16 * 1024, rate=100, region_bytes=4 * MIB)
BUDGET_MS = 5
ALONE_SECONDS = 8
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """A backup, or the guest alone: how long writes took, and how long it took itself."""

    writes: GuestWrites
    seconds: float
    slowed_seconds: float = 0.0

    @property
    def mean_ms(self) -> float:
        assert self.writes.mean_ms is not None
        return self.writes.mean_ms


async def measure(mib: int) -> Section:
    """All of it, in one guest."""
    with tempfile.TemporaryDirectory(prefix="vmfleece-bench-") as name:
        folder = Path(name)
        disk = DiskSpec("vda", mib * MIB, format="raw", bytes_per_second=DISK_BYTES_PER_SECOND)
        vm = GuestVm(folder / "vm", [disk], WORKLOAD)
        vm.folder.mkdir()
        images.fill(vm.image_path(disk.id), disk.size_bytes)
        found: dict[str, list[Measured]] = {"without a budget": [], f"budget of {BUDGET_MS} ms": []}
        async with vm:
            await vm.wait_ready()
            await vm.wait_writes(2 * WORKLOAD.rate)
            report.say("the guest alone")
            alone = await of_alone(vm)
            for number in range(ROUNDS):
                for way, budget in zip(found, ("", f'latency_budget = "{BUDGET_MS}ms"'), strict=True):
                    report.say(f"{way}, {number + 1} of {ROUNDS}")
                    found[way].append(await backed_up(vm, folder / f"{number}-{len(budget)}", budget))
    return section(mib, alone, found)


async def of_alone(vm: GuestVm) -> Measured:
    """Nothing is backed up."""
    impact = Impact()

    async def reading() -> dict[str, writes.Counters]:
        return writes.counters(await vm.execute(commands.QUERY_DEVICE_STATS.name))

    first = await reading()
    impact.devices = list(first)
    impact.begin(first)
    for _ in range(ALONE_SECONDS):
        await asyncio.sleep(1)
        impact.take(await reading())
    found = impact.writes()
    assert found is not None
    return Measured(found, ALONE_SECONDS)


async def backed_up(vm: GuestVm, folder: Path, budget: str) -> Measured:
    """One full backup, by a vmfleece of its own."""
    folder.mkdir()
    settings = config.load(bed.write_config(folder, vm.product_socket, more=budget))
    options = RunOptions("main", Fleecing(storage="local"), full=True)
    async with engine.opened(settings) as opened:
        result = await opened.back_up(bed.VM, options, on_progress=lambda _: None)
    if result.error is not None or result.guest_writes is None:
        raise CopyError(f"the backup failed: {result.error}")
    return Measured(result.guest_writes, result.duration_seconds, result.slowed_seconds or 0.0)


def section(mib: int, alone: Measured, found: dict[str, list[Measured]]) -> Section:
    """What came of it: each way by its round of median mean latency."""
    ways = {"guest alone": alone} | {way: _median(rounds) for way, rounds in found.items()}
    free, within = (ways[way] for way in found)
    rows = [
        (
            way,
            f"{one.mean_ms:.2f} ms",
            f"{one.mean_ms / alone.mean_ms:.1f}",
            f"{one.writes.worst_ms or 0:.1f} ms",
            f"≤ {one.writes.p99_ms or 0:.0f} ms",
            "" if one is alone else f"{one.seconds:.1f} s ({one.seconds / free.seconds:.1f} times)",
            f"{one.slowed_seconds:.1f} s" if one is within else "",
        )
        for way, one in ways.items()
    ]
    columns = ("", "mean write", "times alone", "slowest second", "99 of 100", "backup took", "slowed for")
    return Section(
        "A budget for the guest's writes",
        f"A guest that writes {WORKLOAD.rate} times a second to a disk of {mib} MiB that can do"
        f" {DISK_BYTES_PER_SECOND // 10**6} MB/s, for the guest and the backup's reads together. The round of"
        f" median mean latency out of {ROUNDS} each way, in turn, in one guest.",
        (Table(columns, tuple(rows)),),
        (
            Bound("mean guest write within a latency budget ÷ the budget", within.mean_ms / BUDGET_MS, most=1.0),
            Bound("mean guest write without a latency budget ÷ with", free.mean_ms / within.mean_ms, least=2.0),
        ),
    )


def _median(rounds: list[Measured]) -> Measured:
    middle = statistics.median_low(one.mean_ms for one in rounds)
    return next(one for one in rounds if one.mean_ms == middle)


if __name__ == "__main__":
    report.main(measure, mib=64)
