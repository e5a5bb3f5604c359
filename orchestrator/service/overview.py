"""From what the engine knows to what `status` shows. Reads only."""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import attrgetter
from typing import NoReturn

from orchestrator.admission.accounts import Accounts
from orchestrator.admission.controller import Controller
from orchestrator.model import Phase, Progress, RunOptions, RunResult
from orchestrator.service.status import RunStatus, StorageStatus, WaitingStatus
from orchestrator.storage.directory import DirectoryStorage
from orchestrator.units import format_duration

PLANNING = "planning"
"""The phase of a run that has not asked for admission yet."""


class RunCancelled(Exception):
    """Somebody wants a run to end."""


@dataclass(slots=True, eq=False)
class Live:
    """A run that is not over. `progress` is the last that it said, `result` what it came to if it was ended."""

    vm: str
    run: str
    priority: int
    options: RunOptions
    started: datetime
    progress: Progress | None = None
    result: RunResult | None = None
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    async def told_to_end(self) -> NoReturn:
        """Wait until somebody wants it to end. Raises RunCancelled."""
        await self.ending.wait()
        raise RunCancelled


@dataclass(frozen=True, slots=True)
class Pausing:
    """A run that is to begin at `until`, since `failed`, the try before it, ended with an error that may pass."""

    vm: str
    run: str
    priority: int
    options: RunOptions
    until: datetime
    failed: RunResult
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    async def ended_within(self, seconds: float) -> bool:
        """Wait; whether somebody said meanwhile that it shall not be tried again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.ending.wait()
        return self.ending.is_set()

    @property
    def reason(self) -> str:
        """Why it waits, and for how long yet, in words."""
        assert self.failed.error is not None  # noqa: S101  it is tried again
        left_seconds = max(0, round((self.until - datetime.now(UTC)).total_seconds()))
        return (
            f"its next try, in {format_duration(left_seconds)}:"
            f" run {self.failed.run} failed with {self.failed.error.code}: {self.failed.error.message}"
        )


def storage_statuses(storages: Mapping[str, DirectoryStorage], accounts: Accounts) -> tuple[StorageStatus, ...]:
    """The storages: what is granted and used of each, and what its file system says."""
    return tuple(_storage_status(storage, accounts) for storage in storages.values())


def _storage_status(storage: DirectoryStorage, accounts: Accounts) -> StorageStatus:
    name = storage.name
    space = accounts.space(name)
    return StorageStatus(
        name=name,
        path=str(storage.path),
        quota_bytes=storage.quota_bytes,
        granted_bytes=accounts.granted_bytes(name),
        stranded_bytes=accounts.stranded_bytes(name),
        used_bytes=accounts.used_bytes(name),
        peak_bytes=accounts.peak_bytes(name),
        free_bytes=space.free_bytes if space else None,
        floor_bytes=space.floor_bytes if space else None,
        runs=accounts.runs(name),
        max_runs=storage.max_runs,
        lacks=tuple(lack.consequence for lack in storage.lacks),
    )


def runs_and_queue(
    live: Iterable[Live], controller: Controller, lined_up: Iterable[Live], pausing: Iterable[Pausing]
) -> tuple[tuple[RunStatus, ...], tuple[WaitingStatus, ...]]:
    """The runs under way, as they began; and those that wait, as they will be admitted, then as they are due.

    `lined_up` are those that wait for another run of their VM.
    """
    by_run = {one.run: one for one in live}
    waiting = controller.waiting()
    queue = tuple(
        WaitingStatus(
            vm=one.vm,
            run=run,
            job=one.options.job,
            target=one.options.target,
            priority=one.priority,
            started=one.started.isoformat(),
            reasons=waits.reasons,
        )
        for run, waits in waiting.items()
        if (one := by_run.get(run)) is not None
    )
    behind = tuple(
        WaitingStatus(
            vm=one.vm,
            run=one.run,
            job=one.options.job,
            target=one.options.target,
            priority=one.priority,
            started=one.started.isoformat(),
            reasons=("another run of this VM, or what is being put right in it",),
        )
        for one in lined_up
    )
    later = tuple(
        WaitingStatus(
            vm=one.vm,
            run=one.run,
            job=one.options.job,
            target=one.options.target,
            priority=one.priority,
            started=one.failed.started.isoformat(),
            reasons=(one.reason,),
            until=one.until.isoformat(),
        )
        for one in sorted(pausing, key=attrgetter("until"))
    )
    return tuple(_run_status(one) for run, one in by_run.items() if run not in waiting), (
        *queue,
        *behind,
        *later,
    )


def _run_status(live: Live) -> RunStatus:
    progress = live.progress
    disks = progress.disks if progress else ()
    under_way = progress is not None and progress.phase is not Phase.QUEUED
    return RunStatus(
        vm=live.vm,
        run=live.run,
        job=live.options.job,
        target=live.options.target,
        phase=progress.phase if progress and under_way else PLANNING,
        started=live.started.isoformat(),
        size_bytes=sum(disk.size_bytes for disk in disks),
        copied_bytes=sum(disk.copied_bytes for disk in disks),
        fleecing_bytes=sum(disk.fleecing_bytes for disk in disks),
        grant_bytes=sum(disk.grant_bytes for disk in disks),
        disks=disks,
        guest_writes=progress.guest_writes if progress else None,
        recent_write_ms=progress.recent_write_ms if progress else (),
        slowed_to_bytes_per_second=progress.slowed_to_bytes_per_second if progress else None,
    )
