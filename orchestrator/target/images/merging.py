"""Making a snapshot stand alone, so that what it builds on can go. No step of it, and no death, breaks a chain.

Of each disk that builds on another snapshot, in the folder of the one that is to stand alone:
1. The chain is held (`chain`): none of it is removed or changed. `<disk>.qcow2.merged` is made, and qemu-img
   writes the disk's content into it, while every image of the chain is checked. It is read back, and made durable.
2. With the VM's folder locked, and the snapshot's alone, so that nobody reads it, builds on it or removes
   anything: `manifest.json` is replaced by one that says that its disks stand alone, and gives their contents'
   hashes. That is right at once: the images still have their backing files, and this content.
3. Each `.merged` is renamed to `<disk>.qcow2`, which is the name that others have as their backing file: whatever
   it is at a moment, it has the same content.

What a dead process left is settled by whoever next begins, removes or merges a snapshot of the VM, with the same
locks (who merges holds the folder, so it is dead if they can be had). As long as the manifest gives parents, it
died before 2: `.merged` files are deleted. Else it died after: they are complete, and step 3 is done. Until then
what the images have as backing files stays, since `removal` looks at those as well as at manifests.

Before each rename, what must be there after a power loss is synced: the `.merged` files and their names, then the
new manifest, then its rename; and the last renames before the locks are given back, that is before anything that
was needed until then can be removed.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from orchestrator import aio
from orchestrator.errors import TargetError, ToolError
from orchestrator.qemu import tools
from orchestrator.target import durable
from orchestrator.target.base import HashOf, OnBytes, Snapshot, SnapshotDisk
from orchestrator.target.images import chain, locks, manifest, qcow2
from orchestrator.target.images.errors import unwritten
from orchestrator.units import format_size

log = structlog.get_logger(__name__)

MERGED = ".merged"
_NEW = manifest.NAME + ".new"
METADATA_SHARE = 1024
POLL_SECONDS = 0.5
EMPTY_BYTES = 1 << 20
"""An image is larger than its content by less than this, and that part of it."""


async def merge(vm_folder: Path, snapshot: Snapshot, *, target: str, on_progress: OnBytes) -> None:
    """Make a snapshot stand alone; nothing to do if it does. Raises OSError, and TargetError as `Target.merge`.

    Cancellation undoes it, or finishes it if it has come to step 2.
    """
    await aio.finish(asyncio.to_thread(settle, vm_folder, target=target))
    names = [disk.disk for disk in snapshot.disks]
    async with chain.held(vm_folder, snapshot.id, names, target=target) as held:
        chains = [links for links in held.links.values() if len(links) > 1]
        if not chains:
            return
        await aio.finish(asyncio.to_thread(_check_use, held))
        await asyncio.to_thread(_check_space, chains, target)
        made: list[Path] = []
        far = _Far(sum(links[0].disk.size_bytes for links in chains), made)
        try:
            async with aio.background(far.tell(on_progress)):
                disks = [await _write(links, far, target) for links in chains]
            # Finished in any case: what was begun with the locks must not go on without them.
            await aio.finish(asyncio.to_thread(_publish, held, disks, made))
        finally:
            # Ours alone, as long as the folder is held.
            await aio.finish(asyncio.to_thread(_delete, made))


def settle(vm_folder: Path, *, target: str) -> None:
    """Finish or undo what dead processes left of merges, as far as nobody has it. Blocks; raises OSError."""
    if any(vm_folder.glob(f"*/*{MERGED}")):
        with locks.alone(vm_folder):
            settle_locked(vm_folder, target=target)


def settle_locked(vm_folder: Path, *, target: str) -> None:
    """As `settle`, with the VM's folder locked by the caller."""
    for folder in sorted({path.parent for path in vm_folder.glob(f"*/*{MERGED}")}):
        try:
            lock = locks.locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):
            continue  # who merges or reads it lives
        try:
            snapshot = manifest.read(folder / manifest.NAME, target=target)
        except TargetError:
            continue  # half-removed, or nobody can tell
        else:
            (folder / _NEW).unlink(missing_ok=True)
            building = {disk.disk for disk in snapshot.disks if disk.parent is not None}
            _delete([folder / _merged(disk) for disk in building])
            _take_over(folder, {disk.disk for disk in snapshot.disks} - building)
            log.info("merge.settled", target=target, snapshot=snapshot.id, finished=not snapshot.parents)
        finally:
            os.close(lock)


class _Far:
    """How far step 1 is: each disk's file is written, which its size on the disk tells, and then read back."""

    def __init__(self, content_bytes: int, made: list[Path]) -> None:
        self.made = made
        self._size_bytes = 2 * content_bytes
        self._before_bytes = 0
        self._disk_bytes = 0
        self._read_bytes = 0
        self._read_back = False

    def begin(self, path: Path, disk: SnapshotDisk) -> None:
        """Go on to a disk, which is written into a file."""
        self._before_bytes += 2 * self._disk_bytes
        self._disk_bytes, self._read_bytes, self._read_back = disk.size_bytes, 0, False
        self.made.append(path)

    async def digest(self, path: Path) -> str:
        """Read a disk's file back, and return its content's SHA-256 in hex."""
        self._read_back = True
        digest = hashlib.sha256()

        def take(piece: memoryview) -> None:  # in a thread
            digest.update(piece)
            self._read_bytes += len(piece)

        await tools.read_back(path, "qcow2", take)
        return digest.hexdigest()

    async def tell(self, on_progress: OnBytes) -> None:
        """Tell it now and then, until cancelled."""
        while True:
            of_disk = self._disk_bytes + self._read_bytes
            if not self._read_back and self.made:
                with contextlib.suppress(OSError):
                    found = await asyncio.to_thread(self.made[-1].stat)
                    of_disk = min(found.st_blocks * 512, self._disk_bytes)
            on_progress(self._before_bytes + of_disk, self._size_bytes)
            await asyncio.sleep(POLL_SECONDS)


async def _write(links: Sequence[chain.Link], far: _Far, target: str) -> SnapshotDisk:
    """Step 1 for one disk: what its manifest will say of it. Its file's path is put among those that are made."""
    newest = links[0]
    path = newest.image.with_name(_merged(newest.disk.disk))
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise _in_use(newest.snapshot) from error
    far.begin(path, newest.disk)
    try:
        compressed = any([await asyncio.to_thread(qcow2.is_zstd, link.image) for link in links])
        try:
            await chain.read(links, tools.flatten(newest.image, descriptor, compress=compressed))
            size_bytes = newest.disk.size_bytes
            wrong = await tools.difference(path, "qcow2", newest.image, "qcow2", size_bytes=size_bytes)
            content = await far.digest(path)
        except ToolError as error:
            raise unwritten(error, descriptor, target=target) from error
        if wrong:
            raise TargetError(
                f"disk {newest.disk.disk} of {newest.snapshot} was merged wrong: {wrong}",
                hint="nothing was changed; check the target's disks",
                code="content-wrong",
            )
        # Finished in any case: the descriptor must not be closed, and used for another file, meanwhile.
        await aio.finish(asyncio.to_thread(os.fsync, descriptor))
        stored_bytes = os.fstat(descriptor).st_blocks * 512
    finally:
        os.close(descriptor)
    # Its content's hash is right before and after the file is exchanged, which the manifest's rename precedes.
    return replace(newest.disk, sha256=content, stored_bytes=stored_bytes, parent=None, sha256_of=HashOf.CONTENT)


def _publish(held: chain.Held, disks: Sequence[SnapshotDisk], made: list[Path]) -> None:
    """Steps 2 and 3. What is left in `made` is to be deleted; from the manifest's rename on, nothing is."""
    folder, path = held.folder, held.folder / manifest.NAME
    with locks.alone(folder.parent):
        if not held.lock_alone():
            _delete(made)  # here, since the folder is not held any more
            raise _in_use(held.snapshot.id)
        durable.sync(folder)
        merged = {disk.disk: disk for disk in disks}
        kept = (merged.get(disk.disk, disk) for disk in held.snapshot.disks)
        content = manifest.rewritten(path, replace(held.snapshot, kind="full", disks=tuple(kept)))
        try:
            durable.write(folder / _NEW, content)
            (folder / _NEW).rename(path)
        except BaseException:
            (folder / _NEW).unlink(missing_ok=True)
            raise
        made.clear()
        durable.sync(folder)
        _take_over(folder, merged)


def _take_over(folder: Path, disks: Iterable[str]) -> None:
    """Step 3, or what is left of it. `folder` is locked alone."""
    for disk in disks:
        with contextlib.suppress(FileNotFoundError):
            (folder / _merged(disk)).rename(folder / manifest.disk_file(disk))
    durable.sync(folder)


def _delete(made: list[Path]) -> None:
    while made:
        made.pop().unlink(missing_ok=True)


def _check_use(held: chain.Held) -> None:
    """Raise TargetError if it is in use now: it might be for as long as all the writing takes."""
    with locks.alone(held.folder.parent):
        if not held.lock_alone():
            raise _in_use(held.snapshot.id)
        held.share()


def _check_space(chains: Sequence[Sequence[chain.Link]], target: str) -> None:
    """Raise TargetError if the images might not fit beside what is there now."""
    folder = chains[0][0].image.parent
    status = os.statvfs(folder)
    free_bytes = status.f_bavail * status.f_frsize
    needed_bytes = sum(
        min(
            sum(link.disk.stored_bytes for link in links),
            links[0].disk.size_bytes * (METADATA_SHARE + 1) // METADATA_SHARE,
        )
        + EMPTY_BYTES
        for links in chains
    )
    if free_bytes < needed_bytes:
        raise TargetError(
            f"target {target}: merging {chains[0][0].snapshot} needs up to {format_size(needed_bytes)},"
            f" and {format_size(free_bytes)} are free",
            hint="free some space first: what is merged into it can be removed only afterwards",
            code="target-full",
        )


def _in_use(snapshot: str) -> TargetError:
    return TargetError(
        f"snapshot {snapshot} is being restored, merged, or built on by a backup",
        hint="merge it again when that has ended",
        code="needed",
    )


def _merged(disk: str) -> str:
    return manifest.disk_file(disk) + MERGED
