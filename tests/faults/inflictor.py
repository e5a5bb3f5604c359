"""Doing a fault to a bed, at its moment, for as long as it takes to show."""

import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence

from orchestrator.model import Phase
from tests.faults.bed import Bed, Machine
from tests.faults.daemon import Daemon, command_line
from tests.faults.damage import damage
from tests.faults.places import filled
from tests.faults.plan import Damage, Fault, Kind, Moment, When
from tests.faults.witness import Witness

USUAL_SECONDS = 2.5
READY_SECONDS = 1.5
"""What a run takes, and a start of the daemon with its first look at what is left, about."""
PAUSES = "7.2"
"""The QEMU that stands still for a snapshot; one of the two is of this version."""
HARMLESS = ("query-", "qmp_", "qom-list", "qom-get")


class Inflictor:
    """Does faults to `bed`; `stop_seconds`: for how long, at least, a QEMU is stopped."""

    def __init__(self, bed: Bed, witness: Witness, *, stop_seconds: float) -> None:
        self._bed = bed
        self._witness = witness
        self._stop_seconds = stop_seconds

    async def do(self, fault: Fault) -> None:
        """Raises AssertionError if what has to come of it at once does not."""
        daemon, machine, moment = self._bed.daemon, self._bed.machines[fault.vm], fault.moment
        assert daemon is not None
        if moment.when is When.PAUSE:
            (machine,) = [one for one in self._bed.machines if one.version == PAUSES]
        match fault.kind:
            case Kind.DAEMON:
                await self._kill_daemon(daemon, machine, moment)
            case Kind.STATE:
                await self._kill_daemon(daemon, machine, moment)
                damage(self._bed.state / "journal.sqlite", fault.damage)
                self._bed.damaged = fault.damage is Damage.TRUNCATED  # other damage may not matter yet
            case Kind.MOVER:
                await self._kill_mover(daemon, machine, moment)
            case Kind.QEMU:
                await self._kill_qemu(daemon, machine, moment)
            case Kind.STOP:
                await self._stop_qemu(daemon, machine, moment)
            case Kind.CUT:
                await self._at(daemon, machine, moment, machine.proxy.cut)
            case _:
                await self._do_to_a_place(daemon, fault)

    async def _do_to_a_place(self, daemon: Daemon, fault: Fault) -> None:
        machine, disk, moment = self._bed.machines[0], self._bed.disk, fault.moment
        match fault.kind:
            case Kind.STORAGE_FULL:
                await self._while_failing(daemon, filled(machine.storage.parent), moment)
            case Kind.TARGET_FULL:
                await self._while_failing(daemon, filled(disk.path), moment)
            case Kind.TARGET_ERRORS:
                await self._while_failing(daemon, disk.returning_errors(), moment)
                await self._bed.stop()
                self._witness.count_runs(daemon)
                await asyncio.to_thread(disk.repair)
            case Kind.TARGET_HANGS:
                await self._while_hanging(daemon, moment)
            case Kind.TARGET_SLOW:
                await self._while_slow(daemon, moment)
            case Kind.IMAGE_ERRORS:
                machine.proxy.rewrite = images_return_errors
                try:
                    await self._witness.fails(daemon, machine)
                finally:
                    machine.proxy.rewrite = None
            case _:
                raise AssertionError(f"nobody does this: {fault}")

    async def _at(self, daemon: Daemon, machine: Machine, moment: Moment, act: Callable[[], object]) -> None:
        """Act at the moment."""
        usual = statistics.median(machine.durations) if machine.durations else USUAL_SECONDS
        since = len(daemon.read())
        match moment.when:
            case When.STARTING:
                await asyncio.sleep(max(0.0, moment.fraction * READY_SECONDS - daemon.seconds()))
            case When.RUN:
                await daemon.logs("run.started", since=since, vm=machine.name)
                await asyncio.sleep(moment.fraction * usual)
            case When.PHASE:
                await daemon.logs("run.phase", since=since, vm=machine.name, phase=moment.phase)
            case When.COMMAND | When.PAUSE:
                await self._at_command(daemon, machine, moment, act)
                return
        act()

    async def _at_command(
        self, daemon: Daemon, machine: Machine, moment: Moment, act: Callable[[], object]
    ) -> None:
        """Act between two commands: in the proxy, which passes nothing on meanwhile."""
        count, counts = 0, moment.when is When.COMMAND
        acted = asyncio.Event()
        loop = asyncio.get_running_loop()

        def reached(names: Sequence[str]) -> bool:
            nonlocal count, counts
            counts = counts or "stop" in names
            count += counts and not names[0].startswith(HARMLESS)
            return count >= moment.number

        def do() -> None:
            act()
            loop.call_soon_threadsafe(acted.set)

        machine.proxy.at(reached, do, after=moment.after)
        try:
            await daemon.until(lambda: acted.is_set() or not daemon.alive, str(moment))
            await acted.wait()
        finally:
            machine.proxy.disarm()

    async def _kill_daemon(self, daemon: Daemon, machine: Machine, moment: Moment) -> None:
        def kill() -> None:
            self._bed.orphans |= daemon.children()
            daemon.kill()

        try:
            await self._at(daemon, machine, moment, kill)
        finally:
            kill()
            await daemon.ended()
            if daemon.of("journal.damaged"):  # killed while it started, it has said so already
                self._bed.damaged = False
            self._witness.count_runs(daemon)

    async def _kill_mover(self, daemon: Daemon, machine: Machine, moment: Moment) -> None:
        since = len(daemon.read())
        killed: list[int] = []

        def kill() -> None:
            for pid in daemon.children():
                if "orchestrator.target.mover" in command_line(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)

        await self._at(daemon, machine, moment, kill)
        if killed and moment.phase is Phase.COPYING:
            end = await daemon.logs("run.finished", since=since, vm=machine.name)
            assert end["error"], f"its mover was killed: {end}"
            assert end["error"]["code"] == "mover-died", end

    async def _kill_qemu(self, daemon: Daemon, machine: Machine, moment: Moment) -> None:
        pid = machine.guest.pid
        assert pid is not None
        await self._at(daemon, machine, moment, lambda: os.kill(pid, signal.SIGKILL))
        await self._bed.boot_again(machine)

    async def _stop_qemu(self, daemon: Daemon, machine: Machine, moment: Moment) -> None:
        pid = machine.guest.pid
        assert pid is not None
        begun = time.monotonic()
        try:
            await self._at(daemon, machine, moment, lambda: os.kill(pid, signal.SIGSTOP))
            begun = time.monotonic()
            await self._witness.neighbours_go_on(daemon, machine)
            await asyncio.sleep(max(0.0, begun + self._stop_seconds - time.monotonic()))
        finally:
            os.kill(pid, signal.SIGCONT)
            machine.stopped_seconds = time.monotonic() - begun

    async def _while_failing(
        self, daemon: Daemon, failing: contextlib.AbstractContextManager[object], moment: Moment
    ) -> None:
        """From that moment on something fails, until a run of the first VM has; its neighbour's goes on."""
        machine = self._bed.machines[0]
        async with contextlib.AsyncExitStack() as stack:
            await self._at(daemon, machine, moment, lambda: stack.enter_context(failing))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._witness.fails(daemon, machine))
                group.create_task(self._witness.neighbours_go_on(daemon, machine))

    async def _while_hanging(self, daemon: Daemon, moment: Moment) -> None:
        machine = self._bed.machines[0]
        with contextlib.ExitStack() as stack:
            await self._at(daemon, machine, moment, lambda: stack.enter_context(self._bed.disk.hanging()))
            await self._witness.neighbours_go_on(daemon, machine)

    async def _while_slow(self, daemon: Daemon, moment: Moment) -> None:
        """The run under way takes longer, and is as good as any."""
        machine = self._bed.machines[0]
        with contextlib.ExitStack() as stack:
            await self._at(daemon, machine, moment, lambda: stack.enter_context(self._bed.disk.slow()))
            async with asyncio.TaskGroup() as group:
                run = daemon.of("run.started", vm=machine.name)[-1]
                group.create_task(self._witness.succeeded(daemon, machine, run))
                group.create_task(self._witness.neighbours_go_on(daemon, machine))


def images_return_errors(command: dict[str, object]) -> dict[str, object]:
    """Have each write to a fleecing image fail: its file is put under blkdebug."""
    arguments = command.get("arguments")
    if command.get("execute") != "blockdev-add" or not isinstance(arguments, dict):
        return command
    name = str(arguments.get("node-name", ""))
    if not (name.startswith("vmf-") and name.endswith("-file")):
        return command
    file = {key: value for key, value in arguments.items() if key != "node-name"}
    rule = {"event": "none", "iotype": "write", "errno": 5, "immediately": True}
    faulty = {"driver": "blkdebug", "node-name": name, "image": file, "inject-error": [rule]}
    return {**command, "arguments": faulty}
