"""How fast a disk is restored from a repository, beside restic: `python -m benchmarks.restore`.

A disk of 2 GiB, of which a third is random, half text and a sixth zero, scattered; a repository in a folder, in
the page cache; in turn. We read back and hash what was written, and make it durable; `restic restore` does
neither, `restore --verify` reads it back. restic 0.18 comes with `make tools`. Trust the ratios.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from orchestrator import memory
from orchestrator.qemu import tools
from orchestrator.target import durable
from orchestrator.target.repository import contents
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.pack import CHUNK_BYTES
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.snapshot import ResticSnapshot
from orchestrator.target.restic.tree import FileContent
from orchestrator.units import GIB, KIB
from tests.guest.restics import RESTICS

SIZE = 2 * GIB
ROUNDS = 3
PASSWORD = "correct horse"
FILE = "vda.raw"


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
        content = await contents.extract(repository, file, name="vda", to=to, image_format="raw")
    await asyncio.gather(
        tools.read_back(to, "raw", content.update),
        asyncio.to_thread(durable.sync, to),
    )
    if content.problem():
        raise SystemExit(content.problem())


def run_ours(root: Path, out: Path) -> None:
    memory.keep_freed()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(ours(root, out / FILE))


def run_restic(version: str, *arguments: str) -> Callable[[Path, Path], None]:
    def run(root: Path, out: Path) -> None:
        environment = os.environ | {"RESTIC_PASSWORD": PASSWORD}
        argv = [RESTICS[version], "--no-cache", "--repo", str(root), *arguments]
        if arguments[0] == "restore":
            subprocess.run([*argv, "--target", str(out)], env=environment, check=True, stdout=subprocess.DEVNULL)
        else:
            with (out / FILE).open("wb") as file:
                subprocess.run(argv, env=environment, check=True, stdout=file)

    return run


WAYS: dict[str, Callable[[Path, Path], None]] = {"ours": run_ours} | {
    f"restic {version} {' '.join(arguments)}": run_restic(version, *arguments, "latest", *more)
    for version, program in RESTICS.items()
    if shutil.which(program)
    for arguments, more in ((("restore",), ()), (("restore", "--verify"), ()), (("dump",), (f"/{FILE}",)))
}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(way: Callable[[Path, Path], None], root: Path, out: Path) -> Took:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    os.sync()
    began, cpu = time.perf_counter(), cpu_seconds()
    way(root, out)
    return Took(time.perf_counter() - began, cpu_seconds() - cpu)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "repository", Path(folder) / "out"
        repository = asyncio.run(Repository.create(DirectoryBackend(root), PASSWORD))
        asyncio.run(write(repository, b"".join(pieces(SIZE))))
        took: dict[str, list[Took]] = {name: [] for name in WAYS}
        for _ in range(ROUNDS):
            for name, way in WAYS.items():
                took[name].append(measure(way, root, out))
        ours_seconds = statistics.median(one.seconds for one in took["ours"])
        for name, runs in took.items():
            seconds = statistics.median(one.seconds for one in runs)
            cpu = statistics.median(one.cpu_seconds for one in runs)
            print(
                f"{name:28} {seconds:5.2f} s  {SIZE / seconds / 1e6:5.0f} MB/s"
                f"  {seconds / ours_seconds:4.2f} times ours  {cpu:5.2f} CPU-s"
            )


if __name__ == "__main__":
    main()
