"""What a mover keeps of what QEMU's tools write: restic finds it clean, and gives it back to the byte."""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.aio import run_process
from orchestrator.errors import TargetError
from orchestrator.target.base import ParentUnusable
from orchestrator.target.mover.session import Session
from orchestrator.target.restic.access import Opened
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.errors import LockLost
from orchestrator.target.restic.lock import Pace
from orchestrator.target.restic.pack import CHUNK_BYTES
from orchestrator.target.restic.place import backend_at
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.snapshot import ResticSnapshot
from orchestrator.target.restic.tree import FileContent
from tests.guest.restics import CHEAP

MIB = 1 << 20
PASSWORD = "correct horse"
SIZE = 5 * CHUNK_BYTES + 3 * 512


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)  # noqa: S311


@pytest.fixture
def root(tmp_path: Path) -> Path:
    asyncio.run(Repository.create(DirectoryBackend(tmp_path / "repository"), PASSWORD, cost=CHEAP))
    return tmp_path / "repository"


def restic(root: Path | str, *arguments: str) -> bytes:
    environment = os.environ | {"RESTIC_PASSWORD": PASSWORD, "RESTIC_REPOSITORY": str(root)}
    argv = ["restic", "--no-cache", *arguments]
    done = subprocess.run(argv, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@contextlib.asynccontextmanager
async def qemu(session: Session, folder: Path, size: int, parent: FileContent | None = None) -> AsyncIterator[str]:
    """Where QEMU's tools reach the sink of `vda`, for one connection."""
    path = folder / "nbd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.setblocking(False)
        listening.bind(str(path))
        listening.listen(1)

        async def accept() -> None:
            connected, _ = await asyncio.get_running_loop().sock_accept(listening)
            session.add("vda", size, connected, parent=parent)

        accepting = asyncio.create_task(accept())
        try:
            yield f"nbd+unix:///vda?socket={path}"
            await accepting
        finally:
            accepting.cancel()
            path.unlink()


async def tool(*argv: str) -> None:
    done = await run_process(argv)
    assert done.returncode == 0, done.stderr


def snapshot_of(vm: str) -> ResticSnapshot:
    return ResticSnapshot(datetime.now(UTC), b"", vm, (f"/{vm}",), tags=("vmfleece",))


async def opened(place: Path | str) -> Opened:
    return (await Repository.open(backend_at(str(place)), PASSWORD)).opened


async def full(root: Path, folder: Path, content: bytes) -> ResticSnapshot:
    source = folder / "source.raw"
    source.write_bytes(content)
    async with Session.opened(DirectoryBackend(root), await opened(root)) as session:
        async with qemu(session, folder, len(content)) as uri:
            await tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri)
        assert (await session.seal("vda")).size_bytes == len(content)
        return await session.commit(snapshot_of("web01"), b"{}")


async def test_a_full_copy_and_one_that_lies_over_it(root: Path, tmp_path: Path) -> None:
    content = bytearray(noise(2 * CHUNK_BYTES, 1) + bytes(CHUNK_BYTES) + noise(SIZE - 3 * CHUNK_BYTES, 2))
    first = await full(root, tmp_path, bytes(content))
    assert first.identity is not None

    async with Session.opened(DirectoryBackend(root), await opened(root)) as session:
        parent = await session.parent_of("vda", first.identity)
        changes = [(MIB, 64 * 1024), (CHUNK_BYTES - 4096, 8192), (3 * CHUNK_BYTES, CHUNK_BYTES), (SIZE - 512, 512)]
        argv = ["qemu-io", "-f", "raw"]
        for number, (offset, length) in enumerate(changes):
            content[offset : offset + length] = bytes([number + 1]) * length
            argv += ["-c", f"write -q -P {number + 1} {offset} {length}"]
        content[2 * MIB : 2 * MIB + 65536] = bytes(65536)
        async with qemu(session, tmp_path, SIZE, parent) as uri:
            await tool(*argv, "-c", f"write -q -z {2 * MIB} 65536", uri)
        sealed = await session.seal("vda")
        second = await session.commit(snapshot_of("web01"), b'{"disks": []}')
    assert second.identity is not None
    assert second.summary["data_blobs"] <= 5  # chunks 0, 1, 3 and the last one, and vm.json
    assert 7 * MIB < sealed.stored_bytes < second.summary["data_added_packed"] < 2 * CHUNK_BYTES  # 0 and 1

    restic(root, "check", "--read-data")
    listed = json.loads(restic(root, "snapshots", "--json", "--host", "web01"))
    assert [one["id"] for one in listed] == [first.identity.hex(), second.identity.hex()]
    assert restic(root, "dump", second.identity.hex(), "/vda.raw") == content
    assert restic(root, "dump", first.identity.hex(), "/vda.raw")[: 2 * CHUNK_BYTES] == noise(2 * CHUNK_BYTES, 1)
    assert restic(root, "dump", second.identity.hex(), "/vm.json") == b'{"disks": []}'


async def test_the_same_disk_again_adds_next_to_nothing(root: Path, tmp_path: Path) -> None:
    content = noise(SIZE, 3)
    await full(root, tmp_path, content)
    again = await full(root, tmp_path, content)
    assert again.summary["data_blobs"] == 0
    assert json.loads(restic(root, "snapshots", "--json"))[1]["tree"] == again.tree.hex()


async def test_a_copy_that_ends_in_the_middle_is_none(root: Path, tmp_path: Path) -> None:
    async with Session.opened(DirectoryBackend(root), await opened(root)) as session:
        async with qemu(session, tmp_path, SIZE) as uri:
            await tool("qemu-io", "-f", "raw", "-c", f"write -q -P 1 0 {CHUNK_BYTES}", uri)
        with pytest.raises(TargetError, match="did not arrive whole: 5 of 6 chunks were not written"):
            await session.seal("vda")
    assert json.loads(restic(root, "snapshots", "--json") or b"null") in (None, [])
    restic(root, "check")
    assert json.loads(restic(root, "list", "locks", "-q") or b'""') == ""


async def test_once_its_lock_is_lost_all_fails_and_qemu_is_told(root: Path, tmp_path: Path) -> None:
    pace = Pace(refresh_seconds=0.05)
    async with Session.opened(DirectoryBackend(root), await opened(root), pace=pace) as session:
        async with qemu(session, tmp_path, SIZE) as uri:
            first = "write -q -P 1 0 4M"
            argv = ["qemu-io", "-f", "raw", "-c", first, "-c", "sleep 1500", "-c", "write -P 1 4M 512", uri]
            writing = asyncio.create_task(run_process(argv))
            await asyncio.sleep(0.7)
        sealing = asyncio.create_task(session.seal("vda"))
        for lock in (root / "locks").iterdir():
            lock.unlink()
        with pytest.raises(LockLost, match="removed its file"):
            await sealing
        assert b"Input/output error" in (await writing).stdout
        with pytest.raises(LockLost):
            session.trouble("vda")
        with pytest.raises(LockLost):
            await session.parent_of("vdb", None)
        with pytest.raises(LockLost):
            await session.commit(snapshot_of("web01"), b"{}")
    assert json.loads(restic(root, "snapshots", "--json") or b"null") in (None, [])


async def test_what_restic_wrote_is_not_built_on(root: Path, tmp_path: Path) -> None:
    (tmp_path / "vda.raw").write_bytes(noise(SIZE, 4))
    restic(root, "backup", "--host", "web01", str(tmp_path / "vda.raw"))
    (listed,) = json.loads(restic(root, "snapshots", "--json"))
    ours, theirs = socket.socketpair()
    with theirs:
        async with Session.opened(DirectoryBackend(root), await opened(root)) as session:
            repository = session._repository
            listing = await repository.snapshots()
            assert listing.snapshots[0].identity == bytes.fromhex(listed["id"])
            chunks = [b"\0" * 32] * 6
            with pytest.raises(ParentUnusable, match="not written by vmfleece"):
                session.add("vda", SIZE, ours, parent=FileContent(SIZE, chunks))
    assert ours.fileno() == -1


async def test_a_parent_that_is_gone_or_lacks_the_disk_is_named(root: Path, tmp_path: Path) -> None:
    first = await full(root, tmp_path, noise(512, 5))
    async with Session.opened(DirectoryBackend(root), await opened(root)) as session:
        with pytest.raises(ParentUnusable, match="no snapshot abababab"):
            await session.parent_of("vda", b"\xab" * 32)
        with pytest.raises(ParentUnusable, match="has no disk vdb"):
            await session.parent_of("vdb", first.identity)
