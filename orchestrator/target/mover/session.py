"""What a mover does between being started and being told to commit: a repository, and a sink for each disk.

    async with Session.opened(backend, opened) as session:
        session.add("vda", size_bytes, connected)   QEMU, at the other end of the socket, writes the disk
        sealed = await session.seal("vda")          once QEMU has closed it
        snapshot = await session.commit(…)          all of it is listed, or nothing is

Whatever ends it before `commit`, nothing is listed, and what was written waits for `restic prune`. Once the lock
is lost everything raises LockLost, and QEMU's writes fail.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import NoReturn

from orchestrator import __version__, aio
from orchestrator.errors import TargetError
from orchestrator.nbd.connection import Trouble
from orchestrator.nbd.server import NbdServer
from orchestrator.target.base import ParentUnusable
from orchestrator.target.mover.messages import Sealed
from orchestrator.target.mover.sink import BufferPool, DiskSink, IncompleteError
from orchestrator.target.mover.store import RepositoryStore
from orchestrator.target.restic.access import Opened
from orchestrator.target.restic.backend.base import Backend
from orchestrator.target.restic.errors import Damaged
from orchestrator.target.restic.lock import Lock, Pace
from orchestrator.target.restic.pack import CHUNK_BYTES
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.snapshot import ResticSnapshot, Summary
from orchestrator.target.restic.tree import FileContent
from orchestrator.target.restic.writer import Writer

THREADS = 2
BUFFERS = 16
"""As many whole chunks as QEMU has under way; 64 MiB, which all disks share."""


@dataclass(slots=True)
class _Disk:
    sink: DiskSink
    serving: asyncio.Task[None]
    parent: FileContent | None
    chunks: list[bytes] | None = None


class Session:
    """See the module. `Session.opened` makes one."""

    def __init__(self, repository: Repository, lock: Lock, writer: Writer, store: RepositoryStore) -> None:
        self._repository = repository
        self._lock = lock
        self._writer = writer
        self._store = store
        self._pool = BufferPool(BUFFERS)
        self._disks: dict[str, _Disk] = {}
        self._troubles: dict[str, Exception] = {}
        self._started = datetime.now(UTC)

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(
        cls, backend: Backend, opened: Opened, *, threads: int = THREADS, pace: Pace | None = None
    ) -> AsyncIterator["Session"]:
        """Lock a repository that was opened before, for the block. Raises TargetError, as `Repository` says."""
        repository = await Repository.open_again(backend, opened)
        # A mover that was killed left its lock, and restic itself would let that stop it for ever.
        await repository.remove_stale_locks()
        async with repository.lock(pace=pace) as held:
            await repository.load_index()
            writer = repository.writer(held)
            with ThreadPoolExecutor(threads) as workers:
                store = RepositoryStore(repository, writer, held, workers)
                session = cls(repository, held, writer, store)
                try:
                    yield session
                finally:
                    await aio.finish(session._cut_off())

    async def lost(self) -> NoReturn:
        """Raise LockLost once nothing can be committed any more."""
        await self._lock.lost()

    async def parent_of(self, disk: str, snapshot: bytes | None) -> FileContent | None:
        """What a disk is to be built on; None without a `snapshot`. Raises ParentUnusable, BackendError."""
        self._lock.check()
        if snapshot is None:
            return None
        found = (await self._repository.snapshots()).find(snapshot)
        if found is None:
            raise ParentUnusable(f"there is no snapshot {snapshot.hex()[:8]} in the repository any more")
        try:
            return (await self._repository.files(found))[f"{disk}.raw"]
        except KeyError:
            raise ParentUnusable(f"snapshot {snapshot.hex()[:8]} has no disk {disk}") from None
        except Damaged as error:
            raise ParentUnusable(f"snapshot {snapshot.hex()[:8]} cannot be built on: {error.message}") from error

    def add(
        self, disk: str, size_bytes: int, connected: socket.socket, *, parent: FileContent | None = None
    ) -> None:
        """Serve a disk's sink, under its name, to QEMU at the other end of a socket, which is taken over.

        With a `parent`, what is not written is as it is there. Raises ParentUnusable.
        """
        if parent is not None and not (
            parent.size_bytes == size_bytes and self._repository.on_grid(parent, CHUNK_BYTES)
        ):
            connected.close()
            raise ParentUnusable(
                f"disk {disk} cannot be built on what the repository has of it: that is of another size, or lacks"
                " chunks, or was not written by vmfleece"
            )
        sink = DiskSink(size_bytes, self._store, self._pool, parent=parent.chunks if parent else None)
        server = NbdServer({disk: sink}, report=lambda trouble: self._note(disk, trouble))
        self._disks[disk] = _Disk(sink, asyncio.create_task(server.converse(connected)), parent)

    def written_bytes(self) -> dict[str, int]:
        """How much QEMU has written of each disk."""
        return {name: disk.sink.written_bytes for name, disk in self._disks.items()}

    def trouble(self, disk: str) -> TargetError | None:
        """Why QEMU could not write to the disk's sink, or None. Raises LockLost."""
        self._lock.check()
        return _explained(disk, self._troubles[disk]) if disk in self._troubles else None

    async def seal(self, disk: str) -> Sealed:
        """Wait until QEMU has left. Raises TargetError: what is not whole is none."""
        return await aio.unless(self._lock.lost(), self._seal(disk))

    async def _seal(self, disk: str) -> Sealed:
        one = self._disks[disk]
        await one.serving
        trouble = self._troubles.get(disk)
        if trouble is not None and not _is_full(trouble):
            raise _explained(disk, trouble)
        try:
            one.chunks = await one.sink.finish()
        except (IncompleteError, OSError) as error:
            raise _explained(disk, trouble or error) from error
        return Sealed(one.sink.size_bytes, one.sink.stored_bytes)

    async def commit(self, snapshot: ResticSnapshot, vm_json: bytes) -> ResticSnapshot:
        """List a snapshot of all sealed disks, as `DISK.raw`, and of `vm.json`. Raises TargetError.

        Of `snapshot`, `tree` and `summary` are set here.
        """
        files = {
            f"{name}.raw": FileContent(one.sink.size_bytes, one.chunks)
            for name, one in self._disks.items()
            if one.chunks is not None
        }
        parents = {f"{name}.raw": one.parent for name, one in self._disks.items() if one.parent is not None}
        tree = await self._writer.write_file_tree(files, vm_json, snapshot.time, parents=parents)
        made = replace(
            snapshot,
            tree=tree,
            program_version=f"vmfleece {__version__}",
            summary=self._summary(files, vm_json).document(),
        )
        return await self._writer.commit(made)

    def _summary(self, files: Mapping[str, FileContent], vm_json: bytes) -> Summary:
        written = self._writer.written
        changed = sum(one.parent is not None for one in self._disks.values())
        return Summary(
            started=self._started,
            ended=datetime.now(UTC),
            files_new=len(files) + 1 - changed,
            files_changed=changed,
            data_blobs=written.data_blobs,
            tree_blobs=written.tree_blobs,
            added_bytes=written.added_bytes,
            added_packed_bytes=written.added_packed_bytes,
            total_files=len(files) + 1,
            total_bytes=sum(content.size_bytes for content in files.values()) + len(vm_json),
        )

    def _note(self, disk: str, trouble: Trouble) -> None:
        known = self._troubles.get(disk)
        if known is None or _is_full(known):
            self._troubles[disk] = trouble.error

    async def _cut_off(self) -> None:
        serving = [one.serving for one in self._disks.values()]
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


def _is_full(error: Exception) -> bool:
    """Whether QEMU waits for an operator after that error, and then repeats what failed."""
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


def _explained(disk: str, error: Exception) -> TargetError:
    """The error that a disk's content is not whole. What the repository said says most."""
    if isinstance(error.__cause__, TargetError):
        return error.__cause__
    if isinstance(error, TargetError):
        return error
    return TargetError(
        f"disk {disk}: its content did not arrive whole: {error}",
        hint="back up again: QEMU ended the connection, or its job did",
        code="target-write-failed",
    )
