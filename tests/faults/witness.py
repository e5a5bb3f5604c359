"""Looking at what came of faults: at guests, by their own word; at all that may be left; at restored backups.

What is wrong is raised as an AssertionError, and counted in the report.
"""

import asyncio
import contextlib
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from orchestrator.causes import Cause
from orchestrator.model import Kind, Outcome
from tests.faults.bed import CBW_TIMEOUT_SECONDS, REGION_BYTES, Bed, Machine
from tests.faults.daemon import Daemon, Line, command_line
from tests.faults.report import Report
from tests.guest import images, sequence
from tests.guest.vm import GuestFailureError

MARGIN_SECONDS = 4.0
"""For a machine that is busy: what a stall may take beyond the copy-before-write timeout."""
TIDY_SECONDS = 60.0
RUN_SECONDS = 90.0
ORPHAN_SECONDS = 20.0
LOOK_SECONDS = 0.1


class Witness:
    """Looks at `bed` and counts in `report`. What is wrong is also told at once, to `say`."""

    def __init__(self, bed: Bed, report: Report, say: Callable[[str], None]) -> None:
        self.report = report
        self._bed = bed
        self._say = say

    # --- what is wrong ---

    def wrong(self, when: object, what: str) -> None:
        """Note it."""
        log = self._bed.daemon.log.name if self._bed.daemon else "no daemon"
        self.report.wrong.append(f"{when}: {what.partition(chr(10))[0][:400]} [{log}]")
        self._say(f"WRONG: {what}")

    def guest_error(self, when: object, what: str) -> None:
        """Note what a guest suffered."""
        self.report.guest_errors += 1
        self.wrong(when, what)

    @contextlib.contextmanager
    def noting(self, when: object) -> Iterator[None]:
        """Note what is wrong in the block instead of raising it, whatever it is: the campaign goes on."""
        try:
            yield
        except* Exception as errors:  # noqa: BLE001
            for error in leaves(errors):
                self.wrong(when, f"{type(error).__name__}: {error}")

    # --- what is left ---

    async def nothing_is_left(self, look: Callable[[], Awaitable[list[str]]], what: str) -> None:
        """Wait until nothing is left; what is, is a leftover."""
        left: list[str] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TIDY_SECONDS):
                while left := await look():
                    await asyncio.sleep(LOOK_SECONDS)
        self.report.leftovers += len(left)
        assert not left, f"left {what}: {left}"

    async def no_orphans(self) -> None:
        """What killed daemons had started has ended by itself."""
        orphans, self._bed.orphans = self._bed.orphans, set()
        deadline = time.monotonic() + ORPHAN_SECONDS
        while alive := [line for pid in orphans if (line := command_line(pid))]:
            if time.monotonic() > deadline:
                self.report.leftovers += len(alive)
                raise AssertionError(f"processes of a dead daemon: {alive}")
            await asyncio.sleep(LOOK_SECONDS)

    # --- backups ---

    async def backed_up(self, daemon: Daemon, machine: Machine, *, exactly: bool, fresh: bool) -> None:
        """The next backup succeeds, incremental where it can be, and restores as one moment of the guest."""
        if exactly:
            await self._backed_up_exactly(daemon, machine)
            return
        since, at_least = 0, machine.records  # of a new daemon, the first run will do
        if not fresh:
            since, at_least = len(daemon.read()), await machine.count_records()
        run = await daemon.logs("run.started", since=since, vm=machine.name)
        end = await self.succeeded(daemon, machine, run)
        restored = await self._restored(machine, end)
        self._holds_a_moment(machine, restored, at_least)
        await asyncio.to_thread(shutil.rmtree, restored[0].parent)

    async def _backed_up_exactly(self, daemon: Daemon, machine: Machine) -> None:
        """As above, compared with copies of the disks while the guest stood still, byte for byte."""
        guest = machine.guest
        await guest.pause()
        try:
            at_least = await machine.count_records()
            run = await daemon.logs("run.started", since=len(daemon.read()), vm=machine.name)
            await daemon.logs("snapshot.taken", run=run["run"], deadline_seconds=RUN_SECONDS)
            folder = self._bed.folder / f"copies-{machine.name}"
            folder.mkdir(exist_ok=True)  # where a run failed that nothing was done to, they are there yet
            copies = [folder / disk.id for disk in guest.disks]
            for disk, copy in zip(guest.disks, copies, strict=True):
                await guest.copy_disk(disk.id, copy)
        finally:
            await guest.resume()
        end = await self.succeeded(daemon, machine, run)
        restored = await self._restored(machine, end)
        self._holds_a_moment(machine, restored, at_least)
        for copy, image in zip(copies, restored, strict=True):
            comparison = await asyncio.to_thread(images.compare, copy, image)
            self.report.wrong_restores += not comparison.identical
            assert comparison.identical, f"{end['snapshot']}, {image.name}: {comparison}"
        self.report.compared += 1
        for place in (folder, restored[0].parent):
            await asyncio.to_thread(shutil.rmtree, place)

    async def succeeded(self, daemon: Daemon, machine: Machine, run: Line) -> Line:
        """A run to which nothing was done ends well, and copied no more than it had to."""
        end = await daemon.logs("run.finished", run=run["run"], deadline_seconds=RUN_SECONDS)
        assert end["outcome"] == Outcome.SUCCEEDED, f"nothing was done to this run: {end}"
        machine.durations = [*machine.durations[-9:], end["duration_seconds"]]
        if end["kind"] == Kind.FULL:
            listed = await self._bed.listed(machine)
            before = listed[: listed.index(end["snapshot"])]
            anew = not before or before[-1] == machine.restarted_after or "full_every" in end["reason"]
            assert anew, f"{machine.name}: full, although there is {before[-1]}: {end['reason']}"
        return end

    async def _restored(self, machine: Machine, end: Line) -> list[Path]:
        """Its disks, in the guest's order."""
        paths = await self._bed.host.restored(machine.target, end["snapshot"], name=machine.name)
        self.report.restores += 1
        return [paths[disk.id] for disk in machine.guest.disks]

    def _holds_a_moment(self, machine: Machine, restored: Sequence[Path], at_least: int) -> None:
        verdict = sequence.check(
            restored, run=machine.guest.run, region_bytes=REGION_BYTES, at_least=max(1, at_least)
        )
        self.report.wrong_restores += not verdict.ok
        assert verdict.ok, f"{machine.name}: restored is no moment of the guest: {verdict.problems}"

    async def fails(self, daemon: Daemon, machine: Machine) -> None:
        """A run that began before, or begins now, fails with a cause that is named, or waits for what it lacks."""
        since = len(daemon.read())

        def failed() -> bool:
            new = daemon.read()[since:]
            ends = [line for line in new if line["event"] == "run.finished" and line["vm"] == machine.name]
            waits = [line for line in new if line["event"] == "run.queued" and line["vm"] == machine.name]
            return bool([line for line in ends if line["error"]] or waits)

        await daemon.until(failed, f"a run of {machine.name} that fails", deadline_seconds=RUN_SECONDS)

    async def neighbours_go_on(self, daemon: Daemon, machine: Machine) -> None:
        """A backup of the other VM begins now, and succeeds."""
        for other in self._bed.machines:
            if other is not machine:
                run = await daemon.logs("run.started", since=len(daemon.read()), vm=other.name)
                await self.succeeded(daemon, other, run)

    def count_runs(self, daemon: Daemon) -> None:
        """How all runs of a daemon that is over ended."""
        for line in daemon.of("run.finished"):
            end, said = line["outcome"], "; ".join(line["warnings"])
            if line["error"]:
                end += f" with {line['error']['code']}"
                said = line["error"]["message"]
                if line["error"]["cause"] == Cause.BUG:
                    self.wrong(line["vm"], f"nobody has foreseen this: {line['error']}")
            self.report.runs[end] += 1
            if said:
                self.report.examples.setdefault(end, f", such as {daemon.log.name}: {said[:300]}")
            if not line["error"]:
                self.report.kinds[line["kind"]] += 1

    # --- guests ---

    async def look_at_guests(self, when: object) -> None:
        """By their own word: they go on, no write failed, none took too long."""
        for machine in self._bed.machines:
            if not machine.guest.alive():
                self.report.lost_guests += 1
                self.wrong(when, f"{machine.name}'s QEMU is gone")
                await self._bed.boot_again(machine)
                continue
            goes_on = await self._goes_on(machine, when)
            self._count_trouble(machine, when)
            if not goes_on:
                await self._bed.boot_again(machine)

    async def _goes_on(self, machine: Machine, when: object) -> bool:
        if self._bed.daemon_is_dead and await machine.is_paused():
            return True  # whether that is put right is seen at the next start
        try:
            await machine.guest.wait_writes(20)  # a write that took long is told by then
        except GuestFailureError as error:
            self.guest_error(when, f"{machine.name}: {error}")
            return False
        return True

    def _count_trouble(self, machine: Machine, when: object) -> None:
        """What the guest says of its writes since it was asked before."""
        spared, machine.stopped_seconds = machine.stopped_seconds, 0.0
        limit = CBW_TIMEOUT_SECONDS + MARGIN_SECONDS + spared
        stalls = [us / 1e6 for us in machine.guest.stalls_us()]
        new, machine.stalls_seen = stalls[machine.stalls_seen :], len(stalls)
        if not spared:
            self.report.stall_seconds = max(self.report.stall_seconds, *new, 0.0)
        for stall in new:
            if stall > limit:
                self.guest_error(when, f"{machine.name}: a write took {stall:.1f} s")
        errors = machine.guest.guest_errors()
        if errors > machine.errors_seen:
            self.guest_error(when, f"{machine.name}: {errors - machine.errors_seen} writes failed")
        machine.errors_seen = errors


def leaves(errors: BaseExceptionGroup[Exception]) -> Iterator[BaseException]:
    """The errors in a group, and in its groups."""
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error
