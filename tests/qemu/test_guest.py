"""The test bed itself, on real QEMU: what later tests stand on must be shown to work, and to fail
when it should."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.guest import images
from tests.guest.latency import LatencyMeter
from tests.guest.leftovers import leftovers
from tests.guest.sequence import check, slot_of
from tests.guest.vm import MIB, DiskSpec, GuestFailureError, GuestVm, Workload

if TYPE_CHECKING:
    from tests.guest.fixtures import Boot  # at run time only as a plugin, or pytest warns

pytest_plugins = ["tests.guest.fixtures"]


async def copies(vm: GuestVm) -> list[Path]:
    paths = [vm.folder / f"{disk.id}.copy" for disk in vm.disks]
    for disk, path in zip(vm.disks, paths, strict=True):
        await vm.copy_disk(disk.id, path)
    return paths


async def test_a_paused_copy_of_two_disks_is_one_moment(boot: Boot) -> None:
    vm = await boot([DiskSpec("vda", iothread=True), DiskSpec("vdb", format="raw")])
    for _ in range(3):
        await vm.wait_writes(1500)
        await vm.pause()
        paths = await copies(vm)
        verdict = check(paths, run=vm.run, at_least=500)
        assert verdict.problems == []
        at_pause = verdict.last
        await vm.resume()
    assert len(vm.pauses_seconds()) == 3
    # Negative control: the second disk some writes later is another moment.
    await vm.wait_writes(500)
    await vm.pause()
    await vm.copy_disk("vdb", paths[1])
    later = check(paths, run=vm.run)
    assert not later.ok
    assert later.last[1] > at_pause[1]
    with pytest.raises(GuestFailureError, match="not running but paused"):
        await vm.assert_healthy()
    await vm.resume()
    with pytest.raises(GuestFailureError, match="only while the VM is paused"):
        await vm.copy_disk("vda", paths[0])
    await vm.wait_stats(2)
    assert vm.stats()[-1].writes > vm.stats()[-2].writes
    assert vm.stats()[-1].mean_us > 0
    await vm.assert_healthy()


async def test_a_guest_with_iothreads_survives_many_pauses(boot: Boot) -> None:
    vm = await boot([DiskSpec("vda", iothread=True), DiskSpec("sda", bus="virtio-scsi", iothread=True)])
    for _ in range(100):
        await vm.wait_writes(30, 10)
        await vm.pause()
        await vm.resume()
    await vm.assert_healthy()


async def test_every_bus_reaches_the_guest(boot: Boot) -> None:
    disks = [
        DiskSpec("vda", 8 * MIB, with_id=False, style="drive"),
        DiskSpec("sda", 8 * MIB, bus="virtio-scsi", iothread=True),
        DiskSpec("sdb", 8 * MIB, bus="virtio-scsi", format="raw", style="drive"),
        DiskSpec("nvme", 8 * MIB, bus="nvme"),
        DiskSpec("locked", MIB, readonly=True),
    ]
    vm = await boot(disks, cdrom=True)
    await vm.wait_writes(400)
    await vm.assert_healthy()
    assert vm.first_nodes["sda"] == "drive-sda"
    assert vm.first_nodes["vda"].startswith("#block")
    await vm.pause()
    paths = await copies(vm)
    assert check(paths[:4], run=vm.run, at_least=90).problems == []
    assert (await vm.block_stats())["locked"]["wr_operations"] == 0


async def test_ide_and_plain_drive_reach_the_guest(boot: Boot) -> None:
    disks = [
        DiskSpec("hda", 8 * MIB, bus="ide"),
        DiskSpec("plain", 8 * MIB, style="drive-if", with_id=False),
        DiskSpec("other", 8 * MIB),
    ]
    vm = await boot(disks, cdrom=True)
    await vm.wait_writes(300)
    await vm.pause()
    assert check(await copies(vm), run=vm.run, at_least=90).problems == []


async def test_odd_sizes_are_written_to_their_ends(boot: Boot) -> None:
    disks = [
        DiskSpec("small", 528 * 1024),
        DiskSpec("sector", MIB + 512, format="raw"),
        DiskSpec("nvme", MIB + 512, bus="nvme"),
    ]
    vm = await boot(disks, Workload("random", rate=1500))
    await vm.wait_writes(800)
    await vm.assert_healthy()
    stats = await vm.block_stats()
    await vm.pause()
    for disk, copy in zip(disks, await copies(vm), strict=True):
        content = copy.read_bytes()
        assert len(content) == disk.size_bytes
        assert any(content[-512:])
        # Of the last sector's write, the end is what QEMU saw as the highest offset.
        assert stats[disk.id]["wr_highest_offset"] <= disk.size_bytes


async def test_a_restarted_guest_goes_on_where_it_was(boot: Boot) -> None:
    disks = [DiskSpec("vda", 4 * MIB), DiskSpec("vdb", 4 * MIB)]
    vm = await boot(disks, Workload(rate=400, odirect=False))
    await vm.wait_writes(300)
    with pytest.raises(GuestFailureError, match="still missing"):
        await vm.wait_writes(100_000, 0.3)
    await vm.stop()
    first = [vm.image_path("vda"), vm.image_path("vdb")]
    raws = [vm.folder / "a", vm.folder / "b"]
    for image, raw in zip(first, raws, strict=True):
        await images.to_raw(image, "qcow2", raw)
    before = check(raws, run=vm.run, at_least=100)
    assert before.problems == []

    await vm.start()
    await vm.wait_ready()
    await vm.wait_writes(100)
    await vm.pause()
    after = check(await copies(vm), run=vm.run, at_least=before.last[0] + 20)
    assert after.problems == []


async def test_a_write_error_is_seen_and_reported(boot: Boot) -> None:
    size = 8 * MIB
    slot = slot_of(300, size // 4096)
    broken = DiskSpec("bad", size, format="raw", write_error_at_bytes=slot * 4096)
    vm = await boot([DiskSpec("good", size), broken], Workload(rate=2000))
    await vm.wait_console("VMF error", 20)
    await vm.wait_console("errors=1", 20)
    assert vm.guest_errors() >= 1
    with pytest.raises(GuestFailureError, match=r"saw \d+ write errors") as caught:
        await vm.assert_healthy()
    assert "VMF error errno=5 disk=1" in str(caught.value)
    await vm.pause()
    # It repeats the record, and does not go on: the others never see the next one.
    assert check(await copies(vm), run=vm.run).last == [300, 299]


async def test_latencies_and_leftovers_are_seen_from_outside(boot: Boot, tmp_path: Path) -> None:
    vm = await boot([DiskSpec("vda", iothread=True)], Workload("random", sweep=True, region_bytes=4 * MIB))
    meter = LatencyMeter(vm)
    await meter.read()
    await vm.wait_writes(200)
    written = (await meter.read())["vda"]
    assert written.writes >= 200
    assert written.bytes == written.writes * 65536
    assert 0 < written.mean_ms < 1000
    assert written.slow[1] <= written.writes
    assert written.failed == 0
    assert (await vm.block_stats())["vda"]["wr_highest_offset"] <= 4 * MIB

    assert await leftovers(vm) == []
    image = tmp_path / "left.raw"
    await images.create(image, "raw", MIB)
    node = {"driver": "file", "node-name": "vmf-left", "filename": str(image)}
    await vm.execute("blockdev-add", node)
    assert await leftovers(vm) == ["query-named-block-nodes: vmf-left"]
    await vm.execute("blockdev-del", {"node-name": "vmf-left"})
    await vm.execute("stop")
    assert await leftovers(vm) == ["the VM is paused, not running"]


async def test_the_death_of_qemu_is_reported_at_once(boot: Boot) -> None:
    vm = await boot([DiskSpec("vda")], Workload("idle"), initially_paused=True)
    assert (await vm.execute("query-status"))["status"] == "prelaunch"
    assert vm.product_socket.is_socket()
    assert await leftovers(vm) == []
    assert vm.pid is not None
    os.kill(vm.pid, signal.SIGKILL)
    with pytest.raises(GuestFailureError, match="exit code -9"):
        await vm.wait_ready(30)
    with pytest.raises(GuestFailureError):
        await vm.execute("query-status")
    assert not vm.alive()


async def test_qemu_does_not_outlive_its_test(tmp_path: Path, boot: Boot) -> None:  # noqa: ARG001
    script = (
        "import asyncio, os, pathlib, sys\n"
        "from tests.guest.vm import GuestVm\n"
        "async def main():\n"
        "    vm = GuestVm(pathlib.Path(sys.argv[1]), initially_paused=True)\n"
        "    await vm.start()\n"
        "    print(vm.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path / "vm"), cwd=root, stdout=-1
    )
    output, _ = await process.communicate()
    pid = int(output)
    for _ in range(250):
        if not runs(pid):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"QEMU {pid} is still there")


def runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


async def test_a_configuration_that_qemu_refuses_says_why(boot: Boot) -> None:
    with pytest.raises(GuestFailureError, match="no-such-device"):
        await boot(extra_args=["-device", "no-such-device"])
