"""`vmfleece backup`, `job run` and `job list`."""

import argparse
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from orchestrator import aio, schedule
from orchestrator.cli import render
from orchestrator.cli.choose import checked_target
from orchestrator.cli.progress import Display, result_lines
from orchestrator.config import Config, parse_fleecing
from orchestrator.config.select import matching
from orchestrator.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_SOME_FAILED,
    ConfigError,
)
from orchestrator.model import Consistency, Fleecing, FleecingPolicy, Progress, RunOptions, RunResult
from orchestrator.service import engine
from orchestrator.units import parse_rate


async def backup(config: Config, arguments: argparse.Namespace) -> int:
    """Back up VMs now, side by side as far as admission allows."""
    vms = _chosen(config, arguments.vms)
    options = _options(config, arguments)
    without = [vm for vm in vms if config.vm[vm].agent is None]
    if options.consistency is Consistency.FREEZE and without:
        raise ConfigError(
            f"--consistency freeze needs a guest agent, and there is none of {', '.join(without)}",
            hint="set vm.NAME.agent, or leave --consistency out",
        )
    async with engine.opened(config) as opened:

        async def run_all(on_progress: Callable[[Progress], None]) -> list[RunResult]:
            return await aio.all_or_first_error(opened.back_up(vm, options, on_progress=on_progress) for vm in vms)

        return await _report(run_all, as_json=arguments.json)


async def run_job(config: Config, arguments: argparse.Namespace) -> int:
    """Run a configured job now."""
    if arguments.job not in config.job:
        raise ConfigError(
            f"no job {arguments.job!r} in {config.path}", hint=f"there are: {', '.join(config.job) or 'none'}"
        )
    async with engine.opened(config) as opened:

        async def run_all(on_progress: Callable[[Progress], None]) -> list[RunResult]:
            return await opened.run_job(arguments.job, on_progress=on_progress)

        return await _report(run_all, as_json=arguments.json)


async def list_jobs(config: Config, arguments: argparse.Namespace) -> int:
    """The configured jobs and when each is due next."""
    now = datetime.now(UTC)
    rows: list[dict[str, Any]] = []
    for job in config.job.values():
        due = schedule.next_due(job.schedule, now) if job.schedule else None
        rows.append(
            {
                "job": job.name,
                "schedule": job.schedule,
                "next_due": due.isoformat() if due else None,
                "target": job.options.target,
                "vms": list(job.vms),
            }
        )
    if arguments.json:
        render.print_json({"jobs": rows})
        return EXIT_OK
    table = Table("JOB", "NEXT DUE", "SCHEDULE", "TARGET", "VMS", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row["job"], row["next_due"] or "-", row["schedule"] or "-", row["target"], ", ".join(row["vms"])
        )
    render.print_table(table)
    return EXIT_OK


async def _report(
    run_all: Callable[[Callable[[Progress], None]], Coroutine[Any, Any, list[RunResult]]], *, as_json: bool
) -> int:
    if as_json:
        results = await run_all(lambda _progress: None)
        render.print_json({"runs": [result.as_json() for result in results]})
    else:
        with Display() as display:
            results = await run_all(display.update)
        for result in results:
            for line in result_lines(result):
                render.print_line(line)
            if result.error is not None:
                render.complain(f"{result.vm}: {result.error.message}", result.error.hint)
            for warning in result.warnings:
                render.complain(f"{result.vm}: warning: {warning}")
    failed = sum(result.error is not None for result in results)
    if not failed:
        return EXIT_OK
    return EXIT_FAILED if failed == len(results) else EXIT_SOME_FAILED


def _chosen(config: Config, wanted: Sequence[str]) -> list[str]:
    """The configured VMs that were meant. Raises ConfigError if a name or pattern means none."""
    chosen: dict[str, None] = {}
    for pattern in wanted:
        found = matching([pattern], config.vm)
        if not found:
            raise ConfigError(
                f"no VM {pattern!r} in {config.path}", hint=f"there are: {', '.join(config.vm) or 'none'}"
            )
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _options(config: Config, arguments: argparse.Namespace) -> RunOptions:
    if arguments.detach:
        raise ConfigError("--detach: not available yet", hint="the run would end with this command; leave it out")
    fleecing = Fleecing(policy=FleecingPolicy.PREFER)
    if arguments.fleecing is not None:
        fleecing = parse_fleecing(arguments.fleecing)
        if fleecing.storage is not None and fleecing.storage not in config.storage:
            raise ConfigError(
                f"--fleecing {arguments.fleecing}: no storage {fleecing.storage!r} in {config.path}",
                hint=f"there are: {', '.join(config.storage) or 'none'}",
            )
    try:
        bwlimit = parse_rate(arguments.bwlimit) if arguments.bwlimit is not None else 0
    except ValueError as error:
        raise ConfigError(f"--bwlimit {arguments.bwlimit}: {error}") from error
    return RunOptions(
        _target(config, arguments.target),
        fleecing,
        consistency=Consistency(arguments.consistency),
        bwlimit_bytes_per_second=bwlimit,
        full=arguments.full,
    )


def _target(config: Config, name: str | None) -> str:
    if name is not None:
        return checked_target(config, name)
    if len(config.target) != 1:
        raise ConfigError(
            "which target? Give --target T",
            hint=f"there are: {', '.join(config.target) or 'none: add a [target.NAME]'}",
        )
    return next(iter(config.target))
