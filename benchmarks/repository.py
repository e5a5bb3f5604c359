"""Backups to a repository beside restic's: `python -m benchmarks.repository`.

An idle guest with a raw disk, filled with files of this host (as a system disk is), random data, and zeroes. In
turn, each into a new repository: our backup with fleecing, and `restic backup` of the very same file. Then a guest
that has an empty disk of 1 TiB as well is backed up, and again with nothing changed. Trust the ratios, not the
seconds. Needs four times the disk's size in the temporary folder.
"""

import asyncio
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import bed, report
from benchmarks.report import Bound, Section, Table
from orchestrator.model import Fleecing, Kind, RunOptions
from orchestrator.service.engine import Engine
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.repository import Repository
from orchestrator.units import GIB, MIB, format_size
from tests.guest.restics import Restic
from tests.guest.vm import DiskSpec, Workload

OURS = "vmfleece"
WANTED_RATIO = 1.5
WANTED_UNCHANGED_SECONDS = 2.0
FILES = ("/usr/lib", "/usr/share", "/usr/bin")
MIX = {"files of the host": 0.5, "random": 0.2, "zeroes": 0.3}


@dataclass(frozen=True, slots=True)
class Row:
    """A backup that succeeded: its seconds, and what it put into the repository."""

    name: str
    seconds: float
    stored_bytes: int


async def measure(gib: int, rounds: int) -> Section:
    """Both parts."""
    with tempfile.TemporaryDirectory(prefix="vmfleece-bench-") as name:
        folder = Path(name)
        image = folder / "vda.raw"
        await asyncio.to_thread(fill, image, gib * GIB)
        disk, empty = DiskSpec("vda", gib * GIB, format="raw", image=image), DiskSpec("vdb", 1024 * GIB)
        one, two = folder / "one", folder / "two"
        async with bed.made(one, [disk], Workload("idle")) as (_, opened):
            rows = await compared(opened, image, one / "repository", rounds)
        async with bed.made(two, [disk, empty], Workload("idle")) as (_, opened):
            unchanged = await repeated(opened, two / "repository")
    return section(rows, unchanged, gib)


def fill(image: Path, size_bytes: int) -> None:
    """Make the disk's content; blocks."""
    with image.open("wb") as file:
        left = round(size_bytes * MIX["files of the host"])
        for path in host_files():
            if left <= 0:
                break
            content = path.read_bytes()[:left]
            file.write(content)
            left -= len(content)
        source = random.Random(1)
        for _ in range(round(size_bytes * MIX["random"]) // MIB):
            file.write(source.randbytes(MIB))
        file.truncate(size_bytes)
        file.flush()
        os.fsync(file.fileno())  # a snapshot would wait for it


def host_files() -> Iterator[Path]:
    """Regular files of this host, in the order of their names."""
    for top in FILES:
        for folder, _, names in sorted(os.walk(top)):
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_file() and not path.is_symlink() and path.stat().st_size < 64 * MIB:
                    yield path


async def compared(opened: Engine, image: Path, repository: Path, rounds: int) -> list[Row]:
    """In turn, so that what else the machine does hits all of them."""
    rows = []
    for _ in range(rounds):
        for version in ("0.14", "0.18"):
            rows.append(await asyncio.to_thread(restic_backup, version, image, repository))
            shutil.rmtree(repository)
        await Repository.create(DirectoryBackend(repository), bed.PASSWORD)
        rows.append(await our_backup(opened, repository, OURS, full=True))
        shutil.rmtree(repository)
    return rows


async def repeated(opened: Engine, repository: Path) -> list[Row]:
    """A full backup, and three of what has not changed since."""
    await Repository.create(DirectoryBackend(repository), bed.PASSWORD)
    names = ("full", "unchanged", "unchanged", "unchanged")
    return [await our_backup(opened, repository, name, full=name == "full") for name in names]


def restic_backup(version: str, image: Path, repository: Path) -> Row:
    """`restic backup` of the file, into a new repository."""
    report.say(f"restic {version}")
    restic = Restic(repository, bed.PASSWORD, version)
    restic.run("init")
    started = time.monotonic()
    restic.run("backup", str(image))
    return Row(f"restic {version}", time.monotonic() - started, used_bytes(repository))


async def our_backup(opened: Engine, repository: Path, name: str, *, full: bool) -> Row:
    """A whole run, from asking for it to its result."""
    report.say(name)
    before = used_bytes(repository)
    options = RunOptions("repo", Fleecing(storage="local"), full=full)
    started = time.monotonic()
    result = await opened.back_up(bed.VM, options, on_progress=lambda _: None)
    seconds = time.monotonic() - started
    if result.error is not None or result.kind is not (Kind.FULL if full else Kind.INCREMENTAL):
        raise RuntimeError(f"{name}: {result}")
    return Row(name, seconds, used_bytes(repository) - before)


def used_bytes(folder: Path) -> int:
    """What a folder's files have, all together."""
    done = subprocess.run(["du", "-sb", str(folder)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def section(rows: list[Row], unchanged: list[Row], gib: int) -> Section:
    """Both tables and what they must hold."""
    names = list(dict.fromkeys(row.name for row in rows))
    seconds = {name: statistics.median(row.seconds for row in rows if row.name == name) for name in names}
    stored = {name: next(row.stored_bytes for row in rows if row.name == name) for name in names}
    full, *again = (row.seconds for row in unchanged)
    mix = ", ".join(f"{share:.0%} {what}" for what, share in MIX.items())
    ratio = min(seconds[name] for name in names if name != OURS) / seconds[OURS]
    return Section(
        "How long a backup to a repository takes",
        f"""
        An idle guest with a raw disk of {gib} GiB ({mix}), each time into a new repository on the same
        local disk; restic reads the very same file, with its own compression level. Medians, in turn.
        """,
        (
            Table(
                (
                    "full backup into a new repository",
                    "seconds",
                    "MiB/s",
                    "stored",
                    "ours is so many times as fast",
                ),
                tuple(
                    (
                        name,
                        f"{seconds[name]:.1f}",
                        f"{gib * GIB / MIB / seconds[name]:.0f}",
                        format_size(stored[name]),
                        f"{seconds[name] / seconds[OURS]:.2f}",
                    )
                    for name in names
                ),
            ),
            Table(
                ("with an empty disk of 1 TiB beside it", "seconds"),
                (
                    ("full", f"{full:.1f}"),
                    ("nothing changed, three times", ", ".join(f"{one:.2f}" for one in again)),
                ),
            ),
        ),
        (
            Bound("repository, full, times the faster restic", ratio, least=WANTED_RATIO),
            Bound(
                "repository, 1 TiB of which nothing has changed",
                statistics.median(again),
                most=WANTED_UNCHANGED_SECONDS,
                unit="s",
            ),
        ),
    )


if __name__ == "__main__":
    report.main(measure, gib=2, rounds=2)
