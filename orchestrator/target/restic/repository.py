"""A repository: opened by a password, locked, its index loaded; then read, and written by a Writer.

    repository = await Repository.open(backend, password)
    async with repository.lock() as lock:
        await repository.load_index()           after locking: nobody prunes what it lists
        writer = repository.writer(lock)

Reading is checked to the last byte: by names, authentication codes, lengths and hashes; what does not fit is
Damaged. What a pack held that is gone or cut off counts as not there, so the next snapshot that needs it writes it
anew. Methods that block say so, and may be called from any thread. Cancelling the others leaves the
repository as it is or waits until they are done.
"""

import asyncio
import dataclasses
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from orchestrator import aio
from orchestrator.errors import TargetError
from orchestrator.target.restic import access, envelope, index_file, lock, pack, snapshot, tree
from orchestrator.target.restic.access import Opened
from orchestrator.target.restic.backend.base import Backend, File, Kind
from orchestrator.target.restic.blob_index import BlobIndex, IndexBuilder, Location
from orchestrator.target.restic.crypto import Cost
from orchestrator.target.restic.errors import Damaged, FileMissing
from orchestrator.target.restic.index_file import Table
from orchestrator.target.restic.keys import KeyInfo
from orchestrator.target.restic.lock import Lock, Pace
from orchestrator.target.restic.pack import BlobKind
from orchestrator.target.restic.snapshot import ResticSnapshot
from orchestrator.target.restic.tree import FileContent, Node
from orchestrator.target.restic.writer import Writer

T = TypeVar("T")
READERS = 8
"""So many index files are read side by side, some MiB each."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The snapshots that there are, oldest first; and those whose files are damaged, which hide no other."""

    snapshots: tuple[ResticSnapshot, ...]
    damaged: tuple[Damaged, ...]

    def find(self, identity: bytes) -> ResticSnapshot | None:
        """Return the one of an id, or else the newest that restic made of it (`tag`, `rewrite`); None if gone."""
        for made in reversed(self.snapshots):
            if made.identity == identity:
                return made
        return next((made for made in reversed(self.snapshots) if made.original == identity), None)


class Repository:
    """See the module. `lacking`: ids of packs that index files list, and that are not there as a whole."""

    def __init__(self, backend: Backend, opened: Opened) -> None:
        self._backend = backend
        self._opened = opened
        self._key = opened.key
        self._index = BlobIndex()
        self._lacking = BlobIndex()
        self.lacking: tuple[bytes, ...] = ()
        self._snapshots: dict[bytes, ResticSnapshot] = {}

    def __repr__(self) -> str:
        return f"<Repository {self._backend.place}>"

    @classmethod
    async def create(cls, backend: Backend, password: str, *, cost: Cost | None = None) -> "Repository":
        """Make a repository. TargetError's code is "repository-exists" if there is one."""
        return cls(backend, await _finish(access.create, backend, password, cost=cost))

    @classmethod
    async def open(cls, backend: Backend, password: str) -> "Repository":
        """Open one, trying all keys, half a second each.

        Raises NoRepository, WrongPassword, Damaged, BackendError.
        """
        return cls(backend, await asyncio.to_thread(access.open_with, backend, password))

    @classmethod
    async def open_again(cls, backend: Backend, opened: Opened) -> "Repository":
        """Open one that was opened before. Raises NoRepository, BackendError; Damaged if it was made anew."""
        await asyncio.to_thread(access.check_same, backend, opened)
        return cls(backend, opened)

    @property
    def opened(self) -> Opened:
        """What opens it again without the password: as secret as that."""
        return self._opened

    @property
    def identity(self) -> bytes:
        """What tells it from all others: 32 bytes."""
        return self._opened.config.identity

    async def keys(self) -> list[KeyInfo]:
        """Return the keys that open it, oldest first; those whose files are damaged are left out."""
        return await asyncio.to_thread(access.list_keys, self._backend, self._opened)

    async def add_password(self, password: str, *, cost: Cost | None = None) -> bytes:
        """Have another password open it, too; return its key file's id."""
        return await _finish(access.add_password, self._backend, self._key, password, cost=cost)

    async def remove_password(self, key_file: bytes) -> None:
        """Have a password open it no more. TargetError's code is "key-in-use" if it is open with that one.

        So it is for the last one.
        """
        await _finish(access.remove_password, self._backend, self._opened, key_file)

    @asynccontextmanager
    async def lock(self, *, pace: Pace | None = None) -> AsyncIterator[Lock]:
        """Hold a lock for the block. Raises RepositoryLocked if somebody works on it alone; see `lock.held`."""
        async with lock.held(self._backend, self._key, pace=pace) as ours:
            yield ours

    async def remove_stale_locks(self) -> int:
        """Remove locks of this host's dead processes; return how many. Other old ones are for `restic unlock`."""
        return await _finish(lock.remove_abandoned, self._backend, self._key)

    async def load_index(self) -> None:
        """Learn from all index files where blobs are, instead of what was known; `lacking` are left out.

        Raises Damaged for an index file that cannot be read, BackendError.
        """
        await asyncio.to_thread(self._load_index)

    def writer(self, held: Lock, **options: Any) -> Writer:
        """What writes a snapshot while the lock is held, and the index is loaded. `options`: `Writer`."""
        return Writer(self._backend, self._key, self._index, held, **options)

    def has_chunk(self, identity: bytes) -> bool:
        """Whether a chunk is there."""
        return self._index.has(BlobKind.DATA, identity)

    def chunk_bytes(self, identity: bytes) -> int | None:
        """How long a chunk is, as index files say, though its pack may be gone; None if none lists it."""
        for location in self._locations(BlobKind.DATA, identity):
            return location.entry.content_bytes
        return None

    def read_blob(self, identity: bytes, kind: BlobKind = BlobKind.DATA) -> bytes:
        """Return a blob whose hash is its id. Blocks. Raises Damaged if no pack has it any more, BackendError.

        Where one pack is missing or damaged, another one that has the blob is read, or what is left of one that is
        cut off.
        """
        failure = Damaged(f"{kind} blob {identity.hex()}", "no index file says where it is")
        for number, location in enumerate(self._locations(kind, identity)):
            try:
                return self._read_at(location)
            except Damaged as error:
                failure = failure if number else error
        raise failure

    def read_file(self, content: FileContent) -> Iterator[bytes]:
        """Return a file's chunks in turn. Blocks. Raises as `read_blob`, and Damaged for a wrong length."""
        length = 0
        for identity in content.chunks:
            chunk = self.read_blob(identity)
            length += len(chunk)
            yield chunk
        if length != content.size_bytes:
            raise Damaged("a file", f"it has {length} bytes where its tree says {content.size_bytes}")

    def read_tree(self, identity: bytes) -> list[Node]:
        """Return what is in a folder. Blocks. Raises as `read_blob`."""
        return tree.decode(self.read_blob(identity, BlobKind.TREE), file=f"tree {identity.hex()}")

    async def files(self, made: ResticSnapshot) -> dict[str, FileContent]:
        """Return the files at the top of a snapshot. Raises Damaged, BackendError."""
        nodes = await asyncio.to_thread(self.read_tree, made.tree)
        return {node.name: node.content for node in nodes if node.kind == "file"}

    def on_grid(self, content: FileContent, chunk_bytes: int) -> bool:
        """Whether a file's chunk n holds exactly what begins at n times `chunk_bytes`, and all chunks are there.

        Only then can single chunks be exchanged in the list. restic's own chunks vary in length.
        """
        whole, last_bytes = divmod(content.size_bytes, chunk_bytes)
        if len(content.chunks) != whole + (last_bytes > 0):
            return False
        # Of a large disk most may be zeroes, one chunk many times.
        lengths = self._index.lengths(BlobKind.DATA, set(content.chunks[:whole]))
        last = self._index.lengths(BlobKind.DATA, content.chunks[whole:])
        return all(length == chunk_bytes for length in lengths) and all(length == last_bytes for length in last)

    async def snapshots(self) -> Listing:
        """Return all snapshots, oldest first. Raises NoRepository if it is not there any more, BackendError."""
        return await asyncio.to_thread(self._read_snapshots)

    async def replace(self, made: ResticSnapshot, *, tags: Sequence[str]) -> ResticSnapshot:
        """Give a snapshot other tags, as `restic tag` does; return what it is now, which has another id.

        The caller holds a lock. Both are listed until the first is removed, and if that fails, or we die: then
        `original` tells. TargetError's code is "no-snapshot" if it is gone; nothing is done if it has these tags.
        """
        return await _finish(self._replace, _saved(made), tuple(tags))

    async def forget(self, made: ResticSnapshot) -> None:
        """Take a snapshot off the list; its space is free after `restic prune`. Nothing to do if it is gone."""
        await _finish(self._backend.remove, _saved(made))

    def _locations(self, kind: BlobKind, identity: bytes) -> list[Location]:
        return self._index.find(kind, identity) + self._lacking.find(kind, identity)

    def _read_at(self, location: Location) -> bytes:
        file, entry = File(Kind.DATA, location.pack), location.entry
        try:
            sealed = self._backend.read(file, offset=entry.offset, length=entry.length)
        except FileMissing:
            raise Damaged(file.path, "it is missing") from None
        return pack.open_blob(sealed, entry, self._key, file=file.path)

    def _load_index(self) -> None:
        files = self._files(Kind.INDEX)  # before the packs, which are written before the index lists them
        sizes = {stored.file.identity: stored.size_bytes for stored in self._backend.list(Kind.DATA)}
        whole, lacking = IndexBuilder(), IndexBuilder()
        for table in self._tables(files):
            gone = [sizes.get(pack, -1) < end for pack, end in zip(table.packs, table.ends, strict=True)]
            if any(gone):
                lacking.add(table.of(gone))
                table = table.of([not one for one in gone])  # noqa: PLW2901  what is left of it
            whole.add(table)
        self._index, self._lacking, self.lacking = whole.finish(), lacking.finish(), lacking.packs

    def _tables(self, files: list[File]) -> Iterator[Table]:
        """What index files list. While one is taken apart the next are read."""
        with ThreadPoolExecutor(READERS) as pool:
            begun = ((file, pool.submit(self._backend.read, file)) for file in files)
            reading = deque(islice(begun, READERS))
            while reading:
                file, content = reading.popleft()
                stored = content.result()
                reading.extend(islice(begun, 1))
                envelope.check_name(stored, identity=file.identity, file=file.path)
                yield from index_file.open_sealed(stored, self._key, file=file.path)

    def _files(self, kind: Kind) -> list[File]:
        """Where nothing is listed, the repository itself may be gone: a mount, say. That is not to look empty."""
        files = [stored.file for stored in self._backend.list(kind)]
        if not files:
            access.read_config(self._backend)
        return files

    def _read_snapshots(self) -> Listing:
        found: dict[bytes, ResticSnapshot] = {}
        damaged: list[Damaged] = []
        for file in self._files(Kind.SNAPSHOTS):
            known = self._snapshots.get(file.identity)  # a file never changes
            try:
                found[file.identity] = known or self._read_snapshot(file)
            except FileMissing:
                continue  # forgotten meanwhile
            except Damaged as error:
                damaged.append(error)
        self._snapshots = found
        ordered = sorted(found.values(), key=lambda made: (made.time, made.identity))
        return Listing(tuple(ordered), tuple(damaged))

    def _replace(self, file: File, tags: tuple[str, ...]) -> ResticSnapshot:
        try:
            old = self._read_snapshot(file)
        except FileMissing:
            raise TargetError(
                f"there is no {file} in the repository any more",
                hint="somebody has forgotten it meanwhile; `vmfleece snapshot list` says what is there",
                code="no-snapshot",
            ) from None
        if old.tags == tags:
            return old
        new = dataclasses.replace(old, tags=tags, original=old.original or file.identity, identity=None)
        content = snapshot.seal(new, self._key)
        identity = hashlib.sha256(content).digest()
        self._backend.save(File(Kind.SNAPSHOTS, identity), content)
        self._backend.remove(file)
        return dataclasses.replace(new, identity=identity)

    def _read_snapshot(self, file: File) -> ResticSnapshot:
        content = self._backend.read(file)
        return snapshot.open_sealed(content, self._key, identity=file.identity, file=file.path)


def _saved(made: ResticSnapshot) -> File:
    if made.identity is None:
        raise ValueError("a snapshot that was never saved")
    return File(Kind.SNAPSHOTS, made.identity)


async def _finish(work: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Run what blocks and changes something; a thread cannot be cancelled, so it is awaited to its end."""
    return await aio.finish(asyncio.to_thread(work, *arguments, **options))
