"""Why a disk's copy failed, since QEMU's own "Permission denied" hides it."""

import asyncio
import contextlib
import sys
from dataclasses import dataclass

from orchestrator.admission import estimate
from orchestrator.errors import CopyError, FleecingError, StorageError, TargetError, VmfleeceError
from orchestrator.fleecing.grant import GrantKeeper
from orchestrator.qemu.capabilities import Capabilities
from orchestrator.run.copy import Ended
from orchestrator.run.outcome import DiskRun
from orchestrator.run.survey import Storages
from orchestrator.target.base import Draft
from orchestrator.units import format_size

EXHAUSTED_MARGIN_BYTES = 2 << 20
"""A write that does not fit fails as a whole, so a full image ends up to one copy (1 MiB) below its grant."""


async def why(
    ended: Ended,
    disk: DiskRun,
    *,
    draft: Draft,
    keeper: GrantKeeper,
    storages: Storages,
    can: Capabilities,
    cbw_timeout_seconds: int,
) -> VmfleeceError:
    """Find out, of whoever may know."""
    if ended.operation == "write" and (told := await draft.why_unwritten(disk.plan.disk)) is not None:
        return told
    name = disk.plan.storage
    free_bytes, refused, grant_bytes = sys.maxsize, False, 0
    if name is not None:
        fleeced = keeper.of(disk.plan.disk.id)
        refused = fleeced.refused
        # It may have run full just before it was extended.
        grants = [*fleeced.outgrown_bytes, fleeced.grant_bytes]
        grant_bytes = min(grants, key=lambda grant: abs(estimate.limit(grant) - disk.fleecing_peak_bytes))
        disk.grant_bytes = grant_bytes
        with contextlib.suppress(StorageError):  # the reason of the failure is worth more
            free_bytes = (await asyncio.to_thread(storages.by_name[name].space)).free_bytes
    return diagnose(
        ended,
        Circumstances(
            disk=disk.plan.disk.id,
            storage=name,
            high_water_bytes=disk.fleecing_peak_bytes,
            grant_bytes=grant_bytes,
            growth_refused=refused,
            growable=can.discard_source,
            storage_free_bytes=free_bytes,
            cbw_timeout_seconds=cbw_timeout_seconds,
        ),
    )


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is known of a disk's old data when its job failed. Sizes in bytes; `storage` None: no fleecing."""

    disk: str
    storage: str | None
    high_water_bytes: int
    grant_bytes: int
    growth_refused: bool
    growable: bool
    storage_free_bytes: int
    cbw_timeout_seconds: int


def diagnose(ended: Ended, at: Circumstances) -> VmfleeceError:
    """Why a job failed, since QEMU's own "Permission denied" hides it. Pure."""
    said = ended.state.error or "cancelled"
    if ended.stopped:
        return TargetError(f"disk {at.disk}: the target is full", hint="free some space there", code="target-full")
    if ended.operation == "write":
        return TargetError(
            f"disk {at.disk}: writing to the target failed: {said}",
            hint="check the target's file system",
            code="target-write-failed",
        )
    if ended.operation != "read":
        return CopyError(
            f"disk {at.disk}: the copy ended before it was complete: {said}",
            hint="the guest is unharmed; back it up again, and look into QEMU's own log if that happens again",
        )
    if at.storage is None:
        return FleecingError(
            f"disk {at.disk}: the snapshot broke: old data could not be written to the target within"
            f" {at.cbw_timeout_seconds} s (cbw_timeout), or at all; QEMU says: {said}",
            hint="back up with fleecing, so that the guest's writes do not wait for the target",
            code="copy-timeout",
        )
    margin = min(EXHAUSTED_MARGIN_BYTES, at.grant_bytes // 4)
    if at.high_water_bytes + margin >= estimate.limit(at.grant_bytes):
        why = "it could not be extended in time"
        if not at.growable:
            why = "this QEMU (before 9.1) cannot extend it"
        elif at.growth_refused:
            why = "its storage has no more to give now"
        return FleecingError(
            f"disk {at.disk}: its fleecing image on storage {at.storage} was full:"
            f" {format_size(at.high_water_bytes)} of {format_size(at.grant_bytes)} granted; {why}",
            hint=f"the next run is granted more at first, if storage.{at.storage}.quota allows: raise it,"
            " or back up when the guest writes less",
            code="fleecing-full",
        )
    if at.storage_free_bytes < EXHAUSTED_MARGIN_BYTES:
        return FleecingError(
            f"disk {at.disk}: the file system of storage {at.storage} is full"
            f" ({format_size(at.storage_free_bytes)} free)",
            hint="others write there as well: raise its min_free, or lower its quota",
            code="storage-full",
        )
    return FleecingError(
        f"disk {at.disk}: the snapshot broke: copying old data to storage {at.storage} took longer than"
        f" {at.cbw_timeout_seconds} s (cbw_timeout; more than 4 s can overflow to less in QEMU), or the"
        f" storage or the disk itself has an I/O error; QEMU says: {said}",
        hint="check the host's log for I/O errors on that storage and on the disk",
        code="copy-timeout",
    )
