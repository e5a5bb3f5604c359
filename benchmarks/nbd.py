"""How fast the NBD server receives and is read, beside qemu-nbd: `python -m benchmarks.nbd`.

nbdcopy writes chunks of 4 MiB of an image in the page cache to a sink that throws them away, as QEMU's
blockdev-backup does with 4 MiB clusters, and reads an export that is nothing but zeroes. Beside it qemu-nbd serves
null-co, which throws away and makes up as well. Trust the ratios: the client takes most of the processor, and
what one run takes of two cores, the other one lacks.
"""

import asyncio
import contextlib
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.report import Section, Table
from orchestrator.aio import run_process
from orchestrator.nbd.connection import Limits, Trouble
from orchestrator.nbd.export import BlockSizes, Data, Export
from orchestrator.nbd.server import NbdServer
from orchestrator.units import GIB, MIB, format_size

SIZE = GIB
CHUNK = 4 * MIB
IN_FLIGHT = 16
ROUNDS = 5


class Null(Export):
    """Throws away what is written, having received it in one of 16 buffers that are used again and again."""

    block_sizes = BlockSizes(preferred=CHUNK)

    def __init__(self) -> None:
        self._free = [memoryview(bytearray(CHUNK)) for _ in range(IN_FLIGHT)]
        self._room = asyncio.Semaphore(IN_FLIGHT)
        self._zeroes = bytes(CHUNK)

    @property
    def size_bytes(self) -> int:
        return SIZE

    async def read(self, offset: int, length: int) -> Data:
        del offset
        return memoryview(self._zeroes)[:length]

    @contextlib.asynccontextmanager
    async def buffer(self, offset: int, length: int) -> AsyncIterator[memoryview]:
        del offset
        async with self._room:
            lent = self._free.pop()
            try:
                yield lent[:length]
            finally:
                self._free.append(lent)

    async def write(self, offset: int, data: memoryview) -> None:
        pass

    async def write_zeroes(self, offset: int, length: int, *, may_be_hole: bool) -> None:
        pass

    async def flush(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Took:
    """Of one copy of SIZE bytes: wall clock, and the server's processor time, in seconds."""

    seconds: float
    server_cpu_seconds: float


async def copy(source: str, target: str) -> float:
    """Seconds of one copy."""
    began = time.perf_counter()
    argv = ["nbdcopy", f"--request-size={CHUNK}", f"--requests={IN_FLIGHT}", "--connections=1", "--sparse=0"]
    done = await run_process([*argv, source, target])
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - began


def cpu_of(pid: int) -> float:
    """Processor seconds of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_there(path: Path) -> bool:
    return path.exists()


async def ours(path: Path, work: Callable[[], Awaitable[float]]) -> Took:
    """One copy with our server, in this process: what it takes itself meanwhile is the server's."""
    troubles: list[Trouble] = []
    async with NbdServer({"": Null()}, report=troubles.append, limits=Limits(requests=IN_FLIGHT)).at(path):
        before = resource.getrusage(resource.RUSAGE_SELF)
        seconds = await work()
        after = resource.getrusage(resource.RUSAGE_SELF)
    if troubles:
        raise SystemExit(str(troubles))
    return Took(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


async def qemu_nbd(path: Path, work: Callable[[], Awaitable[float]]) -> Took:
    """One copy with qemu-nbd."""
    null = f"driver=null-co,size={SIZE}"  # it would not be read if it said that it is zero
    argv = ["qemu-nbd", "-t", "-e", "4", "-k", str(path), "--image-opts", null]
    process = await asyncio.create_subprocess_exec(*argv)
    try:
        while not is_there(path):
            await asyncio.sleep(0.01)
        before = cpu_of(process.pid)
        seconds = await work()
        return Took(seconds, cpu_of(process.pid) - before)
    finally:
        process.terminate()
        await process.wait()


async def rows_of(folder: Path) -> list[tuple[str, ...]]:
    """Medians of rounds in turn, for both directions."""
    image = folder / "image"
    image.write_bytes(random.Random(1).randbytes(CHUNK) * (SIZE // CHUNK))
    path = folder / "s"
    uri = f"nbd+unix:///?socket={path}"
    rows = []
    for what, source, target in (("receiving", str(image), uri), ("being read", uri, "null:")):
        report.say(what)
        took: dict[str, list[Took]] = {"ours": [], "qemu-nbd": []}
        for _ in range(ROUNDS):
            took["ours"].append(await ours(path, lambda s=source, t=target: copy(s, t)))
            took["qemu-nbd"].append(await qemu_nbd(path, lambda s=source, t=target: copy(s, t)))
        seconds = {who: statistics.median(one.seconds for one in runs) for who, runs in took.items()}
        cpu = {who: statistics.median(one.server_cpu_seconds for one in runs) for who, runs in took.items()}
        rates = (f"{SIZE / seconds[who] / 1e6:.0f} MB/s" for who in took)
        used = (f"{cpu[who] / (SIZE / 1e9):.2f}" for who in took)
        rows.append((what, *rates, f"{seconds['qemu-nbd'] / seconds['ours']:.2f}", ", ".join(used)))
    return rows


async def measure() -> Section:
    with tempfile.TemporaryDirectory() as folder:
        rows = await rows_of(Path(folder))
    columns = ("", "ours (Python)", "qemu-nbd with null-co", "ratio", "CPU seconds per GB, ours and qemu-nbd's")
    return Section(
        "The NBD server",
        f"nbdcopy moves {format_size(SIZE)} over a unix socket, one connection, requests of {format_size(CHUNK)}; "
        f"what is received is thrown away; median of {ROUNDS}.",
        (Table(columns, tuple(rows)),),
    )


if __name__ == "__main__":
    report.main(measure)
