"""A write that lands between any two commands of a run is in its snapshot, in the next one's bitmap, or in both.

One that were in neither would be missing from the chain for ever, and nothing would say so. Each write goes to a
cluster of its own, through the disk's device, on whatever node that is by then: so no later one hides that it was
missed, and what each run has to copy is known to the cluster.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.slow_target import PassingMonitor
from orchestrator.model import Kind, RunResult
from orchestrator.qemu import qmp
from orchestrator.qemu.commands import CONT, STOP, Command
from orchestrator.qemu.monitor import DEADLINE_SECONDS, Monitor
from tests.guest.versions import qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.host import FLEECED, Host, assert_succeeded

CLUSTER = 64 * 1024
WRITE_BYTES = 4096
SIZE_BYTES = 64 * MIB
CHANGES = ("block-dirty-bitmap-add", "stop", "blockdev-reopen", "block-dirty-bitmap-disable")


class Writes:
    """One to each disk before each command of a run, for as long as it is `on`; `made` so far.

    `before`: how many there were when a run first did each of CHANGES.
    """

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        self.on = True
        self.made = 0
        self.before: dict[str, int] = {}
        self._paused = False
        self._one_at_a_time = asyncio.Lock()

    async def step(self, command: Command) -> None:
        """The command is sent next."""
        async with self._one_at_a_time:
            if self.on and not self._paused:
                for disk in self.vm.disks:
                    await self.vm.write(disk.id, self.made * CLUSTER, WRITE_BYTES, pattern=pattern(self.made))
                self.made += 1
        self._paused = (self._paused or command == STOP) and command != CONT
        for name in (command.name, *(action["type"] for action in command.arguments.get("actions", []))):
            if name in CHANGES:
                self.before.setdefault(name, self.made)

    def __call__(self, path: Path, *, vm: str) -> AbstractAsyncContextManager[Monitor]:
        """How the product reaches the VM."""
        return self._connect(path, vm)

    @contextlib.asynccontextmanager
    async def _connect(self, path: Path, vm: str) -> AsyncIterator[Monitor]:
        self.before.clear()
        async with qmp.connect(path, vm=vm) as monitor:
            yield OneByOne(monitor, self)


class OneByOne(PassingMonitor):
    """Sends the commands of a pipeline one after the other, with writes in between."""

    def __init__(self, inner: qmp.QmpMonitor, writes: Writes) -> None:
        super().__init__(inner)
        self._writes = writes

    async def pipeline(
        self, commands: Sequence[Command], *, deadline_seconds: float = DEADLINE_SECONDS
    ) -> list[Any]:
        replies = []
        for command in commands:
            await self._writes.step(command)
            replies += await self._inner.pipeline([command], deadline_seconds=deadline_seconds)
        return replies


def pattern(number: int) -> int:
    return number % 255 + 1


def content(writes: int) -> bytes:
    """A disk after so many writes."""
    clusters = (bytes([pattern(number)]) * WRITE_BYTES + bytes(CLUSTER - WRITE_BYTES) for number in range(writes))
    return b"".join(clusters).ljust(SIZE_BYTES, b"\0")


async def backed_up(host: Host) -> RunResult:
    result = await host.back_up(FLEECED)
    assert_succeeded(result)
    return result


async def assert_restores(host: Host, *, writes: int) -> None:
    """The newest snapshot is the moment after so many writes, on all disks."""
    for disk, path in (await host.restored()).items():
        right = path.read_bytes() == content(writes)
        assert right, f"disk {disk} is not as after {writes} writes"


def copied(result: RunResult) -> set[int]:
    """How many clusters, of each disk."""
    return {disk.copied_bytes // CLUSTER for disk in result.disks}


@pytest.mark.parametrize(
    ("version", "iothread"),
    [
        pytest.param("7.2", False, id="7.2"),
        pytest.param("7.2", True, id="7.2, iothreads"),
        pytest.param("10.0", False, id="10.0"),
        pytest.param("11.1", True, id="11.1, iothreads"),  # the two take the same way
    ],
)
async def test_a_write_between_any_two_commands_is_not_missed(
    version: str, iothread: bool, tmp_path: Path
) -> None:
    disks = [
        DiskSpec("vda", SIZE_BYTES, iothread=iothread),
        DiskSpec("vdb", SIZE_BYTES, format="raw", iothread=iothread),
    ]
    async with GuestVm(tmp_path / "vm", disks, Workload("idle"), qemu=qemu(version)) as vm:
        await vm.wait_ready()
        writes = Writes(vm)
        host = Host(tmp_path, vm, connect=writes)
        moment_at = "stop" if version == "7.2" else "blockdev-reopen"

        first = await backed_up(host)
        assert first.kind is Kind.FULL
        begun = writes.before["block-dirty-bitmap-add"]
        moment = writes.before[moment_at]
        assert 0 < begun <= moment < writes.made
        await assert_restores(host, writes=moment)

        for _ in range(2):
            result = await backed_up(host)
            assert result.kind is Kind.INCREMENTAL
            moment, ended = writes.before[moment_at], writes.before["block-dirty-bitmap-disable"]
            await assert_restores(host, writes=moment)
            assert copied(result) == {ended - begun}
            begun = writes.before["block-dirty-bitmap-add"]
            assert begun <= moment <= ended < writes.made

        writes.on = False
        last = await backed_up(host)
        await assert_restores(host, writes=writes.made)
        assert copied(last) == {writes.made - begun}
        await host.assert_as_before(writes=False)
        await vm.assert_healthy()
