"""Guest writes outside what an incremental backup copies cost nothing, which the fleecing image's peak shows."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from orchestrator.model import Kind, Phase
from tests.guest.versions import QEMUS, qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.hooks import At
from tests.qemu.host import Host, assert_succeeded

CHANGED = MIB
OUTSIDE = 24 * MIB
OVERHEAD = 2 * MIB
"""The image's own tables, and a cluster or two."""


@pytest.mark.parametrize(
    ("version", "iothread", "server"),
    [
        *(pytest.param(version, True, "free", id=f"{version}, iothreads") for version in QEMUS),
        pytest.param("10.0", False, "free", id="10.0"),
        pytest.param("10.0", True, "taken", id="somebody else uses QEMU's NBD server"),
    ],
)
async def test_writes_outside_cost_nothing(version: str, iothread: bool, server: str, tmp_path: Path) -> None:
    disks = [DiskSpec("vda", 64 * MIB, iothread=iothread), DiskSpec("vdb", 32 * MIB, iothread=iothread)]
    async with GuestVm(tmp_path / "vm", disks, Workload("idle"), qemu=qemu(version)) as vm:
        await vm.wait_ready()
        await vm.write("vda", 0, 64 * MIB, pattern=3)  # old data that is zero would occupy nothing
        jobs_may_start = asyncio.Event()
        jobs_may_start.set()
        host = Host(tmp_path, vm, connect=At("blockdev-backup", jobs_may_start.wait))
        assert_succeeded(await host.back_up())
        await vm.write("vda", 8 * MIB, CHANGED, pattern=5)
        if server == "taken":
            path = str(tmp_path / "nbd.sock")
            await vm.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
        await vm.pause()
        moment = await host.copies()
        await vm.resume()
        jobs_may_start.clear()
        async with host.backing_up() as under_way:
            await under_way.until(lambda: under_way.phase is Phase.COPYING, "the point in time")
            await vm.write("vda", 16 * MIB, OUTSIDE, pattern=7)
            await vm.write("vda", 8 * MIB, CHANGED, pattern=7)
            jobs_may_start.set()
        assert_succeeded(under_way.result)
        assert under_way.result.kind is Kind.INCREMENTAL
        await host.assert_restores(moment)
        peak = peak_bytes(under_way.result.as_json())
        assert peak >= CHANGED
        if server == "free" or version == "7.2":
            assert peak <= CHANGED + OVERHEAD
        else:
            assert peak >= OUTSIDE
        assert await vm.execute("query-block-exports") == []
        if server == "taken":
            await vm.execute("nbd-server-stop")  # is still theirs
        await host.assert_as_before(writes=False)


def peak_bytes(result: dict[str, Any]) -> int:
    (vda,) = [disk["fleecing_peak_bytes"] for disk in result["disks"] if "vda" in disk["disk"]]
    return int(vda)
