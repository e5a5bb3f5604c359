"""VMs that are powered off or lose their power, and runs that come to nothing: what the next backup builds on.

QEMU writes the bitmaps of a qcow2 image into it when it closes it, and marks them as in use while it has it open:
if it is killed, they are inconsistent. One that it has not written before, and that of a raw disk, ends with QEMU.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from orchestrator.model import Kind, Outcome, Phase, RunResult
from tests.guest import images
from tests.guest.versions import qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.hooks import At
from tests.qemu.host import FLEECED, SLOWLY, VM, Host, assert_failed, assert_succeeded
from tests.qemu.under_way import our_jobs, until_jobs_run

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLUSTER = 64 * 1024
REGION_BYTES = 8 * MIB
MARK = REGION_BYTES + MIB
"""The guest does not write here: what the test writes stays, and is in the chain by its bitmap alone."""
DISKS = [DiskSpec("vda", 24 * MIB, iothread=True), DiskSpec("vdb", 12 * MIB, format="raw", iothread=True)]


@pytest_asyncio.fixture(loop_scope="module", params=["7.2", "10.0"])
async def vm(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[GuestVm]:
    workload = Workload("random", region_bytes=REGION_BYTES)
    async with GuestVm(tmp_path / "vm", DISKS, workload, qemu=qemu(request.param)) as guest:
        await guest.wait_ready()
        await guest.wait_writes(200)
        yield guest


async def backed_up(host: Host, jobs_may_start: asyncio.Event) -> RunResult:
    """A backup of what the disks hold now, byte for byte, while the guest, if it runs, overwrites it."""
    vm = host.vm
    jobs_may_start.clear()
    runs = vm.expected_status == "running"
    if runs:
        await vm.pause()
    async with host.backing_up(FLEECED, bwlimit=16 * SLOWLY) as under_way:
        await under_way.until(lambda: under_way.phase is Phase.COPYING, "the point in time")
        moment = await host.copies()
        if runs:
            await vm.resume()
            await vm.wait_writes(200)
        jobs_may_start.set()
        await under_way.hurry()
    assert_succeeded(under_way.result)
    await host.assert_restores(moment)
    if runs:  # while a guest is not, QEMU before 9.1 closes no descriptor that was passed to it
        await host.assert_as_before()
    return under_way.result


async def mark(vm: GuestVm, number: int) -> None:
    """Change a cluster of each disk that neither the guest nor another mark changes."""
    for disk in DISKS:
        await vm.write(disk.id, MARK + number * CLUSTER, CLUSTER, pattern=number)


Meanwhile = Callable[[], Awaitable[None]]


async def a_failure(host: Host, meanwhile: Meanwhile) -> None:
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        await meanwhile()
        await host.vm.execute("job-cancel", {"id": (await our_jobs(host.vm))[0]})
    assert_failed(under_way.result, "copy-failed")


async def a_cancellation(host: Host, meanwhile: Meanwhile) -> None:
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        await meanwhile()
        assert under_way.task is not None
        under_way.task.cancel()
    assert under_way.task.cancelled()


async def a_kill(host: Host, meanwhile: Meanwhile) -> None:
    process = await host.command("backup", VM, "--target", "main", "--bwlimit", "256")
    await until_jobs_run(host.vm, process)
    await meanwhile()
    process.kill()
    await process.communicate()
    assert await our_jobs(host.vm) != []


async def power_off(vm: GuestVm) -> None:
    """QEMU closes the images of a guest that is still."""
    await vm.pause()
    await vm.stop()
    assert vm.exit_code == 0


async def bitmaps(path: Path) -> list[dict[str, Any]]:
    """Those in a qcow2 image that nobody has open."""
    described = json.loads(await images.run_tool("qemu-img", "info", "--output=json", str(path)))
    return list(described["format-specific"]["data"].get("bitmaps", []))


async def recording(vm: GuestVm, disk: str) -> list[dict[str, Any]]:
    """The bitmaps of a disk in QEMU."""
    entries = await vm.execute("query-block")
    (found,) = [one["inserted"] for one in entries if one["inserted"]["node-name"] == vm.first_nodes[disk]]
    return list(found.get("dirty-bitmaps", []))


async def test_after_power_off_a_qcow2_disk_goes_on_and_a_raw_one_begins_anew(vm: GuestVm, tmp_path: Path) -> None:
    jobs_may_start = asyncio.Event()
    host = Host(tmp_path, vm, connect=At("blockdev-backup", jobs_may_start.wait))
    first = await backed_up(host, jobs_may_start)
    await mark(vm, 1)
    await vm.wait_writes(200)
    await power_off(vm)
    (kept,) = await bitmaps(vm.image_path("vda"))
    assert kept["name"] == f"vmfleece:main:{first.snapshot}"
    assert kept["flags"] == ["auto"]

    # What was written before is known by the bitmap in the image alone: this guest has not run yet.
    vm.initially_paused = True
    await vm.start()
    second = await backed_up(host, jobs_may_start)
    assert second.kind is Kind.INCREMENTAL
    assert second.reason == f"disk-vda: since {first.snapshot}; disk-vdb: there is no bitmap of its changes"
    vda, vdb = second.disks
    assert 0 < vda.copied_bytes <= REGION_BYTES + CLUSTER
    assert vdb.copied_bytes == vdb.size_bytes

    await mark(vm, 2)
    await vm.resume()
    await vm.wait_ready()
    await vm.wait_writes(200)
    third = await backed_up(host, jobs_may_start)
    assert third.reason == f"disk-vda, disk-vdb: since {second.snapshot}"
    assert all(disk.copied_bytes <= REGION_BYTES + CLUSTER for disk in third.disks)


async def test_after_a_power_failure_an_inconsistent_bitmap_is_replaced(vm: GuestVm, tmp_path: Path) -> None:
    jobs_may_start = asyncio.Event()
    host = Host(tmp_path, vm, connect=At("blockdev-backup", jobs_may_start.wait))
    first = await backed_up(host, jobs_may_start)
    await power_off(vm)
    await vm.start()
    await mark(vm, 1)
    await vm.wait_ready()
    await vm.wait_writes(200)
    await vm.kill()
    assert vm.exit_code == -signal.SIGKILL

    await vm.start()
    await vm.wait_ready()
    await vm.wait_writes(200)
    (lost,) = await recording(vm, "vda")
    assert lost["name"] == f"vmfleece:main:{first.snapshot}"
    assert lost["inconsistent"]
    third = await backed_up(host, jobs_may_start)
    assert third.kind is Kind.FULL
    assert third.reason == (
        "disk-vda: its bitmap is inconsistent: QEMU was not shut down cleanly;"
        " disk-vdb: there is no bitmap of its changes"
    )
    for disk in DISKS:
        (new,) = await recording(vm, disk.id)
        assert new["name"] == f"vmfleece:main:{third.snapshot}"
        assert new["recording"]
        assert not new.get("inconsistent")

    await mark(vm, 2)
    fourth = await backed_up(host, jobs_may_start)
    assert fourth.reason == f"disk-vda, disk-vdb: since {third.snapshot}"
    assert all(disk.copied_bytes <= REGION_BYTES + CLUSTER for disk in fourth.disks)


async def test_after_a_run_that_comes_to_nothing_the_next_one_is_incremental(vm: GuestVm, tmp_path: Path) -> None:
    """What changed before that run, during it and after it is in the next one."""
    jobs_may_start = asyncio.Event()
    host = Host(tmp_path, vm, connect=At("blockdev-backup", jobs_may_start.wait))
    last = await backed_up(host, jobs_may_start)
    for number, way in enumerate((a_failure, a_cancellation, a_kill)):
        await mark(vm, 4 * number)
        await vm.wait_writes(50)
        jobs_may_start.set()
        await way(host, partial(mark, vm, 4 * number + 1))
        await mark(vm, 4 * number + 2)
        assert [snapshot.id for snapshot in await host.snapshots()][-1] == last.snapshot
        result = await backed_up(host, jobs_may_start)
        assert result.outcome is Outcome.SUCCEEDED
        assert result.reason == f"disk-vda, disk-vdb: since {last.snapshot}", way
        assert all(disk.copied_bytes <= REGION_BYTES + 3 * CLUSTER for disk in result.disks)
        last = result
