"""`vmfleece vm list` and `vm show`: which VMs can be reached, and what a backup would do."""

import argparse
import asyncio
from dataclasses import asdict
from typing import Any

from rich.table import Table

from orchestrator.cli import render
from orchestrator.config import Config
from orchestrator.errors import EXIT_FAILED, EXIT_OK, ConfigError, VmfleeceError
from orchestrator.fleecing import bitmaps, rotation
from orchestrator.model import Disk, Fleecing, FleecingPolicy, RunOptions, Vm
from orchestrator.qemu import capabilities, commands, inventory, qmp
from orchestrator.run.plan import Past
from orchestrator.run.survey import survey
from orchestrator.service import engine
from orchestrator.units import format_size


async def list_vms(config: Config, arguments: argparse.Namespace) -> int:
    """All configured VMs; exit code 1 if one cannot be reached."""
    vms = config.vms().values()
    found = await asyncio.gather(*(_look(vm) for vm in vms))
    if arguments.json:
        render.print_json({"vms": found})
    else:
        table = Table("VM", "STATE", "QEMU", "DISKS", "SIZE", "PRIORITY", box=None, pad_edge=False)
        for vm, one in zip(vms, found, strict=True):
            state = one["status"] if one["reachable"] else "unreachable"
            disks = one["disks"]
            table.add_row(
                vm.name,
                state,
                one["qemu"],
                str(len(disks)) if one["reachable"] else "",
                format_size(sum(disk["size_bytes"] for disk in disks)) if one["reachable"] else "",
                str(vm.priority),
            )
        render.print_table(table)
        for one in found:
            if one["error"]:
                render.complain(one["error"]["message"], one["error"]["hint"])
    return EXIT_OK if all(one["reachable"] for one in found) else EXIT_FAILED


async def show(config: Config, arguments: argparse.Namespace) -> int:
    """One VM, with what a backup of it would do and why."""
    vm = configured(config, arguments.vm)
    async with qmp.connect(vm.qmp, vm=vm.name) as monitor:
        features = capabilities.from_schema(await monitor.execute(commands.QUERY_SCHEMA))
        facts = await _facts(monitor)
        block = await monitor.execute(commands.QUERY_BLOCK)
        disks, described = inventory.disks(block), inventory.bitmaps(block)
        plan, refusal = None, None
        try:
            options = RunOptions("", Fleecing(policy=FleecingPolicy.PREFER))
            storages = engine.storages_for_plans(config, engine.storages(config))
            plan = await survey(
                monitor, vm, options, storages, past=await _past(config, monitor, vm), can=features
            )
        except VmfleeceError as error:
            refusal = error
    planned = {one.disk.id: one for one in plan.disks} if plan else {}
    rows = []
    for disk in disks:
        one = planned.get(disk.id)
        skipped = plan.skipped.get(disk.id, "") if plan else ""
        rows.append(
            _disk(disk)
            | {
                "backup": one.kind if one else "skipped" if skipped else None,
                "reason": one.reason if one else skipped,
                "storage": one.storage if one else None,
                "first_grant_bytes": one.grant_bytes if one else 0,
                "bitmaps": [asdict(bitmap) for bitmap in bitmaps.of_node(described.get(disk.id, []))],
            }
        )
    document: dict[str, Any] = {
        "vm": vm.name,
        "qmp": str(vm.qmp),
        **facts,
        "features": {
            "fleecing": features.break_snapshot and features.snapshot_access,
            "discard_source": features.discard_source,
        },
        "disks": rows,
        "warnings": list(plan.warnings) if plan else [],
        "error": render.error_json(refusal) if refusal else None,
    }
    if arguments.json:
        render.print_json(document)
        return EXIT_OK
    _print_vm(document)
    return EXIT_OK


async def _past(config: Config, monitor: qmp.QmpMonitor, vm: Vm) -> Past:
    """What a backup to the first target would build on."""
    for name, target in engine.targets(config).items():
        snapshots = await target.snapshots(vm.name)
        settlements = await rotation.look(monitor, name, [snapshot.id for snapshot in snapshots])
        return Past(snapshots, settlements, target.granule_bytes, target.reads_sinks)
    return Past((), {}, granule_bytes=commands.CLUSTER_BYTES, reads_sinks=True)


def configured(config: Config, name: str) -> Vm:
    """The VM of that name. Raises ConfigError that names those there are."""
    vms = config.vms()
    if name not in vms:
        raise ConfigError(f"no VM {name!r} in {config.path}", hint=f"there are: {', '.join(vms) or 'none'}")
    return vms[name]


def _print_vm(document: dict[str, Any]) -> None:
    features = document["features"]
    render.print_line(f"{document['vm']}: {document['status']}, QEMU {document['qemu']}, {document['qmp']}")
    render.print_line(
        f"fleecing: {'yes' if features['fleecing'] else 'no'};"
        f" backed-up ranges are discarded while copying: {'yes' if features['discard_source'] else 'no'}"
    )
    table = Table("DISK", "SIZE", "DRIVER", "IMAGE", "BACKUP", "WHY", "STORAGE", box=None, pad_edge=False)
    for disk in document["disks"]:
        storage = f"{disk['storage']} ({format_size(disk['first_grant_bytes'])})" if disk["storage"] else "-"
        table.add_row(
            disk["disk"],
            format_size(disk["size_bytes"]),
            disk["driver"] or "-",
            disk["image"] or "-",
            disk["backup"] or "-",
            disk["reason"],
            storage,
        )
    render.print_table(table)
    for disk in document["disks"]:
        for bitmap in disk["bitmaps"]:
            state = "inconsistent" if bitmap["inconsistent"] else f"{format_size(bitmap['dirty_bytes'])} changed"
            kept = "kept in the image" if bitmap["persistent"] else "lost when the VM ends"
            render.print_line(f"{disk['disk']}: {state} since {bitmap['snapshot']} on {bitmap['target']}, {kept}")
    for warning in document["warnings"]:
        render.complain(warning)
    if document["error"]:
        render.complain(document["error"]["message"], document["error"]["hint"])


async def _look(vm: Vm) -> dict[str, Any]:
    found: dict[str, Any] = {"vm": vm.name, "reachable": False, "status": None, "qemu": None}
    found |= {"disks": [], "priority": vm.priority, "error": None}
    try:
        async with qmp.connect(vm.qmp, vm=vm.name) as monitor:
            disks = inventory.disks(await monitor.execute(commands.QUERY_BLOCK))
            found |= await _facts(monitor)
            found |= {"reachable": True, "disks": [_disk(disk) for disk in disks if not disk.empty]}
    except VmfleeceError as error:
        found["error"] = render.error_json(error)
    return found


async def _facts(monitor: qmp.QmpMonitor) -> dict[str, Any]:
    status = await monitor.execute(commands.QUERY_STATUS)
    version = (await monitor.execute(commands.QUERY_VERSION))["qemu"]
    return {
        "status": status["status"],
        "qemu": f"{version['major']}.{version['minor']}.{version['micro']}",
    }


def _disk(disk: Disk) -> dict[str, Any]:
    return {
        "disk": disk.id,
        "size_bytes": disk.size_bytes,
        "driver": disk.node_driver,
        "node": disk.node,
        "image": disk.image,
        "read_only": disk.read_only,
    }
