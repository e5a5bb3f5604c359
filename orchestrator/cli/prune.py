"""`vmfleece prune`: retention, and if that is asked for, having repositories give back space."""

import argparse
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from orchestrator.cli import render
from orchestrator.cli.target import restic_lines
from orchestrator.config import Config, TargetDriver
from orchestrator.errors import EXIT_FAILED, EXIT_OK, ConfigError, StateError, VmfleeceError
from orchestrator.run.prune import Pruned
from orchestrator.run.prune import prune as prune_vm
from orchestrator.service import engine
from orchestrator.service.orders import target_named
from orchestrator.state import lock
from orchestrator.target.repository import upkeep
from orchestrator.units import format_size


async def prune(config: Config, arguments: argparse.Namespace) -> int:
    """Remove what retention does not keep, merged if that is asked for; in a dry run, say what that would be."""
    wanted = _wanted(config, arguments)
    targets = engine.targets(config)
    with contextlib.nullcontext() if arguments.dry_run else _alone(config):
        results = [
            await prune_vm(
                targets[target],
                vm,
                config.keeps(target, vm),
                merge=arguments.merge,
                dry_run=arguments.dry_run,
            )
            for target, vm in wanted
        ]
    pruned = [one for result in results for one in result.snapshots]
    if not arguments.json:
        _print(pruned, _repositories(config), dry_run=arguments.dry_run)
    # Not while we own state_dir: it may take hours, and only the repository itself is closed to others.
    reclaimed = await _reclaim(config, arguments, dict(wanted)) if arguments.reclaim else []
    if arguments.json:
        rows = [_document(one, dry_run=arguments.dry_run) for one in pruned]
        render.print_json({"dry_run": arguments.dry_run, "snapshots": rows, "reclaimed": reclaimed})
    failed = any(one.error for one in pruned) or any(row["error"] for row in reclaimed)
    return EXIT_FAILED if failed else EXIT_OK


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
                render.complain(error.message, error.hint)
    return rows


def _wanted(config: Config, arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Targets and VMs of jobs that say what is kept. Raises ConfigError if a name, or all of them, mean none."""
    if arguments.target is not None:
        target_named(config, arguments.target)
    for what, name, there_are in (("VM", arguments.vm, config.vm), ("job", arguments.job, config.job)):
        if name is not None and name not in there_are:
            raise ConfigError(
                f"no {what} {name!r} in {config.path}", hint=f"there are: {', '.join(there_are) or 'none'}"
            )
    found = {
        (job.options.target, vm): None
        for job in config.job.values()
        for vm in job.vms
        if job.keep is not None
        and arguments.job in (None, job.name)
        and arguments.target in (None, job.options.target)
        and arguments.vm in (None, vm)
    }
    if not found:
        narrowed = any((arguments.target, arguments.vm, arguments.job))
        raise ConfigError(
            f"no job in {config.path} has prune_backups" + (" and backs that up" if narrowed else ""),
            hint='so everything is kept; to change that: prune_backups = "keep-last=3,keep-daily=13"',
        )
    return list(found)


@contextlib.contextmanager
def _alone(config: Config) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.owned(config.daemon.state_dir))
        except StateError as error:
            if error.code != StateError.code:
                raise
            raise StateError(
                error.message,
                hint="prune cannot run beside the daemon or a backup: wait until it has ended; the daemon prunes"
                " after each job by itself, and --dry-run can be used at any time",
            ) from error
        yield


def _repositories(config: Config) -> set[str]:
    """Targets where removing a snapshot frees no space yet."""
    return {name for name, settings in config.target.items() if settings.driver is TargetDriver.RESTIC}


def _document(one: Pruned, *, dry_run: bool) -> dict[str, Any]:
    return {
        "snapshot": one.snapshot.id,
        "vm": one.snapshot.vm,
        "target": one.snapshot.target,
        "keep": one.keep,
        "reasons": one.reasons,
        "removed": one.removed and not dry_run,
        "merged": one.merged and not dry_run,
        "stored_bytes": one.snapshot.stored_bytes,
        "error": asdict(one.error) if one.error else None,
    }


def _print(pruned: Sequence[Pruned], repositories: set[str], *, dry_run: bool) -> None:
    """Why each stays or goes, and the sum. What failed is logged with what to do."""
    table = Table("SNAPSHOT", "", "REASONS", "TARGET", box=None, pad_edge=False)
    for one in pruned:
        what = "failed" if one.error else "merge" if one.merged else "keep" if one.keep else "remove"
        why = one.error.message if one.error else ", ".join(one.reasons)
        table.add_row(one.snapshot.id, what, why, one.snapshot.target)
    render.print_table(table)
    removed = [one.snapshot for one in pruned if one.removed]
    grown_bytes = sum(one.grown_bytes for one in pruned)
    removed_bytes = sum(one.stored_bytes for one in removed if one.target not in repositories)
    freed = format_size(max(0, removed_bytes - grown_bytes))
    would_be = "would be " if dry_run else ""
    kept = sum(one.keep for one in pruned)
    merged = sum(one.merged for one in pruned)
    if dry_run and merged:  # how much the merged ones will grow is known only then
        freed = f"at most {freed}"
    kept_how = f"{kept} kept, {merged} of them {would_be}merged" if merged else f"{kept} kept"
    render.print_line(f"{kept_how}, {len(removed)} {would_be}removed, {freed} {would_be}freed")
    if not_freed := sorted({one.target for one in removed} & repositories):
        render.print_line(f"a repository's space is free after `vmfleece target reclaim`: {', '.join(not_freed)}")
