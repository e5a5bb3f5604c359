"""Removing what retention does not keep of a VM's snapshots on a target.

`retention` decides; the target refuses what must stay all the same, since it was protected or built on meanwhile.
Whatever stops it, every snapshot is there whole or not listed, and the next time goes on where it ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import tzinfo

import structlog

from orchestrator.errors import TargetError
from orchestrator.model import ErrorReport, Keep
from orchestrator.run.retention import Point, decide_all
from orchestrator.target.base import Snapshot, Target

log = structlog.get_logger(__name__)

REFUSALS = ("needed", "protected")
"""Codes that are no failure, but a reason to keep the snapshot."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What became of a snapshot. With neither `keep` nor `error` it was removed, or in a dry run would be."""

    snapshot: Snapshot
    keep: bool
    reasons: tuple[str, ...]
    error: ErrorReport | None = None

    @property
    def removed(self) -> bool:
        """Whether it is gone, or would be."""
        return not self.keep and self.error is None


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What became of a VM's snapshots on a target, oldest first."""

    vm: str
    target: str
    snapshots: tuple[Pruned, ...]


async def prune(
    target: Target, vm: str, keeps: Sequence[Keep], *, zone: tzinfo | None = None, dry_run: bool = False
) -> PruneResult:
    """Remove what none of `keeps` keeps; without any, everything stays. `zone` None: the host's.

    What cannot be removed is an error in the result, and does not save the others. Cancellation finishes the
    removal that is under way, and leaves the rest.
    """
    listed = {snapshot.id: snapshot for snapshot in await target.snapshots(vm)}
    verdicts = decide_all([_point(snapshot) for snapshot in listed.values()], keeps, zone)
    result = {one.id: Pruned(listed[one.id], one.keep, one.reasons) for one in verdicts}
    if keeps and not dry_run:
        result |= await _remove_all(target, [result[one.id] for one in reversed(verdicts) if not one.keep])
        log.info(
            "prune.finished",
            vm=vm,
            target=target.name,
            kept=sum(one.keep for one in result.values()),
            removed=sum(one.removed for one in result.values()),
            failed=[id_ for id_, one in result.items() if one.error is not None],
        )
    return PruneResult(vm, target.name, tuple(result.values()))


async def remove(target: Target, snapshot: Snapshot) -> None:
    """Remove one snapshot. Raises TargetError, as the target says."""
    await target.remove(snapshot)
    log.info(
        "snapshot.removed",
        vm=snapshot.vm,
        target=target.name,
        snapshot=snapshot.id,
        stored_bytes=snapshot.stored_bytes,
    )


async def _remove_all(target: Target, newest_first: Sequence[Pruned]) -> dict[str, Pruned]:
    """Remove them, and return what became of those that are still there."""
    still_there: dict[str, Pruned] = {}
    pending = newest_first
    while pending:
        needed = []
        for one in pending:
            try:
                await remove(target, one.snapshot)
                still_there.pop(one.snapshot.id, None)
            except TargetError as error:
                still_there[one.snapshot.id] = _still_there(one, error)
                if error.code == "needed":
                    needed.append(one)
        # By one that is older, if the clock was set back between them: that may be gone by now.
        pending = needed if len(needed) < len(pending) else []
    return still_there


def _still_there(one: Pruned, error: TargetError) -> Pruned:
    snapshot = one.snapshot
    if error.code in REFUSALS:
        return Pruned(snapshot, keep=True, reasons=(error.message,))
    log.warning(
        "removal.failed",
        vm=snapshot.vm,
        target=snapshot.target,
        snapshot=snapshot.id,
        code=error.code,
        error=str(error),
    )
    report = ErrorReport(error.code, error.message, error.hint)
    return Pruned(snapshot, keep=False, reasons=one.reasons, error=report)


def _point(snapshot: Snapshot) -> Point:
    return Point(snapshot.id, snapshot.created, snapshot.parents, snapshot.protected)
