"""A run whose VM is disturbed, and a guest that a killed vmfleece leaves stopped."""

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

from orchestrator.state.journal import Act, Journal
from tests.guest.versions import qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.host import FLEECED, Host, assert_succeeded
from tests.qemu.proxy import Proxy
from tests.qemu.under_way import said, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKLOAD = Workload("random", block_bytes=16 * 1024, rate=1500)
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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def old(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuestVm]:
    """A guest of the oldest QEMU, which is paused for snapshots."""
    folder = tmp_path_factory.mktemp("old")
    disks = [DiskSpec("vda", 16 * MIB, iothread=True)]
    async with GuestVm(folder, disks, WORKLOAD, qemu=qemu("7.2")) as guest:
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


async def test_a_guest_that_a_killed_process_left_paused_goes_on_at_once(
    old: GuestVm, tmp_path: Path, silent: dict[str, Path]
) -> None:
    """Also if other VMs do not answer, whose guests may be paused as well."""
    with Proxy(old.product_socket.with_name("proxy.sock"), old.product_socket) as proxy:
        more = JOB + "".join(f'[vm.{name}]\nqmp = "{path}"\n' for name, path in silent.items())
        host = Host(tmp_path / "host", old, socket=proxy.path, more=more)
        proxy.hold_before(FIRST_WHILE_PAUSED)
        process = await host.command("job", "run", "yearly")
        await until(proxy.held.is_set, "the snapshot")
        process.kill()
        await said(process)
        assert (await old.execute("query-status"))["status"] == "paused"
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
            while not (await old.execute("query-status"))["running"]:
                await asyncio.sleep(0.01)
        took_seconds = time.monotonic() - started
        print(f"continued {took_seconds:.2f} s after the start; loading alone takes {loading_seconds:.2f} s")  # noqa: T201
        assert took_seconds < 2 * loading_seconds + 1  # who waits for a silent one first waits for 10 s

        await until(lambda: [one.vm for one in journal.open() if one.vm == "web01"] == [], "the journal")
        daemon.terminate()
        ended = await said(daemon)
        assert ended.code == 0, ended
        assert '"guest.continued"' in ended.err
        assert_succeeded(await host.back_up(FLEECED))
        await host.assert_as_before()
    proxy.path.unlink()
