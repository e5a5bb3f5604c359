"""A run to which something happens: to its connection, its jobs, its process, or to QEMU.

Whatever it is, a guest that lives is left as it was, nothing half done is listed, and the next backup succeeds.
"""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from orchestrator.model import Fleecing, Outcome
from orchestrator.run import copy
from tests.guest import images
from tests.guest.leftovers import leftovers
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.hooks import At
from tests.qemu.host import (
    DIRECT,
    FLEECED,
    SLOWLY,
    VM,
    Host,
    assert_failed,
    assert_succeeded,
)
from tests.qemu.proxy import Proxy
from tests.qemu.under_way import our_jobs, until_jobs_run

pytestmark = pytest.mark.asyncio(loop_scope="module")

DISKS = [DiskSpec("vda", 24 * MIB, iothread=True), DiskSpec("vdb", 12 * MIB, format="raw", iothread=True)]
WORKLOAD = Workload("random", block_bytes=16 * 1024, rate=1500)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuestVm]:
    folder = tmp_path_factory.mktemp("vm")
    guest = GuestVm(folder, DISKS, WORKLOAD)
    images.fill(guest.image_path("vdb"), 12 * MIB)
    async with guest:
        await guest.wait_ready()
        await guest.wait_writes(3000)
        yield guest
    shutil.rmtree(folder)


@pytest_asyncio.fixture(loop_scope="module")
async def mortal(tmp_path: Path) -> AsyncIterator[GuestVm]:
    """A guest that the test may kill. It boots meanwhile; its disk is full of data already."""
    guest = GuestVm(tmp_path / "vm", [DiskSpec("vda", 24 * MIB, format="raw", iothread=True)], WORKLOAD)
    guest.folder.mkdir()
    images.fill(guest.image_path("vda"), 24 * MIB)
    async with guest:
        yield guest


async def assert_the_next_one_succeeds(host: Host) -> None:
    assert_succeeded(await host.back_up(FLEECED))
    await host.assert_as_before()


# --- somebody else at work ---


@pytest.mark.parametrize("fleecing", [FLEECED, DIRECT], ids=["fleecing", "direct"])
async def test_a_job_that_somebody_else_cancels_fails_the_run(
    vm: GuestVm, tmp_path: Path, fleecing: Fleecing
) -> None:
    host = Host(tmp_path, vm)
    async with host.backing_up(fleecing, bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        await vm.execute("job-cancel", {"id": (await our_jobs(vm))[-1]})
    assert_failed(under_way.result, "copy-failed")
    assert await host.snapshots() == []
    await host.assert_as_before()
    await assert_the_next_one_succeeds(host)


async def test_somebody_elses_job_is_left_alone(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    await vm.execute("blockdev-add", {"driver": "null-co", "node-name": "theirs", "size": 12 * MIB})
    job = {"job-id": "their-job", "device": "drive-vdb", "target": "theirs", "sync": "full", "speed": 1}
    await vm.execute("blockdev-backup", job)
    result = await host.back_up(FLEECED)
    assert_failed(result, "foreign-job")
    assert result.retryable
    assert result.error is not None
    assert "their-job" in result.error.message
    (theirs,) = await vm.execute("query-block-jobs")
    assert theirs["status"] == "running"
    await vm.execute("block-job-cancel", {"device": "their-job"})
    async with asyncio.timeout(20):
        while await vm.execute("query-block-jobs"):
            await asyncio.sleep(0.05)
    await vm.execute("blockdev-del", {"node-name": "theirs"})
    await host.assert_as_before()


async def test_somebody_elses_filter_is_left_alone(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    await vm.execute("blockdev-add", {"driver": "null-co", "node-name": "their-target", "size": 12 * MIB})
    theirs = {"driver": "copy-before-write", "node-name": "theirs", "file": "drive-vdb", "target": "their-target"}
    drive = {"path": "/machine/peripheral/disk-vdb", "property": "drive"}
    await vm.execute("blockdev-add", theirs)
    await vm.execute("qom-set", {**drive, "value": "theirs"})
    assert_failed(await host.back_up(FLEECED), "foreign-filter")
    assert (await vm.current_nodes())["vdb"] == "theirs"
    await vm.execute("qom-set", {**drive, "value": "drive-vdb"})
    for node in ("theirs", "their-target"):
        await vm.execute("blockdev-del", {"node-name": node})
    await host.assert_as_before()


# --- the connection ---


async def test_a_copy_outlives_its_connection(vm: GuestVm, tmp_path: Path) -> None:
    with Proxy(vm.product_socket.with_name("proxy.sock"), vm.product_socket) as proxy:
        host = Host(tmp_path, vm, socket=proxy.path)
        await vm.pause()
        async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
            await under_way.copying()
            moment = await host.copies()
            await vm.resume()
            for number in (1, 2):
                proxy.cut()
                await vm.wait_writes(1500)
                await under_way.until(lambda number=number: proxy.connections > number, "a new connection")
            await under_way.hurry()
        assert proxy.cuts == 2
    proxy.path.unlink()
    assert_succeeded(under_way.result)
    await host.assert_restores(moment)
    await host.assert_as_before()


@pytest.mark.parametrize("fleecing", [FLEECED, DIRECT], ids=["fleecing", "direct"])
@pytest.mark.parametrize(
    "command",
    [
        "add-fd",
        "remove-fd",
        "blockdev-add",
        "qom-set",
        "blockdev-reopen",
        "blockdev-backup",
        "job-dismiss",
        "blockdev-del",
    ],
)
async def test_a_run_that_is_cut_off_at_a_command_leaves_nothing(
    vm: GuestVm, tmp_path: Path, command: str, fleecing: Fleecing
) -> None:
    with Proxy(vm.product_socket.with_name("proxy.sock"), vm.product_socket) as proxy:
        host = Host(tmp_path, vm, socket=proxy.path)
        proxy.cut_after(command)
        result = await host.back_up(fleecing, bwlimit=64 * MIB)
        assert proxy.cuts == 1
    proxy.path.unlink()
    assert_failed(result, "vm-gone")
    assert result.retryable
    assert await host.snapshots() == []
    await host.assert_as_before()


# --- the run itself ---


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "command",
    [
        "blockdev-add",
        "block-set-write-threshold",
        "blockdev-reopen",
        "blockdev-backup",
        "job-dismiss",
        "blockdev-del",
    ],
)
async def test_a_run_that_is_cancelled_leaves_nothing(
    vm: GuestVm, tmp_path: Path, command: str, *, after: bool
) -> None:
    reached = asyncio.Event()

    async def wait_for_the_end() -> None:
        reached.set()
        await asyncio.Event().wait()

    host = Host(tmp_path, vm, connect=At(command, wait_for_the_end, after=after))
    async with host.backing_up(FLEECED) as under_way:
        assert under_way.task is not None
        await under_way.until(reached.is_set, command)
        under_way.task.cancel()
    assert under_way.task.cancelled()
    assert await host.snapshots() == []
    await host.assert_as_before()


async def test_what_a_killed_process_left_is_taken_out_by_the_next_backup(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    process = await host.command("backup", VM, "--target", "main", "--bwlimit", "256")
    await until_jobs_run(vm, process)
    await vm.wait_writes(500)
    process.kill()
    await process.communicate()
    # The guest is not disturbed meanwhile, and another vmfleece keeps its hands off.
    await vm.assert_healthy()
    await vm.wait_writes(500)
    assert len(await our_jobs(vm)) == 2
    assert len(host.partial()) == 1
    stranger = Host(tmp_path, vm, state="stranger")
    assert_failed(await stranger.back_up(FLEECED), "foreign-run")
    assert len(await our_jobs(vm)) == 2
    await assert_the_next_one_succeeds(host)
    assert len(await host.snapshots()) == 1


# --- QEMU ---


async def test_a_qemu_that_stands_still_for_a_while_is_waited_for(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    assert vm.pid is not None
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        os.kill(vm.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(5)
        finally:
            os.kill(vm.pid, signal.SIGCONT)
        await vm.wait_writes(100)
        assert not under_way.task.done()
        await under_way.hurry()
    assert_succeeded(under_way.result)
    await host.assert_as_before()


async def killed(vm: GuestVm) -> None:
    assert vm.pid is not None
    os.kill(vm.pid, signal.SIGKILL)


async def quit_(vm: GuestVm) -> None:
    await vm.execute("quit")


@pytest.mark.parametrize("way", [killed, quit_])
@pytest.mark.parametrize("moment", ["preparing", "copying", "releasing"])
async def test_a_qemu_that_ends_fails_the_run(
    mortal: GuestVm,
    tmp_path: Path,
    way: Callable[[GuestVm], Awaitable[None]],
    moment: str,
) -> None:
    commands = {"preparing": "block-set-write-threshold", "copying": "blockdev-backup", "releasing": "job-dismiss"}
    host = Host(tmp_path, mortal, connect=At(commands[moment], lambda: way(mortal), after=moment == "copying"))
    result = await host.back_up(FLEECED)
    assert_failed(result, "vm-gone")
    assert result.retryable
    assert result.duration_seconds < copy.RECONNECT_SECONDS / 2  # it is noticed, not waited for
    assert result.outcome is Outcome.FAILED
    assert await host.snapshots() == []
    host.assert_no_files()
    assert not await lives(mortal)
    again = await host.back_up(FLEECED)
    assert_failed(again, "vm-unreachable")
    host.assert_no_files()


async def test_a_guest_that_somebody_pauses_while_it_is_backed_up_stays_paused(
    mortal: GuestVm, tmp_path: Path
) -> None:
    host = Host(tmp_path, mortal)
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        await mortal.pause()
        await under_way.hurry()
    assert_succeeded(under_way.result)
    assert await leftovers(mortal) == []
    host.assert_no_files()


async def lives(vm: GuestVm) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5):
            while vm.alive():
                await asyncio.sleep(0.05)
    return vm.alive()
