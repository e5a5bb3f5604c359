"""What the product is doing right now, a backup in this process or a command, and how to wait for it."""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qemu.qmp import ExecuteError

from orchestrator.model import Phase, Progress, RunResult
from tests.guest.vm import GuestVm

TICK_SECONDS = 0.02


class UnderWay:
    """A backup that runs: what it said so far, and in the end its result."""

    def __init__(self, vm: GuestVm) -> None:
        self.progress: list[Progress] = []
        self.task: asyncio.Task[RunResult] | None = None
        self._vm = vm

    @property
    def result(self) -> RunResult:
        assert self.task is not None
        return self.task.result()

    @property
    def phase(self) -> Phase | None:
        return self.progress[-1].phase if self.progress else None

    @property
    def waits_for(self) -> str:
        return self.progress[-1].waits_for if self.progress else ""

    def ended(self) -> bool:
        assert self.task is not None
        return self.task.done()

    def fleecing_bytes(self) -> int:
        """What all fleecing images occupied when it was last said."""
        return sum(disk.fleecing_bytes for disk in self.progress[-1].disks) if self.progress else 0

    def largest_grants(self) -> dict[str, int]:
        """The largest grant that each disk ever had."""
        largest: dict[str, int] = {}
        for progress in self.progress:
            for disk in progress.disks:
                largest[disk.disk] = max(largest.get(disk.disk, 0), disk.grant_bytes)
        return largest

    async def until(self, done: Callable[[], bool], what: str, *, deadline_seconds: float = 60) -> None:
        """Wait for something that the run brings about."""
        assert self.task is not None
        try:
            async with asyncio.timeout(deadline_seconds):
                while not done():
                    assert not self.task.done(), f"the run ended before {what}: {self.task.result()}"
                    await asyncio.sleep(TICK_SECONDS)
        except TimeoutError:
            self._vm.fail(f"waited {deadline_seconds} s for {what}; the run is {self.progress[-1:]}")

    async def copying(self) -> None:
        """Wait until the point in time is made and all jobs are started."""
        await self.until(lambda: self.phase is Phase.COPYING, "copying")
        await until_jobs_run(self._vm)

    async def hurry(self) -> None:
        """Lift the jobs' speed limit until the run ends."""
        assert self.task is not None
        await hurry(self._vm, self.task)


async def hurry(vm: GuestVm, task: asyncio.Task[Any]) -> None:
    """Lift the jobs' speed limit, also where the product sets it anew, until a task ends."""
    while not task.done():
        await lift_speed_limit(vm)
        await asyncio.wait([task], timeout=0.2)


async def lift_speed_limit(vm: GuestVm) -> None:
    """Let the jobs that are there copy as fast as they can."""
    for job in await our_jobs(vm):
        with contextlib.suppress(ExecuteError):  # it has just ended
            await vm.execute("block-job-set-speed", {"device": job, "speed": 0})


async def our_jobs(vm: GuestVm) -> list[str]:
    """The product's block jobs that are there."""
    return [job["id"] for job in await vm.execute("query-jobs") if job["id"].startswith("vmf-")]


async def until_jobs_run(
    vm: GuestVm, process: asyncio.subprocess.Process | None = None, *, deadline_seconds: float = 60
) -> None:
    """Wait until the product, in that process if one is given, has started its jobs."""
    async with asyncio.timeout(deadline_seconds):
        while not await our_jobs(vm):
            assert process is None or process.returncode is None, await said(process)
            await asyncio.sleep(TICK_SECONDS)


async def until(done: Callable[[], bool], what: str, *, deadline_seconds: float = 60) -> None:
    """Wait for something that becomes true by itself."""
    try:
        async with asyncio.timeout(deadline_seconds):
            while not done():
                await asyncio.sleep(TICK_SECONDS)
    except TimeoutError as error:
        raise AssertionError(f"waited {deadline_seconds} s for {what}") from error


@dataclass(frozen=True, slots=True)
class Said:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


async def said(process: asyncio.subprocess.Process, *, deadline_seconds: float = 120) -> Said:
    """Await a command's end."""
    try:
        async with asyncio.timeout(deadline_seconds):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            await process.wait()
    assert process.returncode is not None
    return Said(process.returncode, out.decode(), err.decode())
