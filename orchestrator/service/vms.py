"""Looking at VMs: which can be reached, and what a backup of one would do. Changes nothing."""

import asyncio
from collections.abc import Mapping

from orchestrator.config import Config
from orchestrator.errors import UnknownName, VmfleeceError
from orchestrator.fleecing import bitmaps, rotation
from orchestrator.model import Disk, ErrorReport, Fleecing, FleecingPolicy, RunOptions, Vm
from orchestrator.qemu import commands, inventory
from orchestrator.qemu.builds import Builds
from orchestrator.qemu.monitor import Connect, Monitor
from orchestrator.run.plan import DiskPlan, Past, Plan
from orchestrator.run.survey import Storages, survey
from orchestrator.service.documents import Features, PlannedDisk, VmDetails, VmDisk, Vms, VmSummary
from orchestrator.target.base import Target

AT_ONCE = 64
"""VMs that are asked side by side."""


def configured(config: Config, name: str) -> Vm:
    """The VM of that name. Raises UnknownName that names those there are."""
    if name not in config.vm:
        raise UnknownName("VM", name, config.vm, place=str(config.path))
    return config.vm[name]


async def summaries(config: Config, connect: Connect) -> Vms:
    """All configured VMs; one that cannot be reached says why."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def look(vm: Vm) -> VmSummary:
        async with turn:
            return await _look(vm, connect)

    return Vms(tuple(await asyncio.gather(*(look(vm) for vm in config.vm.values()))))


async def _look(vm: Vm, connect: Connect) -> VmSummary:
    try:
        async with connect(vm.qmp, vm=vm.name) as monitor:
            disks = inventory.disks(await monitor.execute(commands.QUERY_BLOCK))
            status, qemu = await _facts(monitor)
    except VmfleeceError as error:
        return VmSummary(vm.name, False, None, None, (), vm.priority, ErrorReport.of(error))
    shown = tuple(_described(disk) for disk in disks if not disk.empty)
    return VmSummary(vm.name, True, status, qemu, shown, vm.priority, None)


async def details(vm: Vm, connect: Connect, storages: Storages, targets: Mapping[str, Target]) -> VmDetails:
    """One VM, with what a backup of it to the first target would do. Raises MonitorError."""
    async with connect(vm.qmp, vm=vm.name) as monitor:
        features = await Builds().capabilities(monitor)
        status, qemu = await _facts(monitor)
        block = await monitor.execute(commands.QUERY_BLOCK)
        disks, described = inventory.disks(block), inventory.bitmaps(block)
        plan, refusal = None, None
        try:
            options = RunOptions("", Fleecing(policy=FleecingPolicy.PREFER))
            past = await _past(monitor, vm, targets)
            plan = await survey(monitor, vm, options, storages, past=past, can=features)
        except VmfleeceError as error:
            refusal = ErrorReport.of(error)
    planned = {one.disk.id: one for one in plan.disks} if plan else {}
    return VmDetails(
        vm=vm.name,
        qmp=str(vm.qmp),
        status=status,
        qemu=qemu,
        features=Features(
            fleecing=features.break_snapshot and features.snapshot_access,
            discard_source=features.discard_source,
        ),
        disks=tuple(
            _planned(disk, planned.get(disk.id), plan, tuple(bitmaps.of_node(described.get(disk.id, []))))
            for disk in disks
        ),
        warnings=tuple(plan.warnings) if plan else (),
        error=refusal,
    )


def _planned(disk: Disk, one: DiskPlan | None, plan: Plan | None, ours: tuple[bitmaps.Bitmap, ...]) -> PlannedDisk:
    skipped = plan.skipped.get(disk.id, "") if plan else ""
    return PlannedDisk(
        disk=disk.id,
        size_bytes=disk.size_bytes,
        driver=disk.node_driver,
        node=disk.node,
        image=disk.image,
        read_only=disk.read_only,
        backup=one.kind if one else "skipped" if skipped else None,
        reason=one.reason if one else skipped,
        storage=one.storage if one else None,
        first_grant_bytes=one.grant_bytes if one else 0,
        bitmaps=ours,
    )


async def _past(monitor: Monitor, vm: Vm, targets: Mapping[str, Target]) -> Past:
    """What a backup to the first target would build on."""
    for name, target in targets.items():
        snapshots = await target.snapshots(vm.name)
        settlements = await rotation.look(monitor, name, [snapshot.id for snapshot in snapshots])
        return Past(snapshots, settlements, target.granule_bytes, target.reads_sinks)
    return Past((), {}, granule_bytes=commands.CLUSTER_BYTES, reads_sinks=True)


async def _facts(monitor: Monitor) -> tuple[str, str]:
    """The VM's state, and its QEMU's version."""
    status = await monitor.execute(commands.QUERY_STATUS)
    version = (await monitor.execute(commands.QUERY_VERSION))["qemu"]
    return status["status"], f"{version['major']}.{version['minor']}.{version['micro']}"


def _described(disk: Disk) -> VmDisk:
    return VmDisk(
        disk=disk.id,
        size_bytes=disk.size_bytes,
        driver=disk.node_driver,
        node=disk.node,
        image=disk.image,
        read_only=disk.read_only,
    )
