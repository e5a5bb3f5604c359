"""What a run is going to do, decided before anything is done. Pure.

Which disks, full or incremental and why, fleeced on which storage with which first grant, or why not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.admission import estimate
from orchestrator.admission.estimate import Need
from orchestrator.errors import AdmissionError, FleecingError, RefusedError
from orchestrator.model import Disk, Fleecing, FleecingPolicy, Kind
from orchestrator.qemu import jobs
from orchestrator.qemu.capabilities import Capabilities
from orchestrator.qemu.inventory import FILTERS_OF_JOBS
from orchestrator.units import Share, format_size

REASON_FULL = "incremental backups are not available yet"
MIGRATING = ("setup", "active", "device", "pre-switchover", "postcopy-active", "cancelling")
NOT_NOW = ("inmigrate", "postmigrate", "finish-migrate", "save-vm", "restore-vm", "shutdown")


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """One disk of a run. `storage` None: without fleecing; `grant_bytes` is its first grant there."""

    disk: Disk
    kind: Kind
    reason: str
    storage: str | None
    grant_bytes: int


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
    where nothing is known; `expected` is what the past runs of the VM let expect, by disk.
    """

    quotas: Mapping[str, int]
    attainable: Mapping[str, int]
    shares: Mapping[str, Share | int]
    expected: Mapping[str, int]


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
    fleecing: Fleecing,
    nearest: Mapping[str, str | None],
    room: Room,
) -> Plan:
    """The whole plan. `nearest` is the storage that holds each disk's own image, by disk.

    Raises FleecingError or AdmissionError where fleecing is required and cannot be had.
    """
    if not fleecing.enabled:
        return _without_fleecing(chosen, skipped, ())
    try:
        grants = _grants(vm, chosen, fleecing.storage, nearest, room)
    except (FleecingError, AdmissionError) as error:
        if fleecing.policy is FleecingPolicy.REQUIRE:
            raise
        return _without_fleecing(chosen, skipped, (f"backed up without fleecing: {error}",))
    disks = tuple(
        DiskPlan(disk, Kind.FULL, REASON_FULL, grants[disk.id][0], grants[disk.id][1]) for disk in chosen
    )
    return Plan(disks, skipped)


def _without_fleecing(chosen: Sequence[Disk], skipped: Mapping[str, str], warnings: tuple[str, ...]) -> Plan:
    disks = tuple(DiskPlan(disk, Kind.FULL, REASON_FULL, None, 0) for disk in chosen)
    return Plan(disks, skipped, warnings)


def _grants(
    vm: str,
    chosen: Sequence[Disk],
    storage: str | None,
    nearest: Mapping[str, str | None],
    room: Room,
) -> dict[str, tuple[str, int]]:
    """Storage and first grant by disk."""
    by_storage: dict[str, dict[str, Need]] = {}
    for disk in chosen:
        name = storage or nearest[disk.id]
        if name is None:
            raise FleecingError(
                f"VM {vm}: no storage holds the image of disk {disk.id}"
                f" ({disk.image or 'QEMU names no local file by its full path'})",
                hint=f"name one: --fleecing enabled=1,storage=NAME; there are: {', '.join(room.quotas) or 'none'}",
                code="no-storage",
            )
        need = Need(disk.size_bytes, room.shares[name], room.expected.get(disk.id))
        by_storage.setdefault(name, {})[disk.id] = need
    grants: dict[str, tuple[str, int]] = {}
    for name, needs in by_storage.items():
        # More than the file system has would wait for ever, and others behind it; the least may be freed yet.
        attainable_bytes = max(room.attainable[name], estimate.least_first_grants(needs))
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
