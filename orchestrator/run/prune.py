"""Removing what retention does not keep of a VM's snapshots on a target.

`retention` decides; the target refuses what must stay all the same, since it was protected or built on meanwhile.
Merging comes first: what goes is decided anew from what the target then lists, whatever was merged or not.
Whatever stops it, every snapshot is there whole or not listed, and the next time goes on where it ended.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import tzinfo

import structlog

from orchestrator.errors import TargetError
from orchestrator.model import ErrorReport, Keep, MergeProgress
from orchestrator.run.retention import Merge, Point, decide_all, merges, standing_alone
from orchestrator.target.base import OnBytes, Snapshot, Target

log = structlog.get_logger(__name__)

OnMerge = Callable[[MergeProgress], None]

REFUSALS = ("needed", "protected")
"""Codes that are no failure, but a reason to keep the snapshot."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What became of a snapshot. With neither `keep` nor `error` it was removed, or in a dry run would be.

    `merged`: it was made to stand alone, or would be, and has grown by `grown_bytes`. With `keep` and `error`:
    that failed.
    """

    snapshot: Snapshot
    keep: bool
    reasons: tuple[str, ...]
    error: ErrorReport | None = None
    merged: bool = False
    grown_bytes: int = 0

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
    target: Target,
    vm: str,
    keeps: Sequence[Keep],
    *,
    zone: tzinfo | None = None,
    merge: bool = False,
    dry_run: bool = False,
    on_merge: OnMerge = lambda _progress: None,
) -> PruneResult:
    """Remove what none of `keeps` keeps; without any, everything stays. `zone` None: the host's.

    `merge`: first have the first kept snapshot of a chain stand alone where older ones may go then. What cannot be
    merged or removed is an error in the result, and does not save the others. `on_merge` is told how far merges
    are. Cancellation finishes the removal
    that is under way, undoes a merge or finishes it, and leaves the rest.
    """
    listed = await target.snapshots(vm)
    stored = {one.id: one.stored_bytes for one in listed}
    planned = merges([_point(snapshot) for snapshot in listed], keeps, zone) if merge else ()
    failed: dict[str, TargetError] = {}
    if planned and not dry_run:
        failed = await _merge_all(target, {one.id: one for one in listed}, planned, on_merge)
        listed = await target.snapshots(vm)
    done = [one for one in planned if one.into not in failed]
    points = standing_alone((_point(snapshot) for snapshot in listed), (one.into for one in done))
    verdicts = decide_all(points, keeps, zone)
    by_id = {snapshot.id: snapshot for snapshot in listed}
    result = {one.id: Pruned(by_id[one.id], one.keep, one.reasons) for one in verdicts}
    for one in done:
        _say(result, one, stored, dry_run=dry_run)
    if keeps and not dry_run:
        result |= await _remove_all(target, [result[one.id] for one in reversed(verdicts) if not one.keep])
    for id_, error in failed.items():
        if id_ in result:
            result[id_] = _unmerged(result[id_], error)
    if keeps and not dry_run:
        log.info(
            "prune.finished",
            vm=vm,
            target=target.name,
            kept=sum(one.keep for one in result.values()),
            removed=sum(one.removed for one in result.values()),
            failed=[id_ for id_, one in result.items() if one.error is not None],
        )
    return PruneResult(vm, target.name, tuple(result.values()))


async def _merge_all(
    target: Target, listed: dict[str, Snapshot], planned: Iterable[Merge], on_merge: OnMerge
) -> dict[str, TargetError]:
    """Merge them, and return why some were not."""
    failed: dict[str, TargetError] = {}
    for one in planned:
        snapshot = listed[one.into]
        log.info("merge.started", vm=snapshot.vm, target=target.name, snapshot=snapshot.id, older=list(one.older))
        try:
            await target.merge(snapshot, _telling(snapshot, on_merge))
        except TargetError as error:
            failed[one.into] = error
            if error.code not in REFUSALS:
                log.warning(
                    "merge.failed",
                    vm=snapshot.vm,
                    target=target.name,
                    snapshot=snapshot.id,
                    code=error.code,
                    error=str(error),
                )
        else:
            log.info("snapshot.merged", vm=snapshot.vm, target=target.name, snapshot=snapshot.id)
    return failed


def _telling(snapshot: Snapshot, on_merge: OnMerge) -> OnBytes:
    def told(done_bytes: int, size_bytes: int) -> None:
        on_merge(MergeProgress(snapshot.vm, snapshot.target, snapshot.id, done_bytes, size_bytes))

    return told


def _say(result: dict[str, Pruned], merge: Merge, stored: Mapping[str, int], *, dry_run: bool) -> None:
    """Give the reasons of a merge. Somebody may have removed or protected what it was about meanwhile.

    `stored`: what each occupied before, in bytes.
    """
    for id_ in (merge.into, *merge.older):
        one = result.get(id_)
        if one is None or one.keep != (id_ == merge.into):
            continue
        tense = "would be " if dry_run else ""
        reason = f"{tense}made to stand alone" if one.keep else f"{tense}merged into {merge.into}"
        grown_bytes = one.snapshot.stored_bytes - stored[id_] if one.keep else 0
        result[id_] = replace(one, reasons=(*one.reasons, reason), merged=one.keep, grown_bytes=grown_bytes)


def _unmerged(one: Pruned, error: TargetError) -> Pruned:
    if error.code in REFUSALS:
        return replace(one, reasons=(*one.reasons, error.message))
    return replace(one, error=ErrorReport.of(error))


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
    report = ErrorReport.of(error)
    return Pruned(snapshot, keep=False, reasons=one.reasons, error=report)


def _point(snapshot: Snapshot) -> Point:
    return Point(snapshot.id, snapshot.created, snapshot.parents, snapshot.protected)
