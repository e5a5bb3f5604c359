"""What a backup costs the guest, side by side in one run: `python -m benchmarks.guest_impact`.

1. How long the guest is held for the snapshot of two disks, idle and writing all the time.
2. Backup to a target limited to 5 MB/s, of two disks of different size: with fleecing; with fleecing but without
   holding the jobs still while QEMU's graph changes; without fleecing.
"""

import asyncio
import contextlib
import statistics
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from benchmarks import demo, report, slow_target
from benchmarks.report import Section, Table
from orchestrator import config
from orchestrator.fleecing.quiet import Quiet
from orchestrator.model import Fleecing, RunOptions
from orchestrator.qemu import commands
from orchestrator.service import engine
from tests.guest import sequence
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload

PAUSES = 20
SECONDS = 15
DISKS = (DiskSpec("vda", 24 * MIB, iothread=True), DiskSpec("vdb", 48 * MIB, iothread=True))
BUSY = Workload("sequence", rate=2000)


async def measure() -> Section:
    """Both parts."""
    return Section(
        "What a backup does to the guest",
        "The target's limit is QEMU's own throttle filter in front of its file, since a limit of the job's speed "
        "would not hold up the guest.",
        (await pauses(), await slow()),
    )


@contextlib.asynccontextmanager
async def bed(workload: Workload) -> AsyncIterator[tuple[GuestVm, engine.Engine]]:
    """A guest whose disks are full of data, and an engine that backs it up to a slow target."""
    with tempfile.TemporaryDirectory(prefix="vmfleece-bench-") as name:
        folder = Path(name)
        limit = slow_target.qemu_arguments(demo.TARGET_BYTES_PER_SECOND, disks=len(DISKS))
        async with GuestVm(folder / "vm", DISKS, workload, extra_args=limit) as vm:
            await vm.wait_ready()
            if workload.kind != "idle":
                total = sum(disk.size_bytes for disk in DISKS)
                await vm.wait_writes(2 * total // sequence.RECORD, 120)
            file = folder / "vmfleece.toml"
            file.write_text(demo.CONFIG.format(folder=folder, socket=vm.product_socket))
            async with engine.opened(config.load(file), connect=slow_target.connect) as opened:
                yield vm, opened


async def pauses() -> Table:
    """Part 1."""
    rows = []
    for name, workload in (("idle", Workload("idle")), ("writing all the time", BUSY)):
        async with bed(workload) as (_, opened):
            measured: list[float] = []
            for _ in range(PAUSES):
                # It is cancelled once the snapshot is taken: only the pause is wanted.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await opened.back_up("demo", options(fleecing=True), on_progress=lambda _: None)
            results = opened.catalogue.results("demo")
            measured = [result["pause_ms"] for result in results if result["pause_ms"] is not None]
            held = (f"{statistics.median(measured):.1f} ms", f"{max(measured):.1f} ms")
            rows.append((name, str(len(measured)), *held))
    return Table(("guest with two disks", "snapshots", "held, median", "held, most"), tuple(rows))


async def slow() -> Table:
    """Part 2."""
    phases = []
    async with bed(BUSY) as (vm, opened):
        meter = demo.Meter(vm)
        await meter.start()
        await asyncio.sleep(SECONDS)
        phases.append(await meter.read("guest alone"))
        for name, fleecing, quiet in (
            ("with fleecing", True, True),
            ("with fleecing, jobs not held still", True, False),
            ("without fleecing", False, True),
        ):
            with contextlib.ExitStack() as changes:
                if not quiet:
                    changes.enter_context(without_quiet())
                await meter.start()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SECONDS):
                        await opened.back_up("demo", options(fleecing=fleecing), on_progress=lambda _: None)
                phases.append(await meter.read(name))
    return Table(
        ("target limited to 5 MB/s", "guest's writes/s", "mean write", "times alone", "writes > 200 ms"),
        tuple(
            (
                one.phase,
                f"{one.writes_per_second:.0f}",
                f"{one.mean_ms:.2f} ms",
                f"{one.mean_ms / phases[0].mean_ms:.1f}",
                str(one.slow),
            )
            for one in phases
        ),
    )


def options(*, fleecing: bool) -> RunOptions:
    """A backup to the slow target."""
    return RunOptions("slow", Fleecing(storage="local") if fleecing else Fleecing(enabled=False), full=True)


@contextlib.contextmanager
def without_quiet() -> "contextlib.AbstractContextManager[None]":
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


if __name__ == "__main__":
    report.main(measure)
