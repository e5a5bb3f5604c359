"""Asking a VM what it is and what may be done to it, before anything is done."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from orchestrator import aio
from orchestrator.admission import history
from orchestrator.errors import RefusedError, StorageError, VmfleeceError
from orchestrator.fleecing import graph
from orchestrator.fleecing.names import run_of, run_prefix
from orchestrator.fleecing.pauser import Pauser
from orchestrator.model import Disk, Kind, RunOptions, Vm
from orchestrator.qemu import commands, inventory
from orchestrator.qemu.builds import Builds
from orchestrator.qemu.capabilities import Capabilities
from orchestrator.qemu.commands import PREFIX
from orchestrator.qemu.monitor import Monitor
from orchestrator.run.plan import Past, Plan, Room, Situation, check_situation, choose_disks, plan
from orchestrator.state.journal import Journal
from orchestrator.storage.base import Storage
from orchestrator.units import Share

log = structlog.get_logger(__name__)

CLEANUP = "cleanup"
"""Who pauses a guest in the journal, if that is no run."""


@dataclass(frozen=True, slots=True)
class Storages:
    """The storages by name, and what first grants are made of.

    The share of a disk that each grants first, a VM's past results, oldest first, and what live images occupy.
    """

    by_name: Mapping[str, Storage]
    first_shares: Mapping[str, Share | int]
    past_results: Callable[[str], Sequence[Mapping[str, Any]]]
    used_bytes: Callable[[str], int] = lambda _storage: 0

    def attainable_bytes(self, name: str) -> int:
        """What the file system could give to new images at most, if all live ones were given back. Blocks."""
        try:
            space = self.by_name[name].space()
        except StorageError:  # whoever makes images there says what is wrong with it
            return 0
        return max(0, space.free_bytes - space.floor_bytes + self.used_bytes(name))


async def survey(
    monitor: Monitor,
    vm: Vm,
    options: RunOptions,
    storages: Storages,
    *,
    past: Past,
    can: Capabilities,
) -> Plan:
    """What a backup of the VM would do.

    Raises what `plan` raises where it cannot be backed up now.
    """
    situation = Situation(
        status=await monitor.execute(commands.QUERY_STATUS),
        block_jobs=await monitor.execute(commands.QUERY_BLOCK_JOBS),
        migration=await monitor.execute(commands.QUERY_MIGRATE),
    )
    disks = inventory.disks(await monitor.execute(commands.QUERY_BLOCK))
    check_situation(vm.name, situation, disks, can)
    chosen, skipped = choose_disks(vm.name, disks, vm.exclude_disks)
    past_results = await asyncio.to_thread(storages.past_results, vm.name)
    return plan(
        vm.name,
        chosen,
        skipped,
        options=options,
        past=past,
        nearest=await asyncio.to_thread(nearest_storages, chosen, storages.by_name),
        room=Room(
            quotas={name: storage.quota_bytes for name, storage in storages.by_name.items()},
            attainable={name: storages.attainable_bytes(name) for name in storages.by_name},
            shares=storages.first_shares,
            expected={kind: history.expected(past_results, kind) for kind in Kind},
        ),
    )


async def recover(
    monitor: Monitor, vm: str, is_ours: Callable[[str], bool], *, path: Path, journal: Journal
) -> None:
    """Take out what dead runs left in the QEMU at `path`, whatever its version.

    Raises what `settle_leftovers` raises.
    """
    can = await Builds().capabilities(monitor)
    pauser = None if can.discard_source else Pauser(monitor, path, journal, vm=vm, run=CLEANUP)
    await settle_leftovers(monitor, vm, pauser, is_ours)


async def settle_leftovers(
    monitor: Monitor, vm: str, pauser: Pauser | None, is_ours: Callable[[str], bool]
) -> None:
    """Take out what a dead process of ours left in this QEMU; leave a stranger's alone.

    `is_ours` tells whether a run is in our catalogue. Raises RefusedError if one is not.
    """
    for run in sorted({run_of(name) for name in await our_objects(monitor)}):
        if not is_ours(run):
            raise RefusedError(
                f"VM {vm}: another vmfleece's run {run} is in its QEMU",
                hint="let it end; two vmfleece with different state_dirs cannot share a VM",
                code="foreign-run",
            )
        left = [job["id"] for job in await monitor.execute(commands.QUERY_JOBS)]
        log.warning("leftovers.found", of_run=run, jobs=[job for job in left if job.startswith(run_prefix(run))])
        if pauser is not None:
            await pauser.go_on_unless_known()
        try:
            await graph.dismantle(monitor, run_prefix(run), pauser)
        except BaseException:
            if pauser is not None:
                with contextlib.suppress(VmfleeceError):  # the journal says it to whoever can do it
                    await aio.finish(pauser.make_good())
            raise


async def our_objects(monitor: Monitor) -> list[str]:
    """The names of all that is ours in a QEMU, whosever it is. Raises MonitorError."""
    names = [node["node-name"] for node in await monitor.execute(commands.QUERY_NODES)]
    names += [job["id"] for job in await monitor.execute(commands.QUERY_JOBS)]
    for fdset in await monitor.execute(commands.QUERY_FDSETS):
        names += [fd["opaque"] for fd in fdset["fds"] if "opaque" in fd]
    return [name for name in names if name.startswith(PREFIX)]


def nearest_storages(disks: Sequence[Disk], storages: Mapping[str, Storage]) -> dict[str, str | None]:
    """The storage that holds each disk's own image, by disk; None where none does."""
    found: dict[str, str | None] = {}
    for disk in disks:
        near = {
            name: storage.nearness(Path(disk.image)) if disk.image else 0 for name, storage in storages.items()
        }
        best = max(near, key=near.__getitem__, default=None)
        found[disk.id] = best if best is not None and near[best] > 0 else None
    return found
