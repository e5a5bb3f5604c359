"""The mover as a process of its own: restic reads what it wrote; whatever dies, nothing half-done is listed."""

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.aio import run_process
from orchestrator.errors import TargetError
from orchestrator.target.base import ParentUnusable
from orchestrator.target.mover import process
from orchestrator.target.mover.process import Mover
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.errors import BackendError, Damaged, NoRepository
from orchestrator.target.restic.repository import Repository
from tests.guest.restics import CHEAP
from tests.peer.test_mover_beside_restic import MIB, PASSWORD, SIZE, noise, opened, restic, tool

SOON_SECONDS = 30.0
SLOWLY = ["-c", "write -q -P 9 0 1M", "-c", "sleep 2500", "-c", "write -P 9 1M 1M"]
NOTE = {"run": "7", "disks": {"vda": {"kind": "full"}}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    asyncio.run(Repository.create(DirectoryBackend(tmp_path / "repository"), PASSWORD, cost=CHEAP))
    return tmp_path / "repository"


@contextlib.asynccontextmanager
async def qemu(
    mover: Mover, folder: Path, disk: str, size: int, parent: bytes | None = None
) -> AsyncIterator[str]:
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


async def back_up(root: Path, folder: Path, disks: dict[str, bytes]) -> bytes:
    async with asyncio.timeout(SOON_SECONDS), Mover.started(str(root), await opened(root)) as mover:

        async def copy(disk: str, content: bytes) -> None:
            source = folder / f"{disk}.raw"
            source.write_bytes(content)
            async with qemu(mover, folder, disk, len(content)) as uri:
                await tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri)
            assert (await mover.seal(disk)).size_bytes == len(content)

        await asyncio.gather(*(copy(disk, content) for disk, content in disks.items()))
        return await mover.commit("web01", datetime.now(UTC), b"{}", tags=["vmfleece"], note=NOTE)


def snapshots(root: Path) -> list[str]:
    return [one["id"] for one in json.loads(restic(root, "snapshots", "--json")) or []]


async def test_two_disks_side_by_side(root: Path, tmp_path: Path) -> None:
    disks = {"vda": noise(SIZE, 1), "vdb": noise(3 << 20, 2)}
    snapshot = await back_up(root, tmp_path, disks)
    restic(root, "check", "--read-data")
    for disk, content in disks.items():
        assert restic(root, "dump", snapshot.hex(), f"/{disk}.raw") == content
    assert restic(root, "list", "locks", "-q") == b""


async def test_an_incremental_copy_and_its_progress(root: Path, tmp_path: Path) -> None:
    content = bytearray(noise(SIZE, 3))
    first = await back_up(root, tmp_path, {"vda": bytes(content)})
    seen: list[int] = []

    async with Mover.started(
        str(root), await opened(root), on_progress=lambda written: seen.append(written.get("vda", 0))
    ) as mover:
        async with qemu(mover, tmp_path, "vda", SIZE, parent=first) as uri:
            await tool("qemu-io", "-f", "raw", "-c", "write -q -P 9 1M 64k", "-c", "sleep 1500", uri)
        await mover.seal("vda")
        second = await mover.commit("web01", datetime.now(UTC), b"{}", tags=[], parent=first, note={})
    content[1 << 20 : (1 << 20) + 65536] = b"\x09" * 65536
    assert restic(root, "dump", second.hex(), "/vda.raw") == content
    old, new = (await (await Repository.open(DirectoryBackend(root), PASSWORD)).snapshots()).snapshots
    assert (old.identity, old.note, new.identity, new.note, new.parent) == (first, NOTE, second, {}, first)
    assert new.summary["files_changed"] == 1
    assert 65536 in seen


async def test_one_that_is_not_there(root: Path) -> None:
    with pytest.raises(NoRepository):
        async with Mover.started(str(root.with_name("nothing")), await opened(root)):
            pytest.fail("it was started")


async def test_one_that_was_made_anew_is_not_taken_for_the_old_one(root: Path) -> None:
    key = await opened(root)
    shutil.rmtree(root)
    await Repository.create(DirectoryBackend(root), PASSWORD, cost=CHEAP)
    before = {path for path in root.rglob("*") if path.is_file()}
    with pytest.raises(Damaged, match=r"config.*made anew"):
        async with Mover.started(str(root), key):
            pytest.fail("it was started")
    assert {path for path in root.rglob("*") if path.is_file()} == before


async def test_a_parent_that_is_gone(root: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        async with Mover.started(str(root), await opened(root)) as mover:
            with pytest.raises(ParentUnusable) as failed:
                await mover.add("vda", SIZE, theirs, parent=b"\xab" * 32)
    assert failed.value.code == "parent-unusable"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_mover_that_dies_leaves_nothing_listed(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    async with asyncio.timeout(SOON_SECONDS), Mover.started(str(root), await opened(root)) as mover:
        async with qemu(mover, tmp_path, "vda", SIZE) as uri:
            await tool("qemu-io", "-f", "raw", "-c", "write -q -P 9 0 8M", uri)
        os.kill(mover._process.pid, number)
        with pytest.raises(TargetError) as failed:
            await mover.seal("vda")
        assert await mover.trouble("vda") is failed.value
    assert failed.value.code == "mover-died"
    assert snapshots(root) == []
    content = noise(SIZE, 4)
    snapshot = await back_up(root, tmp_path, {"vda": content})
    restic(root, "check", "--read-data")
    assert restic(root, "dump", snapshot.hex(), "/vda.raw") == content


async def test_a_mover_whose_run_died_goes_away_and_gives_its_lock_back(root: Path, tmp_path: Path) -> None:
    async with asyncio.timeout(SOON_SECONDS), Mover.started(str(root), await opened(root)) as mover:
        async with qemu(mover, tmp_path, "vda", SIZE) as uri:
            await tool("qemu-io", "-f", "raw", "-c", "write -q -P 9 0 8M", uri)
        assert restic(root, "list", "locks", "-q") != b""
        mover._control.shutdown(socket.SHUT_RDWR)  # as the kernel does for a run that was killed
        assert await mover._process.wait() == 0
    assert restic(root, "list", "locks", "-q") == b""
    assert snapshots(root) == []


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_mover_that_is_killed_keeps_nobody_waiting(root: Path, tmp_path: Path, stopped: bool) -> None:
    async with asyncio.timeout(SOON_SECONDS), Mover.started(str(root), await opened(root)) as mover:
        async with qemu(mover, tmp_path, "vda", SIZE) as uri:
            writing = asyncio.create_task(run_process(["qemu-io", "-f", "raw", *SLOWLY, uri]))
            await asyncio.sleep(1)
            if stopped:
                os.kill(mover._process.pid, signal.SIGSTOP)
        await asyncio.sleep(0.5)
        assert not writing.done()
        mover.kill()
        mover.kill()
        async with asyncio.timeout(5):
            assert "Input/output error" in (await writing).stdout.decode()
            with pytest.raises(TargetError) as failed:
                await mover.commit("web01", datetime.now(UTC), b"{}", tags=[], note={})
        assert failed.value.code == "mover-died"
        mover.kill()
    assert snapshots(root) == []


async def test_a_mover_that_is_stopped_tells_no_trouble(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "TELL_SECONDS", 0.2)
    async with Mover.started(str(root), await opened(root)) as mover:
        async with qemu(mover, tmp_path, "vda", SIZE) as uri:
            await tool("qemu-io", "-f", "raw", "-c", "write -q -P 9 0 512", uri)
        assert await mover.trouble("vda") is None
        os.kill(mover._process.pid, signal.SIGSTOP)
        assert await mover.trouble("vda") is None
        mover.kill()


async def test_a_full_target_is_the_trouble(root: Path, tmp_path: Path) -> None:
    async with asyncio.timeout(SOON_SECONDS), Mover.started(str(root), await opened(root)) as mover:
        resource.prlimit(mover._process.pid, resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
        async with qemu(mover, tmp_path, "vda", 64 * MIB) as uri:
            source = tmp_path / "source.raw"
            source.write_bytes(noise(64 * MIB, 5))
            done = await run_process(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri])
            assert "error" in done.stderr
        trouble = await mover.trouble("vda")
        assert isinstance(trouble, BackendError)
        with pytest.raises(TargetError) as failed:
            await mover.seal("vda")
        assert str(failed.value) == str(trouble)
    assert snapshots(root) == []


async def test_unlocking_does_not_end_it_and_nobody_sees_its_key(root: Path, tmp_path: Path) -> None:
    key = await opened(root)
    async with Mover.started(str(root), key) as mover:
        os.kill(mover._process.pid, signal.SIGHUP)
        proc = Path(f"/proc/{mover._process.pid}")
        seen = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
        for secret in (PASSWORD, *(part.hex() for part in (key.key.encrypt, key.key.mac_k, key.key.mac_r))):
            assert secret.encode() not in seen
        async with qemu(mover, tmp_path, "vda", 512) as uri:
            await tool("qemu-io", "-f", "raw", "-c", "write -q -P 9 0 512", uri)
        assert (await mover.seal("vda")).size_bytes == 512


async def test_restic_does_not_prune_beside_it(root: Path) -> None:
    async with Mover.started(str(root), await opened(root)):
        argv = ["restic", "--no-cache", "-r", str(root), "prune"]
        environment = ["env", f"RESTIC_PASSWORD={PASSWORD}"]
        done = await run_process([*environment, *argv])
        assert done.returncode != 0
        assert "lock" in done.stderr
    restic(root, "prune")
