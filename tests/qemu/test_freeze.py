"""Freezing real file systems through Debian's own guest agent: what is in the backup then, and that a guest is not
left frozen whatever happens to its agent, to the run or to vmfleece.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from orchestrator.errors import StorageError
from orchestrator.model import Consistency, Outcome, RunResult
from orchestrator.qemu import agent as agent_module
from orchestrator.qemu.agent import GuestAgent
from tests.guest import agent, ext4
from tests.guest.versions import qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.hooks import At
from tests.qemu.host import Host, assert_failed, assert_succeeded
from tests.qemu.proxy import Proxy
from tests.qemu.under_way import said, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

DISKS = [
    DiskSpec("vda", 32 * MIB, format="raw", iothread=True),
    DiskSpec("sda", 32 * MIB, format="raw", bus="virtio-scsi"),
]
SNAPSHOT = "block-dirty-bitmap-add"
"""It is in the first pipeline that is sent while the guest is frozen, ..."""
FIRST = {"10.0": SNAPSHOT, "7.2": "stop"}
"""... which begins with this."""
STALL_SECONDS = 5
HELD_SECONDS = 0.3
"""Long enough to be a stall by the guest's own measure."""
JOB = """
[job.once]
vms = ["*"]
target = "main"
fleecing = "enabled=1,storage=local"
consistency = "freeze"
"""


@pytest.fixture(scope="module", params=FIRST)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(version: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuestVm]:
    folder = tmp_path_factory.mktemp("vm")
    async with GuestVm(folder, DISKS, Workload("files", rate=50), qemu=qemu(version), agent=True) as guest:
        await guest.wait_ready()
        yield guest
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "SYNC_SECONDS", 0.5)


async def frozen_backup(host: Host) -> RunResult:
    return await host.back_up(consistency=Consistency.FREEZE)


async def file_systems_said_frozen(host: Host) -> int:
    return int((await host.snapshots())[-1].details["frozen_file_systems"])


async def assert_frozen(vm: GuestVm) -> None:
    await asyncio.sleep(0.1)  # what was synced before is told by then
    newest = agent.synced(vm)
    await asyncio.sleep(HELD_SECONDS)
    assert agent.synced(vm) == newest


async def assert_goes_on(host: Host) -> None:
    assert await agent.freeze_status(host.vm) == "thawed"
    await agent.wait_synced(host.vm, 10)
    assert max(host.vm.stalls_us(), default=0) < STALL_SECONDS * 1_000_000
    await host.assert_as_before()


async def assert_the_next_one_is_frozen(host: Host) -> None:
    assert_succeeded(await frozen_backup(host))
    assert await file_systems_said_frozen(host) == len(DISKS)
    await assert_goes_on(host)


async def test_frozen_file_systems_are_whole_without_their_journal(vm: GuestVm, tmp_path: Path) -> None:
    stalls, newest = len(vm.stalls_us()), 0

    async def note() -> None:
        nonlocal newest
        await assert_frozen(vm)
        newest = agent.synced(vm)

    host = Host(tmp_path, vm, connect=At(SNAPSHOT, note))
    assert_succeeded(await frozen_backup(host))
    assert await file_systems_said_frozen(host) == len(DISKS)
    assert newest > 0
    for image in (await host.restored()).values():
        assert not await ext4.needs_recovery(image)
        await ext4.check(image)
        assert await ext4.wrong_files(image, newest) == []
    await assert_goes_on(host)
    assert len(vm.stalls_us()) > stalls


async def test_other_file_systems_are_as_after_a_power_cut(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    await agent.wait_synced(vm, 10)
    newest = agent.synced(vm)
    assert_succeeded(await host.back_up())
    assert await file_systems_said_frozen(host) == 0
    for image in (await host.restored()).values():
        assert await ext4.needs_recovery(image)
        assert await ext4.wrong_files(image, newest) != []
    await assert_goes_on(host)


# --- the agent ---


@pytest.mark.parametrize(
    ("trouble", "remedy"),
    [
        ("killall -KILL qemu-ga", "start_agent"),
        ("killall -STOP qemu-ga", "killall -CONT qemu-ga"),
    ],
    ids=["killed", "stopped"],
)
async def test_an_agent_that_does_not_answer_is_a_warning(
    vm: GuestVm, tmp_path: Path, trouble: str, remedy: str
) -> None:
    host = Host(tmp_path, vm)
    await agent.run(vm, trouble)
    try:
        result = await frozen_backup(host)
    finally:
        await agent.run(vm, remedy)
    assert result.outcome is Outcome.WARNING, result
    assert result.snapshot is not None
    (warning,) = result.warnings
    assert "did not answer guest-sync-delimited" in warning
    assert await file_systems_said_frozen(host) == 0
    await assert_goes_on(host)
    await assert_the_next_one_is_frozen(host)


async def test_a_freeze_that_is_carried_out_too_late_is_undone_at_once(
    vm: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent stands still from before the freeze until nobody waits for it any more."""
    freeze = GuestAgent.freeze

    async def freeze_stopped(self: GuestAgent) -> int:
        await agent.run(vm, "killall -STOP qemu-ga")
        return await freeze(self, deadline_seconds=0.5)

    impatiently(monkeypatch)
    monkeypatch.setattr(GuestAgent, "freeze", freeze_stopped)
    host = Host(tmp_path, vm)
    try:
        result = await frozen_backup(host)
    finally:
        await agent.run(vm, "killall -CONT qemu-ga")
    assert result.outcome is Outcome.WARNING, result
    assert "did not answer guest-fsfreeze-freeze" in result.warnings[0]
    await assert_goes_on(host)
    monkeypatch.undo()
    await assert_the_next_one_is_frozen(host)


async def test_an_agent_that_was_started_anew_meanwhile_thaws(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm, connect=At(SNAPSHOT, lambda: agent.run(vm, "killall -KILL qemu-ga; start_agent")))
    assert_succeeded(await frozen_backup(host))
    assert await file_systems_said_frozen(host) == len(DISKS)
    await assert_goes_on(host)


async def test_an_agent_that_comes_back_later_thaws_then(
    vm: GuestVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatiently(monkeypatch)
    host = Host(tmp_path, vm, connect=At(SNAPSHOT, lambda: agent.run(vm, "killall -KILL qemu-ga")))
    try:
        result = await frozen_backup(host)
        assert result.error is None
        assert await file_systems_said_frozen(host) == len(DISKS)
        await assert_frozen(vm)
    finally:
        await agent.run(vm, "start_agent")
    async with host.opened():
        await agent.wait_synced(vm, 10)
    await assert_goes_on(host)


def impatiently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait long for a thaw."""
    thaw = GuestAgent.thaw

    async def thaw_soon(self: GuestAgent) -> int:
        return await thaw(self, deadline_seconds=0.5)

    monkeypatch.setattr(GuestAgent, "thaw", thaw_soon)


# --- the run ---


async def test_a_snapshot_that_fails_leaves_nothing_frozen(vm: GuestVm, tmp_path: Path) -> None:
    async def fail() -> None:
        await assert_frozen(vm)
        raise StorageError("the test wants it so", code="wanted")

    host = Host(tmp_path, vm, connect=At(SNAPSHOT, fail, after=True))
    result = await frozen_backup(host)
    assert_failed(result, "wanted")
    await assert_goes_on(host)


async def test_a_cancelled_run_leaves_nothing_frozen(vm: GuestVm, tmp_path: Path) -> None:
    reached = asyncio.Event()

    async def wait_for_the_end() -> None:
        reached.set()
        await asyncio.Event().wait()

    host = Host(tmp_path, vm, connect=At(SNAPSHOT, wait_for_the_end))
    async with host.backing_up(consistency=Consistency.FREEZE) as under_way:
        assert under_way.task is not None
        await under_way.until(reached.is_set, SNAPSHOT)
        await assert_frozen(vm)
        under_way.task.cancel()
    assert under_way.task.cancelled()
    await assert_goes_on(host)


async def test_what_a_killed_process_left_frozen_is_thawed_at_the_next_start(
    vm: GuestVm, version: str, tmp_path: Path
) -> None:
    with Proxy(vm.product_socket.with_name("proxy.sock"), vm.product_socket) as proxy:
        host = Host(tmp_path, vm, socket=proxy.path, more=JOB)
        proxy.hold_before(FIRST[version])
        process = await host.command("job", "run", "once")
        await until(proxy.held.is_set, "the snapshot")
        process.kill()
        await said(process)
        await assert_frozen(vm)
        async with host.opened():
            async with asyncio.timeout(STALL_SECONDS):
                await agent.wait_synced(vm, 1)
        await assert_the_next_one_is_frozen(host)
    proxy.path.unlink()
