"""How long an incremental backup takes beside a full one: `python -m benchmarks.incremental`.

A guest with one qcow2 disk that is full of random data, backed up with fleecing to an images target. 1 % of its
blocks of 64 KiB, scattered, are changed through QEMU as the guest would, and it is backed up again, three times.
Says where the time goes; trust the ratio, not the seconds. Needs three times the disk's size of space in the
temporary folder.
"""

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from benchmarks import bed, report
from benchmarks.report import Bound, Section, Table
from orchestrator.model import Fleecing, RunOptions, RunResult
from orchestrator.service.engine import Engine
from orchestrator.units import GIB, MIB, format_size
from tests.guest import images
from tests.guest.vm import DiskSpec, GuestVm, Workload

BLOCK_BYTES = 64 << 10
CHANGED_SHARE = 0.01
INCREMENTALS = 3
WANTED_RATIO = 0.05

ENDS = {
    "admission": ("run.phase", "preparing"),
    "preparing": ("run.phase", "snapshotting"),
    "snapshot": ("run.phase", "copying"),
    "copy": ("disk.copied", None),
    "seal": ("run.phase", "committing"),
    "commit": ("run.phase", "cleaning"),
    "cleaning up": ("run.finished", None),
}
"""The parts of a run, in this order, and the event that ends each."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A backup that succeeded: its seconds, in all and by part."""

    name: str
    seconds: float
    copied_bytes: int
    parts: dict[str, float]


class Clock:
    """Notes when each event was logged, and prints none."""

    def __init__(self) -> None:
        self.events: list[tuple[float, MutableMapping[str, Any]]] = []

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
        self.events.append((time.monotonic(), event))
        raise structlog.DropEvent

    def parts(self, since: float) -> dict[str, float]:
        """The seconds of each part of the one run that was logged since."""
        found = {}
        for part, (name, phase) in ENDS.items():
            end = next(
                at
                for at, event in self.events
                if at >= since and event["event"] == name and phase in (None, event.get("phase"))
            )
            found[part], since = end - since, end
        return found


async def measure(gib: int) -> Section:
    """A full backup, and incremental ones."""
    clock = Clock()
    structlog.configure(processors=[clock])
    with tempfile.TemporaryDirectory(prefix="vmfleece-bench-") as name:
        folder = Path(name)
        image = folder / "vda.qcow2"
        report.say(f"filling a disk of {gib} GiB")
        await fill(image, gib * GIB)
        disk = DiskSpec("vda", gib * GIB, iothread=True, image=image)
        async with bed.made(folder, [disk], Workload("idle")) as (vm, opened):
            rows = [await measured("full", opened, clock)]
            for number in range(1, INCREMENTALS + 1):
                await change(vm, gib * GIB, number)
                rows.append(await measured(f"incremental {number}", opened, clock))
    return section(rows, gib)


async def fill(image: Path, size_bytes: int) -> None:
    """Make an image in which every block has data that nothing can compress."""
    raw = image.with_suffix(".raw")
    await asyncio.to_thread(_write_random, raw, size_bytes)
    await images.run_tool(
        *("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)), deadline_seconds=1200
    )
    raw.unlink()


def _write_random(path: Path, size_bytes: int) -> None:
    source = random.Random(1)
    with path.open("wb") as file:
        for _ in range(size_bytes // MIB):
            file.write(source.randbytes(MIB))


async def change(vm: GuestVm, size_bytes: int, seed: int, share: float = CHANGED_SHARE) -> None:
    """Write to a share of the blocks, chosen at random, through the device, whatever node it is on."""
    blocks, device = size_bytes // BLOCK_BYTES, vm._qdevs["vda"]
    for block in random.Random(seed).sample(range(blocks), round(blocks * share)):
        line = f'qemu-io -d {device} "write -q -P {seed} {block * BLOCK_BYTES} {BLOCK_BYTES}"'
        said = await vm.execute("human-monitor-command", {"command-line": line})
        if said.strip():
            raise RuntimeError(f"{line}: {said}")


async def measured(name: str, opened: Engine, clock: Clock) -> Measured:
    """Back up, and fail unless it is what it has to be."""
    report.say(name)
    since = time.monotonic()
    options = RunOptions("main", Fleecing(storage="local"))
    result: RunResult = await opened.back_up(bed.VM, options, on_progress=lambda _: None)
    seconds = time.monotonic() - since
    if result.error is not None or str(result.kind) != name.partition(" ")[0]:
        raise RuntimeError(f"{name}: {result}")
    return Measured(name, seconds, sum(disk.copied_bytes for disk in result.disks), clock.parts(since))


def section(measured: list[Measured], gib: int) -> Section:
    """The table and the ratio."""
    full, *incremental = measured
    rows = [
        (
            one.name,
            format_size(one.copied_bytes),
            f"{one.seconds:.2f}",
            f"{one.seconds / full.seconds:.1%}",
            *(f"{seconds:.2f}" for seconds in one.parts.values()),
        )
        for one in measured
    ]
    ratio = statistics.median(one.seconds for one in incremental) / full.seconds
    return Section(
        "How long an incremental backup takes",
        f"""
        A guest with one qcow2 disk of {gib} GiB, full of random data; fleecing, an images target on the
        same file system; before each incremental {CHANGED_SHARE:.0%} of the blocks of 64 KiB are changed,
        scattered. Seconds; `snapshot` is with writing back what the host caches of the disk's image.
        Sealing makes an image durable and hashes it as it is stored.
        """,
        (Table(("backup", "copied", "seconds", "of the full", *ENDS), tuple(rows)),),
        (
            Bound(
                f"incremental of {CHANGED_SHARE:.0%} changed, of a full one's time (median; {gib} GiB)",
                ratio,
                most=WANTED_RATIO,
                cause="what does not depend on the disk's size weighs more the smaller it is",
            ),
        ),
    )


if __name__ == "__main__":
    report.main(measure, gib=2)
