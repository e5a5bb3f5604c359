"""`vmfleece verify`: whether what is on the targets can be read, and is what was backed up."""

import argparse
from typing import Any

from rich.table import Table

from orchestrator import memory
from orchestrator.cli import choose, render
from orchestrator.cli.work import Work
from orchestrator.config import Config
from orchestrator.errors import EXIT_FAILED, EXIT_OK, EXIT_SOME_FAILED, VmfleeceError
from orchestrator.target.base import Snapshot, Target
from orchestrator.units import format_size


async def verify(config: Config, arguments: argparse.Namespace) -> int:
    """Check the snapshots that are named, or all, each whatever is wrong with the others."""
    memory.keep_freed()
    targets = choose.checked_targets(config, arguments.target)
    snapshots, complete = [await choose.the_snapshot(targets, name) for name in arguments.snapshots], True
    if not snapshots:
        listed = await choose.list_all(targets, arguments.vm)
        snapshots, complete = listed.snapshots, listed.complete
    rows = []
    before_bytes = 0
    with Work(sum(map(_size, snapshots)), shown=not arguments.json) as work:
        for number, snapshot in enumerate(snapshots, start=1):
            work.begin(f"{snapshot.id} ({number} of {len(snapshots)})", before_bytes=before_bytes)
            rows.append(await _row(targets[snapshot.target], snapshot, arguments.sample))
            before_bytes += _size(snapshot)
            for problem in rows[-1]["problems"]:
                render.warn(f"{snapshot.id}: {problem}")
    if arguments.json:
        render.print_json({"verified": rows})
    else:
        _print(rows)
    failed = sum(bool(row["problems"] or row["error"]) for row in rows)
    if not failed:
        return EXIT_OK if complete else EXIT_SOME_FAILED
    return EXIT_FAILED if failed == len(rows) else EXIT_SOME_FAILED


def _size(snapshot: Snapshot) -> int:
    return sum(disk.stored_bytes for disk in snapshot.disks)


async def _row(target: Target, snapshot: Snapshot, share: float) -> dict[str, Any]:
    row: dict[str, Any] = {"snapshot": snapshot.id, "target": snapshot.target, "checked_bytes": 0}
    row |= {"total_bytes": None, "problems": [], "error": None}
    try:
        found = await target.verify(snapshot, share=share)
    except VmfleeceError as error:
        render.complain(error, about=snapshot.id)
        return row | {"error": render.error_json(error)}
    return row | {
        "checked_bytes": found.checked_bytes,
        "total_bytes": found.total_bytes,
        "problems": list(found.problems),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("SNAPSHOT", "CHECKED", "OF", "RESULT", "TARGET", box=None, pad_edge=False)
    for row in rows:
        total_bytes, problems = row["total_bytes"], row["problems"]
        table.add_row(
            row["snapshot"],
            format_size(row["checked_bytes"]),
            "-" if total_bytes is None else format_size(total_bytes),
            row["error"]["code"] if row["error"] else f"{len(problems)} damaged" if problems else "fine",
            row["target"],
        )
    render.print_table(table)
