"""How fast a disk is restored from a repository, beside restic: `python -m benchmarks.restore`.

A disk of which a third is random, half text and a sixth zero, scattered; a repository in a folder, in
the page cache; in turn. Both hash what they write. We make it durable, which `restic restore` does not;
`restore --verify` reads it back. restic 0.18 comes with `make tools`. Trust the ratios.
"""

import asyncio
import os
import random
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import report
from benchmarks.report import Bound, Section, Table
from orchestrator import memory
from orchestrator.target.repository import contents
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.pack import CHUNK_BYTES
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.snapshot import ResticSnapshot
from orchestrator.target.restic.tree import FileContent
from orchestrator.units import GIB, KIB
from tests.guest.restics import RESTICS

OURS = "vmfleece"
PASSWORD = "correct horse"
FILE = "vda.raw"

Way = Callable[[Path, Path], Awaitable[None]]
"""From a repository, into a folder."""


@dataclass(frozen=True, slots=True)
class Took:
    """Of one restore: wall clock, and processor time of all processes."""

    seconds: float
    cpu_seconds: float


def pieces(size: int) -> Iterator[bytes]:
    """A disk's content, from 64 KiB to 4 MiB at once of a kind."""
    source = random.Random(1)
    words = [source.randbytes(6).hex() for _ in range(2000)]
    while size:
        length = min(size, source.choice([64, 128, 256, 1024, 4096]) * KIB)
        kind = source.random()
        if kind < 0.33:
            yield source.randbytes(length)
        elif kind < 0.83:
            yield " ".join(source.choices(words, k=length // 13 + 1)).encode()[:length].ljust(length)
        else:
            yield bytes(length)
        size -= length


async def write(repository: Repository, content: bytes) -> None:
    view = memoryview(content)
    async with repository.lock() as lock:
        await repository.load_index()
        writer = repository.writer(lock)
        starts = range(0, len(content), CHUNK_BYTES)
        with ThreadPoolExecutor(2) as threads:
            ids = list(threads.map(lambda at: writer.add_chunk(view[at : at + CHUNK_BYTES])[0], starts))
        now = datetime.now(UTC)
        tree = await writer.write_file_tree({FILE: FileContent(len(content), ids)}, b"{}", now)
        await writer.commit(ResticSnapshot(now, tree, "web01", ("/web01",), ("run",)))


async def ours(root: Path, to: Path) -> None:
    repository = await Repository.open(DirectoryBackend(root), PASSWORD)
    async with repository.lock():
        await repository.load_index()
        (made,) = (await repository.snapshots()).snapshots
        file = (await repository.files(made))[FILE]
        await contents.extract(repository, file, name="vda", to=to, image_format="raw")


async def run_ours(root: Path, out: Path) -> None:
    await ours(root, out / FILE)


def run_restic(version: str, *arguments: str) -> Way:
    def run(root: Path, out: Path) -> None:
        environment = os.environ | {"RESTIC_PASSWORD": PASSWORD}
        argv = [RESTICS[version], "--no-cache", "--repo", str(root), *arguments]
        if arguments[0] == "restore":
            subprocess.run([*argv, "--target", str(out)], env=environment, check=True, stdout=subprocess.DEVNULL)
        else:
            with (out / FILE).open("wb") as file:
                subprocess.run(argv, env=environment, check=True, stdout=file)

    return lambda root, out: asyncio.to_thread(run, root, out)


WAYS: dict[str, Way] = {OURS: run_ours} | {
    f"restic {version} `{' '.join(arguments)}`": run_restic(version, *arguments, "latest", *more)
    for version in RESTICS
    for arguments, more in ((("restore",), ()), (("restore", "--verify"), ()), (("dump",), (f"/{FILE}",)))
}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


async def timed(way: Way, root: Path, out: Path) -> Took:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    os.sync()
    began, cpu = time.perf_counter(), cpu_seconds()
    await way(root, out)
    return Took(time.perf_counter() - began, cpu_seconds() - cpu)


async def measure(gib: int, rounds: int) -> Section:
    """All ways in turn."""
    memory.keep_freed()
    size = gib * GIB
    took: dict[str, list[Took]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "repository", Path(folder) / "out"
        report.say("filling a repository")
        repository = await Repository.create(DirectoryBackend(root), PASSWORD)
        await write(repository, b"".join(pieces(size)))
        for _ in range(rounds):
            for name, way in WAYS.items():
                report.say(name)
                took[name].append(await timed(way, root, out))
    seconds = {name: statistics.median(one.seconds for one in runs) for name, runs in took.items()}
    rows = [
        (
            name,
            f"{seconds[name]:.2f}",
            f"{size / seconds[name] / 1e6:.0f}",
            f"{statistics.median(one.cpu_seconds for one in runs):.1f}",
            f"{seconds[name] / seconds[OURS]:.2f}",
        )
        for name, runs in took.items()
    ]
    fastest = min(one for name, one in seconds.items() if name.endswith("`restore`"))
    return Section(
        "How long a restore from a repository takes",
        f"""
        {gib} GiB, a third of it random, half text, a sixth zero; repository and file on one local disk,
        in the page cache; medians of {rounds} rounds in turn. Both hash what they write. We make it durable, past
        the page cache; `restic restore` leaves it in the page cache, and reads it back only with `--verify`.
        """,
        (Table(("", "seconds", "MB/s", "CPU seconds", "times ours"), tuple(rows)),),
        (
            Bound(
                "restore from a repository, times the faster `restic restore`",
                fastest / seconds[OURS],
                least=1,
            ),
        ),
    )


if __name__ == "__main__":
    report.main(measure, gib=1, rounds=3)
