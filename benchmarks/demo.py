"""`make demo`: what a backup does to a guest that writes all the time, with fleecing and without.

A guest with two disks writes numbered records to both in turn. It is backed up to a target that takes only a few
MB/s, with fleecing and, for comparison, directly; its write latency is read from QEMU meanwhile. Then the service
backs it up when its job is due. That snapshot is restored, and the records prove that both disks are from one
moment and nothing is missing.
"""

import asyncio
import contextlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks import slow_target
from orchestrator import config, log
from orchestrator.cli import render
from orchestrator.cli.progress import Display, result_lines
from orchestrator.cli.running import run_async
from orchestrator.model import Fleecing, Progress, RunOptions, RunResult
from orchestrator.run.restore import restore
from orchestrator.service import drivers, engine
from orchestrator.target.base import find
from tests.guest import sequence
from tests.guest.latency import LatencyMeter
from tests.guest.leftovers import leftovers
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload

TARGET_BYTES_PER_SECOND = 5_000_000
DISK_BYTES = 32 * MIB
WRITES_PER_SECOND = 2000
IDLE_SECONDS = 10
DIRECT_SECONDS = 20
SERVICE_SECONDS = 60

CONFIG = """
[daemon]
state_dir = "{folder}/state"
run_dir = "{folder}/run"
[storage.local]
driver = "directory"
path = "{folder}/fleecing"
quota = "1GiB"
min_free = "64MiB"
[target.slow]
driver = "images"
path = "{folder}/backups"
[vm.demo]
qmp = "{socket}"
[job.often]
schedule = "*:*:0/10"
vms = ["demo"]
target = "slow"
fleecing = "enabled=1,storage=local"
"""


@dataclass(frozen=True, slots=True)
class Latency:
    """The guest's writes in one phase, over both disks."""

    phase: str
    seconds: float
    writes: int
    mean_ms: float
    slow: int

    @property
    def writes_per_second(self) -> float:
        return self.writes / self.seconds


class Meter:
    """Reads the guest's write latency from QEMU, a phase at a time."""

    def __init__(self, vm: GuestVm) -> None:
        self._meter = LatencyMeter(vm)
        self._since = 0.0

    async def start(self) -> None:
        """Begin a phase."""
        await self._meter.read()
        self._since = asyncio.get_running_loop().time()

    async def read(self, phase: str) -> Latency:
        """What was written since `start`. A write that still waits counts only once it is done."""
        disks = (await self._meter.read()).values()
        writes = sum(disk.writes for disk in disks)
        total_ms = sum(disk.mean_ms * disk.writes for disk in disks)
        return Latency(
            phase,
            asyncio.get_running_loop().time() - self._since,
            writes,
            total_ms / writes if writes else float("inf"),
            sum(disk.slow[200] for disk in disks),
        )


async def main() -> int:
    """Run the demo; exit code 1 if anything is not as it must be."""
    log.configure(log_format="console", level="critical")
    with tempfile.TemporaryDirectory(prefix="vmfleece-demo-") as name:
        folder = Path(name)
        say("booting a guest with two disks that writes all the time (QEMU under TCG) ...")
        vm = GuestVm(
            folder / "vm",
            [DiskSpec("vda", DISK_BYTES, iothread=True), DiskSpec("vdb", DISK_BYTES, format="raw")],
            Workload("sequence", rate=WRITES_PER_SECOND),
            extra_args=slow_target.qemu_arguments(TARGET_BYTES_PER_SECOND, disks=2),
        )
        async with vm:
            await vm.wait_ready()
            say("waiting until it has written to every place of both disks ...")
            await vm.wait_writes(len(vm.disks) * DISK_BYTES // sequence.RECORD, 60)
            file = folder / "vmfleece.toml"
            file.write_text(CONFIG.format(folder=folder, socket=vm.product_socket))
            async with engine.opened(config.load(file), connect=slow_target.connect) as opened:
                phases, problems = await measure(vm, opened)
            problems += await scheduled_backup(file)
            say("\n5. vmfleece restore demo@latest --all")
            problems += await restored_problems(vm, file)
            problems += [f"left behind: {line}" for line in await leftovers(vm)]
            if vm.guest_errors():
                problems.append(f"the guest saw {vm.guest_errors()} write errors")
            print_table(phases)
    for problem in problems:
        say(f"WRONG: {problem}")
    if not problems:
        say("Both disks restored from one moment, no record missing; nothing left behind; no guest write failed.")
    return 1 if problems else 0


async def measure(vm: GuestVm, opened: engine.Engine) -> tuple[list[Latency], list[str]]:
    """The guest's writes alone, with fleecing and without, and what went wrong."""
    meter = Meter(vm)
    say(f"1. the guest alone, {IDLE_SECONDS} s ...")
    await meter.start()
    await asyncio.sleep(IDLE_SECONDS)
    alone = await meter.read("guest alone")
    say_latency(alone)

    say("\n2. vmfleece backup demo --fleecing enabled=1,storage=local   (target limited to 5 MB/s)")
    await meter.start()
    result = await fleecing_backup(opened)
    fleecing = await meter.read("backup with fleecing")
    for line in result_lines(result):
        say(line)
    say_latency(fleecing)

    say(f"\n3. vmfleece backup demo --fleecing enabled=0   (directly to that target, {DIRECT_SECONDS} s at most)")
    await meter.start()
    await direct_backup(opened)
    direct = await meter.read("backup without fleecing")
    say_latency(direct)

    problems = [f"the backup failed: {result.error.message}"] if result.error is not None else []
    return [alone, fleecing, direct], problems


async def fleecing_backup(opened: engine.Engine) -> RunResult:
    """A whole backup with fleecing, with its progress."""
    with Display() as display:
        return await opened.back_up(
            "demo", RunOptions("slow", Fleecing(storage="local")), on_progress=display.update
        )


async def direct_backup(opened: engine.Engine) -> None:
    """A backup without fleecing, ended after a while: at this rate it would take the guest with it."""

    def silent(_progress: Progress) -> None:
        pass

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DIRECT_SECONDS):
            result = await opened.back_up(
                "demo", RunOptions("slow", Fleecing(enabled=False), full=True), on_progress=silent
            )
            if result.error is not None:
                say(f"   it failed: {result.error.message}")
            for line in result_lines(result):
                say(f"   {line}")
            return
    say("   ended by us; the guest's disks are on their own nodes again")


async def scheduled_backup(file: Path) -> list[str]:
    """Have the service back the guest up when its job is due, and end it; return what went wrong."""
    say("\n4. vmfleece daemon   (its job is due every 10 s)")
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orchestrator", "daemon", "--config", str(file)), stderr=asyncio.subprocess.PIPE
    )
    assert daemon.stderr is not None
    try:
        async with asyncio.timeout(SERVICE_SECONDS):
            problems = await until_backed_up(daemon.stderr)
            daemon.terminate()
            await daemon.stderr.read()
            code = await daemon.wait()
    except TimeoutError:
        daemon.kill()
        await daemon.communicate()
        return [f"the service made no backup, or did not end, within {SERVICE_SECONDS} s"]
    return [*problems, f"the service ended with exit code {code}"] if code else problems


async def until_backed_up(lines: asyncio.StreamReader) -> list[str]:
    """Read the service's log until a run has ended; return what went wrong with it."""
    async for line in lines:
        match json.loads(line):
            case {"event": "job.scheduled", "job": job, "due": due}:
                say(f"   job {job} is due at {due}")
            case {"event": "run.finished", "outcome": outcome, "error": error, "kind": kind, "snapshot": snapshot}:
                say(f"   {outcome}: {snapshot}, {kind}")
                return [] if error is None else [f"the service's backup failed: {error['message']}"]
    return ["the service ended before its job was due"]


async def restored_problems(vm: GuestVm, file: Path) -> list[str]:
    """Restore both disks and check the guest's records in them."""
    target = drivers.targets(config.load(file))["slow"]
    snapshot = find(await target.snapshots(), "demo@latest")
    paths = []
    for disk in vm.disks:
        path = file.with_name(f"{disk.id}.raw")
        await restore(target, snapshot, f"disk-{disk.id}", to=path, image_format="raw")
        say(f"   {disk.id}: {disk.size_bytes // MIB} MiB, SHA-256 checked")
        paths.append(path)
    verdict = await asyncio.to_thread(sequence.check, paths, run=vm.run)
    say(f"   newest record on each disk: {verdict.last}")
    return list(verdict.problems)


def say(text: str) -> None:
    """Print a line at once."""
    render.print_line(text)


def say_latency(latency: Latency) -> None:
    """One phase in words."""
    say(f"   guest's writes: {latency.writes_per_second:.0f}/s, mean {latency.mean_ms:.2f} ms")


def print_table(phases: list[Latency]) -> None:
    """All phases beside each other."""
    table = Table("", "GUEST WRITES/S", "MEAN WRITE", "TIMES ALONE", "WRITES > 200 MS")
    for phase in phases:
        table.add_row(
            phase.phase,
            f"{phase.writes_per_second:.0f}",
            f"{phase.mean_ms:.2f} ms",
            f"{phase.mean_ms / phases[0].mean_ms:.1f} x",
            str(phase.slow),
        )
    say("")
    render.print_table(table)


if __name__ == "__main__":
    sys.exit(run_async(main()))
