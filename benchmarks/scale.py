"""What the control plane costs beside the number of VMs: `python -m benchmarks.scale`.

The daemon as it is, in a process of its own, with 10, 100 and 1000 VMs: scripted QEMUs behind real sockets in
another process (`fleet`), and from 100 VMs on 20 of them real ones, paused at their first instruction. All have
a history of two weeks. Then a job backs up all of them, a hundred at once: it is measured until so many have
their block job, with all others in the queue, and how long a grant that runs out waits for its extension
meanwhile, beside 1000 events a second.
"""

import asyncio
import contextlib
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import report
from benchmarks.report import Bound, Section, Table, percentile
from orchestrator.model import Kind, Outcome, RunResult
from orchestrator.state.catalogue import Catalogue
from orchestrator.units import KIB, MIB, format_size
from tests.guest.process import QemuProcess

COUNTS = (10, 100, 1000)
REAL = 20
REAL_FROM = 100
AT_ONCE = 100
"""Runs: each has two images made by qemu-img, processes that have to be started on this machine, too."""
NIGHTS = 14
IDLE_SECONDS = 10.0
EVENTS_PER_SECOND = 1000
LOAD_SECONDS = 10.0
ASKED = 20
DEADLINE_SECONDS = 240.0
DOCUMENTS = ("/api/v1/status", "/api/v1/protection", "/api/v1/runs?limit=50", "/metrics")

CONFIG = """
[daemon]
state_dir = "{folder}/state"
run_dir = "{folder}/run"
max_runs = {at_once}
[storage.local]
path = "{folder}/fleecing"
quota = "1TiB"
min_free = "64MiB"
[target.main]
path = "{folder}/backups"
[job.all]
vms = ["*"]
target = "main"
fleecing = "enabled=1,storage=local"
"""


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured with so many VMs. Seconds, bytes, and shares of one processor."""

    count: int
    connect_seconds: float
    idle_bytes: int
    idle_share: float
    start_seconds: float
    start_cpu_seconds: float
    busy_bytes: int
    asked: list[float]
    answered: list[float]
    idle_documents: dict[str, float]
    busy_documents: dict[str, float]


class Process:
    """A process of ours, as the kernel sees it."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def cpu_seconds(self) -> float:
        """Of its own threads, and of its children that have ended."""
        fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """What it has in memory."""
        return int((self._folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Fleet:
    """The scripted QEMUs' process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, *words: object) -> Any:
        """Tell it something, and its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        if not (line := await self._process.stdout.readline()):
            raise RuntimeError("the fleet has ended")
        return json.loads(line)


@contextlib.asynccontextmanager
async def started(*argv: str, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process of ours, killed at the end of the block, or with us."""
    process = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "KILL", "--", sys.executable, *argv), **options
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def fleet(folder: Path, count: int) -> AsyncIterator[Fleet]:
    """So many scripted QEMUs in a folder, for the block."""
    pipe = asyncio.subprocess.PIPE
    async with started(
        "-m", "benchmarks.fleet", str(folder), str(count), stdin=pipe, stdout=pipe, limit=1 << 24
    ) as process:
        assert process.stdout is not None
        await process.stdout.readline()
        yield Fleet(process)


@contextlib.asynccontextmanager
async def real(folder: Path, count: int) -> AsyncIterator[None]:
    """So many real QEMUs in a folder, for the block."""
    async with contextlib.AsyncExitStack() as stack:
        for number in range(count):
            process = await QemuProcess.start(
                qemu_arguments(folder, f"real{number:04d}"), stderr=folder / f"real{number:04d}.log"
            )
            stack.push_async_callback(process.end)
        yield


def qemu_arguments(folder: Path, name: str) -> list[str]:
    """A VM with an empty disk and no guest, that is never started."""
    disk = folder / f"{name}.raw"
    disk.touch()
    os.truncate(disk, MIB)
    blockdev = {"driver": "raw", "node-name": "drive", "file": {"driver": "file", "filename": str(disk)}}
    return [
        *("qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-machine", "q35,accel=tcg", "-m", "16"),
        *("-blockdev", json.dumps(blockdev), "-device", "virtio-blk-pci,drive=drive,id=vda"),
        *("-qmp", f"unix:{folder}/{name}.qmp,server=on,wait=off"),
    ]


async def read_schema(folder: Path) -> None:
    """Have a real QEMU say what it can, for the scripted ones."""
    process = await QemuProcess.start(qemu_arguments(folder, "first"), stderr=folder / "first.log")
    try:
        await process.connect(folder / "first.qmp")
        schema = await process.execute("query-qmp-schema", None, 20)
    finally:
        await process.end()
    (folder / "schema.json").write_text(json.dumps(schema))


def enter_history(state_dir: Path, vms: Sequence[str]) -> None:
    """All VMs were backed up every night."""
    state_dir.mkdir()
    catalogue, now = Catalogue(state_dir), datetime.now(UTC)
    rows = []
    for night in range(NIGHTS, 0, -1):
        for vm in vms:
            begun = now - timedelta(days=night)
            run = secrets.token_hex(4)
            snapshot = f"{vm}/{begun:%Y%m%dT%H%M%SZ}"
            result = RunResult(vm, run, Outcome.SUCCEEDED, snapshot, Kind.FULL, "", begun, 61.5, None, ())
            rows.append((run, vm, "all", begun.isoformat(), result.outcome, json.dumps(result.as_json())))
    with catalogue._database.transaction() as connection:
        connection.executemany("INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?, ?, ?)", rows)


async def until(true: Callable[[], Awaitable[bool]], what: str) -> float:
    """The moment at which something has become true."""
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await true():
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise RuntimeError(f"waited {DEADLINE_SECONDS:g} s for {what}") from None
    return time.monotonic()


async def documents(api: aiohttp.ClientSession) -> dict[str, float]:
    """The median time until each has been answered whole, one after the other, as a browser asks."""
    seconds = {}
    for path in DOCUMENTS:
        took = []
        for _ in range(ASKED):
            began = time.monotonic()
            async with api.get(path) as answer:
                await answer.read()
                answer.raise_for_status()
            took.append(time.monotonic() - began)
        seconds[path] = statistics.median(took)
    return seconds


async def with_vms(folder: Path, count: int, at_once: int) -> Row:
    """All measurements with so many VMs."""
    real_ones = REAL if count >= REAL_FROM else 0
    names = [f"vm{number:04d}" for number in range(count - real_ones)]
    names += [f"real{number:04d}" for number in range(real_ones)]
    config = CONFIG.format(folder=folder, at_once=at_once)
    config += "".join(f'[vm.{vm}]\nqmp = "{folder}/{vm}.qmp"\n' for vm in names)
    (folder / "vmfleece.toml").write_text(config)
    enter_history(folder / "state", names)
    await read_schema(folder)
    connector = aiohttp.UnixConnector(f"{folder}/run/api.sock")
    log = folder / "daemon.log"
    async with (
        fleet(folder, count - real_ones) as scripted,
        real(folder, real_ones),
        aiohttp.ClientSession("http://localhost", connector=connector) as api,
    ):
        with log.open("wb") as output:
            argv = ("-m", "orchestrator", "daemon", "--config", str(folder / "vmfleece.toml"))
            async with started(*argv, stdout=output, stderr=output) as daemon:
                try:
                    return await measured(
                        Process(daemon.pid),
                        scripted,
                        api,
                        count,
                        scripted_count=count - real_ones,
                        at_once=at_once,
                    )
                except RuntimeError:
                    report.say(log.read_text()[-2000:])
                    raise


async def measured(
    daemon: Process, scripted: Fleet, api: aiohttp.ClientSession, count: int, *, scripted_count: int, at_once: int
) -> Row:
    """What is seen of a daemon that was just started."""
    began = time.monotonic()

    async def quiet() -> bool:
        return bool((await scripted.ask("quiet"))["quiet"] == scripted_count)

    connected = await until(quiet, "all VMs to be connected to and left in peace")
    await asyncio.sleep(1)
    cpu, idle_since = daemon.cpu_seconds(), time.monotonic()
    await asyncio.sleep(IDLE_SECONDS)
    idle_share = (daemon.cpu_seconds() - cpu) / (time.monotonic() - idle_since)
    idle_bytes = daemon.resident_bytes()
    idle_documents = await documents(api)
    report.say(f"{count} VMs: a job backs them all up")

    async def copying() -> bool:
        answer = await scripted.ask("copying")
        if answer["deaths"]:
            raise RuntimeError(str(answer["deaths"]))
        return bool(answer["copying"] == min(scripted_count, at_once))

    asked, cpu = time.monotonic(), daemon.cpu_seconds()
    async with api.post("/api/v1/jobs/all/run") as answer:
        if answer.status >= 400:
            raise RuntimeError(await answer.text())
    started_at = await until(copying, f"{at_once} VMs to be copied")
    start_cpu_seconds = daemon.cpu_seconds() - cpu
    await asyncio.sleep(2)
    report.say(f"{count} VMs: {EVENTS_PER_SECOND} events a second")
    load = await scripted.ask("load", EVENTS_PER_SECOND, LOAD_SECONDS)
    if load["unanswered"] or not load["answered"]:
        raise RuntimeError(f"{load['unanswered']} thresholds were not answered, {len(load['answered'])} were")
    return Row(
        count,
        connected - began - 2,
        idle_bytes,
        idle_share,
        started_at - asked,
        start_cpu_seconds,
        daemon.resident_bytes(),
        load["asked"],
        load["answered"],
        idle_documents,
        await documents(api),
    )


def per_vm_bytes(few: Row, many: Row) -> float:
    """What one more VM takes."""
    return (many.idle_bytes - few.idle_bytes) / (many.count - few.count)


async def measure(runs: int) -> Section:
    """A row for each number of VMs, of which `runs` are backed up side by side."""
    rows = []
    for count in COUNTS:
        report.say(f"{count} VMs: connecting")
        with tempfile.TemporaryDirectory(prefix="vmf-scale-") as folder:
            rows.append(await with_vms(Path(folder), count, runs))
    few, many = rows[0], rows[-1]
    return Section(
        "What the control plane costs beside the number of VMs",
        f"""
        The daemon with so many VMs, each with a history of {NIGHTS} nights. They are scripted QEMUs
        behind real QMP sockets, in another process; from {REAL_FROM} VMs on {REAL} of them are real.
        *To start* is the time from asking for a job over all VMs until {runs} of them (or all) have their
        block job, and the others wait in the queue: two images are made for each by qemu-img. *A threshold* is an
        image that reaches the threshold of its grant meanwhile, while {EVENTS_PER_SECOND} events a second come
        in: until QEMU is asked about it, and until the grant is extended (with a transaction of the ledger, and
        the job held still) and the next threshold is set.
        """,
        (Table(("", *(f"{row.count} VMs" for row in rows)), tuple(table_rows(rows, runs))),),
        (
            Bound("memory a VM, connected and idle", per_vm_bytes(few, many) / MIB, most=1, unit="MiB"),
            Bound(f"{many.count} VMs, idle, of a processor", many.idle_share * 100, most=2, unit="%"),
            Bound(
                f"{EVENTS_PER_SECOND} events/s, {many.count} VMs, {runs} copied: p99 until a reaction",
                percentile(many.asked, 99) * 1e3,
                most=50,
                unit="ms",
            ),
        ),
    )


def table_rows(rows: Sequence[Row], at_once: int) -> list[tuple[str, ...]]:
    """Each figure, for each number of VMs."""

    def row(name: str, figure: Callable[[Row], str]) -> tuple[str, ...]:
        return (name, *map(figure, rows))

    def spread(values: Sequence[float]) -> str:
        return " / ".join(f"{percentile(values, percent) * 1e3:.1f}" for percent in (50, 99))

    few = rows[0]
    return [
        row("until all are connected, s", lambda one: f"{one.connect_seconds:.1f}"),
        row("memory, idle", lambda one: format_size(one.idle_bytes)),
        row(
            f"one more VM than {few.count}",
            lambda one: f"{per_vm_bytes(few, one) / KIB:.0f} KiB" if one is not few else "",
        ),
        row("idle, of a processor", lambda one: f"{one.idle_share:.2%}"),
        row("to start, s", lambda one: f"{one.start_seconds:.1f}"),
        row(
            "processor time of it a run, qemu-img's too, ms",
            lambda one: f"{one.start_cpu_seconds / min(one.count, at_once) * 1e3:.0f}",
        ),
        row("memory, so many copied", lambda one: format_size(one.busy_bytes)),
        row("a threshold, until asked about, p50 / p99, ms", lambda one: spread(one.asked)),
        row("a threshold, until answered, p50 / p99, ms", lambda one: spread(one.answered)),
        *(
            row(
                f"`GET {path}`, idle / so many copied, ms",
                lambda one, path=path: " / ".join(
                    f"{seconds[path] * 1e3:.1f}" for seconds in (one.idle_documents, one.busy_documents)
                ),
            )
            for path in DOCUMENTS
        ),
    ]


if __name__ == "__main__":
    report.main(measure, runs=AT_ONCE)
