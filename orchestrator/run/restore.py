"""Giving a snapshot's disks back, checked against the hashes that were taken when it was made.

Nothing is continued: who restores again after an interruption starts over.

The target checks what it reads, that what it has written is right, and makes it durable.
A file is written under a `.partial` name and renamed after that: what has the final name is right.
A block device is written in place, and read back.
"""

import asyncio
import contextlib
import errno
import os
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from orchestrator import aio
from orchestrator.errors import TargetError
from orchestrator.qemu import tools
from orchestrator.target import durable, restored
from orchestrator.target.base import Snapshot, Target
from orchestrator.target.extra_files import ExtraFile

log = structlog.get_logger(__name__)

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What link(2) says on a file system without hard links."""


POLL_SECONDS = 0.5


OnProgress = Callable[[int], None]
"""Told how many bytes of the disk's size are written; must neither fail nor wait."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A disk that was given back and is right."""

    disk: str
    path: Path
    size_bytes: int


async def restore(
    target: Target,
    snapshot: Snapshot,
    disk: str,
    *,
    to: Path,
    image_format: str,
    overwrite: bool = False,
    on_progress: OnProgress = lambda _done_bytes: None,
) -> Restored:
    """Restore one disk to a new file, or to a block device (which needs `overwrite`).

    Raises TargetError, also if what was restored is not what was backed up. Cancellation leaves no file.
    """
    wanted = snapshot.disk(disk)
    device = await asyncio.to_thread(_check_destination, to, overwrite=overwrite)
    log.info("restore.started", snapshot=snapshot.id, disk=disk, to=str(to))
    if device and image_format != "raw":
        raise TargetError(
            f"cannot restore to {to} as {image_format}: a block device takes a disk as it is",
            hint="leave --format out, or give a file",
            code="restore-path",
        )
    written = to if device else to.with_name(f"{to.name}.{secrets.token_hex(4)}.partial")
    try:
        if device:
            await _check_fits(wanted.size_bytes, to)
        async with aio.background(_watch(written, on_progress)):
            await target.extract(snapshot, disk, to=written, image_format=image_format)
        if not device:
            with restored.explained(to):
                await asyncio.to_thread(_publish, written, to)
    except BaseException:
        if not device:
            with contextlib.suppress(FileNotFoundError):
                written.unlink()
        raise
    log.info("restore.finished", snapshot=snapshot.id, disk=disk, to=str(to), size_bytes=wanted.size_bytes)
    return Restored(disk, to, wanted.size_bytes)


async def _watch(path: Path, on_progress: OnProgress) -> None:
    """Tell how much of a file is there, which is written by whatever tool; a device does not tell."""
    while True:
        with contextlib.suppress(OSError):  # not there yet
            found = await asyncio.to_thread(path.stat)
            on_progress(found.st_blocks * 512)
        await asyncio.sleep(POLL_SECONDS)


async def restore_extra_files(target: Target, snapshot: Snapshot, *, to: Path) -> list[tuple[ExtraFile, Path]]:
    """Write the files that were kept beside the disks into the folder `to`, by their names; none is overwritten.

    Raises TargetError, after which some may be there.
    """
    files = await target.extra_files(snapshot)
    names = Counter(Path(file.path).name for file in files)
    written: list[tuple[ExtraFile, Path]] = []
    for file in files:
        name = Path(file.path).name
        path = to / (name if names[name] == 1 else file.path.strip("/").replace("/", "_"))
        with restored.explained(path):
            await asyncio.to_thread(_write_new, path, file)
        written.append((file, path))
    return written


def _write_new(path: Path, file: ExtraFile) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file.mode), "wb") as out:
        out.write(file.content)
        out.flush()
        os.fsync(out.fileno())
    durable.sync(path.parent)


def _check_destination(to: Path, *, overwrite: bool) -> bool:
    """Whether the destination is a block device. Raises TargetError if something would be lost."""
    if not to.parent.is_dir():
        raise TargetError(
            f"cannot restore to {to}: no such folder: {to.parent}",
            hint="make it, or give another --to",
            code="restore-path",
        )
    if to.is_block_device():
        if not overwrite:
            raise TargetError(
                f"cannot restore to {to}: it is a block device and would be overwritten",
                hint="give --force if that is what you want",
                code="restore-path",
            )
        return True
    if to.exists():
        raise TargetError(
            f"cannot restore to {to}: it exists already",
            hint="vmfleece overwrites no file: give another path, or remove it first",
            code="restore-path",
        )
    return False


async def _check_fits(size_bytes: int, device: Path) -> None:
    device_bytes = await tools.virtual_size(device, "raw")
    if device_bytes < size_bytes:
        raise TargetError(
            f"cannot restore to {device}: it has {device_bytes} bytes, the disk has {size_bytes}",
            hint="give a block device that is at least as large",
            code="restore-path",
        )


def _publish(written: Path, to: Path) -> None:
    try:
        os.link(written, to)  # unlike a rename, this fails if the name was taken meanwhile
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        written.rename(to)
    else:
        written.unlink()
    durable.sync(to.parent)
