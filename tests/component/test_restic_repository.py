"""A repository on memory and in a folder: written, read back, damaged, shared, and given up."""

import asyncio
import hashlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from orchestrator.errors import TargetError
from orchestrator.target.restic import pack
from orchestrator.target.restic.access import this_host, this_user
from orchestrator.target.restic.backend.base import CONFIG, Backend, Content, File, Kind
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.backend.memory import MemoryBackend
from orchestrator.target.restic.crypto import Cost
from orchestrator.target.restic.errors import (
    BackendError,
    Damaged,
    FileMissing,
    NoRepository,
    Unreachable,
    WrongPassword,
)
from orchestrator.target.restic.pack import BlobKind
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.snapshot import ResticSnapshot
from orchestrator.target.restic.tree import FileContent
from orchestrator.target.restic.writer import Writer
from orchestrator.units import MIB

T = TypeVar("T")
CHEAP = Cost(16, 1, 1)
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
PASSWORD = "correct horse"


def chunk(number: int, length: int = 1000) -> bytes:
    """Content that does not compress, always the same."""
    return hashlib.shake_128(b"%d" % number).digest(length)


def made_of(tree: bytes, hours: int = 0, **more: Any) -> ResticSnapshot:
    return ResticSnapshot(NOON + timedelta(hours=hours), tree, "web01", ("/web01",), **more)


async def write(writer: Writer, chunks: Iterable[bytes], hours: int = 0, **more: Any) -> ResticSnapshot:
    contents = list(chunks)
    ids = [writer.add_chunk(content)[0] for content in contents]
    disk = FileContent(sum(map(len, contents)), ids)
    tree = await writer.write_file_tree({"vda.raw": disk}, b'{"vm":"web01"}', NOON)
    return await writer.commit(made_of(tree, hours, **more))


async def backup(repository: Repository, chunks: Iterable[bytes], hours: int = 0, **more: Any) -> ResticSnapshot:
    async with repository.lock() as lock:
        await repository.load_index()
        return await write(repository.writer(lock, pack_bytes=16 * MIB), chunks, hours, **more)


async def content_of(repository: Repository, made: ResticSnapshot, name: str = "vda.raw") -> bytes:
    files = await repository.files(made)
    return b"".join(repository.read_file(files[name]))


@pytest.fixture(params=["memory", "directory"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return MemoryBackend() if request.param == "memory" else DirectoryBackend(tmp_path / "repository")


@pytest.fixture
async def repository(backend: Backend) -> Repository:
    return await Repository.create(backend, PASSWORD, cost=CHEAP)


def files_of(backend: Backend, kind: Kind) -> set[File]:
    return {stored.file for stored in backend.list(kind)}


# Getting in


async def test_it_opens_with_each_of_its_passwords_only(backend: Backend, repository: Repository) -> None:
    second = await repository.add_password("battery", cost=CHEAP)
    opened = await Repository.open(backend, "battery")
    assert opened.identity == repository.identity
    with pytest.raises(WrongPassword):
        await Repository.open(backend, "staple")
    with pytest.raises(TargetError, match="open with") as refused:
        await opened.remove_password(second)
    assert refused.value.code == "key-in-use"
    await repository.remove_password(second)
    with pytest.raises(WrongPassword):
        await Repository.open(backend, "battery")
    await Repository.open(backend, PASSWORD)


async def test_its_keys_are_listed_and_the_last_one_stays(backend: Backend, repository: Repository) -> None:
    second = await repository.add_password("battery", cost=CHEAP)
    backend.save(File(Kind.KEYS, bytes(32)), b"garbage")
    first, other = await repository.keys()
    assert (first.current, other.current, other.id) == (True, False, second.hex())
    assert (first.hostname, first.username) == (this_host(), this_user())
    assert datetime.now(UTC) - timedelta(minutes=1) < first.created <= other.created
    for key in (bytes.fromhex(first.id), bytes(32)):  # somebody else removed them
        backend.remove(File(Kind.KEYS, key))
    with pytest.raises(TargetError, match="last key") as refused:
        await repository.remove_password(second)
    assert refused.value.code == "key-in-use"
    assert [key.id for key in await repository.keys()] == [second.hex()]


async def test_there_is_none_or_there_is_one_already(backend: Backend) -> None:
    with pytest.raises(NoRepository) as missing:
        await Repository.open(backend, PASSWORD)
    assert (missing.value.code, missing.value.exit_code) == ("no-repository", 10)
    await Repository.create(backend, PASSWORD, cost=CHEAP)
    with pytest.raises(TargetError) as exists:
        await Repository.create(backend, PASSWORD, cost=CHEAP)
    assert exists.value.code == "repository-exists"
    assert len(files_of(backend, Kind.KEYS)) == 1


async def test_of_two_who_create_it_one_wins_and_leaves_one_key() -> None:
    both = threading.Barrier(2)

    class Late(MemoryBackend):
        def save(self, file: File, content: Content, *, replace: bool = True) -> None:
            if file == CONFIG:
                both.wait(20)
            super().save(file, content, replace=replace)

    backend = Late()
    outcomes = await asyncio.gather(
        *(Repository.create(backend, PASSWORD, cost=CHEAP) for _ in range(2)), return_exceptions=True
    )
    (lost,) = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert isinstance(lost, TargetError)
    assert lost.code == "repository-exists"
    await Repository.open(backend, PASSWORD)
    assert len(files_of(backend, Kind.KEYS)) == 1


async def test_nothing_tells_the_password_or_the_key(repository: Repository) -> None:
    told = repr(repository) + repr(vars(repository))
    assert PASSWORD not in told
    assert repr(repository._key.encrypt)[2:-1] not in told
    assert repository._key.encrypt.hex() not in told


# Writing and reading


async def test_what_was_written_is_read_back(backend: Backend, repository: Repository) -> None:
    chunks = [chunk(1), bytes(5000), chunk(2), bytes(5000), chunk(1)]
    made = await backup(repository, chunks)
    opened = await Repository.open(backend, PASSWORD)
    listing = await opened.snapshots()
    assert listing.snapshots == (made,)
    await opened.load_index()
    assert await content_of(opened, made) == b"".join(chunks)
    assert json.loads(await content_of(opened, made, "vm.json")) == {"vm": "web01"}


async def test_a_chunk_is_new_once(repository: Repository) -> None:
    async with repository.lock() as lock:
        await repository.load_index()
        writer = repository.writer(lock)
        outcomes = [writer.add_chunk(content)[1] for content in (chunk(1), chunk(2), chunk(1))]
        assert outcomes == [1032, 1032, 0]
        compressed = writer.add_chunk(bytes(4096))[1]
        assert 32 < compressed < 100
        assert writer.add_chunk(bytes(4096)) == (hashlib.sha256(bytes(4096)).digest(), 0)
        writer.flush()
        written = writer.written
        assert (written.data_blobs, written.tree_blobs, written.added_bytes) == (3, 0, 2000 + 4096)
        assert written.added_packed_bytes == 2 * 1032 + compressed
    async with repository.lock() as lock:
        await repository.load_index()
        assert not repository.writer(lock).add_chunk(chunk(2))[1]


async def test_an_incremental_takes_the_list_of_its_parent(backend: Backend, repository: Repository) -> None:
    first = [chunk(number, 4096) for number in range(20)]
    parent = await backup(repository, first)
    packs = files_of(backend, Kind.DATA)
    async with repository.lock() as lock:
        await repository.load_index()
        files = await repository.files(parent)
        assert repository.on_grid(files["vda.raw"], 4096)
        ids = list(files["vda.raw"].chunks)
        writer = repository.writer(lock)
        ids[7], _ = writer.add_chunk(chunk(99, 4096))
        tree = await writer.write_file_tree({"vda.raw": FileContent(20 * 4096, ids)}, b"{}", NOON)
        made = await writer.commit(made_of(tree, 1, parent=parent.identity))
        assert writer.written.data_blobs == 2
    assert len(files_of(backend, Kind.DATA) - packs) == 2
    await repository.load_index()
    assert await content_of(repository, made) == b"".join([*first[:7], chunk(99, 4096), *first[8:]])
    assert await content_of(repository, parent) == b"".join(first)


async def test_on_grid_means_that_chunk_n_is_where_it_must_be(repository: Repository) -> None:
    await backup(repository, [chunk(1, 4096), chunk(2, 4096), chunk(3, 100)])
    await repository.load_index()
    a, b, short = (hashlib.sha256(chunk(n, size)).digest() for n, size in ((1, 4096), (2, 4096), (3, 100)))
    for size, ids, expected in (
        (8192, [a, b], True),
        (8292, [a, b, short], True),
        (8292, [a, short, b], False),
        (8292, [a, b], False),
        (4196, [short, a], False),
        (8192, [a, bytes(32)], False),
        (8193, [a, b, short], False),
        (0, [], True),
        (0, [a], False),
    ):
        assert repository.on_grid(FileContent(size, ids), 4096) is expected


async def test_a_file_must_be_as_long_as_its_chunks(repository: Repository) -> None:
    async with repository.lock() as lock:
        writer = repository.writer(lock)
        identity, _ = writer.add_chunk(chunk(1))
        for content in (FileContent(999, [identity]), FileContent(1000, []), FileContent(1000, [bytes(32)])):
            with pytest.raises(ValueError, match=r"bytes|no such chunk"):
                await writer.write_file_tree({"vda.raw": content}, b"{}", NOON)
        other, _ = writer.add_chunk(chunk(2)[:500])
        parent = FileContent(2000, [identity, identity])
        for size, ids in ((1500, [identity, other]), (2000, [identity] * 2), (1000, [identity]), (500, [other])):
            good, bad = FileContent(size, ids), FileContent(size + 1, ids)
            await writer.write_file_tree({"vda.raw": good}, b"{}", NOON, parents={"vda.raw": parent})
            with pytest.raises(ValueError, match="bytes"):
                await writer.write_file_tree({"vda.raw": bad}, b"{}", NOON, parents={"vda.raw": parent})
        with pytest.raises(ValueError, match="not there"):
            await writer.commit(made_of(bytes(32)))
        with pytest.raises(ValueError, match="16 to 64"):
            repository.writer(lock, pack_bytes=MIB)


async def test_packs_close_at_their_size_and_many_threads_write(backend: Backend, repository: Repository) -> None:
    contents = [chunk(number % 40, MIB) for number in range(80)]
    async with repository.lock() as lock:
        await repository.load_index()
        writer = repository.writer(lock, pack_bytes=16 * MIB)
        with ThreadPoolExecutor(4) as pool:
            added = list(pool.map(writer.add_chunk, contents))
        assert sum(added_bytes > 0 for _, added_bytes in added) == 40
        disk = FileContent(80 * MIB, [identity for identity, _ in added])
        tree = await writer.write_file_tree({"vda.raw": disk}, b"{}", NOON)
        made = await writer.commit(made_of(tree))
    sizes = [stored.size_bytes for stored in backend.list(Kind.DATA)]
    assert max(sizes) < 17.1 * MIB
    await repository.load_index()
    assert (
        hashlib.sha256(await content_of(repository, made)).digest() == hashlib.sha256(b"".join(contents)).digest()
    )


class FilledAtOnce(list[pack.PackBuilder]):
    """As if another thread took and filled each pack as soon as it is given back."""

    def append(self, builder: pack.PackBuilder) -> None:
        super().append(builder)
        builder._target_bytes = 0


async def test_no_pack_is_closed_by_two_threads() -> None:
    repository = await Repository.create(MemoryBackend(), PASSWORD, cost=CHEAP)
    async with repository.lock() as lock:
        writer = repository.writer(lock)
        writer._open = FilledAtOnce()
        writer.add_chunk(chunk(1))
        assert len(writer._open) == 1
        assert (writer._unsaved, writer._unlisted) == ([], [])
        writer.flush()
    await repository.load_index()
    assert len(repository._index) == 1


async def test_a_tree_that_looks_like_a_chunk_is_still_a_tree(repository: Repository) -> None:
    """A guest might write to its disk what we are going to write as the tree of another snapshot."""
    made = await backup(repository, [chunk(1)])
    await repository.load_index()
    text = b'{"nodes":[]}\n'
    async with repository.lock() as lock:
        writer = repository.writer(lock)
        assert writer.add_chunk(text)[1]
        assert writer._add(BlobKind.TREE, text)[1]
        writer.flush()
    assert await content_of(repository, made) == chunk(1)


# The order of writing, and what is left when it breaks off


class Recorded(MemoryBackend):
    """Says what was saved in which order, and breaks off when it was told to."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[Kind | None] = []
        self.fail: Callable[[File], BackendError | None] = lambda _: None

    def save(self, file: File, content: Content, *, replace: bool = True) -> None:
        if error := self.fail(file):
            raise error
        super().save(file, content, replace=replace)
        self.saved.append(file.kind)


async def test_packs_come_before_the_index_and_that_before_the_snapshot() -> None:
    backend = Recorded()
    await backup(await Repository.create(backend, PASSWORD, cost=CHEAP), [chunk(1)])
    order = [kind for kind in backend.saved if kind in (Kind.DATA, Kind.INDEX, Kind.SNAPSHOTS)]
    assert order == [Kind.DATA, Kind.DATA, Kind.INDEX, Kind.SNAPSHOTS]


@pytest.mark.parametrize("broken", [Kind.DATA, Kind.INDEX, Kind.SNAPSHOTS])
async def test_whatever_cannot_be_saved_no_snapshot_is_listed_and_the_next_one_is_good(broken: Kind) -> None:
    backend = Recorded()
    repository = await Repository.create(backend, PASSWORD, cost=CHEAP)
    backend.fail = lambda file: Unreachable("gone") if file.kind is broken else None
    async with repository.lock() as lock:
        with pytest.raises(Unreachable):
            await write(repository.writer(lock), [chunk(1)])
    assert (await repository.snapshots()).snapshots == ()
    backend.fail = lambda _: None
    made = await backup(repository, [chunk(1)])
    await repository.load_index()
    assert await content_of(repository, made) == chunk(1)


@pytest.mark.parametrize("broken", [Kind.DATA, Kind.INDEX, Kind.SNAPSHOTS])
async def test_what_could_not_be_saved_is_once_that_is_possible_again(broken: Kind) -> None:
    backend = Recorded()
    repository = await Repository.create(backend, PASSWORD, cost=CHEAP)
    contents = [chunk(number, MIB) for number in range(40)]
    full = BackendError("full", code="target-full")
    failures = [number % 3 != 2 for number in range(30)]

    def fail(file: File) -> BackendError | None:
        return full if file.kind is broken and failures.pop() else None

    backend.fail = fail

    async def again(work: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await work()
            except BackendError:
                continue

    async with repository.lock() as lock:
        writer = repository.writer(lock, pack_bytes=16 * MIB)
        tasks = [again(lambda one=one: asyncio.to_thread(writer.add_chunk, one)) for one in contents]  # type: ignore[misc]
        added = await asyncio.gather(*tasks)
        ids = [identity for identity, _ in added]
        assert sum(added_bytes for _, added_bytes in added) == writer.written.added_packed_bytes
        assert writer.written.data_blobs == 40
        files = {"vda.raw": FileContent(40 * MIB, ids)}
        tree = await again(lambda: writer.write_file_tree(files, b"{}", NOON))
        made = await again(lambda: writer.commit(made_of(tree)))
    assert len(failures) < 30
    await repository.load_index()
    assert len(repository._index) == 42
    assert len(files_of(backend, Kind.INDEX)) == 1
    assert await content_of(repository, made) == b"".join(contents)


async def test_while_nothing_can_be_saved_nothing_more_is_taken() -> None:
    backend = Recorded()
    repository = await Repository.create(backend, PASSWORD, cost=CHEAP)
    backend.fail = lambda file: BackendError("full", code="target-full") if file.kind is Kind.DATA else None
    async with repository.lock() as lock:
        writer = repository.writer(lock, pack_bytes=16 * MIB)

        def add(number: int) -> str:
            try:
                writer.add_chunk(chunk(number, MIB))
            except BackendError as error:
                return error.code
            return ""

        with ThreadPoolExecutor(3) as pool:
            codes = list(pool.map(add, range(80)))
        assert codes[-1] == "target-full"
        assert sum(len(one.content) for one in writer._unsaved) < 3 * 18 * MIB
        with pytest.raises(BackendError):
            await writer.commit(made_of(bytes(32)))


async def test_what_fails_but_for_saving_fails_for_good(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    async with repository.lock() as lock:
        writer = repository.writer(lock)
        with monkeypatch.context() as patch:
            patch.setattr(pack.PackBuilder, "add", no_memory)
            with pytest.raises(MemoryError):
                writer.add_chunk(chunk(1))
        for act in (lambda: writer.add_chunk(chunk(1)), writer.flush):
            with pytest.raises(TargetError, match="earlier part"):
                act()


async def test_a_lost_lock_ends_writing(repository: Repository, backend: Backend) -> None:
    async with repository.lock() as lock:
        writer = repository.writer(lock)
        writer.add_chunk(chunk(1))
        lock._reason = "somebody removed its file"
        for act in (lambda: writer.add_chunk(chunk(2)), writer.flush):
            with pytest.raises(TargetError) as lost:
                act()
            assert lost.value.code == "lock-lost"
        assert files_of(backend, Kind.DATA) == set()


async def test_cancelling_a_commit_waits_for_its_outcome() -> None:
    backend = Recorded()
    repository = await Repository.create(backend, PASSWORD, cost=CHEAP)
    began, go_on = threading.Event(), threading.Event()

    def slow(file: File) -> None:
        if file.kind is Kind.SNAPSHOTS:
            began.set()
            go_on.wait(20)

    backend.fail = slow
    task = asyncio.ensure_future(backup(repository, [chunk(1)]))
    await asyncio.to_thread(began.wait, 20)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len((await repository.snapshots()).snapshots) == 1
    assert files_of(backend, Kind.LOCKS) == set()


async def test_flushing_while_a_chunk_is_on_its_way_is_a_bug(repository: Repository) -> None:
    async with repository.lock() as lock:
        writer = repository.writer(lock)
        writer._busy = 1
        with pytest.raises(RuntimeError):
            writer.flush()


# Damage


def rewrite(backend: Backend, file: File, content: bytes) -> None:
    backend.remove(file)
    backend.save(file, content)


@pytest.mark.parametrize("kind", [Kind.INDEX, Kind.DATA, Kind.KEYS, Kind.SNAPSHOTS, None])
async def test_a_flipped_bit_in_any_file_is_told_with_its_name(
    backend: Backend, repository: Repository, kind: Kind | None
) -> None:
    made = await backup(repository, [chunk(1)])
    for file in files_of(backend, kind) if kind else {CONFIG}:
        content = bytearray(backend.read(file))
        content[len(content) // 3] ^= 4
        rewrite(backend, file, bytes(content))

    async def read_all() -> None:
        opened = await Repository.open(backend, PASSWORD)
        await opened.load_index()
        for damaged in (await opened.snapshots()).damaged:
            raise damaged
        await content_of(opened, made)

    with pytest.raises(Damaged) as told:
        await read_all()
    assert (kind or "config") in told.value.file
    assert told.value.code == "repository-damaged"


async def test_one_damaged_snapshot_hides_no_other(backend: Backend, repository: Repository) -> None:
    first, second = await backup(repository, [chunk(1)]), await backup(repository, [chunk(2)], 1)
    assert first.identity
    rewrite(backend, File(Kind.SNAPSHOTS, first.identity), b"garbage")
    listing = await (await Repository.open(backend, PASSWORD)).snapshots()
    assert listing.snapshots == (second,)
    assert [damaged.file for damaged in listing.damaged] == [f"snapshots/{first.identity.hex()}"]


async def test_a_missing_pack_is_told_unless_another_has_the_blob(
    backend: Backend, repository: Repository
) -> None:
    made = await backup(repository, [chunk(1)])
    other = await Repository.open(backend, PASSWORD)
    async with other.lock() as lock:
        await write(other.writer(lock), [chunk(1)])  # without its index: writes the chunk again
    await repository.load_index()
    locations = repository._index.find(BlobKind.DATA, hashlib.sha256(chunk(1)).digest())
    assert len(locations) == 2
    backend.remove(File(Kind.DATA, locations[0].pack))
    assert await content_of(repository, made) == chunk(1)
    rewrite(backend, File(Kind.DATA, locations[1].pack), b"short")
    with pytest.raises(Damaged, match="missing"):
        await content_of(repository, made)


async def test_what_no_index_lists_is_told(repository: Repository) -> None:
    with pytest.raises(Damaged, match="no index file"):
        repository.read_blob(bytes(32))
    with pytest.raises(Damaged, match="says 5"):
        list(repository.read_file(FileContent(5, [])))


# Snapshots


async def test_snapshots_are_listed_oldest_first_until_forgotten(backend: Backend, repository: Repository) -> None:
    late, early = await backup(repository, [chunk(1)], 5), await backup(repository, [chunk(1)], 1)
    assert (await repository.snapshots()).snapshots == (early, late)
    await repository.forget(early)
    await repository.forget(early)
    assert (await repository.snapshots()).snapshots == (late,)
    assert (await (await Repository.open(backend, PASSWORD)).snapshots()).snapshots == (late,)


async def test_a_repository_that_is_gone_does_not_look_empty(backend: Backend, repository: Repository) -> None:
    assert (await repository.snapshots()).snapshots == ()
    backend.remove(CONFIG)  # as if its mount were
    for look in (repository.snapshots, repository.load_index):
        with pytest.raises(NoRepository):
            await look()


async def test_a_snapshot_is_found_by_its_id_and_by_its_first_one(repository: Repository) -> None:
    first = await backup(repository, [chunk(1)], 1)
    assert first.identity
    async with repository.lock() as lock:
        await repository.load_index()
        tagged = await repository.writer(lock).commit(made_of(first.tree, 1, original=first.identity))
    listing = await repository.snapshots()
    assert listing.find(first.identity) == first
    await repository.forget(first)
    listing = await repository.snapshots()
    assert listing.find(first.identity) == tagged
    assert listing.find(bytes(32)) is None


async def test_other_tags_make_another_file_of_the_same_snapshot(repository: Repository) -> None:
    first = await backup(repository, [chunk(1)], note={"run": "1"}, parent=bytes(32), tags=("a",))
    second = await repository.replace(first, tags=["a", "protected"])
    third = await repository.replace(second, tags=["b"])
    assert third == replace(first, tags=("b",), original=first.identity, identity=third.identity)
    assert await repository.replace(third, tags=["b"]) == third
    listing = await repository.snapshots()
    assert listing.snapshots == (third,)
    assert first.identity
    assert listing.find(first.identity) == third
    with pytest.raises(TargetError) as gone:
        await repository.replace(second, tags=["c"])
    assert gone.value.code == "no-snapshot"
    assert (await repository.snapshots()).snapshots == (third,)


async def test_tags_that_cannot_be_saved_leave_the_snapshot_as_it_was() -> None:
    backend = Recorded()
    repository = await Repository.create(backend, PASSWORD, cost=CHEAP)
    made = await backup(repository, [chunk(1)])
    backend.fail = lambda file: Unreachable("gone") if file.kind is Kind.SNAPSHOTS else None
    with pytest.raises(Unreachable):
        await repository.replace(made, tags=["a"])
    assert (await repository.snapshots()).snapshots == (made,)
    with pytest.raises(ValueError, match="never saved"):
        await repository.replace(made_of(bytes(32)), tags=["a"])


async def test_a_snapshot_that_vanishes_while_they_are_listed_is_not_there() -> None:
    class Vanishing(MemoryBackend):
        def read(self, file: File, *, offset: int = 0, length: int | None = None) -> bytes:
            if file.kind is Kind.SNAPSHOTS:
                raise FileMissing("gone")
            return super().read(file, offset=offset, length=length)

    repository = await Repository.create(Vanishing(), PASSWORD, cost=CHEAP)
    await backup(repository, [chunk(1)])
    listing = await repository.snapshots()
    assert (listing.snapshots, listing.damaged) == ((), ())


async def test_two_runs_write_at_once(backend: Backend, repository: Repository) -> None:
    other = await Repository.open(backend, PASSWORD)
    one, two = await asyncio.gather(
        backup(repository, [chunk(1), chunk(2)]), backup(other, [chunk(2), chunk(3)], 1)
    )
    await repository.load_index()
    assert (await repository.snapshots()).snapshots == (one, two)
    assert await content_of(repository, one) == chunk(1) + chunk(2)
    assert await content_of(repository, two) == chunk(2) + chunk(3)
    assert files_of(backend, Kind.LOCKS) == set()
