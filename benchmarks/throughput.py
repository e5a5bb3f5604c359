"""How fast images are written and restored, beside the fastest there is: `python -m benchmarks.throughput`.

An idle guest with a raw disk, filled as a system disk is (see `repository`). In turn, each into a new file: QEMU's
own `blockdev-backup`, which nobody who copies out of a running QEMU can beat; our backup with fleecing; qemu-img
and nbdcopy, which know no moment. Then a tenth of the disk is changed, and backed up by QEMU with a bitmap
and by us; and a snapshot is restored beside `qemu-img convert`. Repositories: `repository` and `restore`.
Needs five times the disk's size in the temporary folder.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from benchmarks import bed, incremental, report
from benchmarks.report import Bound, Section, Table
from benchmarks.repository import fill
from orchestrator.model import Fleecing, Kind, RunOptions
from orchestrator.run.restore import restore
from orchestrator.service import drivers
from orchestrator.service.engine import Engine
from orchestrator.target import durable
from orchestrator.target.base import Snapshot
from orchestrator.units import GIB, MIB
from tests.guest import images
from tests.guest.vm import DiskSpec, GuestVm, Workload

CHANGED_SHARE = 0.1
BITMAP = "bench"
QEMUS, QEMUS_INCREMENT = "QEMU's blockdev-backup", "QEMU's blockdev-backup with a bitmap"
PLAIN, ZSTD = "main", "zstd"
COMPRESSED = """
[target.zstd]
path = "{folder}/backups-zstd"
compress = "zstd"
"""

Way = Callable[[], Awaitable[None]]


class Copier:
    """An idle guest with one full disk, and the ways to copy it."""

    def __init__(self, vm: GuestVm, opened: Engine, folder: Path, size_bytes: int) -> None:
        self.vm = vm
        self.image = vm.image_path("vda")
        self.folder = folder
        self._opened = opened
        self._size_bytes = size_bytes

    # --- QEMU's own job ---

    async def qemus(self, *, compress: bool = False, bitmap: bool = False) -> None:
        """`blockdev-backup` into a new qcow2 file, until that is closed, which makes it durable."""
        path = self.folder / "qemus.qcow2"
        options = ["-o", "compression_type=zstd"] if compress else []
        size = str(self._size_bytes)
        await images.run_tool("qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size)
        file = {"driver": "file", "filename": str(path)}
        await self.vm.execute("blockdev-add", {"driver": "qcow2", "node-name": "theirs", "file": file})
        how: dict[str, Any] = {"sync": "incremental", "bitmap": BITMAP} if bitmap else {"sync": "full"}
        source = (await self.vm.current_nodes())["vda"]
        job = {"job-id": "bench", "device": source, "target": "theirs", "compress": compress}
        await self.vm.execute("blockdev-backup", job | how)
        while await self.vm.execute("query-block-jobs"):
            await asyncio.sleep(0.01)
        await self.vm.execute("blockdev-del", {"node-name": "theirs"}, deadline_seconds=120)
        path.unlink()

    async def remember_changes(self) -> None:
        """From now on, for QEMU's own job."""
        source = (await self.vm.current_nodes())["vda"]
        await self.vm.execute("block-dirty-bitmap-add", {"node": source, "name": BITMAP})

    # --- tools that read the disk from outside: what the guest writes meanwhile is in it or not ---

    async def convert(self, *, compress: bool = False) -> None:
        """`qemu-img convert`, made durable."""
        path = self.folder / "converted.qcow2"
        options = ["-c", "-o", "compression_type=zstd"] if compress else []
        argv = ["qemu-img", "convert", "-U", "-m", "16", "-W", "-f", "raw", "-O", "qcow2", *options]
        await images.run_tool(*argv, str(self.image), str(path), deadline_seconds=600)
        await asyncio.to_thread(durable.sync, path)
        path.unlink()

    async def nbdcopy(self) -> None:
        """Nbdcopy from one qemu-nbd to another, made durable."""
        path = self.folder / "copied.qcow2"
        await images.run_tool("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(self._size_bytes))
        source = f"driver=raw,read-only=on,force-share=on,file.driver=file,file.filename={self.image}"
        read = ["[", "qemu-nbd", "--read-only", "--image-opts", source, "]"]
        write = ["[", "qemu-nbd", "--format=qcow2", str(path), "]"]
        await images.run_tool("nbdcopy", "--flush", "--", *read, *write, deadline_seconds=600)
        path.unlink()

    # --- ours ---

    async def ours(self, target: str, *, full: bool = True) -> None:
        """A whole run, with its hash: what it returns is listed and durable."""
        options = RunOptions(target, Fleecing(storage="local"), full=full)
        result = await self._opened.back_up(bed.VM, options, on_progress=lambda _: None)
        if result.error is not None or result.kind is not (Kind.FULL if full else Kind.INCREMENTAL):
            raise RuntimeError(f"{target}: {result}")

    async def latest(self, target: str) -> Snapshot:
        """The newest snapshot."""
        return (await drivers.targets(self._opened.config)[target].snapshots())[-1]

    async def restore(self) -> None:
        """The newest plain snapshot, checked and made durable."""
        to = self.folder / "restored.raw"
        target = drivers.targets(self._opened.config)[PLAIN]
        await restore(target, await self.latest(PLAIN), "disk-vda", to=to, image_format="raw")
        to.unlink()

    async def convert_back(self) -> None:
        """The same with `qemu-img convert`, made durable, not checked."""
        to = self.folder / "converted.raw"
        image = self.folder / "backups" / (await self.latest(PLAIN)).id / "disk-vda.qcow2"
        argv = ["qemu-img", "convert", "-m", "16", "-W", "-f", "qcow2", "-O", "raw", str(image), str(to)]
        await images.run_tool(*argv, deadline_seconds=600)
        await asyncio.to_thread(durable.sync, to)
        to.unlink()


async def measure(gib: int, rounds: int) -> Section:
    """All parts."""
    clock = incremental.Clock()
    structlog.configure(processors=[clock])
    with tempfile.TemporaryDirectory(prefix="vmfleece-bench-") as name:
        folder = Path(name)
        image = folder / "vda.raw"
        await asyncio.to_thread(fill, image, gib * GIB)
        disk = DiskSpec("vda", gib * GIB, format="raw", iothread=True, image=image)
        more = COMPRESSED.format(folder=folder)
        async with bed.made(folder, [disk], Workload("idle"), more=more) as (vm, opened):
            copier = Copier(vm, opened, folder, gib * GIB)
            full, since = await fulls(copier, rounds)
            changed = await increments(copier, rounds)
            back = await in_turn({"ours": copier.restore, "qemu-img convert": copier.convert_back}, rounds)
    return section(full, clock.parts(since), changed, back, gib)


async def fulls(copier: Copier, rounds: int) -> tuple[dict[str, float], float]:
    """Medians of all ways of a full backup, and when the last plain one of ours began."""
    since = 0.0

    async def ours() -> None:
        nonlocal since
        since = time.monotonic()
        await copier.ours(PLAIN)

    ways: dict[str, Way] = {
        QEMUS: copier.qemus,
        "ours": ours,
        "qemu-img convert": copier.convert,
        "nbdcopy": copier.nbdcopy,
        "QEMU's blockdev-backup, zstd": lambda: copier.qemus(compress=True),
        "ours, zstd": lambda: copier.ours(ZSTD),
        "qemu-img convert, zstd": lambda: copier.convert(compress=True),
    }
    return await in_turn(ways, rounds), since


async def increments(copier: Copier, rounds: int) -> dict[str, float]:
    """Medians of both ways to back up what has changed."""
    await copier.remember_changes()
    blocks = copier.image.stat().st_size // incremental.BLOCK_BYTES
    took: dict[str, list[float]] = {QEMUS_INCREMENT: [], "ours": []}
    for number in range(rounds):
        await incremental.change(copier.vm, blocks * incremental.BLOCK_BYTES, number + 1, CHANGED_SHARE)
        ways = {QEMUS_INCREMENT: lambda: copier.qemus(bitmap=True)}
        ways["ours"] = lambda: copier.ours(PLAIN, full=False)
        for name, seconds in (await in_turn(ways, 1)).items():
            took[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


async def in_turn(ways: Mapping[str, Way], rounds: int) -> dict[str, float]:
    """Each way's median in seconds. In turn, so that what else the machine does hits all of them."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            report.say(name)
            await asyncio.to_thread(os.sync)
            began = time.monotonic()
            await way()
            took[name].append(time.monotonic() - began)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def section(
    full: dict[str, float],
    parts: dict[str, float],
    changed: dict[str, float],
    back: dict[str, float],
    gib: int,
) -> Section:
    """The tables, and what must hold."""
    ratio = full[QEMUS] / full["ours"]
    return Section(
        "How fast images are written and restored",
        f"""
        An idle guest with a raw disk of {gib} GiB, filled as for the repository below; everything on one local
        disk, each time into a new file, which is durable in the end. Ours hashes what was written, and checks
        what is restored; nobody else does. qemu-img and nbdcopy read the image beside QEMU: no moment, nothing
        that a restored guest could rely on. Medians, in turn. For the changes, {CHANGED_SHARE:.0%} of the blocks
        of 64 KiB, scattered, were written to.
        """,
        (
            compared("full backup into qcow2", full, QEMUS, gib * GIB),
            Table(("where a plain one of ours goes", "seconds"), tuple((k, f"{v:.2f}") for k, v in parts.items())),
            compared("backup of what has changed", changed, QEMUS_INCREMENT, gib * GIB * CHANGED_SHARE),
            compared("restore from a full backup", back, "qemu-img convert", gib * GIB),
        ),
        (
            Bound(
                "images, full: of the speed of QEMU's own blockdev-backup",
                ratio,
                least=0.95,
                cause="a snapshot is hashed and made durable before it is listed",
            ),
        ),
    )


def compared(what: str, seconds: dict[str, float], limit: str, size_bytes: float) -> Table:
    """Each way, and its speed beside that of `limit`."""
    rows = [
        (name, f"{took:.2f}", f"{size_bytes / MIB / took:.0f}", f"{seconds[limit] / took:.2f}")
        for name, took in seconds.items()
    ]
    return Table((what, "seconds", "MiB/s", f"times {limit}"), tuple(rows))


if __name__ == "__main__":
    report.main(measure, gib=2, rounds=3)
