"""What was overwritten and what was not, side by side: a copy must take each cluster from the right place.

QEMU before 8.0 looks at the disk for all that one request asks for if the first cluster of it was overwritten and
a later one was not. What it reads there is wrong only if the guest wrote in that very moment; but where the guest
wrote zeroes, the job sees that, asks for no data, and the copy is zero.
"""

import asyncio
import itertools
from pathlib import Path

import pytest

from orchestrator.model import Discard, Phase
from tests.guest.versions import qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.hooks import At
from tests.qemu.host import FLEECED, Host, assert_succeeded

CLUSTER = 64 * 1024
SIZE = 4 * MIB


@pytest.mark.parametrize(
    ("version", "discard", "first"),
    [
        *itertools.product(["7.2"], [Discard.JOB, Discard.WINDOW], [0, 1]),
        ("10.0", Discard.JOB, 0),
        ("11.1", Discard.JOB, 0),
    ],
)
async def test_every_other_cluster_is_zeroed(version: str, discard: Discard, first: int, tmp_path: Path) -> None:
    async with GuestVm(tmp_path / "vm", [DiskSpec("vda", SIZE)], Workload("idle"), qemu=qemu(version)) as vm:
        await vm.wait_ready()
        await vm.write("vda", 0, SIZE, pattern=3)
        jobs_may_start = asyncio.Event()
        host = Host(tmp_path, vm, connect=At("blockdev-backup", jobs_may_start.wait))
        async with host.backing_up(FLEECED, discard=discard) as under_way:
            await under_way.until(lambda: under_way.phase is Phase.COPYING, "the point in time")
            for offset in range(first * CLUSTER, SIZE, 2 * CLUSTER):
                await vm.write("vda", offset, CLUSTER, pattern=None)
            jobs_may_start.set()
        assert_succeeded(under_way.result)
        (restored,) = (await host.restored()).values()
        assert restored.read_bytes() == b"\3" * SIZE
