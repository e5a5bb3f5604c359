"""What happens to a VM while it is backed up, and a guest that a killed vmfleece leaves paused."""

import asyncio
import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from qemu.qmp import ExecuteError

from orchestrator.errors import EXIT_OK
from orchestrator.model import Outcome
from orchestrator.state.journal import Act, Journal
from tests.guest.leftovers import leftovers
from tests.guest.versions import qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.host import FLEECED, SLOWLY, Host, assert_failed, assert_succeeded
from tests.qemu.proxy import Proxy
from tests.qemu.under_way import said, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

DISKS = [
    DiskSpec("vda", 16 * MIB, iothread=True),
    DiskSpec("sda", 8 * MIB, bus="virtio-scsi", format="raw"),
    DiskSpec("sdb", 4 * MIB, bus="virtio-scsi", format="raw"),
    DiskSpec("sdc", 4 * MIB, bus="virtio-scsi", format="raw"),
]
WORKLOAD = Workload("random", disks=("vda", "sda"), block_bytes=16 * 1024, rate=1500)
FIRST_WHILE_PAUSED = "block-dirty-bitmap-add"
JOB = """
[job.yearly]
schedule = "*-01-01 03:00"
repeat_missed = false
vms = ["web01"]
target = "main"
fleecing = "enabled=1,storage=local"
"""
SILENT_VMS = 20
READY = "VMF ready"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["10.0", "7.2"])
async def vm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuestVm]:
    folder = tmp_path_factory.mktemp("vm")
    async with GuestVm(folder, DISKS, WORKLOAD, qemu=qemu(request.param)) as guest:
        await guest.wait_ready()
        yield guest
    shutil.rmtree(folder)


@pytest.fixture
def silent() -> Iterator[dict[str, Path]]:
    """Monitors that take connections and never say anything, like those of QEMUs that stand still."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmf")))
        monitors = {f"silent{number}": folder / str(number) for number in range(SILENT_VMS)}
        for path in monitors.values():
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            listener.listen()
        yield monitors


@pytest.mark.parametrize("vm", ["7.2"], indirect=True)
async def test_a_guest_that_a_killed_process_left_paused_goes_on_at_once(
    vm: GuestVm, tmp_path: Path, silent: dict[str, Path]
) -> None:
    """Also if other VMs do not answer, whose guests may be paused as well."""
    with Proxy(vm.product_socket.with_name("proxy.sock"), vm.product_socket) as proxy:
        more = JOB + "".join(f'[vm.{name}]\nqmp = "{path}"\n' for name, path in silent.items())
        host = Host(tmp_path / "host", vm, socket=proxy.path, more=more)
        proxy.hold_before(FIRST_WHILE_PAUSED)
        process = await host.command("job", "run", "yearly")
        await until(proxy.held.is_set, "the snapshot")
        process.kill()
        await said(process)
        assert (await vm.execute("query-status"))["status"] == "paused"
        journal = Journal(tmp_path / "host" / "state")
        (left,) = journal.open()
        assert (left.act, left.vm) == (Act.PAUSE, "web01")
        for name, path in silent.items():
            journal.intend(Act.PAUSE, vm=name, run="0", subject=f"its-process {path}")

        started = time.monotonic()
        assert (await host.run("config", "check")).code == 0
        loading_seconds = time.monotonic() - started
        started = time.monotonic()
        daemon = await host.command("daemon")
        async with asyncio.timeout(30):
            while not (await vm.execute("query-status"))["running"]:
                await asyncio.sleep(0.01)
        took_seconds = time.monotonic() - started
        print(f"continued {took_seconds:.2f} s after the start; loading alone takes {loading_seconds:.2f} s")  # noqa: T201
        assert took_seconds < 2 * loading_seconds + 1  # who waits for a silent one first waits for 10 s

        await until(lambda: [one.vm for one in journal.open() if one.vm == "web01"] == [], "the journal")
        daemon.terminate()
        ended = await said(daemon)
        assert ended.code == EXIT_OK, ended
        assert '"guest.continued"' in ended.err
        assert_succeeded(await host.back_up(FLEECED))
        await host.assert_as_before()
    proxy.path.unlink()


async def test_what_others_do_to_disks_meanwhile_is_theirs_and_not_in_the_snapshot(
    vm: GuestVm, tmp_path: Path
) -> None:
    """One disk grows and is written past its old end, one gets somebody else's job, one is unplugged."""
    host = Host(tmp_path, vm)
    await vm.pause()
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        moment = await host.copies()
        await vm.resume()
        with pytest.raises(ExecuteError):  # QEMU refuses it below our filter: shrunk there, it would abort
            await vm.execute("block_resize", {"node-name": "drive-vda", "size": 8 * MIB})
        ours = (await vm.current_nodes())["vda"]
        await vm.execute("block_resize", {"node-name": ours, "size": 24 * MIB})
        writing = 'qemu-io -d /machine/peripheral/disk-vda/virtio-backend "write -P 7 15M 8M"'
        said = await vm.execute("human-monitor-command", {"command-line": writing})
        assert "error" not in said
        await vm.execute("blockdev-add", {"driver": "null-co", "node-name": "theirs", "size": 4 * MIB})
        job = {"job-id": "their-job", "device": "drive-sdc", "target": "theirs", "sync": "full", "speed": 1 << 16}
        await vm.execute("blockdev-backup", job)
        await vm.wait_writes(500)
        await vm.execute("device_del", {"id": "disk-sdb"})
        await under_way.hurry()
    result = under_way.result
    assert result.outcome is Outcome.WARNING, result
    assert result.warnings == ("disk disk-sdb was unplugged meanwhile; the snapshot has it as it was",)
    await host.assert_restores(moment)
    (theirs,) = await vm.execute("query-block-jobs")
    assert (theirs["device"], theirs["status"]) == ("their-job", "running")
    await vm.execute("block-job-cancel", {"device": "their-job"})
    async with asyncio.timeout(20):
        while await vm.execute("query-block-jobs"):
            await asyncio.sleep(0.05)
    await vm.execute("blockdev-del", {"node-name": "theirs"})
    plug = {"driver": "scsi-hd", "id": "disk-sdb", "bus": "scsi0.0", "drive": "drive-sdb"}
    await vm.execute("device_add", plug)
    await host.assert_as_before()
    again = await host.back_up(FLEECED)
    assert_succeeded(again)
    sizes = {disk.disk: disk.size_bytes for disk in again.disks}
    assert sizes == {"disk-vda": 24 * MIB, "disk-sda": 8 * MIB, "disk-sdb": 4 * MIB, "disk-sdc": 4 * MIB}


async def test_a_migration_is_not_held_up_and_ends_the_run(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    await vm.execute("migrate-set-parameters", {"max-bandwidth": MIB})
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        await vm.execute("migrate", {"uri": "exec:cat > /dev/null"})
    assert_failed(under_way.result, "vm-migrating")
    assert under_way.result.retryable
    assert (await vm.execute("query-migrate"))["status"] == "active"
    await host.assert_as_before()
    assert await host.snapshots() == []
    assert_failed(await host.back_up(FLEECED), "vm-state")
    await vm.execute("migrate_cancel")
    async with asyncio.timeout(20):
        while (await vm.execute("query-migrate"))["status"] != "cancelled":
            await asyncio.sleep(0.05)
    assert_succeeded(await host.back_up(FLEECED))
    await host.assert_as_before()


async def test_a_guest_that_is_reset_and_shut_down_meanwhile_is_backed_up_to_the_end(
    vm: GuestVm, tmp_path: Path
) -> None:
    """It boots again and writes on; its QEMU stays when it is shut down (-no-shutdown)."""
    host = Host(tmp_path, vm)
    await vm.execute("set-action", {"reboot": "reset"})
    await vm.pause()
    async with host.backing_up(FLEECED, bwlimit=SLOWLY) as under_way:
        await under_way.copying()
        moment = await host.copies()
        await vm.resume()
        await vm.wait_writes(200)
        boots = vm.console().count(READY)
        await vm.execute("system_reset")
        await vm.wait_until(lambda: vm.console().count(READY) > boots, "the guest to boot again", 60)
        await vm.wait_writes(200)
        await vm.assert_healthy()
        assert not under_way.ended()
        await vm.execute("set-action", {"shutdown": "pause", "reboot": "shutdown"})
        await vm.execute("system_reset")
        await under_way.until(lambda: under_way.fleecing_bytes() > 0, "old data")
        async with asyncio.timeout(20):
            while (await vm.execute("query-status"))["status"] != "shutdown":
                await asyncio.sleep(0.05)
        await under_way.hurry()
    assert_succeeded(under_way.result)
    await host.assert_restores(moment)
    # QEMU before 9.0 closes descriptors only while its guest runs (monitor_fdset_cleanup in monitor/fds.c).
    left = [line for line in await leftovers(vm) if not line.startswith("fdset")]
    assert left == ["the VM is shutdown, not running"]
    await vm.execute("set-action", {"shutdown": "poweroff", "reboot": "reset"})
    await vm.execute("system_reset")
    await vm.execute("cont")
    assert_succeeded(await host.back_up(FLEECED))
    assert await leftovers(vm) == []
    host.assert_no_files()
