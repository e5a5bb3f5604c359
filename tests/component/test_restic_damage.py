"""What is damaged or lost in a repository: what is told of it, and that the next snapshot does not rely on it."""

import asyncio
import contextlib
import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from orchestrator.errors import TargetError
from orchestrator.target.restic.backend.base import CONFIG, Backend, File, Kind, Stored
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.backend.memory import MemoryBackend
from orchestrator.target.restic.errors import Damaged, FileMissing, NoRepository, WrongPassword
from orchestrator.target.restic.lock import Pace
from orchestrator.target.restic.pack import BlobKind
from orchestrator.target.restic.repository import READERS, Repository
from orchestrator.target.restic.tree import FileContent
from tests.component.test_restic_repository import (
    CHEAP,
    PASSWORD,
    backup,
    chunk,
    content_of,
    files_of,
    rewrite,
    write,
)

SIZE = 4096
CHUNKS = [chunk(number, SIZE) for number in range(6)]
BLOBS_BYTES = 6 * (SIZE + 32) + len('{"vm":"web01"}') + 32


@pytest.fixture(params=["memory", "directory"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return MemoryBackend() if request.param == "memory" else DirectoryBackend(tmp_path / "repository")


@pytest.fixture
async def repository(backend: Backend) -> Repository:
    return await Repository.create(backend, PASSWORD, cost=CHEAP)


async def loaded(backend: Backend) -> Repository:
    opened = await Repository.open(backend, PASSWORD)
    await opened.load_index()
    return opened


def pack_of(repository: Repository, content: bytes) -> File:
    (location,) = repository._index.find(BlobKind.DATA, hashlib.sha256(content).digest())
    return File(Kind.DATA, location.pack)


def cut(backend: Backend, file: File, length: int) -> None:
    rewrite(backend, file, backend.read(file)[:length])


DAMAGES: dict[str, Callable[[Backend, File], None]] = {
    "missing": lambda backend, file: backend.remove(file),
    "empty": lambda backend, file: cut(backend, file, 0),
    "cut off": lambda backend, file: cut(backend, file, 6 * (SIZE + 32) - 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_a_lost_pack_held_counts_as_missing(
    backend: Backend, repository: Repository, damage: str
) -> None:
    first = await backup(repository, CHUNKS)
    pack = pack_of(repository, CHUNKS[0])
    DAMAGES[damage](backend, pack)

    opened = await loaded(backend)
    assert opened.lacking == (pack.identity,)
    assert not opened.has_chunk(hashlib.sha256(CHUNKS[0]).digest())
    assert not opened.on_grid((await opened.files(first))["vda.raw"], SIZE)
    with pytest.raises(Damaged) as told:
        await content_of(opened, first)
    assert pack.path in told.value.file

    second = await backup(opened, CHUNKS, 1)
    again = await loaded(backend)
    assert again.lacking == (pack.identity,)
    for made in (first, second):
        assert again.on_grid((await again.files(made))["vda.raw"], SIZE)
        assert await content_of(again, made) == b"".join(CHUNKS)


async def test_of_a_pack_that_is_cut_off_what_is_left_is_read(backend: Backend, repository: Repository) -> None:
    await backup(repository, CHUNKS)
    cut(backend, pack_of(repository, CHUNKS[0]), 3 * (SIZE + 32))
    opened = await loaded(backend)
    ids = [hashlib.sha256(content).digest() for content in CHUNKS]
    assert b"".join(opened.read_file(FileContent(3 * SIZE, ids[:3]))) == b"".join(CHUNKS[:3])
    with pytest.raises(Damaged, match="0 of its 4128 bytes"):
        opened.read_blob(ids[3])


async def test_a_pack_that_lacks_but_its_header_is_used(backend: Backend, repository: Repository) -> None:
    made = await backup(repository, CHUNKS)
    cut(backend, pack_of(repository, CHUNKS[0]), BLOBS_BYTES)
    opened = await loaded(backend)
    assert opened.lacking == ()
    assert await content_of(opened, made) == b"".join(CHUNKS)


async def test_a_lost_pack_that_two_index_files_list_is_named_once(
    backend: Backend, repository: Repository
) -> None:
    await backup(repository, CHUNKS)
    pack = pack_of(repository, CHUNKS[0])
    (listed,) = files_of(backend, Kind.INDEX)
    text = repository._key.open(backend.read(listed), file="x")
    again = bytes(repository._key.seal(text))
    backend.save(File(Kind.INDEX, hashlib.sha256(again).digest()), again)
    backend.remove(pack)
    assert (await loaded(backend)).lacking == (pack.identity,)


async def test_what_another_run_writes_while_the_index_is_loaded_is_not_taken_for_lost() -> None:
    class Racing(MemoryBackend):
        """Another run ends as soon as something was listed."""

        def list(self, kind: Kind) -> Iterable[Stored]:
            listed = super().list(kind)
            if racing and kind in (Kind.INDEX, Kind.DATA):
                racing.pop()()
            return listed

    backend = Racing()
    racing: list[Callable[[], object]] = []
    repository = await Repository.create(backend, PASSWORD, cost=CHEAP)
    other = await Repository.open(backend, PASSWORD)
    racing.append(lambda: asyncio.run(backup(other, CHUNKS)))
    await repository.load_index()
    assert racing == []
    assert repository.lacking == ()
    await repository.load_index()
    assert repository.has_chunk(hashlib.sha256(CHUNKS[0]).digest())


async def test_a_few_index_files_are_read_at_once() -> None:
    class Slow(MemoryBackend):
        under_way = most = 0
        turn = threading.Lock()

        def read(self, file: File, *, offset: int = 0, length: int | None = None) -> bytes:
            with self.turn:
                self.under_way += 1
                self.most = max(self.most, self.under_way)
            time.sleep(0.02)
            with self.turn:
                self.under_way -= 1
            return super().read(file, offset=offset, length=length)

    backend = Slow()
    repository = await Repository.create(backend, PASSWORD, cost=CHEAP)
    async with repository.lock() as lock:
        for number in range(3 * READERS + 1):
            writer = repository.writer(lock)
            writer.add_chunk(chunk(number))
            writer.flush()
    backend.most = 0
    opened = await loaded(backend)
    assert len(opened._index) == 3 * READERS + 1
    assert backend.most == READERS


# Single files


async def test_an_index_file_that_cannot_be_read_is_named(backend: Backend, repository: Repository) -> None:
    await backup(repository, CHUNKS)
    (file,) = files_of(backend, Kind.INDEX)
    for content in (b"", b"garbage", backend.read(file)[:-1]):
        rewrite(backend, file, content)
        with pytest.raises(Damaged) as told:
            await loaded(backend)
        assert (told.value.file, told.value.code, told.value.exit_code) == (file.path, "repository-damaged", 1)


async def test_without_an_index_file_its_chunks_are_written_anew(backend: Backend, repository: Repository) -> None:
    first = await backup(repository, CHUNKS)
    for file in files_of(backend, Kind.INDEX):
        backend.remove(file)
    opened = await loaded(backend)
    with pytest.raises(Damaged, match="no index file"):
        await opened.files(first)
    second = await backup(opened, CHUNKS, 1)
    again = await loaded(backend)
    for made in (first, second):
        assert await content_of(again, made) == b"".join(CHUNKS)


async def test_a_flipped_byte_in_a_pack_costs_only_the_chunk_that_it_is_in(
    backend: Backend, repository: Repository
) -> None:
    await backup(repository, CHUNKS)
    pack = pack_of(repository, CHUNKS[0])
    content = bytearray(backend.read(pack))
    content[2 * (SIZE + 32) + 100] ^= 1
    rewrite(backend, pack, bytes(content))
    opened = await loaded(backend)
    for number, expected in enumerate(CHUNKS):
        identity = hashlib.sha256(expected).digest()
        if number == 2:
            with pytest.raises(Damaged, match="authentication code") as told:
                opened.read_blob(identity)
            assert pack.path in told.value.file
        else:
            assert opened.read_blob(identity) == expected


@pytest.mark.parametrize("content", [b"", b"{}", b"garbage"])
async def test_a_garbled_key_file_hides_no_other(backend: Backend, repository: Repository, content: bytes) -> None:
    second = await repository.add_password("battery", cost=CHEAP)
    rewrite(backend, File(Kind.KEYS, second), content)
    await Repository.open(backend, PASSWORD)
    with pytest.raises(TargetError) as told:
        await Repository.open(backend, "battery")
    assert isinstance(told.value, Damaged)


async def test_without_its_config_or_its_keys_it_cannot_be_opened(
    backend: Backend, repository: Repository
) -> None:
    config = backend.read(CONFIG)
    backend.remove(CONFIG)
    with pytest.raises(NoRepository):
        await Repository.open(backend, PASSWORD)
    rewrite(backend, CONFIG, config[:-1])
    with pytest.raises(Damaged, match="config"):
        await Repository.open(backend, PASSWORD)
    rewrite(backend, CONFIG, config)
    for file in files_of(backend, Kind.KEYS):
        backend.remove(file)
    with pytest.raises(TargetError) as told:
        await Repository.open(backend, PASSWORD)
    assert (told.value.code, told.value.exit_code) == ("wrong-password", 12)
    with pytest.raises(FileMissing):
        backend.read(File(Kind.KEYS, bytes(32)))
    assert repository.lacking == ()


# Any file, any damage


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A byte is another one, the end is missing, or what is there is something else."""
    at = chance.randrange(len(content))
    return chance.choice(
        [
            content[:at] + bytes([content[at] ^ chance.randrange(1, 256)]) + content[at + 1 :],
            content[:at],
            content + b"\0",
            chance.randbytes(len(content)),
        ]
    )


async def test_no_damage_is_read_as_content_and_the_next_snapshot_is_good_or_refused() -> None:
    original = MemoryBackend()
    repository = await Repository.create(original, PASSWORD, cost=CHEAP)
    first = await backup(repository, CHUNKS)
    new = [*CHUNKS[:3], chunk(99, SIZE)]
    refused = 0
    for seed in range(200):
        chance = random.Random(seed)  # noqa: S311
        backend = MemoryBackend()
        backend.files = dict(original.files)
        file = chance.choice(sorted(backend.files, key=str))
        backend.files[file] = damaged(backend.files[file], chance)
        try:
            opened = await loaded(backend)
        except (Damaged, WrongPassword):
            assert file.kind in (None, Kind.KEYS, Kind.INDEX)
            refused += 1
            continue
        for made in (await opened.snapshots()).snapshots:
            assert made == first
            with contextlib.suppress(Damaged):
                assert await content_of(opened, made) == b"".join(CHUNKS)
        async with opened.lock(pace=Pace(settle_seconds=0)) as lock:
            second = await write(opened.writer(lock), new, 1)
        try:
            content = await content_of(await loaded(backend), second)
        except Damaged as told:
            assert file.kind is Kind.DATA
            assert file.path in told.file  # noqa: PT017
        else:
            assert content == b"".join(new)
    assert 20 < refused < 150
