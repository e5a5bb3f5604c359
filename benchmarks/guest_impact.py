"""What a backup does to the guest, side by side in one run: `python -m benchmarks.guest_impact`.

One guest that writes all the time, backed up again and again for some seconds each: by us, and as others do it
without fleecing, by blockdev-backup from the disk to the target (qmpbackup's sequence of commands). The target
is limited by QEMU's throttle filter in front of its file, since a limit of the job's speed would not hold up the
guest.
"""

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bed, plot, report, slow_target
from benchmarks.report import Bound, Picture, Section, Table
from benchmarks.slow_target import IN_FLEECING, IN_TARGET
from orchestrator.fleecing.quiet import Quiet
from orchestrator.model import Fleecing, Kind, RunOptions
from orchestrator.qemu import commands
from orchestrator.run.backup import new_run_id
from orchestrator.service.engine import Engine
from tests.guest import images
from tests.guest.vm import MIB, DiskSpec, GuestVm, StatLine, Workload

DISK_BYTES = 256 * MIB
DISKS = ("vda", "vdb")
WRITES_PER_SECOND = 2000
MB = 1_000_000
SETTLE_SECONDS = 2.0
BOUNDARIES_NS = sorted({round(10_000 * 1.25**step) for step in range(66)})
"""From 10 us to 20 s: within a quarter."""
IDLE = "guest alone"
DIRECT = "blockdev-backup, as qmpbackup does"
OURS = "vmfleece, with fleecing"
MOST_TIMES_IDLE = 5


@dataclass(frozen=True, slots=True)
class Phase:
    """The guest's writes in one phase. `mean_ms` and `longest_ms` are by its own clock, the others QEMU's."""

    what: str
    target: str
    seconds: float
    writes: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    longest_ms: float
    points: list[tuple[float, float]]
    outcome: str

    @property
    def writes_per_second(self) -> float:
        return self.writes / self.seconds


class Bench:
    """The guest, and what is done to it a phase at a time."""

    def __init__(self, vm: GuestVm, opened: Engine, folder: Path, seconds: int) -> None:
        self._vm = vm
        self._opened = opened
        self._folder = folder
        self._seconds = seconds
        self._numbers = iter(range(1000))
        self.phases: list[Phase] = []

    async def phase(self, what: str, target: str, work: Callable[[], Awaitable[str]]) -> None:
        """Do something to the guest for a while, and note how its writes fare; `work` says what came of it."""
        report.say(f"{what}, target {target}")
        await asyncio.sleep(SETTLE_SECONDS)
        for device in self._vm._qdevs.values():
            await self._vm.execute(
                "block-latency-histogram-set", {"id": device, "boundaries-write": BOUNDARIES_NS}
            )
        await self._vm.wait_stats(1)
        first, before, began = len(self._vm.stats()), self._vm.stats()[-1], time.monotonic()
        outcome = await work()
        seconds = time.monotonic() - began
        bins = [stats["wr_latency_histogram"]["bins"] for stats in (await self._vm.block_stats()).values()]
        await self._vm.wait_stats(1, 60)  # a write that waited is told of once it is done
        lines = self._vm.stats()[first:]
        counts = [later.writes - one.writes for one, later in zip([before, *lines], lines, strict=False)]
        merged = [sum(counted) for counted in zip(*bins, strict=True)]
        self.phases.append(
            Phase(
                what,
                target,
                seconds,
                sum(merged),
                sum(line.mean_us * count for line, count in zip(lines, counts, strict=True)) / sum(counts) / 1e3,
                _quantile_ms(merged, 0.50),
                _quantile_ms(merged, 0.99),
                max(line.max_us for line in lines) / 1e3,
                _points(before, lines),
                outcome,
            )
        )
        report.say(f"  {self.phases[-1].mean_ms:.2f} ms, {self.phases[-1].writes_per_second:.0f}/s, {outcome}")

    async def limit(self, bytes_per_second: int, place: slow_target.Place = IN_TARGET) -> None:
        """How much the target, or the fleecing storage, takes from now on; 0: as much as it can."""
        for command in slow_target.limited(bytes_per_second, disks=len(DISKS), place=place):
            await self._vm.execute(command.name, dict(command.arguments))

    async def nothing(self) -> str:
        """Leave the guest alone."""
        await asyncio.sleep(self._seconds)
        return ""

    async def ours(self, *, full: bool = True) -> str:
        """Back it up until the time is over; what is under way then is ended."""
        end, done, failed = time.monotonic() + self._seconds, 0, ""
        while time.monotonic() < end:
            run = new_run_id()
            options = RunOptions("main", Fleecing(storage="local"), full=full)
            timer = asyncio.get_running_loop().call_at(
                asyncio.get_running_loop().time() + end - time.monotonic(), self._opened.end_run, run
            )
            try:
                result = await self._opened.back_up(bed.VM, options, run=run, on_progress=lambda _: None)
            finally:
                timer.cancel()
            if result.error is None:
                done += 1
                if not full and result.kind is not Kind.INCREMENTAL:
                    raise RuntimeError(f"not incremental: {result.reason}")
            elif result.error.code != "cancelled":
                failed = result.error.code
                await asyncio.sleep(0.5)
        return failed or _done(done)

    async def full(self) -> None:
        """One whole backup by us, for incremental ones to build on."""
        options = RunOptions("main", Fleecing(storage="local"), full=True)
        result = await self._opened.back_up(bed.VM, options, on_progress=lambda _: None)
        if result.error is not None:
            raise RuntimeError(str(result.error))

    async def direct(self) -> str:
        """Back it up as qmpbackup does, until the time is over; what is under way then is cancelled."""
        end, done = time.monotonic() + self._seconds, 0
        while time.monotonic() < end:
            async with self._targets() as targets:
                backups = [
                    {
                        "type": "blockdev-backup",
                        "data": {
                            "job-id": f"peer-{disk}",
                            "device": f"drive-{disk}",
                            "target": target,
                            "sync": "full",
                            "auto-dismiss": False,
                        },
                    }
                    for disk, target in targets.items()
                ]
                await self._vm.execute("transaction", {"actions": backups})
                done += await self._jobs_end(end)
        return _done(done)

    @contextlib.asynccontextmanager
    async def _targets(self) -> AsyncIterator[dict[str, str]]:
        """A node with a new image for each disk, for the block."""
        nodes: dict[str, str] = {}
        for number, disk in enumerate(DISKS):
            path = self._folder / f"peer-{next(self._numbers)}.qcow2"
            await images.create(path, "qcow2", DISK_BYTES)
            file = {"driver": "file", "node-name": f"peer-file-{disk}", "filename": str(path)}
            throttle = {
                "driver": "throttle",
                "node-name": f"peer-slow-{disk}",
                "throttle-group": slow_target.group(number),
                "file": f"peer-file-{disk}",
            }
            nodes[disk] = f"peer-{disk}"
            image = {"driver": "qcow2", "node-name": nodes[disk], "file": f"peer-slow-{disk}"}
            for node in (file, throttle, image):
                await self._vm.execute("blockdev-add", node)
        try:
            yield nodes
        finally:
            for disk in DISKS:
                for name in (f"peer-{disk}", f"peer-slow-{disk}", f"peer-file-{disk}"):
                    await self._vm.execute("blockdev-del", {"node-name": name}, deadline_seconds=120)
            for path in self._folder.glob("peer-*.qcow2"):
                path.unlink()

    async def _jobs_end(self, end: float) -> bool:
        """Wait for the jobs, and cancel them when the time is over; whether they had ended by themselves."""
        cancelled = False
        jobs: list[dict[str, Any]] = await self._vm.execute("query-jobs")
        while not all(job["status"] == "concluded" for job in jobs):
            if time.monotonic() > end and not cancelled:
                cancelled = True
                for job in jobs:
                    if job["status"] != "concluded":
                        await self._vm.execute("job-cancel", {"id": job["id"]}, deadline_seconds=120)
            await asyncio.sleep(0.1)
            jobs = await self._vm.execute("query-jobs", deadline_seconds=120)
        for job in jobs:
            await self._vm.execute("job-dismiss", {"id": job["id"]})
            if job.get("error") and not cancelled:
                raise RuntimeError(json.dumps(job))
        return not cancelled


def _done(count: int) -> str:
    return f"{count} done" if count else "under way all the time"


def _quantile_ms(bins: Sequence[int], share: float) -> float:
    """Of a histogram over BOUNDARIES_NS: the upper boundary of the bin in which it lies."""
    rank, seen = share * sum(bins), 0
    for place, count in enumerate(bins):
        seen += count
        if seen >= rank:
            return BOUNDARIES_NS[min(place, len(BOUNDARIES_NS) - 1)] / 1e6
    raise ValueError("no writes")


def _points(before: StatLine, lines: Sequence[StatLine]) -> list[tuple[float, float]]:
    """The mean of each of the guest's seconds, since the phase began."""
    return [(line.t - before.t, max(line.mean_us, 1) / 1e3) for line in lines]


@contextlib.contextmanager
def not_quiet() -> "contextlib.AbstractContextManager[None]":
    """As if `fleecing.quiet` and the limit of requests in flight did not exist."""

    @contextlib.asynccontextmanager
    async def changing_graph(_self: Quiet) -> AsyncIterator[None]:
        yield

    kept = Quiet.changing_graph, commands.IN_FLIGHT
    Quiet.changing_graph = changing_graph
    commands.IN_FLIGHT = {"max-workers": 64}
    try:
        yield
    finally:
        Quiet.changing_graph, commands.IN_FLIGHT = kept


async def measure(seconds: int) -> Section:
    """All phases on one guest."""
    with tempfile.TemporaryDirectory(prefix="vmf-impact-") as name:
        folder = Path(name)
        disks = []
        for disk in DISKS:
            path = folder / f"{disk}.qcow2"
            await asyncio.to_thread(bed.fill, folder / "full.raw", DISK_BYTES)
            await images.run_tool(
                *("qemu-img", "convert", "-O", "qcow2", "-f", "raw", str(folder / "full.raw"), str(path)),
                deadline_seconds=120,
            )
            disks.append(DiskSpec(disk, DISK_BYTES, iothread=True, image=path))
        workload = Workload("sequence", rate=WRITES_PER_SECOND)
        async with bed.made(folder, disks, workload, slow=(IN_TARGET, IN_FLEECING)) as (vm, opened):
            bench = Bench(vm, opened, folder, seconds)
            await all_phases(bench)
            await vm.assert_healthy()
    return section(bench.phases, seconds)


async def all_phases(bench: Bench) -> None:
    """In this order: an incremental backup builds on the full ones before it."""
    await bench.phase(IDLE, "", bench.nothing)
    for mb in (5, 50, 0):
        await bench.limit(mb * MB)
        await bench.phase(DIRECT, _target(mb), bench.direct)
        await bench.phase(OURS, _target(mb), bench.ours)
    await bench.limit(5 * MB, IN_FLEECING)
    await bench.limit(50 * MB)
    await bench.phase(f"{OURS} to a storage of 5 MB/s", _target(50), bench.ours)
    await bench.limit(0, IN_FLEECING)
    await bench.limit(5 * MB)
    with not_quiet():
        await bench.phase(f"{OURS}, jobs not held still while QEMU's graph changes", _target(5), bench.ours)
    await bench.limit(0)
    await bench.full()
    await bench.limit(5 * MB)
    await bench.phase(f"{OURS}, incremental", _target(5), lambda: bench.ours(full=False))


def _target(mb: int) -> str:
    return f"{mb} MB/s" if mb else "unthrottled"


def section(phases: list[Phase], seconds: int) -> Section:
    """The table, the bound and the picture."""
    idle = phases[0]
    ours = next(one for one in phases if (one.what, one.target) == (OURS, _target(5)))
    columns = ("", "target", "writes/s", "mean ms", "times alone", "p50 ms", "p99 ms", "longest ms", "backups")
    rows = [
        (
            one.what,
            one.target,
            f"{one.writes_per_second:.0f}",
            f"{one.mean_ms:.2f}",
            f"{one.mean_ms / idle.mean_ms:.1f}",
            f"{one.p50_ms:.2f}",
            f"{one.p99_ms:.2f}",
            f"{one.longest_ms:.0f}",
            one.outcome,
        )
        for one in phases
    ]
    return Section(
        "What a backup does to the guest",
        f"""
        A guest with two qcow2 disks of {DISK_BYTES // MIB} MiB in iothreads, full of data, that writes
        {WRITES_PER_SECOND} records of 4 KiB a second, spread over both, one after the other; {seconds}
        s each. Mean and longest write are by the guest's own clock; p50 and p99 are QEMU's (its
        histogram, within a quarter), and so are the writes per second. A target's limit is QEMU's own
        throttle filter in front of its file, half for each disk; unthrottled is full speed. qmpbackup's
        sequence: `blockdev-add` of the targets, one `transaction` of `blockdev-backup` with `sync=full`
        from the disks' own nodes. What is under way at a phase's end is cancelled, which QEMU does once
        what it has in flight is done.
        """,
        (Table(columns, tuple(rows)),),
        (
            Bound(
                "with fleecing, target of 5 MB/s: mean write, times that of the guest alone",
                ours.mean_ms / idle.mean_ms,
                most=MOST_TIMES_IDLE,
            ),
        ),
        (picture(phases),),
    )


def picture(phases: Sequence[Phase]) -> Picture:
    """Latency over time, of the phases with the slowest target."""
    shown = {one.what: one.points for one in phases if one.what == IDLE or one.target == _target(5)}
    return plot.lines(
        "latency",
        {what: points for what, points in shown.items() if what in (IDLE, DIRECT, OURS)},
        title="The guest's writes while it is backed up to a target of 5 MB/s",
        x="seconds since the backup began",
        y="mean write of each second, ms",
        logarithmic=True,
    )


if __name__ == "__main__":
    report.main(measure, seconds=12)
