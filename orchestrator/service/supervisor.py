"""One supervisor a VM: keeps its monitor connected, puts right what is left in it, and lends it to others.

QEMU's monitor serves one client at a time, so the daemon has one connection to each VM, and runs borrow it. It
also brings the news: that a guest was stopped, reset or shut down, that a disk was unplugged, that QEMU has ended
or was started anew. Decisions never rest on these: whoever acts asks QEMU.

What must hold:
- A VM that does not answer holds up nobody else: each has a task of its own, and waits by itself.
- A VM that does not run is nothing special: now and then its socket is looked for, which costs next to nothing,
  and at once when somebody wants the VM.
- Nothing is polled: between events, a connected VM costs memory only.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import structlog

from orchestrator import aio
from orchestrator.errors import (
    CommandTimeout,
    ConnectFailed,
    ConnectionLost,
    MonitorError,
    NobodyThere,
    VmfleeceError,
)
from orchestrator.model import Vm
from orchestrator.qemu import commands
from orchestrator.qemu.monitor import Connect, Event, EventStream, Monitor
from orchestrator.service.reconciler import Reconciler

log = structlog.get_logger(__name__)

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
"""How long after a failure it is tried to connect again: from the first to the longest, doubling each time."""
REGAIN_SECONDS = 10.0
STARTS_PER_SECOND = 100
"""How many VMs are connected to at start; those whose guests have to be put right come first."""
RECONCILE_SECONDS = 600.0
RETRY_SECONDS = 60.0
"""How often it is looked for what dead runs have left, and how soon again if not all of it was put right."""
SETTLE_SECONDS = 0.5
"""Events come in groups, and our own pauses are shorter."""
STATES = ("STOP", "RESUME", "SUSPEND", "WAKEUP")
GUEST_NEWS = ("SHUTDOWN", "RESET", "GUEST_PANICKED")
NEWS = (*GUEST_NEWS, "POWERDOWN", "DEVICE_DELETED", "MIGRATION")


class Supervisor:
    """One VM's. `serve` runs beside everything else; `lent` gives its connection to others."""

    def __init__(self, vm: Vm, connect: Connect, reconciler: Reconciler) -> None:
        self._vm = vm
        self._connect = connect
        self._reconciler = reconciler
        self._monitor: Monitor | None = None
        self._borrowers = 0
        self._returned = asyncio.Event()
        self._wanted = asyncio.Event()
        self._outcomes: list[asyncio.Future[Monitor]] = []
        self._process = ""
        self._status = ""
        self._trouble = ""

    # --- for others ---

    @contextlib.asynccontextmanager
    async def lent(self) -> AsyncIterator[Monitor]:
        """The VM's monitor for the block, as `qmp.connect` gives one. Raises ConnectFailed.

        Whoever waits for one that is not connected has it tried at once. Cancellation leaves nothing behind.
        """
        monitor = self._monitor if self._monitor is not None and self._monitor.connected else await self._next()
        self._borrowers += 1
        try:
            yield monitor
        finally:
            self._borrowers -= 1
            self._returned.set()

    async def _next(self) -> Monitor:
        """What comes of the next attempt to connect."""
        outcome: asyncio.Future[Monitor] = asyncio.get_running_loop().create_future()
        self._outcomes.append(outcome)
        self._wanted.set()
        return await outcome

    # --- its life ---

    @property
    def name(self) -> str:
        """The VM's."""
        return self._vm.name

    async def serve(self, *, delay_seconds: float, after: "asyncio.Task[None] | None" = None) -> None:
        """Look after the VM until cancelled, first after a delay, or as soon as somebody wants it.

        Not before `after` has ended, however often it is cancelled: that still holds the same monitor.
        Cancelled, it ends once all who borrowed the connection have returned it.
        """
        pause_seconds = FIRST_PAUSE_SECONDS
        with structlog.contextvars.bound_contextvars(vm=self._vm.name):
            try:
                if after is not None:
                    await aio.finish(_ended(after))
                await self._wait(delay_seconds)
                while True:
                    if await self._lives():
                        pause_seconds = FIRST_PAUSE_SECONDS
                    await self._wait(pause_seconds)
                    pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
            finally:
                ended = f"VM {self._vm.name}: vmfleece ends, or looks after it no more"
                self._tell(ConnectFailed(ended, hint="it is the next one's to connect"))

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds * random.uniform(0.75, 1.25)):  # noqa: S311  not all VMs at once
                await self._wanted.wait()

    async def _lives(self) -> bool:
        """One QEMU process, from connecting to its end; whether it was connected."""
        connected = False
        try:
            async with self._connect(self._vm.qmp, vm=self._vm.name) as monitor:
                connected = True
                await self._hold(monitor)
        except NobodyThere as error:
            if not connected:  # else who wants it now is told what comes of looking for the next process
                self._tell(error)
            self._say_ended(error)
        except MonitorError as error:
            self._say_trouble(error)
            self._tell(error)
        except Exception as error:  # one VM must not end the service
            log.exception("vm.bug")
            what = f"{type(error).__name__}: {error}"
            self._tell(ConnectFailed(f"VM {self._vm.name}: {what}", hint="please report this with the log"))
        return connected

    async def _hold(self, monitor: Monitor) -> None:
        """Keep one process's monitor connected. Raises NobodyThere when it has ended."""
        self._monitor = monitor
        ended = False
        try:
            while True:
                with monitor.subscribe(*STATES, *NEWS) as events:
                    self._tell(monitor)
                    async with aio.background(self._keep_right()):
                        await self._follow(monitor, events)
                await self._regain(monitor)
        except NobodyThere:
            ended = True
            raise
        finally:
            self._monitor = None
            if not ended:  # else who borrows it, perhaps a run that waits for hours, learns that by itself
                await aio.finish(self._all_returned())

    async def _regain(self, monitor: Monitor) -> None:
        """Connect again to the same process. Raises NobodyThere."""
        pause_seconds = FIRST_PAUSE_SECONDS
        while not monitor.connected:
            try:
                await monitor.reconnect(deadline_seconds=REGAIN_SECONDS)
            except NobodyThere:
                raise
            except ConnectFailed as error:
                self._say_trouble(error)
                self._tell(error)
                await self._wait(pause_seconds)
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)

    async def _all_returned(self) -> None:
        while self._borrowers:
            self._returned.clear()
            await self._returned.wait()

    def _tell(self, outcome: Monitor | MonitorError) -> None:
        """Tell those that wait what came of the attempt."""
        told, self._outcomes = self._outcomes, []
        self._wanted.clear()
        for one in told:
            if one.done():  # cancelled
                continue
            if isinstance(outcome, Monitor):
                one.set_result(outcome)
            else:
                one.set_exception(outcome)

    # --- putting right ---

    async def _keep_right(self) -> None:
        """Put right what dead runs have left: now, after a run that left something, and from time to time."""
        while True:
            seconds = RETRY_SECONDS
            with contextlib.suppress(MonitorError):
                if await self._put_right():
                    seconds = RECONCILE_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._until_a_run_left_something()

    async def _put_right(self) -> bool:
        """Whether nothing is left to be done."""
        vm, path = self._vm.name, str(self._vm.qmp)
        try:
            done = await self._reconciler.guests.put_right(vm)
            done += await self._reconciler.put_vm_right(vm, path)
            return all(one.error is None for one in done) and not await self._reconciler.owes(vm)
        except VmfleeceError as error:
            log.warning("reconcile.failed", error=str(error))
            return False
        except Exception:  # it must not end the service
            log.exception("vm.bug")
            return False

    async def _until_a_run_left_something(self) -> None:
        while True:
            self._returned.clear()
            await self._returned.wait()
            try:
                if not self._borrowers and await self._reconciler.owes(self._vm.name):
                    return
            except VmfleeceError:  # it cannot be said: who puts right says why
                return

    # --- news ---

    async def _follow(self, monitor: Monitor, events: EventStream) -> None:
        """Log what happens to the VM, until the connection is lost."""
        while True:
            try:
                await self._look(monitor)
                first = await events.next()
                await asyncio.sleep(SETTLE_SECONDS)
                _log_news([first, *events.received()])
            except CommandTimeout as error:
                self._say_trouble(error)
                await asyncio.sleep(RETRY_SECONDS)
            except ConnectionLost as error:
                self._trouble = error.code
                return

    async def _look(self, monitor: Monitor) -> None:
        """Say in which state it is, if that is news. Raises MonitorError."""
        status = (await monitor.execute(commands.QUERY_STATUS))["status"]
        if monitor.process != self._process or self._trouble:
            restarted = self._process not in ("", monitor.process)
            log.info("vm.connected", status=status, restarted=restarted)
        elif status != self._status:
            log.info("vm.state", status=status, was=self._status)
        self._process, self._status, self._trouble = monitor.process, status, ""

    def _say_ended(self, error: NobodyThere) -> None:
        if self._status or self._trouble:
            log.info("vm.lost", error=error.message)
        self._status = self._trouble = ""

    def _say_trouble(self, error: MonitorError) -> None:
        if self._trouble != error.code:
            log.warning("vm.unreachable", code=error.code, error=str(error))
        self._trouble = error.code


def _log_news(events: Iterable[Event]) -> None:
    """What a guest can cause as often as it likes is one line, with how often it came."""
    lines: dict[object, tuple[Event, int]] = {}
    for number, event in enumerate(events):
        if event.name in STATES or (event.name == "DEVICE_DELETED" and "device" not in event.data):
            continue  # a device without a name is a part of one that has one
        key = event.name if event.name in GUEST_NEWS else number
        lines[key] = event, lines.get(key, (event, 0))[1] + 1
    for event, times in lines.values():
        log.info("vm.news", name=event.name, data=event.data, times=times)


async def _ended(task: "asyncio.Task[None]") -> None:
    await asyncio.wait([task])


class Supervisors:
    """Those of all VMs. `connect` is what runs are given instead of the `connect` that they were made with."""

    def __init__(self, connect: Connect, reconciler: Reconciler) -> None:
        self._connect = connect
        self._reconciler = reconciler
        self._by_path: dict[str, Supervisor] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """Also those that end once what they lent is returned."""
        self._start: aio.Start | None = None

    @property
    def monitors(self) -> set[str]:
        """The monitors that are looked after, by their paths."""
        return set(self._by_path)

    def connect(self, path: Path, *, vm: str) -> AbstractAsyncContextManager[Monitor]:
        """Borrow the connection to a VM that is looked after; others are connected to as without supervisors."""
        if (one := self._by_path.get(str(path))) is not None:
            return one.lent()
        if (ending := self._tasks.get(str(path))) is not None and not ending.done():
            return self._connected_after(ending, path, vm)
        return self._connect(path, vm=vm)

    @contextlib.asynccontextmanager
    async def _connected_after(self, ending: "asyncio.Task[None]", path: Path, vm: str) -> AsyncIterator[Monitor]:
        await _ended(ending)
        async with self._connect(path, vm=vm) as monitor:
            yield monitor

    def follow(self, vms: Iterable[Vm]) -> None:
        """Look after these from now on. Another VM's connection is given up once nobody borrows it."""
        assert self._start is not None  # noqa: S101  `serving`
        wanted = {str(vm.qmp): vm for vm in vms}
        for path, one in tuple(self._by_path.items()):
            if path not in wanted or wanted[path].name != one.name:
                del self._by_path[path]
                self._tasks[path].cancel()
        self._tasks = {path: task for path, task in self._tasks.items() if not task.done()}
        for number, path in enumerate([path for path in wanted if path not in self._by_path]):
            one = self._by_path[path] = Supervisor(wanted[path], self._connect, self._reconciler)
            serve = one.serve(delay_seconds=number / STARTS_PER_SECOND, after=self._tasks.get(path))
            self._tasks[path] = self._start(serve)

    @contextlib.asynccontextmanager
    async def serving(self, vms: Iterable[Vm]) -> AsyncIterator[None]:
        """Look after these for the block. At its end, whoever borrowed a connection has returned it."""
        async with aio.background() as start:
            self._start = start
            self.follow(vms)
            try:
                yield
            finally:
                self._start = None
                self._by_path = {}
