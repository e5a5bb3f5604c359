"""Several guests that write all the time share one storage: its quota holds, whatever happens.

Where it matters, the storage has a file system of its own, so what it really holds can be seen from outside. Each
guest overwrites its disks at full speed, with numbered records: in a second or two its fleecing images hold nearly
all that they can, and its backup can be proven to be one moment (tests.guest.sequence).
"""

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from structlog.typing import EventDict

from orchestrator.admission import estimate
from orchestrator.qemu import qmp
from orchestrator.service import engine
from orchestrator.service.engine import Engine
from orchestrator.service.status import Status
from orchestrator.units import format_size
from tests.guest import sequence
from tests.guest.leftovers import leftovers
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.conftest import SmallFileSystem
from tests.qemu.host import FLEECED, SLOWLY, VM, Host, assert_failed, assert_succeeded
from tests.qemu.under_way import lift_speed_limit, our_jobs, said, until, until_jobs_run

pytestmark = pytest.mark.asyncio(loop_scope="module")

Guests = Mapping[str, GuestVm]

ONE = [DiskSpec("vda", 68 * MIB, iothread=True)]
TWO = [DiskSpec("vda", 44 * MIB), DiskSpec("vdb", 28 * MIB, format="raw")]
OTHER = "web02"
DISKS = {VM: ONE, OTHER: ONE, "db01": TWO, "db02": TWO}
RECORDS = 1400
"""With so many records, nearly each cluster of disks of these sizes holds one."""
GRANT = estimate.worst_case(68 * MIB)
"""What a run of VM or OTHER is granted, from the first to the last."""
GRANTED = format_size(GRANT)
FOR_ONE = f"{GRANT * 3 // 2}B"
FOR_TWO = f"{GRANT * 5 // 2}B"
SAMPLE_SECONDS = 0.05
BACKUP = ("--target", "main", "--fleecing", "enabled=1,storage=local", "--bwlimit", str(SLOWLY // 1024))
JOB = f"""
[job.all]
vms = ["*"]
target = "main"
fleecing = "enabled=1,storage=local"
bwlimit = "{SLOWLY // 1024}"
retries = 0
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guests(memory: Path) -> AsyncIterator[Guests]:
    """All of them, paused while no test needs them."""
    folder = memory / "guests"
    booted = {
        name: GuestVm(folder / name, disks, Workload("sequence"), memory_mib=192) for name, disks in DISKS.items()
    }
    async with contextlib.AsyncExitStack() as stack:
        for guest in booted.values():
            await stack.enter_async_context(guest)
        for guest in booted.values():
            await guest.wait_ready()
            await guest.wait_writes(RECORDS * len(guest.disks))
            await guest.pause()
        yield booted
    shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def writing(guests: Guests, *names: str) -> AsyncIterator[None]:
    """Let some of the guests run for the block."""
    for name in names:
        await guests[name].resume()
    yield
    for name in names:
        await guests[name].pause()


class Usage:
    """What is used of a file system that was empty when this was made, and the most that ever was."""

    def __init__(self, mount: Path) -> None:
        self._mount = mount
        self._empty_bytes = 0
        self._empty_bytes = self.bytes()
        self.most_bytes = 0

    def bytes(self) -> int:
        status = os.statvfs(self._mount)
        return (status.f_blocks - status.f_bfree) * status.f_frsize - self._empty_bytes

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look again and again, from a thread: whatever this process's loop is busy with."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                self.most_bytes = max(self.most_bytes, self.bytes())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def free_bytes(mount: Path) -> int:
    status = os.statvfs(mount)
    return status.f_bavail * status.f_frsize


def occupy(path: Path, *, leaving_bytes: int) -> None:
    """Be somebody else who fills a file system."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes(path.parent) - leaving_bytes)


async def seen_meanwhile(host: Host, opened: Engine, task: asyncio.Task[Any]) -> list[Status]:
    """What the product says of itself until a task ends.

    A run's jobs are slow until its images hold most of what they can.
    """
    seen = [opened.status()]
    while not task.done():
        for run in seen[-1].runs:
            if run.fleecing_bytes > run.size_bytes * 3 // 4 or run.copied_bytes > run.size_bytes // 8:
                await lift_speed_limit(host.vms[run.vm])
        await asyncio.wait([task], timeout=SAMPLE_SECONDS)
        seen.append(opened.status())
    return seen


def of_event(lines: list[EventDict], event: str) -> list[EventDict]:
    return [line for line in lines if line["event"] == event]


async def records(guest: GuestVm) -> int:
    """How many records are on all disks of a guest by now."""
    return await guest.writes() // len(guest.disks) - 1


async def assert_is_a_moment(host: Host, name: str, *, since: int) -> None:
    """The newest snapshot of a guest is one moment, after it had written so many records."""
    guest = host.vms[name]
    restored = await host.restored(name=name)
    paths = [restored[disk.id] for disk in guest.disks]
    verdict = await asyncio.to_thread(sequence.check, paths, run=guest.run, at_least=since)
    assert verdict.problems == []
    assert verdict.last[-1] < await records(guest)


async def asked(host: Host) -> dict[str, Any]:
    """What `vmfleece status --json` prints."""
    one = await host.run("status", "--json")
    assert (one.code, one.err) == (0, ""), one
    found = json.loads(one.out)
    assert isinstance(found, dict)
    return found


# --- the quota ---


async def test_four_guests_share_a_quota_for_two(
    guests: Guests, folder: Path, ext4_file_system: SmallFileSystem, log_lines: list[EventDict]
) -> None:
    mount = ext4_file_system("fast", 512)
    storage = mount / "fleecing"
    storage.mkdir(mode=0o700)
    others = {name: guest for name, guest in guests.items() if name != VM}
    host = Host(folder, guests[VM], others=others, storage=storage, quota=FOR_TWO, more=JOB)
    quota_bytes = GRANT * 5 // 2
    async with writing(guests, *guests), host.opened() as opened:
        since = {name: await records(guest) for name, guest in guests.items()}
        usage = Usage(mount)
        with usage.watched():
            job = asyncio.create_task(opened.run_job("all"))
            seen = await seen_meanwhile(host, opened, job)
        await host.assert_as_before()

    assert GRANT < usage.most_bytes <= quota_bytes  # two of them at a time, and never more
    assert usage.bytes() < MIB
    assert max(status.storages[0].granted_bytes for status in seen) <= quota_bytes
    assert seen[-1].storages[0].granted_bytes == 0
    for result in job.result():
        assert_succeeded(result)
        size_bytes = sum(disk.size_bytes for disk in result.disks)
        assert sum(disk.fleecing_peak_bytes for disk in result.disks) > size_bytes // 2
    reasons = {reason for status in seen for waiting in status.queue for reason in waiting.reasons}
    assert any("storage local: " in reason and reason.count(" holds ") == 2 for reason in reasons), reasons
    queued = of_event(log_lines, "run.queued")
    assert len({line["vm"] for line in queued}) >= 2
    obstacles = [obstacle for line in queued for obstacle in line["obstacles"]]
    assert all(one["wanted_bytes"] > one["free_bytes"] for one in obstacles)
    for name in guests:
        await assert_is_a_moment(host, name, since=since[name])


# --- a file system that others use, too ---


async def test_what_others_write_meanwhile_ends_the_less_important_run(
    guests: Guests, folder: Path, ext4_file_system: SmallFileSystem, log_lines: list[EventDict]
) -> None:
    mount = ext4_file_system("fast", 384)
    storage = mount / "fleecing"
    others = {OTHER: guests[OTHER]}
    host = Host(folder, guests[VM], others=others, storage=storage, quota=FOR_TWO, min_free="64MiB", priority=10)
    async with writing(guests, VM, OTHER):
        async with (
            host.opened() as opened,
            host.backing_up(on=opened, bwlimit=SLOWLY) as low,
            host.backing_up(name=OTHER, on=opened, bwlimit=SLOWLY) as high,
        ):
            for one in (low, high):
                await one.until(lambda one=one: one.fleecing_bytes() > 52 * MIB, "an image that is nearly full")
            occupy(mount / "others", leaving_bytes=32 * MIB)
            await until(low.ended, "the end of the less important run")
            assert not high.ended()
            assert free_bytes(mount) > 64 * MIB
            (storage_status,) = opened.status().storages
            assert storage_status.granted_bytes == GRANT
            await high.hurry()
        await host.assert_as_before()
    assert_failed(low.result, "storage-low")
    assert low.result.retryable
    assert low.result.error is not None
    assert "min_free (64.0 MiB)" in low.result.error.message
    assert_succeeded(high.result)
    (line,) = of_event(log_lines, "storage.low")
    assert line["gives_way"] == low.result.run
    assert line["free_bytes"] < line["floor_bytes"] == 64 * MIB


async def test_a_run_waits_for_space_that_others_use(
    guests: Guests, folder: Path, ext4_file_system: SmallFileSystem
) -> None:
    mount = ext4_file_system("fast", 192)
    host = Host(folder, guests[VM], storage=mount / "fleecing", quota=FOR_TWO, min_free="16MiB")
    occupy(mount / "others", leaving_bytes=48 * MIB)
    async with writing(guests, VM):
        async with host.opened() as opened, host.backing_up(on=opened) as under_way:
            await under_way.until(lambda: under_way.waits_for != "", "waiting")
            assert under_way.waits_for.startswith(f"storage local: {GRANTED} wanted")
            assert "but its file system has no more" in under_way.waits_for
            (waiting,) = opened.status().queue
            assert waiting.reasons == (under_way.waits_for,)
            assert opened.status().storages[0].granted_bytes == 0
            assert await leftovers(guests[VM]) == []
            await guests[VM].wait_writes(200)
            assert not under_way.ended()
            (mount / "others").unlink()
        assert_succeeded(under_way.result)
        await host.assert_as_before()


# --- what a process that was killed held ---


def stranded_bytes(opened: Engine) -> int:
    (storage,) = opened.status().storages
    assert storage.stranded_bytes == storage.granted_bytes
    return storage.stranded_bytes


async def kill_a_backup(host: Host) -> None:
    """`vmfleece backup` is killed while it copies; what it held is shown although no vmfleece runs."""
    process = await host.command("backup", VM, *BACKUP)
    await until_jobs_run(host.vm, process)
    process.kill()
    await process.communicate()
    status = await asked(host)
    assert status["process"] is None
    (storage,) = status["storages"]
    assert storage["stranded_bytes"] == storage["granted_bytes"] == GRANT
    assert f"stranded: {GRANTED} granted" in (await host.run("status")).out


async def test_a_dead_process_s_grants_come_back_when_its_images_are_out_of_qemu(
    guests: Guests, folder: Path, log_lines: list[EventDict]
) -> None:
    host = Host(folder, guests[VM])
    async with writing(guests, VM):
        await kill_a_backup(host)
        assert len(await our_jobs(guests[VM])) == 1
        async with host.opened() as opened:
            assert stranded_bytes(opened) == GRANT
            await until(lambda: stranded_bytes(opened) == 0, "the grant")
            assert await leftovers(guests[VM]) == []
            assert host.descriptors() == []
        (recovered,) = of_event(log_lines, "grant.recovered")
        assert (recovered["vm"], recovered["granted_bytes"]) == (VM, GRANT)
        assert of_event(log_lines, "run.started") == []
        assert (await asked(host))["storages"][0]["stranded_bytes"] == 0
        assert_succeeded(await host.back_up(FLEECED))
        await host.assert_as_before()


async def test_a_dead_process_s_grants_come_back_when_qemu_is_dead_as_well(
    folder: Path, log_lines: list[EventDict]
) -> None:
    async with GuestVm(folder / "vm", ONE, initially_paused=True) as mortal:
        host = Host(folder, mortal)
        await kill_a_backup(host)
        assert mortal.pid is not None
        os.kill(mortal.pid, signal.SIGKILL)
        await until(lambda: not mortal.alive(), "the end of QEMU")
        async with host.opened() as opened:
            assert stranded_bytes(opened) == GRANT
            await until(lambda: stranded_bytes(opened) == 0, "the grant")
        assert len(of_event(log_lines, "grant.recovered")) == 1


async def test_a_dead_process_s_grants_are_kept_while_qemu_is_silent(
    guests: Guests, folder: Path, log_lines: list[EventDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else gets them until it is known that the images are gone."""
    monkeypatch.setattr(engine, "RECOVER_SECONDS", 0.2)
    connect = functools.partial(qmp.connect, deadline_seconds=2.0)
    host = Host(folder, guests[VM], others={OTHER: guests[OTHER]}, quota=FOR_ONE, connect=connect)
    silent = guests[VM].pid
    assert silent is not None
    async with writing(guests, VM, OTHER):
        await kill_a_backup(host)
        os.kill(silent, signal.SIGSTOP)
        try:
            async with host.opened() as opened, host.backing_up(name=OTHER, on=opened) as other:
                await other.until(lambda: other.waits_for != "", "waiting")
                assert f"of {VM}, which is over, holds {GRANTED}" in other.waits_for
                await other.until(lambda: len(of_event(log_lines, "grant.unrecovered")) > 1, "two tries")
                assert stranded_bytes(opened) == GRANT
                os.kill(silent, signal.SIGCONT)
        finally:
            os.kill(silent, signal.SIGCONT)
        assert_succeeded(other.result)
        assert len(of_event(log_lines, "grant.recovered")) == 1
        assert of_event(log_lines, "run.bug") == []
        await host.back_up(FLEECED)  # takes away what was left on the target
        await host.assert_as_before()


# --- as a user ---


async def test_status_shows_who_runs_and_who_waits(guests: Guests, folder: Path) -> None:
    host = Host(folder, guests[VM], others={OTHER: guests[OTHER]}, quota=FOR_ONE)
    async with writing(guests, VM, OTHER):
        process = await host.command("backup", VM, OTHER, *BACKUP)
        async with asyncio.timeout(60):
            while True:
                status = await asked(host)
                if status["queue"] and status["runs"] and status["runs"][0]["copied_bytes"]:
                    break
                assert process.returncode is None, await said(process)
        (run,), (waiting,), (storage,) = status["runs"], status["queue"], status["storages"]
        assert status["process"] == process.pid
        assert {run["vm"], waiting["vm"]} == {VM, OTHER}
        assert (run["phase"], run["target"], run["grant_bytes"]) == ("copying", "main", GRANT)
        assert 0 < run["copied_bytes"] < run["size_bytes"] == 68 * MIB
        assert (storage["granted_bytes"], storage["quota_bytes"], storage["runs"]) == (GRANT, GRANT * 3 // 2, 1)
        assert 0 < storage["used_bytes"] <= storage["peak_bytes"] <= GRANT
        (reason,) = waiting["reasons"]
        assert reason.startswith(f"storage local: {GRANTED} wanted")
        assert f"run {run['run']} of {run['vm']} holds {GRANTED}" in reason

        shown = await host.run("status")
        assert (shown.code, shown.err) == (0, "")
        lines = shown.out.splitlines()
        assert lines[0].startswith(f"vmfleece, process {process.pid}, running for ")
        assert any(line.startswith("local ") for line in lines)
        assert any(line.startswith(f"{run['vm']} ") and " copying " in line and "% " in line for line in lines)
        assert any(line.startswith(f"1  {waiting['vm']} ") for line in lines)
        assert any(line.strip() == reason for line in lines)

        process.send_signal(signal.SIGINT)
        ended = await said(process)
        assert ended.code == 130, ended
        assert list((host.folder / "run").iterdir()) == []
        status = await asked(host)
        assert (status["process"], status["runs"], status["queue"]) == (None, [], [])
        assert status["storages"][0]["granted_bytes"] == 0
        await host.assert_as_before()
