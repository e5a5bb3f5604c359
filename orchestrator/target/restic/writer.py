"""Writing a snapshot: chunks first, then the tree that lists them, then the snapshot that names the tree.

    identity, added_bytes = writer.add_chunk(content)  from any number of threads; blocks while packs are saved
    tree = await writer.write_file_tree(files, …)
    snapshot = await writer.commit(ResticSnapshot(…))  packs → index → snapshot: listed, and durable

Until `commit` nothing is listed; what was written before is found again by the next run once it is in an index
file, and `restic prune` removes the rest. What could not be saved is kept, and saved first by the next call: so
whoever waits until a full target has space again repeats what failed, and goes on. Each thread that adds fills a
pack of its own: memory is two packs a thread at most, and back-pressure is the caller's.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from orchestrator import aio
from orchestrator.errors import TargetError
from orchestrator.target.restic import index_file, pack, snapshot, tree
from orchestrator.target.restic.backend.base import Backend, Content, File, Kind
from orchestrator.target.restic.blob_index import BlobIndex
from orchestrator.target.restic.crypto import Key
from orchestrator.target.restic.lock import Lock
from orchestrator.target.restic.pack import CHUNK_BYTES, BlobKind, Entry, Pack, PackBuilder
from orchestrator.target.restic.snapshot import ResticSnapshot
from orchestrator.target.restic.tree import FileContent, FileNode
from orchestrator.units import MIB

if TYPE_CHECKING:
    import mmap

VM_FILE: Final = "vm.json"
_NOTHING: Final = FileContent(0, ())
_PACK_BYTES: Final = 32 * MIB
_BLOBS_A_FILE: Final = 20_000
"""So many are in one index file, and need not be written again after a run that broke: 80 GiB of chunks."""


@dataclass(slots=True)
class Written:
    """What was new. `added_bytes` before, `added_packed_bytes` after compressing and sealing."""

    data_blobs: int = 0
    tree_blobs: int = 0
    added_bytes: int = 0
    added_packed_bytes: int = 0


@dataclass(slots=True)
class _Pending:
    """A blob that is not saved yet: how long it is, and where it is once it is sealed."""

    plain_bytes: int
    at: tuple[PackBuilder, Entry] | None = None


@dataclass(frozen=True, slots=True)
class _Unsaved:
    """A file on its way; `pack` if it is one."""

    file: File
    content: Content
    pack: Pack | None = None


class Writer:
    """See the module. `key` and `index` are the repository's, which must be loaded after locking."""

    def __init__(
        self,
        backend: Backend,
        key: Key,
        index: BlobIndex,
        lock: Lock,
        *,
        pack_bytes: int = _PACK_BYTES,
    ) -> None:
        if not pack.SMALLEST_TARGET_BYTES <= pack_bytes <= pack.LARGEST_TARGET_BYTES:
            raise ValueError(f"packs of {pack_bytes} bytes: 16 to 64 MiB are allowed")
        self._backend, self._key, self._index, self._lock = backend, key, index, lock
        self._pack_bytes = pack_bytes
        self._turn = threading.Lock()
        self._sealed = threading.Condition(self._turn)
        self._busy = 0
        self._broken: BaseException | None = None
        self._pending: dict[tuple[BlobKind, bytes], _Pending] = {}
        self._untold: dict[tuple[BlobKind, bytes], int] = {}  # what they take, of those whose adding failed
        self._open: list[PackBuilder] = []  # those that no thread is filling right now
        self._spare: list[mmap.mmap] = []  # of packs that are saved
        self._unsaved: list[_Unsaved] = []
        self._unlisted: list[
            tuple[bytes, tuple[Entry, ...]]
        ] = []  # packs that are saved, and in no index file yet
        self.written = Written()

    def add_chunk(self, chunk: bytes | memoryview) -> tuple[bytes, int]:
        """Have a chunk in the repository; return its id, and the bytes it takes there: 0 if it was there already.

        Raises LockLost and BackendError, also for what an earlier call could not save. It may be repeated. Blocks;
        may be called from any thread.
        """
        return self._add(BlobKind.DATA, chunk)

    def read_pending(self, identity: bytes) -> bytes | None:
        """Return a chunk that was added and is not saved yet; None if it is not pending. Blocks; from any thread.

        Where it was pending it is in the index as soon as it is not any more.
        """
        with self._turn:
            while (pending := self._pending.get((BlobKind.DATA, identity))) is not None and pending.at is None:
                self._check_broken()
                self._sealed.wait()
            if pending is None or pending.at is None:
                return None
            builder, entry = pending.at
            sealed = builder.sealed(entry)  # before the pack is saved: then its memory is for others
        return pack.open_blob(sealed, entry, self._key, file="a pack that is not saved yet")

    async def write_file_tree(
        self,
        files: Mapping[str, FileContent],
        vm_json: bytes,
        modified: datetime,
        *,
        parents: Mapping[str, FileContent] = MappingProxyType({}),
    ) -> bytes:
        """Write the tree of `files` by name and of `vm.json`, and return its id.

        Raises as `add_chunk` does, and ValueError if a file's chunks are unknown or not as long as the file. What
        is as in `parents`, whose chunks are known to be there, is not looked up. Cancelling it waits until it is
        done.
        """
        return await aio.finish(asyncio.to_thread(self._write_tree, files, vm_json, modified, parents))

    async def commit(self, made: ResticSnapshot) -> ResticSnapshot:
        """Make all that was added durable, then the snapshot; return it with its id. No chunk may be on its way.

        Raises as `add_chunk` does: the snapshot is not listed then, but after Unreachable, which may mean that
        only the answer was lost. Cancelling it waits until it is done: whether it is listed, `snapshots` says.
        """
        return await aio.finish(asyncio.to_thread(self._commit, made))

    def flush(self) -> None:
        """Make all that was added durable, and findable by the next run. Blocks; no chunk may be on its way."""
        with self._turn:
            if self._busy:
                raise RuntimeError("flushed while chunks are being added")
            builders, self._open = self._open, []
        with self._working():
            for builder in builders:
                self._close(builder)
            self._save()
            self._list(at_least=1)
            self._save()

    def _commit(self, made: ResticSnapshot) -> ResticSnapshot:
        self.flush()
        if not self._index.has(BlobKind.TREE, made.tree):
            raise ValueError(f"a snapshot of a tree that is not there: {made.tree.hex()}")
        content = snapshot.seal(made, self._key)
        identity = hashlib.sha256(content).digest()
        self._lock.check()
        self._backend.save(File(Kind.SNAPSHOTS, identity), content)
        return dataclasses.replace(made, identity=identity)

    def _write_tree(
        self,
        files: Mapping[str, FileContent],
        vm_json: bytes,
        modified: datetime,
        parents: Mapping[str, FileContent],
    ) -> bytes:
        parts = [vm_json[at : at + CHUNK_BYTES] for at in range(0, len(vm_json), CHUNK_BYTES)]
        contents = {**files, VM_FILE: FileContent(len(vm_json), [self.add_chunk(part)[0] for part in parts])}
        for name, content in contents.items():
            self._check_length(name, content, parents.get(name, _NOTHING))
        nodes = [FileNode(name, content, modified) for name, content in contents.items()]
        return self._add(BlobKind.TREE, tree.encode(nodes))[0]

    def _check_length(self, name: str, content: FileContent, parent: FileContent) -> None:
        """`restic check` does not see that a file is longer or shorter than its chunks."""
        pairs = itertools.zip_longest(content.chunks, parent.chunks)
        changed = [(new, old) for new, old in pairs if new != old]
        more = sum(self._length(new) for new, _ in changed if new is not None)
        less = sum(self._length(old) for _, old in changed if old is not None)
        total = parent.size_bytes + more - less
        if total != content.size_bytes:
            raise ValueError(f"{name} has {content.size_bytes} bytes, and its chunks have {total}")

    def _length(self, identity: bytes) -> int:
        with self._turn:
            pending = self._pending.get((BlobKind.DATA, identity))
        (length,) = [pending.plain_bytes] if pending else self._index.lengths(BlobKind.DATA, [identity])
        if length is None:
            raise ValueError(f"no such chunk: {identity.hex()}")
        return length

    def _add(self, kind: BlobKind, plain: bytes | memoryview) -> tuple[bytes, int]:
        with self._working():
            self._lock.check()
            self._save()
            identity = hashlib.sha256(plain).digest()
            with self._turn:
                if (kind, identity) in self._pending or self._index.has(kind, identity):
                    return identity, self._untold.pop((kind, identity), 0)
                pending = self._pending[kind, identity] = _Pending(len(plain))
            blob = pack.seal_blob(kind, identity, plain, self._key)
            try:
                self._put(blob, pending)
            except TargetError:
                with self._turn:
                    self._untold[kind, identity] = len(blob.sealed)
                raise
            return identity, len(blob.sealed)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """What fails other than saving (no memory) may have lost a chunk that others rely on: all fails then."""
        with self._turn:
            self._check_broken()
            self._busy += 1
        try:
            yield
        except TargetError:
            raise
        except BaseException as error:
            self._broken = error
            raise
        finally:
            with self._turn:
                self._busy -= 1
                self._sealed.notify_all()

    def _check_broken(self) -> None:
        if self._broken is not None:
            raise TargetError("an earlier part of the snapshot could not be made") from self._broken

    def _put(self, blob: pack.SealedBlob, pending: _Pending) -> None:
        builder = self._take(blob.kind)
        entry = builder.add(blob)
        full = builder.full  # before it is given back: then another thread may be filling it
        with self._turn:
            pending.at = builder, entry
            self._sealed.notify_all()
            if not full:
                self._open.append(builder)
            self.written.data_blobs += blob.kind is BlobKind.DATA
            self.written.tree_blobs += blob.kind is BlobKind.TREE
            self.written.added_bytes += pending.plain_bytes
            self.written.added_packed_bytes += len(blob.sealed)
        if full:
            self._close(builder)
            self._save()
            self._list(at_least=_BLOBS_A_FILE)
            self._save()

    def _take(self, kind: BlobKind) -> PackBuilder:
        with self._turn:
            for at, builder in enumerate(self._open):
                if builder.kind is kind:
                    return self._open.pop(at)
            memory = self._spare.pop() if self._spare and kind is BlobKind.DATA else None
        return PackBuilder(kind, self._pack_bytes, memory)

    def _close(self, builder: PackBuilder) -> None:
        made = builder.finish(self._key)
        with self._turn:
            self._unsaved.append(_Unsaved(File(Kind.DATA, made.identity), made.content, made))

    def _list(self, *, at_least: int) -> None:
        """Make an index file of the packs that are saved, if they have so many blobs."""
        with self._turn:
            packs = self._unlisted
            if sum(len(entries) for _, entries in packs) < at_least:
                return
            self._unlisted = []
        content = index_file.seal(packs, self._key)
        with self._turn:
            self._unsaved.append(_Unsaved(File(Kind.INDEX, hashlib.sha256(content).digest()), content))

    def _save(self) -> None:
        """Save all that waits for it; what cannot be saved waits on."""
        while True:
            with self._turn:
                if not self._unsaved:
                    return
                one = self._unsaved.pop()
            try:
                self._lock.check()
                self._backend.save(one.file, one.content)
            except BaseException:
                with self._turn:
                    self._unsaved.append(one)
                raise
            if one.pack is not None:
                self._note_saved(one.pack)

    def _note_saved(self, made: Pack) -> None:
        self._index.add(made.identity, made.entries)
        with self._turn:
            for entry in made.entries:
                self._pending.pop((entry.kind, entry.identity), None)
            self._unlisted.append((made.identity, made.entries))
            if made.entries[0].kind is BlobKind.DATA:
                self._spare.append(made.memory)
