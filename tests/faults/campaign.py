"""Doing a plan's faults to a bed, one after the other, and looking at what comes of each.

What goes wrong is noted in the report and the campaign goes on, with a guest that is started anew if one was lost.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from orchestrator.causes import Cause
from orchestrator.model import Kind as BackupKind
from orchestrator.model import Outcome, Phase
from tests.faults.bed import CBW_TIMEOUT_SECONDS, REGION_BYTES, Bed, Machine
from tests.faults.daemon import Daemon, Line, command_line
from tests.faults.damage import damage
from tests.faults.places import filled
from tests.faults.plan import Damage, Fault, Kind, Moment, When
from tests.faults.report import Report
from tests.guest import images, sequence
from tests.guest.vm import GuestFailureError

MARGIN_SECONDS = 4.0
"""For a machine that is busy: what a stall may take beyond the copy-before-write timeout."""
TIDY_SECONDS = 60.0
RUNS_AGAIN_SECONDS = 20.0
READY_SECONDS = 30.0
RUN_SECONDS = 90.0
USUAL_SECONDS = 2.5
ORPHAN_SECONDS = 20.0
LOOK_SECONDS = 0.1
PAUSES = "7.2"
"""The QEMU that stands still for a snapshot; one of the two is of this version."""
HARMLESS = ("query-", "qmp_", "qom-list", "qom-get")


class Campaign:
    """Does faults to `bed` and counts."""

    def __init__(
        self, bed: Bed, report: Report, *, stop_seconds: float, say: Callable[[str], None] = print
    ) -> None:
        self._bed = bed
        self._report = report
        self._stop_seconds = stop_seconds
        self._say = say
        self._orphans: set[int] = set()
        self._truncated = False
        self._fresh = False
        """Whether nobody has looked yet at what the daemon's start has put right."""
        self._spared: dict[str, float] = {}
        """Seconds that a VM stood still this round, because it was wanted so."""

    async def run(self, faults: Sequence[Fault]) -> None:
        """All of them, and a last look at everything."""
        begun = time.monotonic()
        for number, fault in enumerate(faults):
            left = (time.monotonic() - begun) / max(number, 1) * (len(faults) - number)
            self._say(f"{number + 1} of {len(faults)}, {left / 60:.0f} min left: {fault}")
            await self.round(fault)
            self._report.seconds = time.monotonic() - begun
        await self.finish()
        self._report.seconds = time.monotonic() - begun

    async def round(self, fault: Fault) -> None:
        """See what the last one left, do this one."""
        self._report.count(fault)
        with self._noting(fault):
            if fault.alone and self._daemon_is_dead:
                await self._tidied_alone()
            daemon = await self._daemon()
            if not fault.at_once:
                await self._recovered(daemon, exactly=fault.exactly)
            await self._do(fault)
        await self._look_at_guests(fault)

    async def finish(self) -> None:
        """The last fault is recovered from, and nothing of anything is left."""
        with self._noting("the end"):
            await self._recovered(await self._daemon(), exactly=True)
            await self._stop_daemon()
            await self._tidied_alone()

    # --- after a fault ---

    @property
    def _daemon_is_dead(self) -> bool:
        return self._bed.daemon is None or not self._bed.daemon.alive

    async def _daemon(self) -> Daemon:
        """The one that lives, or a new one, which first of all lets guests run."""
        if not self._daemon_is_dead:
            assert self._bed.daemon is not None
            return self._bed.daemon
        return await self._started(idle=False)

    async def _started(self, *, idle: bool) -> Daemon:
        paused = [machine for machine in self._bed.machines if await self._is_paused(machine)]
        self._report.left_paused += len(paused)
        for machine in self._bed.machines:
            machine.records = await self._records(machine)
        daemon = await self._bed.start(idle=idle)
        self._fresh = True
        for machine in paused:
            await self._runs_again(daemon, machine)
        return daemon

    async def _runs_again(self, daemon: Daemon, machine: Machine) -> None:
        try:
            async with asyncio.timeout(RUNS_AGAIN_SECONDS):
                while await self._is_paused(machine):
                    await asyncio.sleep(0.01)
        except TimeoutError:
            await machine.guest.resume()
            self._guest_error("the last kill", f"{machine.name} was left paused")
        self._report.paused_seconds.append(daemon.seconds())

    async def _is_paused(self, machine: Machine) -> bool:
        return machine.guest.alive() and not (await machine.guest.execute("query-status"))["running"]

    async def _recovered(self, daemon: Daemon, *, exactly: bool) -> None:
        """The daemon is ready, nothing of dead runs is left, and the next backups are right."""
        await daemon.until(lambda: daemon.of("daemon.ready"), "daemon.ready", deadline_seconds=READY_SECONDS)
        await self._damage_is_named(daemon)
        await self._without(self._bed.of_dead_runs, "of dead runs")
        fresh, self._fresh = self._fresh, False
        if fresh:
            self._report.tidy_seconds.append(daemon.seconds())
        await self._no_orphans()
        async with asyncio.TaskGroup() as group:
            for machine in self._bed.machines:
                group.create_task(self._backed_up(daemon, machine, exactly=exactly, fresh=fresh))

    async def _tidied_alone(self) -> None:
        """A daemon that makes no backups leaves nothing at all, and ends when it is told to."""
        daemon = await self._started(idle=True)
        try:
            await daemon.until(lambda: daemon.of("daemon.ready"), "daemon.ready", deadline_seconds=READY_SECONDS)
            await self._damage_is_named(daemon)
            await self._without(self._bed.anything, "at all")
            self._report.tidy_seconds.append(daemon.seconds())
            await self._no_orphans()
        finally:
            self._fresh = False
            await self._stop_daemon()

    async def _damage_is_named(self, daemon: Daemon) -> None:
        if self._truncated:
            self._truncated = False
            await daemon.until(lambda: daemon.of("journal.damaged"), "journal.damaged")

    async def _stop_daemon(self) -> None:
        assert self._bed.daemon is not None
        self._note_runs(self._bed.daemon)
        code = await self._bed.daemon.stop()
        assert code == 0, f"exit code {code} after SIGTERM: {self._bed.daemon.tail()}"

    async def _without(self, look: Callable[[], Awaitable[list[str]]], what: str) -> None:
        """Wait until nothing is left; what is, is a leftover."""
        left: list[str] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TIDY_SECONDS):
                while left := await look():
                    await asyncio.sleep(LOOK_SECONDS)
        self._report.leftovers += len(left)
        assert not left, f"left {what}: {left}"

    async def _no_orphans(self) -> None:
        """What a killed daemon had started has ended by itself."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while alive := [line for pid in self._orphans if (line := command_line(pid))]:
            if time.monotonic() > deadline:
                self._report.leftovers += len(alive)
                self._orphans.clear()
                raise AssertionError(f"processes of a dead daemon: {alive}")
            await asyncio.sleep(LOOK_SECONDS)
        self._orphans.clear()

    # --- backups ---

    async def _backed_up(self, daemon: Daemon, machine: Machine, *, exactly: bool, fresh: bool) -> None:
        """The next backup succeeds, incremental where it can be, and restores as one moment of the guest."""
        if exactly:
            await self._backed_up_exactly(daemon, machine)
            return
        since, at_least = 0, machine.records  # of a new daemon, the first run will do
        if not fresh:
            since, at_least = len(daemon.read()), await self._records(machine)
        run = await daemon.logs("run.started", since=since, vm=machine.name)
        end = await self._succeeded(daemon, machine, run)
        restored = await self._restored(machine, end)
        self._holds_a_moment(machine, restored, at_least)
        await asyncio.to_thread(shutil.rmtree, restored[0].parent)

    async def _backed_up_exactly(self, daemon: Daemon, machine: Machine) -> None:
        """As above, compared with copies of the disks while the guest stood still, byte for byte."""
        guest = machine.guest
        await guest.pause()
        try:
            at_least = await self._records(machine)
            run = await daemon.logs("run.started", since=len(daemon.read()), vm=machine.name)
            await daemon.logs("snapshot.taken", run=run["run"], deadline_seconds=RUN_SECONDS)
            folder = self._bed.folder / f"copies-{machine.name}"
            folder.mkdir()
            copies = [folder / disk.id for disk in guest.disks]
            for disk, copy in zip(guest.disks, copies, strict=True):
                await guest.copy_disk(disk.id, copy)
        finally:
            await guest.resume()
        end = await self._succeeded(daemon, machine, run)
        restored = await self._restored(machine, end)
        self._holds_a_moment(machine, restored, at_least)
        for copy, image in zip(copies, restored, strict=True):
            comparison = await asyncio.to_thread(images.compare, copy, image)
            self._report.wrong_restores += not comparison.identical
            assert comparison.identical, f"{end['snapshot']}, {image.name}: {comparison}"
        self._report.compared += 1
        for place in (folder, restored[0].parent):
            await asyncio.to_thread(shutil.rmtree, place)

    async def _succeeded(self, daemon: Daemon, machine: Machine, run: Line) -> Line:
        end = await daemon.logs("run.finished", run=run["run"], deadline_seconds=RUN_SECONDS)
        assert end["outcome"] == Outcome.SUCCEEDED, f"nothing was done to this run: {end}"
        machine.durations = [*machine.durations[-9:], end["duration_seconds"]]
        if end["kind"] == BackupKind.FULL:
            listed = await self._bed.listed(machine)
            before = listed[: listed.index(end["snapshot"])]
            anew = not before or before[-1] == machine.restarted_after or "full_every" in end["reason"]
            assert anew, f"{machine.name}: full, although there is {before[-1]}: {end['reason']}"
        return end

    async def _restored(self, machine: Machine, end: Line) -> list[Path]:
        """Its disks, in the guest's order."""
        paths = await self._bed.host.restored(machine.target, end["snapshot"], name=machine.name)
        self._report.restores += 1
        return [paths[disk.id] for disk in machine.guest.disks]

    def _holds_a_moment(self, machine: Machine, restored: Sequence[Path], at_least: int) -> None:
        verdict = sequence.check(
            restored, run=machine.guest.run, region_bytes=REGION_BYTES, at_least=max(1, at_least)
        )
        self._report.wrong_restores += not verdict.ok
        assert verdict.ok, f"{machine.name}: restored is no moment of the guest: {verdict.problems}"

    async def _records(self, machine: Machine) -> int:
        """So many records, of this start of the guest, are on all its disks."""
        return await machine.guest.writes() // len(machine.guest.disks) - 2

    def _note_runs(self, daemon: Daemon) -> None:
        for line in daemon.of("run.finished"):
            end, said = line["outcome"], "; ".join(line["warnings"])
            if line["error"]:
                end += f" with {line['error']['code']}"
                said = line["error"]["message"]
                if line["error"]["cause"] == Cause.BUG:
                    self._wrong(line["vm"], f"nobody has foreseen this: {line['error']}")
            self._report.runs[end] += 1
            if said:
                self._report.examples.setdefault(end, f", such as {self._bed.daemon_name}: {said[:300]}")
            if not line["error"]:
                self._report.kinds[line["kind"]] += 1

    # --- faults ---

    async def _do(self, fault: Fault) -> None:
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
                self._truncated = fault.damage is Damage.TRUNCATED  # what else it is may not matter yet
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
                await self._stop_daemon()
                await asyncio.to_thread(disk.repair)
            case Kind.TARGET_HANGS:
                await self._while_hanging(daemon, moment)
            case Kind.IMAGE_ERRORS:
                machine.proxy.rewrite = images_return_errors
                try:
                    await self._fails(daemon, machine)
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
                await asyncio.sleep(max(0.0, moment.fraction * READY_USUALLY_SECONDS - daemon.seconds()))
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
            await daemon.until(lambda: acted.is_set() or not daemon.alive, f"{moment}: {count} were sent")
            await acted.wait()
        finally:
            machine.proxy.disarm()

    async def _kill_daemon(self, daemon: Daemon, machine: Machine, moment: Moment) -> None:
        def kill() -> None:
            self._orphans |= daemon.children()
            daemon.kill()

        try:
            await self._at(daemon, machine, moment, kill)
        finally:
            kill()
            await daemon.ended()
            self._note_runs(daemon)

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
        await self._boot_again(machine)

    async def _boot_again(self, machine: Machine) -> None:
        await machine.guest.kill()
        listed = await self._bed.listed(machine)
        machine.restarted_after = listed[-1] if listed else None
        machine.stalls_seen = machine.errors_seen = 0
        await machine.guest.start()
        await machine.guest.wait_ready()
        await machine.guest.wait_writes(100)

    async def _stop_qemu(self, daemon: Daemon, machine: Machine, moment: Moment) -> None:
        pid = machine.guest.pid
        assert pid is not None
        self._spared[machine.name] = self._stop_seconds
        try:
            await self._at(daemon, machine, moment, lambda: os.kill(pid, signal.SIGSTOP))
            async with asyncio.timeout(self._stop_seconds) as stopped:
                await self._neighbours_go_on(daemon, machine)
                await asyncio.sleep(self._stop_seconds)
        except TimeoutError:
            if not stopped.expired():
                raise
        finally:
            os.kill(pid, signal.SIGCONT)

    async def _while_failing(
        self, daemon: Daemon, failing: contextlib.AbstractContextManager[object], moment: Moment
    ) -> None:
        """From that moment on something fails, until a run of the first VM has; its neighbour's goes on."""
        machine = self._bed.machines[0]
        async with contextlib.AsyncExitStack() as stack:
            await self._at(daemon, machine, moment, lambda: stack.enter_context(failing))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._fails(daemon, machine))
                group.create_task(self._neighbours_go_on(daemon, machine))

    async def _while_hanging(self, daemon: Daemon, moment: Moment) -> None:
        machine = self._bed.machines[0]
        with contextlib.ExitStack() as stack:
            await self._at(daemon, machine, moment, lambda: stack.enter_context(self._bed.disk.hanging()))
            await self._neighbours_go_on(daemon, machine)

    async def _fails(self, daemon: Daemon, machine: Machine) -> None:
        """A run that began before, or begins now, fails with a cause that is named, or waits for what it lacks."""
        since = len(daemon.read())

        def failed() -> bool:
            new = daemon.read()[since:]
            ends = [line for line in new if line["event"] == "run.finished" and line["vm"] == machine.name]
            waits = [line for line in new if line["event"] == "run.queued" and line["vm"] == machine.name]
            return bool([line for line in ends if line["error"]] or waits)

        await daemon.until(failed, f"a run of {machine.name} that fails", deadline_seconds=RUN_SECONDS)

    async def _neighbours_go_on(self, daemon: Daemon, machine: Machine) -> None:
        """A backup of the other VM begins now, and succeeds."""
        for other in self._bed.machines:
            if other is not machine:
                run = await daemon.logs("run.started", since=len(daemon.read()), vm=other.name)
                await self._succeeded(daemon, other, run)

    # --- guests ---

    async def _look_at_guests(self, fault: Fault | str) -> None:
        """By their own word: no write failed, none took too long, and they go on."""
        for machine in self._bed.machines:
            guest = machine.guest
            if not guest.alive():
                self._report.lost_guests += 1
                self._wrong(fault, f"{machine.name}'s QEMU is gone")
                await self._boot_again(machine)
                continue
            limit = CBW_TIMEOUT_SECONDS + MARGIN_SECONDS + self._spared.get(machine.name, 0.0)
            stalls = [us / 1e6 for us in guest.stalls_us()]
            new, machine.stalls_seen = stalls[machine.stalls_seen :], len(stalls)
            if machine.name not in self._spared:
                self._report.stall_seconds = max(self._report.stall_seconds, *new, 0.0)
            for stall in new:
                if stall > limit:
                    self._guest_error(fault, f"{machine.name}: a write took {stall:.1f} s")
            errors, machine.errors_seen = guest.guest_errors() - machine.errors_seen, guest.guest_errors()
            if errors:
                self._guest_error(fault, f"{machine.name}: {errors} writes failed")
            if self._daemon_is_dead and await self._is_paused(machine):
                continue  # whether that is put right is seen at the next start
            try:
                await guest.wait_writes(20)
            except GuestFailureError as error:
                self._guest_error(fault, f"{machine.name}: {error}")
                await self._boot_again(machine)
        self._spared.clear()

    def _guest_error(self, fault: Fault | str, what: str) -> None:
        self._report.guest_errors += 1
        self._wrong(fault, what)

    def _wrong(self, fault: Fault | str, what: str) -> None:
        log = f" [{self._bed.daemon_name}]"
        self._report.wrong.append(f"{fault}: {what.partition(chr(10))[0][:400]}{log}")
        self._say(f"WRONG: {what}")

    @contextlib.contextmanager
    def _noting(self, fault: Fault | str) -> Iterator[None]:
        """Note what is wrong, and go on."""
        try:
            yield
        except* (AssertionError, TimeoutError) as errors:
            for error in leaves(errors):
                self._wrong(fault, f"{type(error).__name__}: {error}")


READY_USUALLY_SECONDS = 1.5
"""What a start takes, about, with the first look at what is left."""


def leaves(errors: BaseExceptionGroup[Exception]) -> Iterator[BaseException]:
    """The errors in a group, and in its groups."""
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


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
