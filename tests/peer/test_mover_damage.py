"""A repository that is damaged, locked or full: what a mover says of it, and that the next run is good."""

import hashlib
import random
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.nbd.protocol import Act, Errno
from orchestrator.target.base import ParentUnusable
from orchestrator.target.mover.process import Mover
from orchestrator.target.restic import lock_file
from orchestrator.target.restic.backend.base import File, Kind
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.errors import BackendError, Damaged, NoRepository, RepositoryLocked
from orchestrator.target.restic.lock_file import LockFile
from orchestrator.target.restic.repository import Repository
from orchestrator.units import KIB
from tests.component.nbd_wire import Wire
from tests.component.test_file_systems import mounted
from tests.guest.restics import CHEAP
from tests.peer.test_mover_beside_restic import MIB, PASSWORD, SIZE, noise, opened, restic
from tests.peer.test_mover_process import back_up, root

CONTENT = noise(SIZE, 1)
Damage = Callable[[Path], object]

__all__ = ["root"]


def files(root: Path, kind: str) -> list[Path]:
    return sorted(
        (path for path in (root / kind).rglob("*") if path.is_file()), key=lambda one: one.stat().st_size
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace(path, bytes(content))


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


async def snapshot_content(root: Path, identity: bytes) -> bytes:
    repository = await Repository.open(DirectoryBackend(root), PASSWORD)
    await repository.load_index()
    made = (await repository.snapshots()).find(identity)
    assert made
    return b"".join(repository.read_file((await repository.files(made))["vda.raw"]))


async def parent_is_refused(root: Path, parent: bytes) -> str:
    async with Mover.started(str(root), await opened(root)) as mover:
        ours, theirs = socket.socketpair()
        with ours, pytest.raises(ParentUnusable) as refused:
            await mover.add("vda", SIZE, theirs, parent=parent)
    return str(refused.value)


LOSSES: dict[str, Damage] = {
    "a pack is missing": lambda root: files(root, "data")[-1].unlink(),
    "a pack is cut off": lambda root: replace(files(root, "data")[-1], bytes(9 * MIB)),
    "the tree's pack is missing": lambda root: files(root, "data")[0].unlink(),
    "all packs are missing": lambda root: [path.unlink() for path in files(root, "data")],
    "the index is missing": lambda root: files(root, "index")[0].unlink(),
    "the snapshot is damaged": lambda root: flip(files(root, "snapshots")[0]),
    "the snapshot is missing": lambda root: files(root, "snapshots")[0].unlink(),
}


@pytest.mark.parametrize("loss", LOSSES)
async def test_whatever_is_lost_the_next_full_copy_is_good(root: Path, tmp_path: Path, loss: str) -> None:
    first = await back_up(root, tmp_path, {"vda": CONTENT})
    LOSSES[loss](root)
    assert await parent_is_refused(root, first)
    second = await back_up(root, tmp_path, {"vda": CONTENT})
    assert await snapshot_content(root, second) == CONTENT
    for path in files(root, "snapshots"):
        if path.name != second.hex():
            path.unlink()
    restic(root, "rebuild-index")  # restic itself asks for 15 minutes for a pack that is missing
    restic(root, "check", "--read-data")
    assert restic(root, "dump", second.hex(), "/vda.raw") == CONTENT


@pytest.mark.parametrize("kind", ["index", "config"])
async def test_what_nothing_can_be_done_without_is_named(root: Path, tmp_path: Path, kind: str) -> None:
    await back_up(root, tmp_path, {"vda": CONTENT})
    path = files(root, kind)[0] if kind != "config" else root / "config"
    good, key = path.read_bytes(), await opened(root)
    flip(path)
    with pytest.raises(Damaged) as failed:
        async with Mover.started(str(root), key):
            pytest.fail("it was started")
    assert str(path.relative_to(root)) in failed.value.message
    assert failed.value.code == "repository-damaged"
    replace(path, good)
    assert await snapshot_content(root, await back_up(root, tmp_path, {"vda": CONTENT})) == CONTENT


async def test_what_is_refused_leaves_the_repository_as_it_was(root: Path, tmp_path: Path) -> None:
    repository = await Repository.open(DirectoryBackend(root), PASSWORD)
    content = lock_file.seal(LockFile(datetime.now(UTC), True, "elsewhere", "root", 1), repository._key)
    file = File(Kind.LOCKS, hashlib.sha256(content).digest())
    DirectoryBackend(root).save(file, content)
    for place, kind, exit_code in ((root, RepositoryLocked, 11), (tmp_path / "nothing", NoRepository, 10)):
        with pytest.raises(kind) as failed:
            async with Mover.started(str(place), repository.opened):
                pytest.fail("it was started")
        assert failed.value.exit_code == exit_code
    DirectoryBackend(root).remove(file)
    assert files(root, "locks") == []
    await back_up(root, tmp_path, {"vda": CONTENT})


async def write(wire: Wire, content: bytes, length: int) -> list[tuple[int, int]]:
    """Write it in pieces slightly out of order, 8 in flight; those that failed for want of space."""
    starts = random.Random(1)  # noqa: S311
    order = sorted(range(0, len(content), length), key=lambda at: at + 4 * length * starts.random())
    return await write_pieces(wire, content, [(at, length) for at in order])


async def write_pieces(wire: Wire, content: bytes, pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    failed, under_way = [], {}
    waiting = list(pieces)
    while waiting or under_way:
        while waiting and len(under_way) < 8:
            at, length = waiting.pop(0)
            under_way[wire.ask(Act.WRITE, at, data=content[at : at + length])] = at, length
            await wire.writer.drain()
        answer = await wire.answer()
        piece = under_way.pop(answer.cookie)
        if answer.error:
            assert answer.error == Errno.NOSPC
            failed.append(piece)
    return failed


@pytest.mark.parametrize("length", [4 * MIB, 64 * KIB])
async def test_a_full_disk_is_waited_for(tmp_path: Path, length: int) -> None:
    """As QEMU does: each request that failed comes again once there is space, and no other."""
    content = noise(120 * MIB, 2)
    with mounted(tmp_path, "tmpfs", 200) as folder:
        root = folder / "repository"
        await Repository.create(DirectoryBackend(root), PASSWORD, cost=CHEAP)
        (folder / "others").write_bytes(bytes(140 * MIB))
        async with Mover.started(str(root), await opened(root)) as mover:
            ours, theirs = socket.socketpair()
            await mover.add("vda", len(content), theirs)
            wire = await Wire.begun(ours, "vda", structured=False)
            failed = await write(wire, content, length)
            assert failed
            trouble = await mover.trouble("vda")
            assert (type(trouble), trouble and trouble.code) == (BackendError, "target-full")
            again = await write_pieces(wire, content, failed)
            assert again
            (folder / "others").unlink()
            assert await write_pieces(wire, content, again) == []
            await wire.leave()
            assert (await mover.seal("vda")).size_bytes == len(content)
            made = await mover.commit("web01", datetime.now(UTC), b"{}", tags=[], note={})
        assert restic(root, "dump", made.hex(), "/vda.raw") == content


async def test_on_a_disk_that_stays_full_nothing_is_listed(tmp_path: Path) -> None:
    content = noise(60 * MIB, 3)
    with mounted(tmp_path, "tmpfs", 100) as folder:
        root = folder / "repository"
        await Repository.create(DirectoryBackend(root), PASSWORD, cost=CHEAP)
        (folder / "others").write_bytes(bytes(80 * MIB))
        async with Mover.started(str(root), await opened(root)) as mover:
            ours, theirs = socket.socketpair()
            await mover.add("vda", len(content), theirs)
            wire = await Wire.begun(ours, "vda", structured=False)
            assert await write(wire, content, MIB)
            await wire.leave()
            with pytest.raises(BackendError) as full:
                await mover.seal("vda")
            assert full.value.code == "target-full"
        (folder / "others").unlink()
        assert files(root, "snapshots") == files(root, "locks") == []
        made = await back_up(root, tmp_path, {"vda": content})
        assert restic(root, "dump", made.hex(), "/vda.raw") == content
