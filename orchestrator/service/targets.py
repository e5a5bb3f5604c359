"""Looking at targets: which can be used, and what is on them. Changes nothing."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from orchestrator.config import Config, TargetDriver, TargetSettings
from orchestrator.errors import TargetError
from orchestrator.model import ErrorReport
from orchestrator.service.documents import Snapshots, SnapshotSummary, Targets, TargetSummary
from orchestrator.target.base import Snapshot, Target


async def summaries(config: Config, targets: Mapping[str, Target]) -> Targets:
    """All targets, and what is wrong with those that cannot be used."""
    return Targets(tuple([await _summary(settings, targets[name]) for name, settings in config.target.items()]))


async def _summary(settings: TargetSettings, target: Target) -> TargetSummary:
    try:
        snapshots, error = await count(settings, target), None
    except TargetError as failure:
        snapshots, error = None, ErrorReport.of(failure)
    return TargetSummary(settings.name, settings.driver, settings.place, snapshots, error)


async def count(settings: TargetSettings, target: Target) -> int:
    """How many snapshots there are. Raises TargetError, also where there is no folder yet."""
    if settings.driver is TargetDriver.IMAGES and not await asyncio.to_thread(Path(settings.place).is_dir):
        raise TargetError(
            f"there is no folder {settings.place}",
            hint="mount what should be there; if nothing should, the first backup makes it",
            code="no-folder",
        )
    return len(await target.snapshots())


async def snapshots(target: Target, vm: str | None) -> Snapshots:
    """What is on a target, by VM and oldest first. Raises TargetError."""
    return Snapshots(tuple(_snapshot(one) for one in await target.snapshots(vm)))


def _snapshot(one: Snapshot) -> SnapshotSummary:
    run, job = one.details.get("run"), one.details.get("job")
    return SnapshotSummary(
        id=one.id,
        target=one.target,
        vm=one.vm,
        created=one.created.isoformat(),
        kind=one.kind,
        stored_bytes=one.stored_bytes,
        protected=one.protected,
        run=run if isinstance(run, str) else None,
        job=job if isinstance(job, str) else None,
        disks=one.disks,
    )
