"""What a run is going to do, decided before anything is done. Pure.

Which disks, full or incremental and why, fleeced on which storage with which first grant, or why not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.admission import estimate
from orchestrator.admission.estimate import Need
from orchestrator.errors import AdmissionError, FleecingError, RefusedError
from orchestrator.fleecing.bitmaps import Settlement
from orchestrator.model import Disk, FleecingPolicy, Kind, RunOptions
from orchestrator.qemu import jobs
from orchestrator.qemu.capabilities import Capabilities
from orchestrator.qemu.inventory import FILTERS_OF_JOBS
from orchestrator.target.base import Snapshot, SnapshotDisk
from orchestrator.units import Share, format_size

MIGRATING = (
    "setup",
    "wait-unplug",
    "active",
    "device",
    "pre-switchover",
    "postcopy-device",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover-setup",
    "postcopy-recover",
    "cancelling",
)
GONE_ELSEWHERE = ("finish-migrate", "postmigrate")
OTHERS_SHARE = 16
"""One byte in so many of what is free is left to whoever else writes there before we are admitted."""
NOT_NOW = (*GONE_ELSEWHERE, "inmigrate", "save-vm", "restore-vm", "shutdown")


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """One disk of a run. `storage` None: without fleecing; `grant_bytes` is its first grant there.

    An incremental one is copied as far as it changed since the snapshot `parent`, which `bitmap` says.
    """

    disk: Disk
    kind: Kind
    reason: str
    storage: str | None
    grant_bytes: int
    parent: str | None = None
    bitmap: str | None = None


@dataclass(frozen=True, slots=True)
class Past:
    """What there is to build on: the VM's snapshots on the target, oldest first, and each disk's bitmaps of it.

    `granule_bytes` and `reads_sinks` are the target's (`Target`).
    """

    snapshots: Sequence[Snapshot]
    settlements: Mapping[str, Settlement]
    granule_bytes: int
    reads_sinks: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """All of it. `skipped` says why, by disk."""

    disks: tuple[DiskPlan, ...]
    skipped: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    def is_like(self, other: "Plan") -> bool:
        """Whether the same would be done, whatever is granted first."""
        return [replace(one, grant_bytes=0) for one in self.disks] == [
            replace(one, grant_bytes=0) for one in other.disks
        ]


@dataclass(frozen=True, slots=True)
class Room:
    """What first grants are made of. Sizes in bytes.

    Of each storage its quota, what its file system could give at most, and the share of a disk that it gives first
    where nothing is known; `expected` is what the past runs of the VM let expect, by kind and disk.
    """

    quotas: Mapping[str, int]
    attainable: Mapping[str, int]
    shares: Mapping[str, Share | int]
    expected: Mapping[Kind, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Situation:
    """What QEMU says of itself before a run: replies of query-status, -block-jobs and -migrate."""

    status: Mapping[str, Any]
    block_jobs: Sequence[Mapping[str, Any]]
    migration: Mapping[str, Any]


def check_situation(vm: str, situation: Situation, disks: Sequence[Disk], capabilities: Capabilities) -> None:
    """Raise RefusedError if somebody else's work, or the VM's state, forbids a backup now."""
    if not (capabilities.break_snapshot and capabilities.snapshot_access):
        raise RefusedError(
            f"VM {vm}: its QEMU has no on-cbw-error for copy-before-write, so a failing backup would give"
            " the guest I/O errors",
            hint="QEMU 7.1 or later is needed; restart the VM with it",
            code="qemu-too-old",
        )
    if foreign := jobs.foreign(situation.block_jobs):
        raise RefusedError(
            f"VM {vm}: somebody else's block job is running: {', '.join(foreign)}",
            hint="wait until it has ended, or cancel it, then try again",
            code="foreign-job",
        )
    migration = situation.migration.get("status")
    if migration in MIGRATING or situation.status["status"] in NOT_NOW:
        state = f"migration {migration}" if migration in MIGRATING else situation.status["status"]
        raise RefusedError(
            f"VM {vm}: cannot be backed up now: {state}",
            hint="try again when it runs (or is paused) on this host",
            code="vm-state",
        )
    for disk in disks:
        if disk.node_driver in FILTERS_OF_JOBS:
            raise RefusedError(
                f"VM {vm}: disk {disk.id} is under somebody else's {disk.node_driver} filter ({disk.node})",
                hint="end the backup, mirror or commit that put it there, then try again",
                code="foreign-filter",
            )


def choose_disks(vm: str, disks: Sequence[Disk], exclude: Sequence[str]) -> tuple[list[Disk], dict[str, str]]:
    """The disks to back up, and why each other one is not. Raises RefusedError if none is left."""
    chosen, skipped = [], {}
    for disk in disks:
        if disk.id in exclude:
            skipped[disk.id] = "excluded by the configuration"
        elif disk.empty:
            skipped[disk.id] = "no medium in it"
        elif disk.removable:
            skipped[disk.id] = "removable"
        elif disk.read_only:
            skipped[disk.id] = "read-only"
        else:
            chosen.append(disk)
    if not chosen:
        what = ", ".join(f"{disk} ({why})" for disk, why in skipped.items()) or "no disk at all"
        raise RefusedError(
            f"VM {vm}: no disk to back up: {what}",
            hint="check exclude_disks and `vmfleece vm show`",
            code="no-disks",
        )
    return chosen, skipped


def plan(
    vm: str,
    chosen: Sequence[Disk],
    skipped: Mapping[str, str],
    *,
    options: RunOptions,
    past: Past,
    nearest: Mapping[str, str | None],
    room: Room,
) -> Plan:
    """The whole plan. `nearest` is the storage that holds each disk's own image, by disk.

    Raises FleecingError or AdmissionError where fleecing is required and cannot be had.
    """
    fleecing = options.fleecing
    disks = tuple(_copied(disk, options, past) for disk in chosen)
    if not fleecing.enabled:
        _check_unfleeced(vm, options, past)
        return Plan(disks, skipped)
    try:
        grants = _grants(vm, disks, fleecing.storage, nearest, room)
    except (FleecingError, AdmissionError) as error:
        if fleecing.policy is FleecingPolicy.REQUIRE or not past.reads_sinks:
            raise
        return Plan(disks, skipped, (f"backed up without fleecing: {error}",))
    return Plan(
        tuple(replace(one, storage=grants[one.disk.id][0], grant_bytes=grants[one.disk.id][1]) for one in disks),
        skipped,
    )


def _check_unfleeced(vm: str, options: RunOptions, past: Past) -> None:
    if not past.reads_sinks:
        raise AdmissionError(
            f"VM {vm}: target {options.target} is a repository, and QEMU cannot read back what it wrote there:"
            " backing up to it needs a fleecing image",
            hint="leave enabled=0 out, and configure a [storage.NAME]",
            code="fleecing-needed",
        )


def _copied(disk: Disk, options: RunOptions, past: Past) -> DiskPlan:
    """How much of a disk is copied, and why; not fleeced yet."""
    settlement = past.settlements.get(disk.id)
    base = settlement.base if settlement else None
    if options.full:
        return DiskPlan(disk, Kind.FULL, "asked for", None, 0)
    if base is None:
        why = settlement.reason if settlement else "there is no bitmap of its changes"
        return DiskPlan(disk, Kind.FULL, why, None, 0)
    parents = {snapshot.id: {one.disk: one for one in snapshot.disks} for snapshot in past.snapshots}
    parent = parents[base.snapshot].get(disk.id)
    if parent is None:
        return DiskPlan(disk, Kind.FULL, f"{base.snapshot} does not have it", None, 0)
    if base.granularity_bytes % past.granule_bytes:
        known, needed = format_size(base.granularity_bytes), format_size(past.granule_bytes)
        return DiskPlan(disk, Kind.FULL, f"its bitmap has a granularity of {known}, not {needed}", None, 0)
    if parent.size_bytes != disk.size_bytes:
        sizes = f"from {format_size(parent.size_bytes)} to {format_size(disk.size_bytes)}"
        return DiskPlan(disk, Kind.FULL, f"it was resized {sizes}", None, 0)
    length = _chain_length(parents, base.snapshot, disk.id)
    if length is None:
        return DiskPlan(disk, Kind.FULL, f"a snapshot that {base.snapshot} builds on is gone", None, 0)
    if options.full_every and length >= options.full_every:
        return DiskPlan(disk, Kind.FULL, f"its chain has {length} snapshots (full_every)", None, 0)
    return DiskPlan(disk, Kind.INCREMENTAL, f"since {base.snapshot}", None, 0, base.snapshot, base.name)


def _chain_length(
    snapshots: Mapping[str, Mapping[str, SnapshotDisk]], snapshot: str | None, disk: str
) -> int | None:
    """How many snapshots a disk's image builds on, its own included; None if one of them is gone."""
    length = 0
    while snapshot is not None:
        found = snapshots.get(snapshot, {}).get(disk)
        if found is None:
            return None
        length += 1
        snapshot = found.parent
    return length


def _grants(
    vm: str,
    disks: Sequence[DiskPlan],
    storage: str | None,
    nearest: Mapping[str, str | None],
    room: Room,
) -> dict[str, tuple[str, int]]:
    """Storage and first grant by disk."""
    by_storage: dict[str, dict[str, Need]] = {}
    for one in disks:
        disk = one.disk
        name = storage or nearest[disk.id]
        if name is None:
            raise FleecingError(
                f"VM {vm}: no storage holds the image of disk {disk.id}"
                f" ({disk.image or 'QEMU names no local file by its full path'})",
                hint=f"name one: --fleecing enabled=1,storage=NAME; there are: {', '.join(room.quotas) or 'none'}",
                code="no-storage",
            )
        need = Need(disk.size_bytes, room.shares[name], room.expected[one.kind].get(disk.id))
        by_storage.setdefault(name, {})[disk.id] = need
    grants: dict[str, tuple[str, int]] = {}
    for name, needs in by_storage.items():
        # More than the file system has would wait for ever, and others behind it; the least may be freed yet.
        spare_bytes = room.attainable[name] // OTHERS_SHARE
        attainable_bytes = max(room.attainable[name] - spare_bytes, estimate.least_first_grants(needs))
        first = estimate.first_grants(needs, min(room.quotas[name], attainable_bytes))
        if first is None:
            least = sum(estimate.smallest_grant(need.size_bytes) for need in needs.values())
            raise AdmissionError(
                f"VM {vm}: storage {name} has a quota of {format_size(room.quotas[name])}, but the fleecing images"
                f" of {', '.join(needs)} need at least {format_size(least)}",
                hint=f"raise storage.{name}.quota",
            )
        grants |= {disk: (name, grant_bytes) for disk, grant_bytes in first.items()}
    return grants
