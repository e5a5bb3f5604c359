"""Backups to a repository of restic's format, on each QEMU: restic gives back what the guest had, and so do we.

Whatever dies or is in the way meanwhile, the guest goes on, nothing half-done is listed, restic finds no error,
and the next backup is right.
"""

import asyncio
import hashlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

from orchestrator.model import Kind, Phase
from orchestrator.target.mover import process
from orchestrator.target.restic import lock_file
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.lock_file import LockFile
from orchestrator.target.restic.repository import Repository
from tests.guest import images
from tests.guest.restics import Restic
from tests.guest.versions import QEMUS, qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.hooks import At
from tests.qemu.host import FLEECED, PASSWORD, SLOWLY, VM, Host, assert_failed, assert_succeeded
from tests.qemu.under_way import UnderWay, until, until_jobs_run

pytestmark = pytest.mark.asyncio(loop_scope="module")

INCREMENTALS = {"7.2": 2, "10.0": 5, "11.1": 2}
DISKS = [
    DiskSpec("vda", 64 * MIB, iothread=True),
    DiskSpec("vdb", 32 * MIB, format="raw", iothread=True),
    DiskSpec("sda", MIB + 512, bus="virtio-scsi"),
]
Moment = Mapping[str, Path]


@pytest_asyncio.fixture(loop_scope="module")
async def of_each(version: str, tmp_path: Path) -> AsyncIterator[GuestVm]:
    workload = Workload("random", region_bytes=16 * MIB)
    async with GuestVm(tmp_path / "vm", DISKS, workload, qemu=qemu(version)) as guest:
        await guest.wait_ready()
        await guest.wait_writes(200)
        yield guest
    shutil.rmtree(tmp_path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuestVm]:
    folder = tmp_path_factory.mktemp("vm")
    disks = [DiskSpec("vda", 96 * MIB, iothread=True), DiskSpec("vdb", 24 * MIB, format="raw")]
    guest = GuestVm(folder, disks, Workload("random", region_bytes=8 * MIB, block_bytes=16 * 1024, rate=500))
    images.fill(guest.image_path("vdb"), 24 * MIB)
    async with guest:
        await guest.wait_ready()
        await guest.wait_writes(500)
        yield guest
    shutil.rmtree(folder)


@pytest_asyncio.fixture(loop_scope="module")
async def host(vm: GuestVm, tmp_path: Path) -> AsyncIterator[Host]:
    made = Host(tmp_path, vm, repository=True)
    await made.make_repository()
    yield made
    await drop_bitmaps(vm)


async def drop_bitmaps(vm: GuestVm) -> None:
    """As if the VM had never been backed up."""
    for device in await vm.execute("query-block"):
        for bitmap in device.get("inserted", {}).get("dirty-bitmaps", []):
            node = device["inserted"]["node-name"]
            await vm.execute("block-dirty-bitmap-remove", {"node": node, "name": bitmap["name"]})


def restic(host: Host) -> Restic:
    return Restic(host.repository, PASSWORD)


def assert_dumped(host: Host, snapshot: str, moment: Moment) -> None:
    """What restic gives back of the disks is what the paused guest had. `latest` is this VM's."""
    for disk, path in moment.items():
        dump = ("dump", "--host", VM, snapshot, f"/disk-{disk}.raw")
        assert restic(host).run(*dump) == path.read_bytes(), disk


async def moment_of(host: Host) -> dict[str, Path]:
    """Copies of the paused guest's disks that stay."""
    copies = await host.copies()
    kept = {}
    for disk, path in copies.items():
        number = len(list(host.folder.glob("moment-*")))
        kept[disk] = path.rename(host.folder / f"moment-{number}-{disk}")
    return kept


async def backed_up_under_writes(host: Host, jobs_may_start: asyncio.Event) -> tuple[UnderWay, dict[str, Path]]:
    """A backup whose moment is known, since the guest was paused; it has gone on before anything is copied."""
    jobs_may_start.clear()
    await host.vm.pause()
    async with host.backing_up(FLEECED, target="repo", bwlimit=16 * SLOWLY) as under_way:
        await under_way.until(lambda: under_way.phase is Phase.COPYING, "the point in time")
        moment = await moment_of(host)
        await host.vm.resume()
        await host.vm.wait_writes(200)
        jobs_may_start.set()
        await host.vm.wait_writes(100)
        await under_way.hurry()
    assert_succeeded(under_way.result)
    return under_way, moment


@pytest.mark.parametrize("version", QEMUS)
async def test_a_full_and_incrementals_under_constant_writes(
    of_each: GuestVm, version: str, tmp_path: Path
) -> None:
    incrementals = INCREMENTALS[version]
    jobs_may_start = asyncio.Event()
    host = Host(tmp_path, of_each, repository=True, connect=At("blockdev-backup", jobs_may_start.wait))
    await host.make_repository()
    moments: list[tuple[str, dict[str, Path]]] = []
    for _ in range(1 + incrementals):
        under_way, moment = await backed_up_under_writes(host, jobs_may_start)
        result = under_way.result
        moments.append((str(result.snapshot), moment))
        assert result.kind is (Kind.INCREMENTAL if len(moments) > 1 else Kind.FULL)
        await host.assert_as_before()
    assert result.disks[0].copied_bytes == 16 * MIB  # what the guest writes to
    await asyncio.to_thread(restic(host).check)
    listed = restic(host).snapshots("--host", VM)
    assert [one["tags"] for one in listed] == [["vmfleece", "full"]] + [["vmfleece", "incremental"]] * incrementals
    for (snapshot, moment), of_restic in zip(moments, listed, strict=True):
        await asyncio.to_thread(assert_dumped, host, of_restic["id"], moment)
        restored = await host.restored("repo", snapshot)
        for disk, path in moment.items():
            assert (await asyncio.to_thread(images.compare, path, restored[disk])).identical, (snapshot, disk)


async def test_nothing_of_the_guest_or_the_password_can_be_read(host: Host) -> None:
    await host.vm.pause()
    result = await host.back_up(target="repo")
    moment = await moment_of(host)
    await host.vm.resume()
    assert_succeeded(result)
    content = moment["vdb"].read_bytes()
    plain = next(content[at : at + 48] for at in range(MIB, len(content), 4096) if any(content[at : at + 48]))
    files = [
        path
        for folder in (host.repository, host.folder / "state", host.folder / "run", host.storage)
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert len(files) > 5
    for path in files:
        stored = path.read_bytes()
        assert plain not in stored, path
        assert PASSWORD.encode() not in stored, path
        assert path.stat().st_mode & 0o077 == 0, path
    assert (host.repository.stat().st_mode | (host.repository / "data").stat().st_mode) & 0o077 == 0


# --- what dies, and what is in the way ---


async def assert_the_next_one_is_right(host: Host, *, kind: Kind) -> None:
    await host.vm.pause()
    result = await host.back_up(target="repo")
    moment = await moment_of(host)
    await host.vm.resume()
    assert_succeeded(result)
    assert result.kind is kind, result.reason
    assert_dumped(host, "latest", moment)
    await asyncio.to_thread(restic(host).check)
    await host.assert_as_before()


def mover_of(vmfleece: int) -> int:
    """The process that writes to the repository, a child of vmfleece's."""
    command = ["pgrep", "-P", str(vmfleece), "-f", "orchestrator.target.mover"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    (pid,) = map(int, found.stdout.split())
    return pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_mover_that_dies_or_hangs_ends_its_run_only(
    host: Host, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SILENCE_SECONDS", 4.0)
    await assert_the_next_one_is_right(host, kind=Kind.FULL)
    async with host.backing_up(target="repo", bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        os.kill(mover_of(os.getpid()), number)
        await host.vm.wait_writes(50)  # the guest does not notice
    assert_failed(under_way.result, "mover-died")
    assert len(await host.snapshots("repo")) == 1
    await host.assert_as_before()
    await assert_the_next_one_is_right(host, kind=Kind.INCREMENTAL)


async def test_a_killed_vmfleece_lists_nothing_and_its_mover_ends(host: Host) -> None:
    command = await host.command("backup", VM, "--target", "repo", "--bwlimit", str(SLOWLY // 1024))
    await until_jobs_run(host.vm, command)
    pid = mover_of(command.pid)
    command.kill()
    await command.wait()
    await until(lambda: not Path(f"/proc/{pid}").exists(), "the mover's end")
    assert await host.snapshots("repo") == []
    assert list((host.repository / "locks").iterdir()) == []
    await assert_the_next_one_is_right(host, kind=Kind.FULL)


async def test_restic_unlock_does_not_end_a_run(host: Host) -> None:
    """It sends SIGHUP to whoever holds a lock on this host."""
    async with host.backing_up(target="repo", bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        restic(host).run("unlock")
        await host.vm.wait_writes(20)
        assert not under_way.ended()
        assert len(list((host.repository / "locks").iterdir())) == 1
        await under_way.hurry()
    assert_succeeded(under_way.result)
    await assert_the_next_one_is_right(host, kind=Kind.INCREMENTAL)


async def test_restic_prunes_before_and_after_us_and_writes_beside_us(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(3 * MIB))
    for kind in (Kind.FULL, Kind.INCREMENTAL):
        async with host.backing_up(target="repo", bwlimit=4 * SLOWLY) as under_way:
            await under_way.copying()
            said = await asyncio.to_thread(restic(host).run, "prune", code=1)
            assert b"already locked" in said
            await asyncio.to_thread(restic(host).run, "backup", str(tmp_path / "file"))
            await under_way.hurry()
        assert_succeeded(under_way.result)
        assert under_way.result.kind is kind
        await asyncio.to_thread(restic(host).run, "prune", "--max-unused", "0")
    await assert_the_next_one_is_right(host, kind=Kind.INCREMENTAL)


async def test_while_somebody_works_on_it_alone_a_run_fails_and_may_be_tried_again(host: Host) -> None:
    repository = await Repository.open(DirectoryBackend(host.repository), PASSWORD)
    alone = LockFile(datetime.now(UTC), True, socket.gethostname(), "root", os.getpid(), 0, 0)
    content = lock_file.seal(alone, repository._key)
    path = host.repository / "locks" / hashlib.sha256(content).hexdigest()
    path.write_bytes(content)
    result = await host.back_up(target="repo")
    assert_failed(result, "repository-locked")
    assert result.retryable
    await host.assert_as_before()
    path.unlink()
    await assert_the_next_one_is_right(host, kind=Kind.FULL)


async def test_chunks_that_are_gone_are_copied_again(host: Host) -> None:
    await assert_the_next_one_is_right(host, kind=Kind.FULL)
    packs = sorted((host.repository / "data").rglob("?" * 64), key=lambda path: path.stat().st_size)
    packs[-1].unlink()
    result = await host.back_up(target="repo")
    assert_succeeded(result)
    assert "chunks" in result.reason, result.reason
    await host.vm.pause()
    moment = await moment_of(host)
    result = await host.back_up(target="repo")
    await host.vm.resume()
    assert_succeeded(result)
    assert result.kind is Kind.INCREMENTAL
    await host.assert_restores(moment, "repo")
    await asyncio.to_thread(restic(host).run, "rebuild-index")  # else it tries for minutes to find the lost pack
    await asyncio.to_thread(assert_dumped, host, "latest", moment)
    await host.assert_as_before()
