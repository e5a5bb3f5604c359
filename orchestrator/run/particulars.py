"""What a snapshot keeps of its VM beside the disks: its QEMU, how disks are attached, and files of the host."""

import asyncio
import errno
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.model import Disk
from orchestrator.qemu import commands
from orchestrator.qemu.monitor import Monitor
from orchestrator.target.extra_files import ExtraFile
from orchestrator.units import MIB, format_size

LARGEST_FILE_BYTES = 16 * MIB
"""Such files are read whole, and kept in one document."""


@dataclass(frozen=True, slots=True)
class Particulars:
    """`qemu` is its version, `devices` the type of each disk's device (`virtio-blk-pci`), as QEMU calls them."""

    qemu: str = ""
    devices: Mapping[str, str] = field(default_factory=dict)


async def look(monitor: Monitor, disks: Sequence[Disk]) -> Particulars:
    """Ask QEMU. Raises MonitorError."""
    version = (await monitor.execute(commands.QUERY_VERSION))["qemu"]
    types = await monitor.pipeline([commands.get_type(disk.device_path) for disk in disks])
    return Particulars(
        qemu="{major}.{minor}.{micro}".format_map(version),
        devices={disk.id: kind for disk, kind in zip(disks, types, strict=True) if isinstance(kind, str)},
    )


async def read_files(paths: Iterable[Path]) -> tuple[list[ExtraFile], list[str]]:
    """The files, and why others could not be read: a backup without one is better than none."""
    found, missing = [], []
    for path in paths:
        try:
            found.append(await asyncio.to_thread(_read, path))
        except OSError as error:
            missing.append(f"extra file {path} is not in the snapshot: {error.strerror}")
    return found, missing


def _read(path: Path) -> ExtraFile:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not hold us up
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        content = os.read(descriptor, LARGEST_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > LARGEST_FILE_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {format_size(LARGEST_FILE_BYTES)}")
    return ExtraFile(str(path), stat.S_IMODE(status.st_mode), content)
