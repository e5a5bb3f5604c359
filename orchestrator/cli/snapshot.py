"""`vmfleece snapshot list|show|protect|forget` and `vmfleece restore`."""

import argparse
import asyncio
from dataclasses import asdict
from typing import Any

from rich.table import Table

from orchestrator import memory
from orchestrator.cli import choose, render
from orchestrator.cli.work import Work
from orchestrator.config import Config
from orchestrator.errors import EXIT_FAILED, EXIT_OK, EXIT_SOME_FAILED, TargetError
from orchestrator.run.prune import remove
from orchestrator.run.restore import restore as restore_disk
from orchestrator.run.restore import restore_extra_files
from orchestrator.target.base import Snapshot
from orchestrator.units import format_size


async def list_snapshots(config: Config, arguments: argparse.Namespace) -> int:
    """What is on the targets, by VM and oldest first."""
    listed = await choose.list_all(choose.checked_targets(config, arguments.target), arguments.vm)
    code = EXIT_OK if listed.complete else EXIT_SOME_FAILED
    if arguments.json:
        render.print_json({"snapshots": [_document(snapshot) for snapshot in listed.snapshots]})
        return code
    columns = ("SNAPSHOT", "TAKEN", "KIND", "BASED ON", "PROTECTED", "DISKS", "SIZE", "STORED", "TARGET")
    table = Table(*columns, box=None, pad_edge=False)
    for snapshot in listed.snapshots:
        table.add_row(
            snapshot.id,
            render.moment(snapshot.created),
            snapshot.kind,
            ", ".join(parent.rpartition("/")[2] for parent in snapshot.parents) or "-",
            "yes" if snapshot.protected else "-",
            ", ".join(disk.disk for disk in snapshot.disks),
            format_size(sum(disk.size_bytes for disk in snapshot.disks)),
            format_size(snapshot.stored_bytes),
            snapshot.target,
        )
    render.print_table(table)
    return code


async def show(config: Config, arguments: argparse.Namespace) -> int:
    """One snapshot."""
    snapshot = await choose.the_snapshot(choose.checked_targets(config, arguments.target), arguments.snapshot)
    if arguments.json:
        render.print_json(_document(snapshot))
        return EXIT_OK
    details = snapshot.details
    render.print_line(f"{snapshot.id} on target {snapshot.target}")
    render.print_line(f"taken {render.moment(snapshot.created)}, {snapshot.kind}, by run {details.get('run')}")
    if details.get("pause_ms") is not None:
        render.print_line(f"guest held {details['pause_ms']:.1f} ms")
    if snapshot.protected:
        render.print_line("protected: it is kept until `vmfleece snapshot protect … --off`")
    table = Table("DISK", "SIZE", "STORED", "BASED ON", "SHA-256", box=None, pad_edge=False)
    for disk in snapshot.disks:
        sizes = (format_size(disk.size_bytes), format_size(disk.stored_bytes))
        table.add_row(disk.disk, *sizes, disk.parent or "-", disk.sha256 or "-")
    render.print_table(table)
    if snapshot.parents:
        render.print_line("SHA-256 of a disk that is based on another snapshot: of its image, not of its content")
    return EXIT_OK


async def protect(config: Config, arguments: argparse.Namespace) -> int:
    """Keep a snapshot whatever retention says, or stop doing so."""
    targets = choose.checked_targets(config, arguments.target)
    snapshot = choose.the_one((await choose.list_all(targets)).snapshots, arguments.snapshot)
    snapshot = await targets[snapshot.target].protect(snapshot, protected=not arguments.off)
    if arguments.json:
        render.print_json(_document(snapshot))
    else:
        render.print_line(f"{snapshot.id}: {'protected' if snapshot.protected else 'not protected any more'}")
    return EXIT_OK


async def forget(config: Config, arguments: argparse.Namespace) -> int:
    """Remove the snapshots that are named, each by itself; all names are checked before the first is removed."""
    targets = choose.checked_targets(config, arguments.target)
    found = (await choose.list_all(targets)).snapshots
    wanted = {snapshot.id: snapshot for snapshot in (choose.the_one(found, name) for name in arguments.snapshots)}
    rows: list[dict[str, Any]] = []
    # What is based on others goes before them.
    for snapshot in sorted(wanted.values(), key=lambda one: one.created, reverse=True):
        row = {"snapshot": snapshot.id, "target": snapshot.target, "stored_bytes": snapshot.stored_bytes}
        rows.append(row | {"error": None})
        try:
            await remove(targets[snapshot.target], snapshot)
        except TargetError as error:
            rows[-1]["error"] = render.error_json(error)
            render.complain(error)
        else:
            if not arguments.json:
                render.print_line(f"{snapshot.id}: removed, {format_size(snapshot.stored_bytes)} freed")
    if arguments.json:
        render.print_json({"forgotten": rows})
    failed = sum(row["error"] is not None for row in rows)
    if not failed:
        return EXIT_OK
    return EXIT_FAILED if failed == len(rows) else EXIT_SOME_FAILED


async def restore(config: Config, arguments: argparse.Namespace) -> int:
    """Give one disk back, or all of them into a folder."""
    memory.keep_freed()
    targets = choose.checked_targets(config, arguments.target)
    snapshot = await choose.the_snapshot(targets, arguments.snapshot)
    to = arguments.to
    if arguments.all:
        if not await asyncio.to_thread(to.is_dir):
            raise TargetError(
                f"--to {to} is no folder", hint="with --all, give a folder that is there", code="restore-path"
            )
        wanted = {disk.disk: to / _file_name(disk.disk, arguments.format) for disk in snapshot.disks}
    else:
        wanted = {arguments.disk: to}
    restored = []
    for disk, path in wanted.items():
        with Work(snapshot.disk(disk).size_bytes, shown=not arguments.json) as work:
            work.begin(disk, before_bytes=0)
            one = await restore_disk(
                targets[snapshot.target],
                snapshot,
                disk,
                to=path,
                image_format=arguments.format,
                overwrite=arguments.force,
                on_progress=work.done,
            )
        restored.append(one)
        if not arguments.json:
            render.print_line(
                f"{one.path}: {one.disk} of {snapshot.id}, {format_size(one.size_bytes)}, SHA-256 checked"
            )
    files = await restore_extra_files(targets[snapshot.target], snapshot, to=to) if arguments.all else []
    if arguments.json:
        document = [asdict(one) | {"path": str(one.path)} for one in restored]
        extra = [{"file": file.path, "path": str(path)} for file, path in files]
        render.print_json({"snapshot": snapshot.id, "restored": document, "extra_files": extra})
    else:
        for file, path in files:
            render.print_line(f"{path}: {file.path} of {snapshot.id}")
    return EXIT_OK


def _file_name(disk: str, image_format: str) -> str:
    """What a disk that may be called by a path is called in one folder."""
    return f"{disk.strip('/').replace('/', '_')}.{image_format}"


def _document(snapshot: Snapshot) -> dict[str, Any]:
    return asdict(snapshot) | {"created": snapshot.created.isoformat()}
