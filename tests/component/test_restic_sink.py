"""A disk's sink over a real repository: what was written to it, however often, is what the snapshot gives back."""

import asyncio
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import TargetError
from orchestrator.target.mover.sink import BufferPool, DiskSink
from orchestrator.target.mover.store import RepositoryStore
from orchestrator.target.restic import pack
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.backend.memory import MemoryBackend
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.tree import FileContent
from tests.component.test_restic_repository import CHEAP, PASSWORD, chunk, content_of, made_of
from tests.unit.test_sink import CHUNK, make_small, noise, rounds, write

Requests = list[list[tuple[int, int, bool]]]
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


async def apply(disk: DiskSink, model: bytearray, requests: Requests, seed: int) -> None:
    """Rounds of requests that do not overlap, side by side; each round may write again what others wrote."""
    for number, side_by_side in enumerate(requests):
        works = []
        for offset, length, zeroes in side_by_side:
            data = bytes(length) if zeroes else random.Random(seed + number).randbytes(length)  # noqa: S311
            model[offset : offset + length] = data
            works.append(
                disk.write_zeroes(offset, length, may_be_hole=False) if zeroes else write(disk, offset, data)
            )
        await asyncio.gather(*works)


async def copy(folder: Path, size: int, requests: Requests, pack_bytes: int) -> None:
    """A full copy that writes things twice, then an incremental one; a repository of its own reads both."""
    backend, model = DirectoryBackend(folder), bytearray(noise(size))
    repository = await Repository.create(backend, PASSWORD, cost=CHEAP)
    parent: list[bytes] | None = None
    for number in range(2):
        async with repository.lock() as lock:
            await repository.load_index()
            writer = repository.writer(lock)
            writer._pack_bytes = pack_bytes
            with ThreadPoolExecutor(3) as threads:
                store = RepositoryStore(repository, writer, lock, threads)
                disk = DiskSink(size, store, BufferPool(4), parent=parent)
                if parent is None:
                    await write(disk, 0, bytes(model))
                await apply(disk, model, requests, 100 * number)
                parent = await disk.finish()
            tree = await writer.write_file_tree({"vda.raw": FileContent(size, parent)}, b"{}", NOON)
            made = await writer.commit(made_of(tree, number))
        opened = await Repository.open(backend, PASSWORD)
        await opened.load_index()
        assert await content_of(opened, made) == model


@settings(max_examples=12, deadline=None)
@given(rounds(), st.sampled_from([1, 100, 1000, 1 << 24]))
def test_whatever_is_written_twice_or_in_parts(drawn: tuple[int, Requests], pack_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
        make_small(monkeypatch)
        asyncio.run(copy(Path(folder) / "repository", *drawn, pack_bytes))


async def test_many_parts_of_chunks_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks are begun than may be held, so each is put, read back and put again."""
    make_small(monkeypatch)
    size = 60 * CHUNK
    pieces = [(at, 4, at % 3 == 0) for at in range(0, size, 4)]
    random.Random(1).shuffle(pieces)  # noqa: S311
    await copy(tmp_path / "repository", size, [pieces[at : at + 8] for at in range(0, len(pieces), 8)], 150)


async def test_a_pending_chunk_is_read_while_others_fill_and_save_packs() -> None:
    repository = await Repository.create(MemoryBackend(), PASSWORD, cost=CHEAP)
    async with repository.lock() as lock:
        writer = repository.writer(lock)
        writer._pack_bytes = 5000

        def add_and_read(number: int) -> bool:
            content = chunk(number % 300)
            identity, _ = writer.add_chunk(content)
            pending = writer.read_pending(identity)
            return (repository.read_blob(identity) if pending is None else pending) == content

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(add_and_read, range(1200)))
        writer.flush()
        assert writer._pending == {}
        assert writer.read_pending(bytes(32)) is None


@pytest.mark.parametrize("fails", [False, True])
async def test_one_that_another_thread_is_sealing_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    repository = await Repository.create(MemoryBackend(), PASSWORD, cost=CHEAP)
    began, go_on = threading.Event(), threading.Event()
    real = pack.seal_blob

    def slow(*arguments: object) -> pack.SealedBlob:
        began.set()
        go_on.wait(20)
        if fails:
            raise MemoryError
        return real(*arguments)  # type: ignore[arg-type]

    async with repository.lock() as lock:
        writer = repository.writer(lock)
        monkeypatch.setattr(pack, "seal_blob", slow)
        with ThreadPoolExecutor(2) as pool:
            adding = pool.submit(writer.add_chunk, chunk(1))
            began.wait(20)
            identity, added_bytes = writer.add_chunk(chunk(1))
            assert added_bytes == 0
            reading = pool.submit(writer.read_pending, identity)
            await asyncio.sleep(0.05)
            assert not reading.done()
            go_on.set()
            if fails:
                with pytest.raises(TargetError, match="earlier part"):
                    reading.result(20)
                with pytest.raises(MemoryError):
                    adding.result(20)
            else:
                assert reading.result(20) == chunk(1)
