"""The mover as a process of its own: restic reads what it wrote; whatever dies, nothing half-done is listed."""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.aio import run_process
from orchestrator.errors import TargetError
from orchestrator.target.mover.process import Mover
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.errors import NoRepository, WrongPassword
from orchestrator.target.restic.repository import Repository
from tests.peer.test_mover_beside_restic import CHEAP, PASSWORD, SIZE, noise, restic, tool

SOON_SECONDS = 30.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    asyncio.run(Repository.create(DirectoryBackend(tmp_path / "repository"), PASSWORD, cost=CHEAP))
    return tmp_path / "repository"


@contextlib.asynccontextmanager
async def qemu(mover: Mover, folder: Path, disk: str, size: int, parent: str = "") -> AsyncIterator[str]:
    """Where QEMU's tools reach the disk's sink, for one connection."""
    path = folder / f"{disk}.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.setblocking(False)
        listening.bind(str(path))
        listening.listen(1)

        async def accept() -> None:
            connected, _ = await asyncio.get_running_loop().sock_accept(listening)
            await mover.add(disk, size, connected, parent=parent)

        accepting = asyncio.create_task(accept())
        try:
            yield f"nbd+unix:///{disk}?socket={path}"
            await accepting
        finally:
            accepting.cancel()
            await asyncio.wait([accepting])
            path.unlink()


async def back_up(root: Path, folder: Path, disks: dict[str, bytes]) -> str:
    async with asyncio.timeout(SOON_SECONDS), Mover.started(root, PASSWORD) as mover:

        async def copy(disk: str, content: bytes) -> None:
            source = folder / f"{disk}.raw"
            source.write_bytes(content)
            async with qemu(mover, folder, disk, len(content)) as uri:
                await tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri)
            assert await mover.seal(disk) == len(content)

        await asyncio.gather(*(copy(disk, content) for disk, content in disks.items()))
        snapshot, _ = await mover.commit("web01", datetime.now(UTC), b"{}", tags=["vmfleece"])
    return snapshot


def snapshots(root: Path) -> list[str]:
    return [one["id"] for one in json.loads(restic(root, "snapshots", "--json")) or []]


async def test_two_disks_side_by_side(root: Path, tmp_path: Path) -> None:
    disks = {"vda": noise(SIZE, 1), "vdb": noise(3 << 20, 2)}
    snapshot = await back_up(root, tmp_path, disks)
    restic(root, "check", "--read-data")
    for disk, content in disks.items():
        assert restic(root, "dump", snapshot, f"/{disk}.raw") == content
    assert restic(root, "list", "locks", "-q") == b""


async def test_an_incremental_copy_and_its_progress(root: Path, tmp_path: Path) -> None:
    content = bytearray(noise(SIZE, 3))
    first = await back_up(root, tmp_path, {"vda": bytes(content)})
    seen: list[int] = []

    async with Mover.started(
        root, PASSWORD, on_progress=lambda written: seen.append(written.get("vda", 0))
    ) as mover:
        async with qemu(mover, tmp_path, "vda", SIZE, parent=first) as uri:
            await tool("qemu-io", "-f", "raw", "-c", "write -q -P 9 1M 64k", "-c", "sleep 1500", uri)
        await mover.seal("vda")
        second, summary = await mover.commit("web01", datetime.now(UTC), b"{}", tags=[], parent=first)
    content[1 << 20 : (1 << 20) + 65536] = b"\x09" * 65536
    assert restic(root, "dump", second, "/vda.raw") == content
    assert summary["files_changed"] == 1
    assert 65536 in seen


@pytest.mark.parametrize(
    ("place", "password", "kind"),
    [("repository", "wrong", WrongPassword), ("nothing", PASSWORD, NoRepository)],
)
async def test_what_cannot_be_opened(root: Path, place: str, password: str, kind: type[TargetError]) -> None:
    with pytest.raises(kind) as failed:
        async with Mover.started(root.with_name(place), password):
            pass
    assert "wrong" not in str(failed.value)


async def test_a_parent_that_is_gone(root: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        async with Mover.started(root, PASSWORD) as mover:
            with pytest.raises(TargetError) as failed:
                await mover.add("vda", SIZE, theirs, parent="ab" * 32)
    assert failed.value.code == "no-snapshot"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_mover_that_dies_leaves_nothing_listed(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    async with asyncio.timeout(SOON_SECONDS), Mover.started(root, PASSWORD) as mover:
        async with qemu(mover, tmp_path, "vda", SIZE) as uri:
            await tool("qemu-io", "-f", "raw", "-c", "write -q -P 9 0 8M", uri)
        os.kill(mover._process.pid, number)
        with pytest.raises(TargetError) as failed:
            await mover.seal("vda")
    assert failed.value.code == "mover-died"
    assert snapshots(root) == []
    content = noise(SIZE, 4)
    snapshot = await back_up(root, tmp_path, {"vda": content})
    restic(root, "check", "--read-data")
    assert restic(root, "dump", snapshot, "/vda.raw") == content


async def test_a_mover_whose_run_died_goes_away_and_gives_its_lock_back(root: Path, tmp_path: Path) -> None:
    async with asyncio.timeout(SOON_SECONDS), Mover.started(root, PASSWORD) as mover:
        async with qemu(mover, tmp_path, "vda", SIZE) as uri:
            await tool("qemu-io", "-f", "raw", "-c", "write -q -P 9 0 8M", uri)
        assert restic(root, "list", "locks", "-q") != b""
        mover._control.shutdown(socket.SHUT_RDWR)  # as the kernel does for a run that was killed
        assert await mover._process.wait() == 0
    assert restic(root, "list", "locks", "-q") == b""
    assert snapshots(root) == []


async def test_unlocking_does_not_end_it_and_nobody_sees_its_password(root: Path, tmp_path: Path) -> None:
    async with Mover.started(root, PASSWORD) as mover:
        os.kill(mover._process.pid, signal.SIGHUP)
        proc = Path(f"/proc/{mover._process.pid}")
        seen = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
        assert PASSWORD.encode() not in seen
        async with qemu(mover, tmp_path, "vda", 512) as uri:
            await tool("qemu-io", "-f", "raw", "-c", "write -q -P 9 0 512", uri)
        assert await mover.seal("vda") == 512


async def test_restic_does_not_prune_beside_it(root: Path) -> None:
    async with Mover.started(root, PASSWORD):
        argv = ["restic", "--no-cache", "-r", str(root), "prune"]
        environment = ["env", f"RESTIC_PASSWORD={PASSWORD}"]
        done = await run_process([*environment, *argv])
        assert done.returncode != 0
        assert "lock" in done.stderr
    restic(root, "prune")
