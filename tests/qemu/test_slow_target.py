"""A slow target slows the backup down, and with fleecing nothing else.

Figures are compared with the same guest's own a moment before; nothing here depends on how fast the machine is.
"""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from benchmarks import slow_target
from tests.guest import images
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.host import DIRECT, FLEECED, Host, assert_succeeded

pytestmark = pytest.mark.asyncio(loop_scope="module")

TARGET_BYTES_PER_SECOND = 5_000_000
STALL_SECONDS = 2
IOTHREADS = [
    DiskSpec("vda", 4 * MIB, format="raw", iothread=True),
    DiskSpec("vdb", 16 * MIB, format="raw", iothread=True),
]
FOUR = [
    DiskSpec("vda", 3 * MIB, format="raw"),
    DiskSpec("sda", 6 * MIB, format="raw", bus="virtio-scsi"),
    DiskSpec("nvme", 9 * MIB, format="raw", bus="nvme"),
    DiskSpec("vdb", 14 * MIB, format="raw"),
]


@dataclass(frozen=True, slots=True)
class Machine:
    """Disks of different sizes, so that one is released while others still copy."""

    disks: Sequence[DiskSpec]

    @property
    def limits(self) -> list[str]:
        return slow_target.qemu_arguments(TARGET_BYTES_PER_SECOND, disks=len(self.disks))

    @contextlib.asynccontextmanager
    async def booted(self, folder: Path) -> AsyncIterator[GuestVm]:
        """A guest that writes at a moderate rate to disks that are full of data."""
        workload = Workload("random", block_bytes=4096, rate=400)
        guest = GuestVm(folder, self.disks, workload, extra_args=self.limits)
        guest.folder.mkdir(exist_ok=True)
        for disk in self.disks:
            images.fill(guest.image_path(disk.id), disk.size_bytes)
        async with guest:
            await guest.wait_ready()
            await guest.wait_writes(400)
            yield guest


MACHINES = [
    pytest.param(Machine(IOTHREADS), id="two"),
    pytest.param(Machine(FOUR), id="four"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=MACHINES)
async def slowed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GuestVm]:
    folder = tmp_path_factory.mktemp("vm")
    machine: Machine = request.param
    async with machine.booted(folder) as guest:
        yield guest
    shutil.rmtree(folder)


class Writes:
    """Counts the guest's writes over a time."""

    def __init__(self, vm: GuestVm) -> None:
        self._vm = vm
        self._stalls = len(vm.stalls_us())

    async def begin(self) -> None:
        self._since = asyncio.get_running_loop().time()
        self._before = await self._vm.writes()

    async def per_second(self) -> float:
        seconds = asyncio.get_running_loop().time() - self._since
        return (await self._vm.writes() - self._before) / seconds

    def stalls_seconds(self) -> list[float]:
        """The guest's own word, since this was made."""
        return [us / 1e6 for us in self._vm.stalls_us()[self._stalls :]]


async def usual(vm: GuestVm) -> float:
    """Writes per second without a backup."""
    writes = Writes(vm)
    await writes.begin()
    await asyncio.sleep(3)
    return await writes.per_second()


async def test_with_fleecing_the_guest_goes_on_as_before(slowed: GuestVm, tmp_path: Path) -> None:
    await assert_goes_on(slowed, tmp_path)


async def assert_goes_on(vm: GuestVm, folder: Path) -> None:
    """While it is backed up with fleecing, the guest writes at least half as much as before."""
    host = Host(folder, vm, connect=slow_target.connect)
    before = await usual(vm)
    writes = Writes(vm)
    await writes.begin()
    result = await host.back_up(FLEECED)
    during = await writes.per_second()
    stalls = writes.stalls_seconds()
    assert_succeeded(result)
    # It was slow indeed, so disks were released while others copied for seconds.
    assert result.duration_seconds > 4
    assert during > before / 2, (
        f"{during:.0f} writes/s instead of {before:.0f}; stalls {writes.stalls_seconds()} s"
    )
    assert max(writes.stalls_seconds(), default=0) < STALL_SECONDS
    await host.assert_as_before()
    print(f"{before:.0f} writes/s before, {during:.0f} during; stalls {stalls} s")  # noqa: T201


async def test_without_fleecing_the_guest_waits_for_the_target(slowed: GuestVm, tmp_path: Path) -> None:
    """The control: the same guest, the same target."""
    vm = slowed
    host = Host(tmp_path, vm, connect=slow_target.connect)
    before = await usual(vm)
    writes = Writes(vm)
    async with host.backing_up(DIRECT) as under_way:
        await under_way.copying()
        await writes.begin()
        await asyncio.sleep(3)
        during = await writes.per_second()
        assert under_way.task is not None
        under_way.task.cancel()
    assert during < before / 2, f"{during:.0f} writes/s, and {before:.0f} before"
    await host.assert_as_before()
