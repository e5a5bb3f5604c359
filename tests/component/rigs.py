"""What the monitor's conformance suite needs of an implementation: a QEMU, and ways to ill-treat it."""

import abc
import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from orchestrator.qemu import qmp
from orchestrator.qemu.monitor import Monitor
from orchestrator.qemu.qmp import QmpMonitor
from tests.component.fake_monitor import FakeHost, FakeMonitor
from tests.component.fake_qemu import FakeQemu

EXECUTABLE = "qemu-system-x86_64"


class Rig(abc.ABC):
    """One QEMU without a guest, whose monitor is at `path`."""

    path: Path

    @abc.abstractmethod
    def connect(self, path: Path, *, deadline_seconds: float = 5) -> AbstractAsyncContextManager[Monitor]:
        """A connected monitor. Raises ConnectFailed."""

    @abc.abstractmethod
    async def kill(self) -> None:
        """End QEMU at once."""

    @abc.abstractmethod
    def cut(self, monitor: Monitor) -> None:
        """End the connection; QEMU lives on."""

    @abc.abstractmethod
    def hold(self) -> None:
        """Make QEMU silent."""

    @abc.abstractmethod
    def go_on(self) -> None:
        """Let it answer again, also to what it was sent meanwhile."""


class FakeRig(Rig):
    def __init__(self, folder: Path) -> None:
        self.path = folder / "qmp"
        self._qemu = FakeQemu({}, running=False)
        self._host = FakeHost({self.path: self._qemu})

    def connect(self, path: Path, *, deadline_seconds: float = 5) -> AbstractAsyncContextManager[Monitor]:
        return self._host.connect(path, vm="fake", deadline_seconds=deadline_seconds)

    async def kill(self) -> None:
        self._qemu.kill()

    def cut(self, monitor: Monitor) -> None:
        assert isinstance(monitor, FakeMonitor)
        monitor.lose()

    def hold(self) -> None:
        self._qemu.silent = True

    def go_on(self) -> None:
        self._qemu.speak()


class QemuRig(Rig):
    def __init__(self, path: Path, process: asyncio.subprocess.Process) -> None:
        self.path = path
        self._process = process

    def connect(self, path: Path, *, deadline_seconds: float = 5) -> AbstractAsyncContextManager[Monitor]:
        return qmp.connect(path, vm="real", deadline_seconds=deadline_seconds)

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    def cut(self, monitor: Monitor) -> None:
        assert isinstance(monitor, QmpMonitor)
        assert monitor._socket is not None
        monitor._socket.shutdown(socket.SHUT_RDWR)

    def hold(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def fake(folder: Path) -> AsyncIterator[Rig]:
    yield FakeRig(folder)


@contextlib.asynccontextmanager
async def real(folder: Path) -> AsyncIterator[Rig]:
    path = folder / "qmp"
    machine = ("-machine", "none", "-nodefaults", "-display", "none", "-accel", "tcg", "-S")
    monitors = ("-qmp", f"unix:{path},server=on,wait=off", "-qmp", "stdio")
    process = await asyncio.create_subprocess_exec(
        EXECUTABLE, *machine, *monitors, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(20):
            # Whoever connects before all monitors are set up may be thrown out again.
            assert process.stdout is not None
            assert b"QMP" in await process.stdout.readline()
        yield QemuRig(path, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


RIGS = {"fake": fake, "qemu": real}
