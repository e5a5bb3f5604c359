"""Backups of guests under load, again and again, on each QEMU, with and without iothreads.

    python -m tests.soak.versions [--rounds 30] [CASE ...]

What kills a QEMU may do so only once in tens of rounds. Each round is one backup of a guest that writes all the
time, a full one and then some incremental ones; it is restored and held against the order of the guest's writes.
The larger disk's fleecing image is extended on the way, where QEMU can do that.

A guest that is lost is replaced, so that the table at the end shows how often it happens. Exit code 1 if any round
went wrong.
"""

import argparse
import asyncio
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import structlog
import uvloop

from orchestrator.fleecing import boundary
from orchestrator.model import Discard, Kind
from tests.guest import sequence
from tests.guest.versions import QEMUS, qemu
from tests.guest.vm import MIB, DiskSpec, GuestFailureError, GuestVm, Workload
from tests.qemu.host import FLEECED, SLOWLY, Host
from tests.qemu.under_way import UnderWay

ROUNDS = 30
BY_WINDOWS = "7.2"
"""Copies by windows of its own accord."""
WINDOW_BYTES = 64 * MIB
CHAIN = 5
"""Rounds of one full backup and its incremental ones."""
REGION_BYTES = 160 * MIB
"""The part of a disk that is written to: the larger one's outgrows the first threshold of its fleecing image."""
OVERWRITING = 4000
WRITES_SECONDS = 120.0
ROUND_SECONDS = 400.0
ANSWER_SECONDS = 20.0


class End(StrEnum):
    """How a round ended. After the last three there is no guest to go on with."""

    OK = "ok"
    WRONG = "wrong"  # what was restored is not what the guest had written
    FAILED = "failed"  # no backup, or something of it was left, but the guest goes on
    STUCK = "stuck"  # QEMU answers, but its guest stands still or saw errors
    MUTE = "mute"  # QEMU's process is there, but does not answer
    DIED = "died"


LOST = (End.STUCK, End.MUTE, End.DIED)


class WrongError(Exception):
    """The restored disks are no moment of the guest."""


@dataclass(slots=True)
class Case:
    """A QEMU with one kind of disks, and what became of its rounds."""

    version: str
    iothread: bool
    by_windows: bool = False
    ends: Counter[End] = field(default_factory=Counter)
    guests: int = 0
    incremental: int = 0
    growths: int = 0
    held_ms: list[float] = field(default_factory=list)
    stall_ms: float = 0.0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.version}-{'iothreads' if self.iothread else 'plain'}{'-windows' * self.by_windows}"

    @property
    def rounds(self) -> int:
        return self.ends.total()

    def new_guest(self, folder: Path) -> GuestVm:
        """The next guest, not started yet."""
        self.guests += 1
        disks = [
            DiskSpec("vda", 512 * MIB, iothread=self.iothread),
            DiskSpec("vdb", 32 * MIB, format="raw", iothread=self.iothread),
        ]
        workload = Workload("sequence", region_bytes=REGION_BYTES)
        return GuestVm(folder / f"guest-{self.guests}", disks, workload, qemu=qemu(self.version))


async def soak(case: Case, rounds: int) -> None:
    """All rounds of one case, with as many guests as that takes."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        while case.rounds < rounds:
            async with case.new_guest(Path(folder)) as vm:
                await vm.wait_ready()
                await vm.wait_writes(OVERWRITING, WRITES_SECONDS)
                await rounds_of_guest(case, rounds, vm)
            shutil.rmtree(vm.folder)


async def rounds_of_guest(case: Case, rounds: int, vm: GuestVm) -> None:
    """Rounds until there have been enough, or the guest is lost."""
    end = End.OK
    while end not in LOST and case.rounds < rounds:
        started = time.monotonic()
        host = Host(vm.folder / f"chain-{case.rounds // CHAIN}", vm)
        end = await judged(case, host)
        case.ends[end] += 1
        case.seconds += time.monotonic() - started
        case.stall_ms = max(case.stall_ms, *(us / 1000 for us in vm.stalls_us()), 0.0)
        say(f"{case.name}: round {case.rounds} of {rounds}: {end}")
        shutil.rmtree(host.folder / "restored", ignore_errors=True)
        if case.rounds % CHAIN == 0:
            shutil.rmtree(host.folder)


async def judged(case: Case, host: Host) -> End:
    """One round, and how it ended; anything but well is explained at once."""
    try:
        async with asyncio.timeout(ROUND_SECONDS):
            await one_round(case, host)
    except WrongError as error:
        say(str(error))
        return End.WRONG
    except (AssertionError, TimeoutError) as error:
        # A QEMU that hangs or dies fails the backup, too: what it has come to says more.
        say(f"{type(error).__name__}: {error}")
        return await condition(host.vm)
    return End.OK


async def one_round(case: Case, host: Host) -> None:
    """Back up under load, restore, compare. Raises WrongError, AssertionError or TimeoutError."""
    vm = host.vm
    at_least = await vm.writes() // len(vm.disks) - 2
    discard = Discard.WINDOW if case.by_windows else Discard.AUTO
    async with host.backing_up(FLEECED, bwlimit=SLOWLY, discard=discard) as under_way:
        await under_way.copying()
        await vm.wait_writes(OVERWRITING, WRITES_SECONDS)
        await under_way.hurry()
    result = under_way.result
    assert result.error is None and not result.warnings, result  # noqa: PT018  (shown whole either way)
    case.held_ms.append(result.pause_ms or 0.0)
    case.incremental += result.kind is Kind.INCREMENTAL
    case.growths += growths(under_way)
    restored = await host.restored()
    paths = [restored[disk.id] for disk in vm.disks]
    verdict = await asyncio.to_thread(
        sequence.check, paths, run=vm.run, region_bytes=REGION_BYTES, at_least=at_least
    )
    if not verdict.ok:
        raise WrongError("\n".join(verdict.problems))
    await host.assert_as_before()


def growths(under_way: UnderWay) -> int:
    """How often the grants of a run were extended."""
    seen = {(disk.disk, disk.grant_bytes) for one in under_way.progress for disk in one.disks if disk.grant_bytes}
    return len(seen) - len({disk for disk, _ in seen})


async def condition(vm: GuestVm) -> End:
    """What a round that went wrong has left of its guest."""
    try:
        if vm.alive():
            await vm.execute("query-status", deadline_seconds=ANSWER_SECONDS)
    except GuestFailureError as error:
        say(str(error))
        return End.MUTE if vm.alive() else End.DIED
    try:
        await vm.wait_writes(20, ANSWER_SECONDS)
        await vm.assert_healthy()
    except GuestFailureError as error:
        say(str(error))
        return End.STUCK if vm.alive() else End.DIED
    return End.FAILED


def table(cases: Sequence[Case]) -> str:
    """What became of all rounds. `held`: for how long the product held the guest's I/O, or paused it."""
    heads = [*End, "incremental", "extended", "held ms", "at most", "stall ms", "s a round"]
    lines = [" " * 14 + "".join(f"{head:>12}" for head in heads)]
    for case in cases:
        held = sorted(case.held_ms) or [0.0]
        counts = [*(case.ends[end] for end in End), case.incremental, case.growths]
        measures = [held[len(held) // 2], held[-1], case.stall_ms, case.seconds / max(case.rounds, 1)]
        lines.append(
            f"{case.name:14}"
            + "".join(f"{count:12}" for count in counts)
            + "".join(f"{measure:12.1f}" for measure in measures)
        )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201  (a command)


def main() -> int:
    """Soak what is asked for; returns the exit code."""
    cases = [Case(version, iothread) for version in QEMUS for iothread in (False, True)]
    cases += [Case(version, iothread=True, by_windows=True) for version in QEMUS if version != BY_WINDOWS]
    boundary.WINDOW_BYTES = WINDOW_BYTES
    parser = argparse.ArgumentParser(description="Back up guests under load, again and again, on each QEMU.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each case (default: %(default)s)")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {', '.join(case.name for case in cases)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - {case.name for case in cases}:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    chosen = [case for case in cases if not arguments.cases or case.name in arguments.cases]
    for case in chosen:
        qemu(case.version)  # rather now than after an hour
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            for case in chosen:
                runner.run(soak(case, arguments.rounds))
        finally:
            print(table(chosen))  # noqa: T201  (a command)
    return int(any(case.ends[End.OK] < case.rounds for case in chosen))


if __name__ == "__main__":
    sys.exit(main())
