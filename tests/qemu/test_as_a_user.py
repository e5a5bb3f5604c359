"""The commands as an administrator types them: what they print, how they exit, and what signals do to them."""

import asyncio
import json
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.guest import images, sequence
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.host import VM, Host
from tests.qemu.under_way import Said, said, until_jobs_run

pytestmark = pytest.mark.asyncio(loop_scope="module")

DISKS = [DiskSpec("vda", 16 * MIB, iothread=True), DiskSpec("vdb", 8 * MIB, format="raw")]
SLOW = ("--bwlimit", "512")

JOB = """
[job.often]
schedule = "*:*:0/3"
vms = ["*"]
target = "main"
fleecing = "enabled=1,storage=local"
bwlimit = "{bwlimit}"
retries = 0
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuestVm]:
    folder = tmp_path_factory.mktemp("vm")
    async with GuestVm(folder, DISKS, Workload("sequence", rate=2000)) as guest:
        await guest.wait_ready()
        await guest.wait_writes(6000)  # each place of both disks is written once
        yield guest
    shutil.rmtree(folder)


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than the guest's disks."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="vmfleece-test-") as folder:
        assert Path(folder).stat().st_dev != tmp_path.stat().st_dev, "the tests' own folder is in /dev/shm"
        yield Path(folder)


def document(one: Said, *, code: int = 0) -> dict[str, Any]:
    """What a command printed as JSON, and nothing else."""
    assert one.code == code, one
    found = json.loads(one.out)
    assert isinstance(found, dict)
    return found


async def test_backup_list_and_restore(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    backup = await host.run("backup", VM, "--target", "main", "--fleecing", "enabled=1,storage=local", "--json")
    (run,) = document(backup)["runs"]
    assert backup.err == ""
    assert run["vm"] == VM
    assert run["outcome"] == "succeeded"
    assert run["error"] is None
    assert run["kind"] == "full"
    assert run["pause_ms"] > 0
    assert run["duration_seconds"] > 0
    assert {disk["disk"]: (disk["size_bytes"], disk["copied_bytes"]) for disk in run["disks"]} == {
        f"disk-{disk.id}": (disk.size_bytes, disk.size_bytes) for disk in DISKS
    }
    assert {disk["storage"] for disk in run["disks"]} == {"local"}

    listed = document(await host.run("snapshot", "list", "--json"))["snapshots"]
    assert [snapshot["id"] for snapshot in listed] == [run["snapshot"]]
    shown = await host.run("snapshot", "show", f"{VM}@latest", "--json")
    assert run["snapshot"] in shown.out
    assert run["snapshot"] in (await host.run("snapshot", "list")).out

    raw, qcow2 = tmp_path / "raw", tmp_path / "qcow2"
    for folder, options in ((raw, ()), (qcow2, ("--format", "qcow2"))):
        folder.mkdir()
        restored = await host.run("restore", f"{VM}@latest", "--all", "--to", str(folder), *options)
        assert restored.code == 0, restored
    paths = sorted(raw.iterdir())
    verdict = await asyncio.to_thread(sequence.check, paths, run=vm.run, at_least=1000)
    assert verdict.problems == []
    for disk, path, other in zip(DISKS, paths, sorted(qcow2.iterdir()), strict=True):
        again = tmp_path / disk.id
        await images.to_raw(other, "qcow2", again)
        assert images.compare(path, again).identical
    one = await host.run("restore", run["snapshot"], "--disk", "disk-vdb", "--to", str(tmp_path / "one"))
    assert one.code == 0, one
    assert images.compare(paths[1], tmp_path / "one").identical
    twice = await host.run("restore", run["snapshot"], "--disk", "disk-vdb", "--to", str(tmp_path / "one"))
    assert twice.code == 1
    await host.assert_as_before()
    shutil.rmtree(tmp_path)


async def test_what_a_vm_is_and_what_a_backup_would_do(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm, exclude=["disk-vdb"])
    (listed,) = document(await host.run("vm", "list", "--json"))["vms"]
    assert (listed["vm"], listed["reachable"], listed["status"]) == (VM, True, "running")
    shown = document(await host.run("vm", "show", VM, "--json"))
    disks = {disk["disk"]: disk for disk in shown["disks"]}
    assert disks["disk-vda"]["size_bytes"] == 16 * MIB
    assert (disks["disk-vda"]["backup"], disks["disk-vda"]["storage"]) == ("full", "local")
    assert disks["disk-vdb"]["backup"] == "skipped"
    assert VM in (await host.run("vm", "list")).out
    assert "disk-vdb" in (await host.run("vm", "show", VM)).out
    await host.assert_as_before()


async def test_wrong_usage_exits_with_2(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    for arguments in (
        ("backup", "nobody", "--target", "main"),
        ("backup", VM),  # which target?
        ("backup", VM, "--target", "main", "--fleecing", "enabled=1,storage=none"),
        ("backup", VM, "--target", "main", "--bwlimit", "fast"),
        ("backup",),
    ):
        assert (await host.run(*arguments)).code == 2, arguments
    await host.assert_as_before()


async def test_an_unreachable_vm_and_a_reachable_one(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm, more=f'[vm.gone]\nqmp = "{tmp_path}/gone.sock"\n')
    both = await host.run("backup", "*", "--target", "main", "--json")
    outcomes = {run["vm"]: run["outcome"] for run in document(both, code=3)["runs"]}
    assert outcomes == {VM: "succeeded", "gone": "failed"}
    only = await host.run("backup", "gone", "--target", "main", "--json")
    (run,) = document(only, code=1)["runs"]
    assert run["error"]["code"] == "vm-unreachable"
    await host.assert_as_before()


async def test_fleecing_without_a_storage_takes_the_disks_own(
    vm: GuestVm, tmp_path: Path, other_file_system: Path
) -> None:
    more = f'[storage.far]\npath = "{other_file_system}/fleecing"\nquota = "1GiB"\nmin_free = "1MiB"\n'
    host = Host(tmp_path, vm, more=more)
    backup = await host.run("backup", VM, "--target", "main", "--fleecing", "enabled=1", "--json")
    (run,) = document(backup)["runs"]
    assert {disk["storage"] for disk in run["disks"]} == {"local"}

    far = Host(tmp_path, vm, storage=other_file_system / "fleecing", state="far")
    backup = await far.run("backup", VM, "--target", "main", "--fleecing", "enabled=1", "--json")
    (run,) = document(backup, code=1)["runs"]
    assert run["error"]["code"] == "no-storage"
    named = await far.run("backup", VM, "--target", "main", "--fleecing", "enabled=1,storage=local", "--json")
    (run,) = document(named)["runs"]
    assert {disk["storage"] for disk in run["disks"]} == {"local"}
    # Without --fleecing it is used where it can be had, and that it cannot is said.
    without = await far.run("backup", VM, "--target", "main", "--json")
    (run,) = document(without)["runs"]
    assert run["outcome"] == "warning"
    assert {disk["storage"] for disk in run["disks"]} == {None}
    await far.assert_as_before()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 20], ids=["once", "impatiently"])
async def test_a_signal_puts_everything_back(
    vm: GuestVm, tmp_path: Path, number: signal.Signals, times: int
) -> None:
    host = Host(tmp_path, vm)
    process = await host.command("backup", VM, "--target", "main", *SLOW)
    await until_jobs_run(vm, process)
    ending = asyncio.create_task(said(process))
    for _ in range(times):
        if process.returncode is None:
            process.send_signal(number)
            await asyncio.sleep(0.01)
    ended = await ending
    assert ended.code == 130, ended
    assert ended.err == "vmfleece: interrupted; everything was put back\n"
    assert document(await host.run("snapshot", "list", "--json")) == {"snapshots": []}
    await host.assert_as_before()


async def test_a_second_backup_at_once_exits_with_11(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm)
    process = await host.command("backup", VM, "--target", "main", *SLOW)
    await until_jobs_run(vm, process)
    second = await host.run("backup", VM, "--target", "main", "--json")
    assert document(second, code=11)["error"]["code"] == "locked"
    assert process.returncode is None
    process.send_signal(signal.SIGINT)
    assert (await said(process)).code == 130
    await host.assert_as_before()


async def test_the_daemon_backs_up_by_schedule(vm: GuestVm, tmp_path: Path) -> None:
    host = Host(tmp_path, vm, more=JOB.format(bwlimit="0"))
    daemon = await host.command("daemon")
    async with asyncio.timeout(60):
        while len(await host.snapshots()) < 2:
            assert daemon.returncode is None, await said(daemon)
            await asyncio.sleep(0.1)
    daemon.send_signal(signal.SIGTERM)
    ended = await said(daemon)
    assert ended.code == 0, ended
    events = [json.loads(line)["event"] for line in (ended.out + ended.err).splitlines()]
    assert events.count("run.finished") >= 2
    assert events[-1] == "daemon.stopped"
    restored = await host.restored()
    verdict = await asyncio.to_thread(sequence.check, [restored[disk.id] for disk in DISKS], run=vm.run)
    assert verdict.problems == []
    await host.assert_as_before()
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_daemon_stops_while_a_run_is_under_way(
    vm: GuestVm, tmp_path: Path, number: signal.Signals
) -> None:
    host = Host(tmp_path, vm, more=JOB.format(bwlimit="256KiB"))
    daemon = await host.command("daemon")
    await until_jobs_run(vm, daemon)
    locked = await host.run("daemon")
    assert locked.code == 11, locked
    daemon.send_signal(number)
    ended = await said(daemon)
    assert ended.code == 0, ended
    assert await host.snapshots() == []
    await host.assert_as_before()
