"""`vmfleece vm list` and `vm show`: which VMs can be reached, and what a backup would do."""

import argparse
from functools import partial

from rich.table import Table

from orchestrator.cli import render
from orchestrator.config import Config
from orchestrator.errors import EXIT_FAILED, EXIT_OK
from orchestrator.qemu import qmp
from orchestrator.service import client, drivers, offline, vms
from orchestrator.service.documents import VmDetails, Vms
from orchestrator.units import format_size

DEADLINE_SECONDS = 120.0
"""The daemon asks the VMs, and those that are silent take their time."""


async def list_vms(config: Config, arguments: argparse.Namespace) -> int:
    """All configured VMs; exit code 1 if one cannot be reached."""
    found = await client.ask(config.daemon.run_dir, "/vms", Vms, deadline_seconds=DEADLINE_SECONDS)
    if found is None:
        found = await vms.summaries(config, qmp.connect)
    if arguments.json:
        render.print_document(found)
    else:
        table = Table("VM", "STATE", "QEMU", "DISKS", "SIZE", "PRIORITY", box=None, pad_edge=False)
        for vm in found.vms:
            table.add_row(
                vm.vm,
                vm.status if vm.reachable else "unreachable",
                vm.qemu,
                str(len(vm.disks)) if vm.reachable else "",
                format_size(sum(disk.size_bytes for disk in vm.disks)) if vm.reachable else "",
                str(vm.priority),
            )
        render.print_table(table)
        for vm in found.vms:
            if vm.error is not None:
                render.complain(vm.error)
    return EXIT_OK if all(vm.reachable for vm in found.vms) else EXIT_FAILED


async def show(config: Config, arguments: argparse.Namespace) -> int:
    """One VM, with what a backup of it would do and why."""
    vm = vms.configured(config, arguments.vm)
    run_dir = config.daemon.run_dir
    found = await client.ask(run_dir, f"/vms/{vm.name}", VmDetails, deadline_seconds=DEADLINE_SECONDS)
    if found is None:
        storages = drivers.storages_for_plans(
            config, drivers.storages(config), partial(offline.past_results, config)
        )
        found = await vms.details(vm, qmp.connect, storages, drivers.targets(config))
    if arguments.json:
        render.print_document(found)
    else:
        _print(found)
    return EXIT_OK


def _print(vm: VmDetails) -> None:
    render.print_line(f"{vm.vm}: {vm.status}, QEMU {vm.qemu}, {vm.qmp}")
    render.print_line(
        f"fleecing: {'yes' if vm.features.fleecing else 'no'};"
        f" backed-up ranges are discarded while copying: {'yes' if vm.features.discard_source else 'no'}"
    )
    table = Table("DISK", "SIZE", "DRIVER", "IMAGE", "BACKUP", "WHY", "STORAGE", box=None, pad_edge=False)
    for disk in vm.disks:
        storage = f"{disk.storage} ({format_size(disk.first_grant_bytes)})" if disk.storage else "-"
        table.add_row(
            disk.disk,
            format_size(disk.size_bytes),
            disk.driver or "-",
            disk.image or "-",
            disk.backup or "-",
            disk.reason,
            storage,
        )
    render.print_table(table)
    for disk in vm.disks:
        for bitmap in disk.bitmaps:
            state = "inconsistent" if bitmap.inconsistent else f"{format_size(bitmap.dirty_bytes)} changed"
            kept = "kept in the image" if bitmap.persistent else "lost when the VM ends"
            render.print_line(f"{disk.disk}: {state} since {bitmap.snapshot} on {bitmap.target}, {kept}")
    for warning in vm.warnings:
        render.warn(warning)
    if vm.error is not None:
        render.complain(vm.error)
