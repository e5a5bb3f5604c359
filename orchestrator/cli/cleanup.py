"""`vmfleece cleanup`: what dead runs have left anywhere, and putting it right."""

import argparse

from rich.table import Table

from orchestrator.cli import render
from orchestrator.config import Config
from orchestrator.errors import EXIT_FAILED, EXIT_OK, EXIT_SOME_FAILED
from orchestrator.run.reconcile import Act
from orchestrator.service import client, desk, engine
from orchestrator.service.api.base import CleanupOrder
from orchestrator.service.documents import Cleanup

DEADLINE_SECONDS = 600.0
"""VMs that are silent take their time."""


async def cleanup(config: Config, arguments: argparse.Namespace) -> int:
    """Do it, or in a dry run say what would be done: the daemon, if one runs."""
    found = await _found(config, dry_run=arguments.dry_run)
    if arguments.json:
        render.print_document(found)
    else:
        _print(found)
    todo = [one for one in found.repairs if one.act != Act.NOTHING]
    failed = sum(one.error is not None for one in todo)
    if not failed:
        return EXIT_OK
    return EXIT_FAILED if failed == len(todo) else EXIT_SOME_FAILED


async def _found(config: Config, *, dry_run: bool) -> Cleanup:
    run_dir = config.daemon.run_dir
    if await client.daemon_serves(run_dir):
        order = CleanupOrder(dry_run=dry_run)
        done = await client.ask(
            run_dir, "/cleanup", Cleanup, method="POST", body=order, deadline_seconds=DEADLINE_SECONDS
        )
        if done is not None:
            return done
    async with engine.opened(config, recover=False) as opened:
        return await desk.clean_up(opened.reconciler, dry_run=dry_run)


def _print(found: Cleanup) -> None:
    if not found.repairs:
        render.print_line("nothing is left of dead runs")
        return
    table = Table("WHAT", "VM", "RUN OR TARGET", "WHY", "", box=None, pad_edge=False)
    for one in found.repairs:
        outcome = "left alone" if one.act == Act.NOTHING else f"failed: {one.error.message}" if one.error else ""
        table.add_row(one.act, one.vm or "-", one.subject, one.reason, outcome)
    render.print_table(table)
