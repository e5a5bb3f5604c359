"""What a backup takes beside the disk's size: `python -m benchmarks.growth`.

A real QEMU without a guest, with one raw disk: empty ones of up to 64 GiB, and ones that are full of data of which
nothing is there twice. Each is backed up once by `vmfleece backup`, a process of its own, to a folder and to a new
repository; the memory of that process and of the mover, which writes to the repository, is looked at all the time.
"""

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import bed, report
from benchmarks.report import Bound, Section, Table
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.repository import Repository
from orchestrator.units import GIB, KIB, MIB
from tests.guest.process import QemuProcess

SPARSE_GIB = (1, 4, 16, 64)
FULL_GIB = (1, 4, 8)
TARGETS = {"main": "images", "repo": "repository"}
LOOK_SECONDS = 0.02
MOVER = "orchestrator.target.mover"
MOST_TIMES = 1.25
"""How much more memory the largest disk may take than the smallest, to be called flat."""


@dataclass
class Peaks:
    """The most memory that a process and its children had, by what they are. In bytes."""

    ours: int = 0
    mover: int = 0

    def look(self, pid: int) -> None:
        """Take one look at a process and its children: the kernel keeps the peak of each."""
        self.ours = max(self.ours, _peak_bytes(pid))
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if MOVER in Path(f"/proc/{child}/cmdline").read_text():
                    self.mover = max(self.mover, _peak_bytes(int(child)))


def _peak_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KIB
    return 0


@dataclass(frozen=True, slots=True)
class Row:
    """One backup."""

    what: str
    gib: int
    target: str
    seconds: float
    peaks: Peaks
    stored_bytes: int
    index_bytes: int


@contextlib.asynccontextmanager
async def vm(folder: Path, disk: Path) -> AsyncIterator[Path]:
    """A QEMU with a disk and no guest; gives the socket of its monitor."""
    path = folder / "vm.qmp"
    file = {"driver": "file", "filename": str(disk)}
    process = await QemuProcess.start(
        [
            *("qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-m", "16"),
            *("-machine", "q35,accel=tcg", "-object", "iothread,id=io"),
            *("-blockdev", json.dumps({"driver": "raw", "node-name": "drive", "file": file})),
            *("-device", "virtio-blk-pci,drive=drive,id=vda,iothread=io"),
            *("-qmp", f"unix:{path},server=on,wait=off"),
            *("-qmp", f"unix:{folder}/bed.qmp,server=on,wait=off"),
        ],
        stderr=folder / "qemu.log",
    )
    try:
        await process.connect(folder / "bed.qmp")
        yield path
    finally:
        await process.end()


async def backup(folder: Path, what: str, gib: int, target: str) -> Row:
    """One full backup of a disk that is there."""
    report.say(f"{what}, {gib} GiB, to {TARGETS[target]}")
    async with vm(folder, folder / "disk.raw") as socket:
        config = bed.write_config(folder, socket)
        await Repository.create(DirectoryBackend(folder / "repository"), bed.PASSWORD)
        peaks, began = Peaks(), time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-m", "orchestrator", "backup", bed.VM),
            *("--config", str(config), "--target", target, "--fleecing", "enabled=1,storage=local", "--json"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        told = asyncio.ensure_future(process.communicate())
        while not told.done():
            peaks.look(process.pid)
            await asyncio.sleep(LOOK_SECONDS)
        seconds = time.monotonic() - began
    stdout, _ = told.result()
    (result,) = json.loads(stdout)["runs"]
    if result["error"] is not None:
        raise RuntimeError(str(result["error"]))
    at = folder / ("backups" if target == "main" else "repository")
    return Row(what, gib, target, seconds, peaks, used_bytes(at), used_bytes(at / "index"))


def used_bytes(folder: Path) -> int:
    """What all files below a folder occupy."""
    return sum(
        (Path(parent) / name).stat().st_blocks * 512 for parent, _, names in os.walk(folder) for name in names
    )


async def measure() -> Section:
    """A row for each disk and target."""
    rows = []
    for what, sizes in (("empty", SPARSE_GIB), ("full", FULL_GIB)):
        for gib in sizes:
            with tempfile.TemporaryDirectory(prefix="vmf-growth-") as name:
                disk = Path(name) / "disk.raw"
                if what == "full":
                    await asyncio.to_thread(bed.fill, disk, gib * GIB)
                else:
                    disk.touch()
                    os.truncate(disk, gib * GIB)
                for target in TARGETS:
                    folder = Path(name) / target
                    folder.mkdir()
                    (folder / "disk.raw").symlink_to(disk)
                    rows.append(await backup(folder, what, gib, target))
                    shutil.rmtree(folder)
    return Section(
        "What a backup takes beside the disk's size",
        """
        One full backup each, by `vmfleece backup` as a process of its own, of a raw disk of a QEMU without a
        guest. Peaks of memory as the kernel counts them: of the process that sequences the backup, and of the
        mover, which chunks, compresses and encrypts for the repository.
        """,
        (Table(COLUMNS, tuple(map(cells, rows))),),
        tuple(flat(rows, what, target) for what in ("empty", "full") for target in TARGETS),
    )


COLUMNS = ("disk", "GiB", "to", "seconds", "memory, MiB", "mover's, MiB", "stored, MiB", "index, KiB")


def cells(row: Row) -> tuple[str, ...]:
    """A row as it is shown."""
    repository = row.target == "repo"
    return (
        row.what,
        str(row.gib),
        TARGETS[row.target],
        f"{row.seconds:.1f}",
        f"{row.peaks.ours / MIB:.0f}",
        f"{row.peaks.mover / MIB:.0f}" if repository else "",
        f"{row.stored_bytes / MIB:.1f}",
        f"{row.index_bytes / KIB:.0f}" if repository else "",
    )


def flat(rows: list[Row], what: str, target: str) -> Bound:
    """That the largest of some disks takes hardly more memory than the smallest."""
    memory = {
        row.gib: row.peaks.ours + row.peaks.mover for row in rows if (row.what, row.target) == (what, target)
    }
    small, large = min(memory), max(memory)
    return Bound(
        f"{TARGETS[target]}, {what} disks: memory for {large} GiB, times that for {small} GiB",
        memory[large] / memory[small],
        most=MOST_TIMES,
    )


if __name__ == "__main__":
    report.main(measure)
