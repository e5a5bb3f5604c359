"""`vmfleece cleanup`: what dead runs have left anywhere, and putting it right."""

import argparse
from typing import Any

from rich.table import Table

from orchestrator.cli import render
from orchestrator.config import Config
from orchestrator.errors import EXIT_FAILED, EXIT_OK, EXIT_SOME_FAILED
from orchestrator.run.reconcile import Act
from orchestrator.service import engine
from orchestrator.service.reconciler import Repaired


async def cleanup(config: Config, arguments: argparse.Namespace) -> int:
    """Do it, or in a dry run say what would be done. Raises StateError: a daemon does it by itself."""
    async with engine.opened(config, recover=False) as opened:
        if arguments.dry_run:
            repaired = [Repaired(repair) for repair in await opened.reconciler.plan()]
        else:
            repaired = await opened.reconciler.put_right()
    if arguments.json:
        render.print_json({"dry_run": arguments.dry_run, "repairs": [_document(one) for one in repaired]})
    else:
        _print(repaired)
    todo = [one for one in repaired if one.repair.act is not Act.NOTHING]
    failed = sum(one.error is not None for one in todo)
    if not failed:
        return EXIT_OK
    return EXIT_FAILED if failed == len(todo) else EXIT_SOME_FAILED


def _print(repaired: list[Repaired]) -> None:
    if not repaired:
        render.print_line("nothing is left of dead runs")
        return
    table = Table("WHAT", "VM", "RUN OR TARGET", "WHY", "", box=None, pad_edge=False)
    for one in repaired:
        repair = one.repair
        outcome = (
            "left alone" if repair.act is Act.NOTHING else f"failed: {one.error.message}" if one.error else ""
        )
        table.add_row(repair.act, repair.vm or "-", repair.subject, repair.reason, outcome)
    render.print_table(table)


def _document(one: Repaired) -> dict[str, Any]:
    repair = one.repair
    return {
        "act": repair.act,
        "vm": repair.vm or None,
        "subject": repair.subject,
        "reason": repair.reason,
        "error": render.error_json(one.error) if one.error else None,
    }
