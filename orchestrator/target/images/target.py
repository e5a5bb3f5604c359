"""Snapshots in folders: `<path>/<vm>/<20261122T023000Z>/{manifest.json,<disk>.qcow2}`.

A snapshot is written under `<time>.partial`, made durable, and renamed; the rename is what lists it. A partial
folder is flocked by its writer, so that a later one can tell a dead writer's from a live one's. How snapshots are
removed and protected, and what locks there are: `removal`.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import structlog

from orchestrator import aio
from orchestrator.errors import TargetError, ToolError
from orchestrator.model import Compression, Disk
from orchestrator.qemu import commands, reading, serving, tools
from orchestrator.target import durable, extra_files
from orchestrator.target.base import (
    STAMP,
    Draft,
    FileSink,
    OnBytes,
    ParentUnusable,
    Snapshot,
    SnapshotDisk,
    Target,
    Verification,
    check_disk_name,
    gone,
    protected_error,
    untold,
)
from orchestrator.target.extra_files import ExtraFile
from orchestrator.target.images import chain, locks, manifest, merging, removal
from orchestrator.target.images.errors import explained, unwritten

log = structlog.get_logger(__name__)

EXTRA_FILES = "extra_files.json"


class ImagesTarget(Target):
    """See the contract, `Target`."""

    granule_bytes = commands.CLUSTER_BYTES
    reads_sinks = True

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        compression: Compression = Compression.NONE,
        max_runs: int | None = None,
    ) -> None:
        self.name = name
        self.path = path
        self.max_runs = max_runs
        self._compression = compression

    async def prepare(self) -> None:
        await asyncio.to_thread(self._prepare)

    def _prepare(self) -> None:
        with explained(self.name, self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Only making a file tells whether one can be made (read-only mounts, ACLs, root squash).
            tempfile.TemporaryFile(dir=self.path).close()

    async def begin(self, vm: str, started: datetime) -> "ImagesDraft":
        return await aio.acquire(asyncio.to_thread(self._begin, vm, started), ImagesDraft.abort)

    def _begin(self, vm: str, started: datetime) -> "ImagesDraft":
        folder = self.path / vm
        with explained(self.name, folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            removal.clear(folder, target=self.name)
            created = started.astimezone(UTC).replace(microsecond=0)
            while True:
                final = folder / created.strftime(STAMP)
                partial = final.with_name(final.name + removal.PARTIAL)
                if not final.exists() and (lock := self._claim(partial)) is not None:
                    break
                created += timedelta(seconds=1)
        return ImagesDraft(
            self.name,
            vm,
            partial=partial,
            final=final,
            created=created,
            lock=lock,
            compression=self._compression,
        )

    def _claim(self, partial: Path) -> int | None:
        """Make and lock a folder; None if somebody else has it, or took it for dead before it was locked."""
        try:
            partial.mkdir(mode=0o700)
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileExistsError, FileNotFoundError):
            return None
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink == 0:
            os.close(lock)
            return None
        return lock

    async def snapshots(self, vm: str | None = None) -> list[Snapshot]:
        return await asyncio.to_thread(self._snapshots, vm)

    def _snapshots(self, vm: str | None) -> list[Snapshot]:
        found = []
        # Each run asks for its own VM's: the folders of a thousand others are not read for that.
        vms = [folder for folder in self.path.glob("*") if vm in (None, folder.name)]
        for path in sorted(path for folder in vms for path in folder.glob(f"*/{manifest.NAME}")):
            folder = path.parent
            if not removal.is_listed(folder):
                continue
            try:
                snapshot = manifest.read(path, target=self.name)
                found.append(replace(snapshot, protected=removal.is_protected(folder)))
            except TargetError as error:  # one broken snapshot must not hide the others
                if path.exists():  # else somebody removed it meanwhile
                    log.warning("snapshot.unreadable", target=self.name, error=str(error))
        return found

    async def extract(self, snapshot: Snapshot, disk: str, *, to: Path, image_format: str) -> None:
        async with self._held(snapshot, [disk]) as held:
            await chain.restore(held.links[disk], to, image_format)

    @contextlib.asynccontextmanager
    async def exported(
        self, snapshot: Snapshot, disks: Sequence[str], folder: Path
    ) -> AsyncIterator[Mapping[str, str]]:
        async with contextlib.AsyncExitStack() as stack:
            held = await stack.enter_async_context(self._held(snapshot, disks))
            uris = {}
            for number, disk in enumerate(disks):
                server = serving.served(held.links[disk][0].image, at=folder / f"{number}.sock", export=disk)
                uris[disk] = await stack.enter_async_context(server)
            yield uris

    async def verify(self, snapshot: Snapshot, *, share: float) -> Verification:
        try:
            async with self._held(snapshot, [disk.disk for disk in snapshot.disks]) as held:
                links = [link for links in held.links.values() for link in links]
                return await chain.verify(links, share=share)
        except TargetError as error:
            if error.code != "content-wrong":
                raise
            return Verification(0, snapshot.stored_bytes, (error.message,))

    def _held(self, snapshot: Snapshot, disks: Sequence[str]) -> AbstractAsyncContextManager[chain.Held]:
        return chain.held(self.path / snapshot.vm, snapshot.id, disks, target=self.name)

    async def look_up(self, wanted: str) -> Snapshot | None:  # noqa: ARG002  all there is has been listed
        return None

    async def extra_files(self, snapshot: Snapshot) -> list[ExtraFile]:
        path = self.path / snapshot.id / EXTRA_FILES
        try:
            content = await asyncio.to_thread(path.read_bytes)
        except FileNotFoundError:
            return []
        return extra_files.decode(json.loads(content), snapshot=snapshot.id)

    async def merge(self, snapshot: Snapshot, on_progress: OnBytes = untold) -> None:
        with explained(self.name, self.path / snapshot.id):
            await merging.merge(self.path / snapshot.vm, snapshot, target=self.name, on_progress=on_progress)

    async def leftovers(self) -> list[str]:
        return await asyncio.to_thread(self._leftovers)

    def _leftovers(self) -> list[str]:
        with explained(self.name, self.path):
            return [str(path) for folder in self._vm_folders() for path in removal.leftovers(folder)]

    async def clear(self) -> None:
        await aio.finish(asyncio.to_thread(self._clear))

    def _clear(self) -> None:
        with explained(self.name, self.path):
            for folder in self._vm_folders():
                removal.clear(folder, target=self.name)

    def _vm_folders(self) -> list[Path]:
        return sorted(path for path in self.path.glob("*") if path.is_dir())

    async def remove(self, snapshot: Snapshot) -> None:
        await aio.finish(asyncio.to_thread(self._remove, snapshot))

    def _remove(self, snapshot: Snapshot) -> None:
        folder = self.path / snapshot.id
        with explained(self.name, folder):
            stays = removal.remove(folder, target=self.name)
        if stays is None:
            return
        if stays.protected:
            raise protected_error(snapshot)
        if not stays.needed_by:
            raise TargetError(
                f"snapshot {snapshot.id} is needed by a backup, a restore or a merge of {snapshot.vm}"
                " that is under way",
                hint="try again when it has ended",
                code="needed",
            )
        needed_by = ", ".join(f"{snapshot.vm}/{name}" for name in stays.needed_by)
        raise TargetError(
            f"snapshot {snapshot.id} is needed by {needed_by}",
            hint="remove what builds on it first",
            code="needed",
        )

    async def protect(self, snapshot: Snapshot, *, protected: bool) -> Snapshot:
        return await aio.finish(asyncio.to_thread(self._protect, snapshot, protected))

    def _protect(self, snapshot: Snapshot, protected: bool) -> Snapshot:
        folder = self.path / snapshot.id
        with explained(self.name, folder):
            if not removal.protect(folder, protected=protected):
                raise gone(snapshot.id)
        return replace(snapshot, protected=protected)


class ImagesDraft(Draft):
    """See the contract, `Draft`. Owns the partial folder, its lock, the open images in it, and parents' locks."""

    def __init__(
        self,
        target: str,
        vm: str,
        *,
        partial: Path,
        final: Path,
        created: datetime,
        lock: int,
        compression: Compression,
    ) -> None:
        self.snapshot_id = f"{vm}/{final.name}"
        self._target = target
        self._vm = vm
        self._partial = partial
        self._final = final
        self._created = created
        self._lock = lock
        self._compression = compression
        self._disks: list[str] = []
        self._parents: dict[str, str | None] = {}
        self._held: dict[str, int] = {}
        self._images: dict[str, int] = {}
        self._sealed: dict[str, SnapshotDisk] = {}
        self._renamed = False
        self._committed: Snapshot | None = None

    async def add_disk(self, disk: Disk, *, compressible: bool, parent: str | None = None) -> FileSink:
        check_disk_name(disk)
        compress = compressible and self._compression is Compression.ZSTD
        if parent is not None:
            # Finished in any case: a lock that is had after all must be known to `abort`.
            await aio.finish(asyncio.to_thread(self._hold, parent))
        with explained(self._target, self._path(disk.id)):
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
            self._images[disk.id] = os.open(self._path(disk.id), flags, 0o600)
        self._disks.append(disk.id)
        self._parents[disk.id] = parent
        options = "compression_type=zstd" if compress else ""
        backing = manifest.backing_name(disk.id, parent) if parent else None
        try:
            await tools.create_qcow2(self._images[disk.id], disk.size_bytes, options=options, backing=backing)
        except ToolError as error:
            raise unwritten(error, self._images[disk.id], target=self._target) from error
        return FileSink(self._images[disk.id], compress)

    def _hold(self, parent: str) -> None:
        if parent not in self._held:
            folder = self._final.parent.parent / parent
            with explained(self._target, folder):
                descriptor = locks.hold(folder)
            if descriptor is None:
                raise ParentUnusable(gone(parent).message)
            self._held[parent] = descriptor

    async def why_unwritten(self, disk: Disk) -> TargetError | None:  # noqa: ARG002  QEMU itself knows best
        return None

    async def lost(self) -> NoReturn:
        while True:  # what is written is there
            await asyncio.Event().wait()

    async def cut_off(self) -> None:
        """Nothing: a file answers by itself."""

    async def seal(self, disk: Disk) -> SnapshotDisk:
        path, descriptor = self._path(disk.id), self._images.pop(disk.id)
        try:
            with explained(self._target, path):
                # Finished in any case: the descriptor must not be closed, and used for another file, meanwhile.
                making_durable = aio.finish(asyncio.to_thread(os.fsync, descriptor))
                digest, _ = await aio.all_or_first_error((reading.file_sha256(path), making_durable))
                stored_bytes = os.fstat(descriptor).st_blocks * 512
        finally:
            os.close(descriptor)
        parent = self._parents[disk.id]
        if parent is None:
            await tools.check(path)
        self._sealed[disk.id] = SnapshotDisk(disk.id, disk.size_bytes, digest, stored_bytes, parent)
        return self._sealed[disk.id]

    async def commit(self, details: dict[str, Any], files: Sequence[ExtraFile] = ()) -> Snapshot:
        if self._committed is None:
            snapshot = Snapshot(
                id=self.snapshot_id,
                target=self._target,
                vm=self._vm,
                created=self._created,
                kind=str(details["kind"]),
                disks=tuple(self._sealed[disk] for disk in self._disks),
                details=details,
            )
            # Finished in any case: `abort` must not remove the folder while it is being renamed.
            await aio.finish(asyncio.to_thread(self._publish, manifest.encode(snapshot), files))
            self._committed = snapshot
        return self._committed

    def _publish(self, content: bytes, files: Sequence[ExtraFile]) -> None:
        with explained(self._target, self._partial):
            if not self._renamed:
                if files:
                    durable.write(self._partial / EXTRA_FILES, json.dumps(extra_files.encode(files)).encode())
                durable.write(self._partial / manifest.NAME, content)
                os.fsync(self._lock)
                self._partial.rename(self._final)
                self._renamed = True
            durable.sync(self._final.parent)
            durable.sync(self._final.parent.parent)
        self._unlock()

    async def abort(self) -> None:
        if self._committed is None:
            # Finished in any case: who aborts it again must not close what this closes.
            await aio.finish(asyncio.to_thread(self._remove))

    def _remove(self) -> None:
        while self._images:
            os.close(self._images.popitem()[1])
        with explained(self._target, self._partial):
            with contextlib.suppress(FileNotFoundError):
                if (
                    self._renamed
                ):  # that could not be made durable: nothing may be listed, nor half of it for a moment
                    self._final.rename(self._partial)
                    self._renamed = False
                shutil.rmtree(self._partial)
            with contextlib.suppress(OSError):  # the VM's folder, if this would have been its first
                self._final.parent.rmdir()
        self._unlock()

    def _unlock(self) -> None:
        while self._held:
            os.close(self._held.popitem()[1])
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _path(self, disk: str) -> Path:
        return self._partial / manifest.disk_file(disk)
