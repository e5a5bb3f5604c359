"""A real guest under QEMU whose word can be trusted, and a second monitor to look at it.

`GuestVm` starts QEMU with two QMP sockets. `product_socket` is for the product alone; the test bed
looks and acts through the other one. Whatever fails here raises `GuestFailureError` (an
AssertionError) with the ends of the guest's console and of QEMU's stderr, and no wait is endless.
QEMU dies with the process that started it.

With `agent` the guest is a larger one: it has Debian's qemu-guest-agent, which listens at `agent_socket`, and a
shell that the test bed speaks to (agent.py).

QEMU is always started paused, for two reasons: the latency histograms can be set up without a race
against a disk in an iothread, and the devices are noted before anybody changes them.
"""

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from tests.guest import build, console, ext4, images
from tests.guest.command import (
    agent_arguments,
    boot_arguments,
    disk_arguments,
    machine_type,
    monitor_arguments,
    nudge_ms,
)
from tests.guest.console import StatLine
from tests.guest.monitor import MonitorLostError
from tests.guest.process import QemuProcess
from tests.guest.spec import MIB, DiskSpec, Workload

__all__ = ["MIB", "DiskSpec", "GuestFailureError", "GuestVm", "StatLine", "Workload"]

HISTOGRAM_NS = [step * 1_000_000 for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)]
SOCKET_PATH_MAX = 100  # sun_path holds 108


class GuestFailureError(AssertionError):
    """The guest or QEMU is not as it has to be."""


class GuestVm:
    """One VM in a folder of its own. Stopped and started again it keeps disks, run and folder."""

    def __init__(
        self,
        folder: Path,
        disks: Sequence[DiskSpec] = (DiskSpec("vda"),),
        workload: Workload = Workload(),  # noqa: B008  (frozen)
        *,
        qemu: str | Sequence[str] = "qemu-system-x86_64",
        qemu_img: str = "qemu-img",
        agent: bool = False,
        cdrom: bool = False,
        initially_paused: bool = False,
        extra_args: Sequence[str] = (),
        memory_mib: int = 256,
    ) -> None:
        self.folder = folder
        self.disks = tuple(disks)
        self.workload = workload  # may be replaced before a start
        self.run = secrets.randbits(63)
        self.initially_paused = initially_paused
        self.first_nodes: dict[str, str] = {}
        self._command = [qemu] if isinstance(qemu, str) else list(qemu)
        self._qemu_img = qemu_img
        self._agent = agent
        self._cdrom = cdrom
        self._extra_args = list(extra_args)
        self._memory_mib = memory_mib
        self._qemu: QemuProcess | None = None
        self._exit_code: int | None = None
        self._qdevs: dict[str, str] = {}
        self._status = "shutdown"
        self._starts = 0
        self._sockets = folder
        if len(str(folder.absolute())) > SOCKET_PATH_MAX - len("/product.sock"):
            self._sockets = Path(tempfile.gettempdir()) / f"vmf-{secrets.token_hex(6)}"

    @property
    def product_socket(self) -> Path:
        """QMP socket for the product; the test bed never touches it."""
        return (self._sockets / "product.sock").absolute()

    @property
    def agent_socket(self) -> Path | None:
        """The guest agent's socket, for one client at a time; None if the guest has no agent."""
        return (self._sockets / "agent.sock").absolute() if self._agent else None

    @property
    def shell_socket(self) -> Path:
        """Where a guest with an agent takes commands."""
        return (self._sockets / "shell.sock").absolute()

    @property
    def console_path(self) -> Path:
        """The serial console of the current start."""
        return self.folder / f"console-{self._starts}.log"

    @property
    def stderr_path(self) -> Path:
        """QEMU's stderr of the current start."""
        return self.folder / f"qemu-{self._starts}.log"

    @property
    def expected_status(self) -> str:
        """What query-status has to say, by what the test bed itself has done."""
        return self._status

    def image_path(self, disk_id: str) -> Path:
        """Return the image file of a disk."""
        disk = next(disk for disk in self.disks if disk.id == disk_id)
        return disk.image or self.folder / f"{disk.id}.{disk.format}"

    # --- life ---

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Create missing images, start QEMU, and let the guest run unless `initially_paused`."""
        if self._qemu is not None:
            raise GuestFailureError("the VM has been started already")
        files = await asyncio.to_thread(build.ensure, agent=self._agent)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sockets.mkdir(mode=0o700, exist_ok=True)
        for disk in self.disks:
            path = self.image_path(disk.id)
            if path.exists():
                continue
            if self.workload.kind == "files":
                await ext4.make(path, disk.size_bytes)
            else:
                await images.create(path, disk.format, disk.size_bytes, qemu_img=self._qemu_img)
        self._starts += 1
        self.console_path.unlink(missing_ok=True)
        command = [*self._command, *self._arguments(files)]
        self._qemu = await QemuProcess.start(command, stderr=self.stderr_path)
        try:
            await self._look_at_devices()
            self._status = "prelaunch"
            if not self.initially_paused:
                await self.resume()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End QEMU and reap it: `quit`, else SIGKILL. Harmless when it has ended already."""
        qemu, self._qemu = self._qemu, None
        self._status = "shutdown"
        if qemu is None:
            return
        try:
            await qemu.end()
        finally:
            self._exit_code = qemu.exit_code
            if self._sockets != self.folder:
                shutil.rmtree(self._sockets, ignore_errors=True)

    async def kill(self) -> None:
        """End QEMU by SIGKILL, as a power failure does, and reap it."""
        if self._qemu is not None:
            self._qemu.kill()
        await self.stop()

    @property
    def exit_code(self) -> int | None:
        """How QEMU ended the last time; negative: the signal."""
        return self._exit_code

    def alive(self) -> bool:
        """Whether QEMU's process is there."""
        return self._qemu is not None and self._qemu.alive

    @property
    def pid(self) -> int | None:
        """QEMU's process id."""
        return self._qemu.pid if self._qemu else None

    async def pause(self) -> None:
        """Stop the guest's processor; QEMU flushes all disks."""
        await self.execute("stop")
        self._status = "paused"

    async def resume(self) -> None:
        """Let the guest run."""
        await self.execute("cont")
        self._status = "running"

    # --- looking ---

    async def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        deadline_seconds: float = 20.0,
    ) -> Any:
        """Run a command on the test bed's monitor. Raises qemu.qmp's ExecuteError on refusal."""
        if self._qemu is None:
            self.fail(f"{command}: the VM is not started")
        try:
            return await self._qemu.execute(command, arguments, deadline_seconds)
        except MonitorLostError as error:
            self.fail(str(error), error)

    def console(self) -> str:
        """Return the guest's console since the last start."""
        return console.read(self.console_path)

    def stats(self) -> list[StatLine]:
        """Return the guest's statistics, one line a second of guest time."""
        return console.stats(self.console())

    def stalls_us(self) -> list[int]:
        """Return the guest's writes that took more than 200 ms of guest time."""
        return console.stalls_us(self.console())

    def guest_errors(self) -> int:
        """Return how many of the guest's writes failed."""
        return console.errors(self.console())

    def pauses_seconds(self) -> list[float]:
        """Return how long the VM stood still each time it was stopped and continued, by anybody."""
        return list(self._qemu.monitor.pauses.pauses_seconds) if self._qemu else []

    async def block_stats(self) -> dict[str, dict[str, Any]]:
        """Return query-blockstats' `stats` of each disk, whatever node it is on now."""
        entries = await self.execute("query-blockstats")
        by_qdev = {entry.get("qdev"): entry["stats"] for entry in entries}
        return {disk: by_qdev[qdev] for disk, qdev in self._qdevs.items()}

    async def current_nodes(self) -> dict[str, str | None]:
        """Return the node that each disk's device is on now."""
        entries = await self.execute("query-block")
        nodes = {entry.get("qdev"): entry.get("inserted", {}).get("node-name") for entry in entries}
        return {disk: nodes.get(qdev) for disk, qdev in self._qdevs.items()}

    async def writes(self) -> int:
        """Return the number of writes that QEMU has completed for the guest, over all disks."""
        return sum(stats["wr_operations"] for stats in (await self.block_stats()).values())

    async def write(self, disk_id: str, offset_bytes: int, length_bytes: int, *, pattern: int | None) -> None:
        """Write one byte's value to a disk as its device does, on whatever node that is now, and await it.

        None: zeroes, as a request of its own kind. It is no write of a running guest's: where that writes, too,
        the last one wins.
        """
        wrote = f"wrote {length_bytes}/{length_bytes} bytes at offset {offset_bytes}\n"
        wanted = console.read(self.stderr_path).count(wrote) + 1
        how = "-z -u" if pattern is None else f"-P {pattern}"
        write = f'qemu-io -d {self._qdevs[disk_id]} "write {how} {offset_bytes} {length_bytes}"'
        refusal = await self.execute("human-monitor-command", {"command-line": write})
        # It answers on QEMU's own output.
        if refusal or console.read(self.stderr_path).count(wrote) < wanted:
            self.fail(f"{write}: {refusal}")

    # --- waiting and checking ---

    async def wait_ready(self, deadline_seconds: float = 60.0) -> None:
        """Wait until the guest writes (or idles, as told)."""
        await self.wait_console("VMF ready", deadline_seconds)

    async def wait_console(self, text: str, deadline_seconds: float = 30.0) -> None:
        """Wait until the guest has printed a text."""

        def seen() -> bool:
            printed = self.console()
            if "VMF fatal" in printed and "VMF fatal" not in text:
                self.fail("the guest gave up")
            return text in printed

        await self.wait_until(seen, f"the guest to print {text!r}", deadline_seconds)

    async def wait_until(self, done: Callable[[], bool], what: str, deadline_seconds: float = 30.0) -> None:
        """Wait for something that a living QEMU's guest brings about."""
        try:
            async with asyncio.timeout(deadline_seconds):
                while not done():
                    if not self.alive():
                        self.fail(f"QEMU ended while waiting for {what}")
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            self.fail(f"waited {deadline_seconds} s for {what}", error)

    async def wait_writes(self, number: int, deadline_seconds: float = 30.0) -> None:
        """Wait until so many more of the guest's writes have completed."""
        wanted = missing = number + await self.writes()
        try:
            async with asyncio.timeout(deadline_seconds):
                while True:
                    missing = wanted - await self.writes()
                    if missing <= 0:
                        return
                    await asyncio.sleep(0.02)
        except TimeoutError as error:
            what = f"{missing} of {number} writes still missing after {deadline_seconds} s"
            self.fail(what, error)

    async def wait_stats(self, number: int = 1, deadline_seconds: float = 30.0) -> None:
        """Wait until the guest has printed so many more statistics lines."""
        wanted = len(self.stats()) + number
        await self.wait_until(lambda: len(self.stats()) >= wanted, f"{number} stat lines", deadline_seconds)

    async def assert_healthy(self) -> None:
        """Raise GuestFailureError if QEMU died, the guest stands still, or a write failed."""
        if not self.alive():
            self.fail("QEMU is not running")
        status = (await self.execute("query-status"))["status"]
        if status != "running":
            self.fail(f"the guest is not running but {status}")
        if self.guest_errors():
            self.fail(f"the guest saw {self.guest_errors()} write errors")

    async def copy_disk(self, disk_id: str, dest: Path, *, deadline_seconds: float = 120.0) -> None:
        """Copy a paused VM's disk, from outside, into a raw file.

        `stop` on a stopped VM flushes again: the image file then holds all of it, metadata too.
        """
        if (await self.execute("query-status"))["running"]:
            self.fail("a disk can be copied only while the VM is paused")
        await self.execute("stop")
        disk = next(disk for disk in self.disks if disk.id == disk_id)
        async with asyncio.timeout(deadline_seconds):
            await images.to_raw(self.image_path(disk_id), disk.format, dest, in_use=True, qemu_img=self._qemu_img)

    def fail(self, what: str, cause: BaseException | None = None) -> NoReturn:
        """Raise GuestFailureError with all there is to see."""
        code = self._qemu.exit_code if self._qemu else self._exit_code
        process = f"pid {self.pid}, exit code {code}"
        raise GuestFailureError(
            f"{what}\n{process}\n--- console ---\n{console.tail(self.console_path)}\n"
            f"--- QEMU ---\n{console.tail(self.stderr_path)}"
        ) from cause

    # --- inner ---

    def _arguments(self, files: build.GuestFiles) -> list[str]:
        paths = {disk.id: self.image_path(disk.id).absolute() for disk in self.disks}
        workload = self.workload.on(self.disks).kernel_arguments(self.run, resume=self._starts > 1)
        workload += f" nudge={nudge_ms(self.disks)}"
        arguments = ["-machine", f"{machine_type(self.disks)},accel=tcg"]
        arguments += ["-m", str(self._memory_mib)]
        arguments += boot_arguments(files, workload, self.console_path.absolute())
        arguments += monitor_arguments("product", self.product_socket)
        arguments += monitor_arguments("testbed", self._sockets.absolute() / "testbed.sock")
        arguments += disk_arguments(self.disks, paths)
        if self.agent_socket is not None:
            arguments += agent_arguments(self.agent_socket, self.shell_socket)
        if self._cdrom:
            arguments += ["-device", "ide-cd,id=cdrom0"]
        return arguments + self._extra_args

    async def _look_at_devices(self) -> None:
        assert self._qemu is not None
        try:
            await self._qemu.connect(self._sockets / "testbed.sock")
        except MonitorLostError as error:
            self.fail("QEMU did not start", error)
        entries = await self.execute("query-block")
        for disk in self.disks:
            entry = next(entry for entry in entries if self._is_disk(entry, disk))
            self._qdevs[disk.id] = entry["qdev"]
            self.first_nodes[disk.id] = entry["inserted"]["node-name"]
            await self.execute(
                "block-latency-histogram-set",
                {"id": entry["qdev"], "boundaries-write": HISTOGRAM_NS},
            )

    def _is_disk(self, entry: dict[str, Any], disk: DiskSpec) -> bool:
        name = f"drive-{disk.id}"
        inserted = entry.get("inserted", {})
        path = str(self.image_path(disk.id).absolute())
        return name in {entry["device"], inserted.get("node-name")} or inserted.get("file") == path
