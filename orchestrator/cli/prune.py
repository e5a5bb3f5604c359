"""`vmfleece prune`: retention, and if that is asked for, having repositories give back space."""

import argparse
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from pydantic import TypeAdapter
from rich.table import Table

from orchestrator.cli import render
from orchestrator.cli.target import restic_lines
from orchestrator.cli.work import Work
from orchestrator.config import Config, TargetDriver
from orchestrator.errors import EXIT_FAILED, EXIT_OK, VmfleeceError
from orchestrator.model import MergeProgress
from orchestrator.run.prune import OnMerge
from orchestrator.run.prune import prune as prune_vm
from orchestrator.service import client, desk, drivers, following, orders
from orchestrator.service.documents import Fate, PrunedSnapshot
from orchestrator.service.orders import PruneOrder
from orchestrator.state import lock
from orchestrator.target.repository import upkeep
from orchestrator.units import format_size


async def prune(config: Config, arguments: argparse.Namespace) -> int:
    """Remove what retention does not keep, merged if that is asked for; in a dry run, say what that would be."""
    order = PruneOrder(
        target=arguments.target,
        vm=arguments.vm,
        job=arguments.job,
        merge=arguments.merge,
        dry_run=arguments.dry_run,
    )
    with _Merging(shown=not arguments.json) as display:
        if await client.daemon_serves(config.daemon.run_dir):
            request = await following.carried_out(config.daemon.run_dir, "/prune", order, display.take)
            pruned = request.pruned
        else:
            pruned = await _pruned_here(config, order, display.update)
    if not arguments.json:
        _print(pruned, _repositories(config), dry_run=order.dry_run)
    # Not while we own state_dir: it may take hours, and only the repository itself is closed to others.
    reclaimed = []
    if arguments.reclaim:
        reclaimed = await _reclaim(config, arguments, dict(orders.prunable(order, config)))
    if arguments.json:
        rows = TypeAdapter(tuple[PrunedSnapshot, ...]).dump_python(pruned, mode="json")
        render.print_json({"dry_run": order.dry_run, "snapshots": rows, "reclaimed": reclaimed})
    failed = any(one.error for one in pruned) or any(row["error"] for row in reclaimed)
    return EXIT_FAILED if failed else EXIT_OK


async def _pruned_here(config: Config, order: PruneOrder, on_merge: OnMerge) -> tuple[PrunedSnapshot, ...]:
    """Do it in this process, while no other vmfleece is at work; a dry run at any time."""
    pairs, targets = orders.prunable(order, config), drivers.targets(config)
    with contextlib.nullcontext() if order.dry_run else lock.owned(config.daemon.state_dir):
        results = [
            await prune_vm(
                targets[target],
                vm,
                config.keeps(target, vm),
                merge=order.merge,
                dry_run=order.dry_run,
                on_merge=on_merge,
            )
            for target, vm in pairs
        ]
    return desk.pruned(results, dry_run=order.dry_run)


class _Merging:
    """Shows how far each merge is, for the block, and what is waited for."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._snapshot = ""
        self._stack = contextlib.ExitStack()
        self._work: Work | None = None
        self._told = following.telling(on_merge=self.update)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def take(self, event: Mapping[str, Any]) -> None:
        """What the daemon tells."""
        self._told(event)
        if self._shown and event["event"] == "prune.waiting":
            render.print_line(f"{event['vm']}: waits for the end of its backup")

    def update(self, progress: MergeProgress) -> None:
        """How far one is."""
        if self._work is None or progress.snapshot != self._snapshot:
            self._stack.close()
            self._snapshot = progress.snapshot
            self._work = self._stack.enter_context(Work(progress.size_bytes, shown=self._shown))
            self._work.begin(f"{progress.snapshot}: merging", before_bytes=0)
        self._work.done(progress.done_bytes)


async def _reclaim(config: Config, arguments: argparse.Namespace, targets: Iterable[str]) -> list[dict[str, Any]]:
    """Have each repository among the targets give back space, whatever becomes of the others."""
    rows: list[dict[str, Any]] = []
    for name in targets:
        settings = config.target[name]
        if name in _repositories(config):
            rows.append({"target": name, "error": None})
            try:
                await upkeep.reclaim(settings, on_line=restic_lines(arguments))
            except VmfleeceError as error:
                rows[-1]["error"] = render.error_json(error)
                render.complain(error)
    return rows


def _repositories(config: Config) -> set[str]:
    """Targets where removing a snapshot frees no space yet."""
    return {name for name, settings in config.target.items() if settings.driver is TargetDriver.RESTIC}


def _print(pruned: Sequence[PrunedSnapshot], repositories: set[str], *, dry_run: bool) -> None:
    """Why each stays or goes, and the sum. What failed is logged with what to do."""
    table = Table("SNAPSHOT", "", "REASONS", "TARGET", box=None, pad_edge=False)
    for one in pruned:
        why = one.error.message if one.error else ", ".join(one.reasons)
        table.add_row(one.snapshot, one.fate, why, one.target)
    render.print_table(table)
    removed = [one for one in pruned if one.fate is Fate.REMOVE]
    grown_bytes = sum(one.grown_bytes for one in pruned)
    removed_bytes = sum(one.stored_bytes for one in removed if one.target not in repositories)
    freed = format_size(max(0, removed_bytes - grown_bytes))
    would_be = "would be " if dry_run else ""
    kept = sum(one.keep for one in pruned)
    merged = sum(one.fate is Fate.MERGE for one in pruned)
    if dry_run and merged:  # how much the merged ones will grow is known only then
        freed = f"at most {freed}"
    kept_how = f"{kept} kept, {merged} of them {would_be}merged" if merged else f"{kept} kept"
    render.print_line(f"{kept_how}, {len(removed)} {would_be}removed, {freed} {would_be}freed")
    if not_freed := sorted({one.target for one in removed} & repositories):
        render.print_line(f"a repository's space is free after `vmfleece target reclaim`: {', '.join(not_freed)}")
