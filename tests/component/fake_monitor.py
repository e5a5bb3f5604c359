"""The monitor contract over a fake QEMU, and the troubles that a connection to a real one has."""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.errors import CommandFailed, CommandTimeout, ConnectFailed, ConnectionLost, NobodyThere
from orchestrator.qemu.commands import Command, add_fd, get_fd
from orchestrator.qemu.monitor import DEADLINE_SECONDS, OUTCOME_UNKNOWN, Event, Monitor
from tests.component.fake_qemu import FakeQemu


class Trouble(StrEnum):
    """What can happen to a command. Those behind it in its pipeline share its fate, but for REFUSED."""

    REFUSED = "refused"
    LOST_BEFORE = "connection lost before it was executed"
    LOST_AFTER = "connection lost after it was executed"
    KILLED = "QEMU killed before it was executed"
    TIMEOUT_DONE = "executed, but no reply in time"
    TIMEOUT_LATE = "no reply in time, executed afterwards"
    TIMEOUT_NEVER = "no reply in time, never executed"


CANNOT_BE_REFUSED = ("stop", "query-jobs", "job-resume", "human-monitor-command")
"""QEMU has no reason to refuse these, in the states that a run uses them in (runstate.c, job.c, hmp.c)."""


@dataclass
class Troubles:
    """Which commands get into trouble: each entry once, for the first command that it matches."""

    when: list[tuple[Callable[[int, Command], bool], Trouble]] = field(default_factory=list)
    seen: int = 0

    def at(self, index: int, trouble: Trouble) -> None:
        """Get the command of that number, counted from now, into trouble, if that can happen to it."""
        wanted = self.seen + index

        def matches(number: int, command: Command) -> bool:
            return number == wanted and not (trouble is Trouble.REFUSED and command.name in CANNOT_BE_REFUSED)

        self.when.append((matches, trouble))

    def on(self, name: str, trouble: Trouble, *, also: Callable[[Command], bool] = lambda _command: True) -> None:
        """Get the next command of that name into trouble."""
        self.when.append((lambda _number, command: command.name == name and also(command), trouble))

    def of(self, command: Command) -> Trouble | None:
        """What happens to this command."""
        number, self.seen = self.seen, self.seen + 1
        for entry in self.when:
            if entry[0](number, command):
                self.when.remove(entry)
                return entry[1]
        return None


class FakeMonitor(Monitor):
    """See the contract, `Monitor`."""

    def __init__(self, qemu: FakeQemu, *, vm: str, troubles: Troubles) -> None:
        super().__init__()
        self._qemu = qemu
        self._vm = vm
        self._troubles = troubles
        self._sent: int | None = None
        self._descriptor_lock = asyncio.Lock()

    @property
    def connected(self) -> bool:
        return self in self._qemu.monitors

    @property
    def process(self) -> str:
        return str(id(self._qemu))

    def open(self) -> None:
        """Connect. Raises ConnectFailed."""
        if not self._qemu.alive:
            raise NobodyThere(f"VM {self._vm}: cannot connect", hint="is it running?")
        if not self._qemu.accepts or self._qemu.monitors:
            raise ConnectFailed(f"VM {self._vm}: cannot connect", hint="is it running?")
        self._qemu.monitors.append(self)

    def close(self) -> None:
        """Disconnect."""
        if self.connected:
            self._qemu.monitors.remove(self)
        if self._sent is not None:
            os.close(self._sent)
            self._sent = None

    def lose(self) -> None:
        """Lose the connection."""
        self.close()
        self._router.lose(self._lost())

    def receive(self, event: Event) -> None:
        """Take an event of QEMU's."""
        self._router.publish(event)

    def take_descriptor(self) -> int | None:
        """Take the descriptor that was sent last."""
        sent, self._sent = self._sent, None
        return sent

    async def pipeline(
        self, commands: Sequence[Command], *, deadline_seconds: float = DEADLINE_SECONDS
    ) -> list[Any]:
        await asyncio.sleep(0)  # whoever is cancelled here has sent nothing
        if not self.connected:
            raise self._lost()
        if self._qemu.silent:
            replies = await self._wait(commands, deadline_seconds)
        else:
            self._qemu.catch_up()
            replies = self._send(commands)
            await asyncio.sleep(0)  # whoever is cancelled here has sent everything
        return replies

    def _send(self, commands: Sequence[Command]) -> list[Any]:
        replies: list[Any] = []
        late = False
        for at, command in enumerate(commands):
            trouble = self._troubles.of(command)
            if trouble is Trouble.LOST_BEFORE:
                self.lose()
                raise self._lost()
            if trouble is Trouble.KILLED:
                self._qemu.kill()
                raise self._lost()
            if trouble is Trouble.TIMEOUT_NEVER:
                raise self._timeout()
            if trouble is Trouble.TIMEOUT_LATE:
                self._qemu.backlog.append((list(commands[at:]), self, None))
                raise self._timeout()
            if trouble is Trouble.REFUSED:
                replies.append(CommandFailed(command.name, "the test wants it so"))
                continue
            replies.append(self._qemu.carry_out(command, self))
            if trouble is Trouble.LOST_AFTER:
                self.lose()
            if not self.connected:  # also if QEMU was killed by what it did
                raise self._lost()
            late = late or trouble is Trouble.TIMEOUT_DONE
        if late:
            raise self._timeout()
        return replies

    async def _wait(self, commands: Sequence[Command], deadline_seconds: float) -> list[Any]:
        waiter: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._qemu.backlog.append((list(commands), self, waiter))
        try:
            async with asyncio.timeout(deadline_seconds):
                with self._router.open(()) as loss:
                    lost = asyncio.ensure_future(loss.next())
                    try:
                        await asyncio.wait([waiter, lost], return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        lost.cancel()
                        with contextlib.suppress(ConnectionLost, asyncio.CancelledError):
                            await lost
        except TimeoutError as error:
            raise self._timeout() from error
        if not waiter.done():
            raise self._lost()
        return waiter.result()

    async def pass_descriptor(self, descriptor: int, *, opaque: str) -> int:
        reply = await self._hand_over(descriptor, add_fd(opaque=opaque))
        return int(reply["fdset-id"])

    async def lend_descriptor(self, descriptor: int, *, name: str) -> None:
        await self._hand_over(descriptor, get_fd(name))

    async def _hand_over(self, descriptor: int, taking: Command) -> Any:
        async with self._descriptor_lock:
            if not self.connected:
                raise self._lost()
            if self._sent is not None:
                os.close(self._sent)  # QEMU keeps the last one only
            self._sent = os.dup(descriptor)
            return await self.execute(taking)

    async def reconnect(self, *, deadline_seconds: float) -> None:
        give_up = asyncio.get_running_loop().time() + deadline_seconds
        while not self.connected:
            await asyncio.sleep(0)
            try:
                self.open()
            except NobodyThere as error:
                raise NobodyThere(f"VM {self._vm}: its QEMU has ended", code="vm-gone") from error
            except ConnectFailed:
                if asyncio.get_running_loop().time() >= give_up:
                    raise
                await asyncio.sleep(0.01)

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(f"VM {self._vm}: the connection was lost", hint=OUTCOME_UNKNOWN)

    def _timeout(self) -> CommandTimeout:
        return CommandTimeout(f"VM {self._vm}: no reply in time", hint=OUTCOME_UNKNOWN)


@dataclass
class FakeHost:
    """Where the monitors' sockets are: QEMUs by path. `connect` is what a run is given.

    `connects` counts, by VM, how often it was tried to connect.
    """

    qemus: dict[Path, FakeQemu] = field(default_factory=dict)
    troubles: Troubles = field(default_factory=Troubles)
    connects: Counter[str] = field(default_factory=Counter)

    @contextlib.asynccontextmanager
    async def connect(self, path: Path, *, vm: str, deadline_seconds: float = 10) -> AsyncIterator[FakeMonitor]:
        """Like qmp.connect."""
        self.connects[vm] += 1
        if path not in self.qemus:
            raise NobodyThere(f"VM {vm}: cannot connect to {path}: No such file or directory")
        monitor = FakeMonitor(self.qemus[path], vm=vm, troubles=self.troubles)
        await asyncio.sleep(0)
        try:
            await self._greeted(self.qemus[path], deadline_seconds)
            monitor.open()
            yield monitor
        finally:
            monitor.close()

    async def _greeted(self, qemu: FakeQemu, deadline_seconds: float) -> None:
        try:
            async with asyncio.timeout(deadline_seconds):
                while qemu.silent:
                    await asyncio.sleep(0.01)
        except TimeoutError as error:
            raise ConnectFailed("accepted the connection but sent no greeting") from error
