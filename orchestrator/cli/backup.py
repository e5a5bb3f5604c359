"""`vmfleece backup`, `job run` and `job list`."""

import argparse
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from pydantic import BaseModel
from rich.table import Table

from orchestrator import aio
from orchestrator.cli import render
from orchestrator.cli.progress import Display, result_lines
from orchestrator.config import Config
from orchestrator.errors import EXIT_FAILED, EXIT_OK, EXIT_SOME_FAILED, ConfigError
from orchestrator.model import Consistency, Progress, RunResult
from orchestrator.service import client, desk, engine, following, orders
from orchestrator.service.documents import Jobs, Request
from orchestrator.service.orders import BackupOrder

OnProgress = Callable[[Progress], None]
RunAll = Callable[[OnProgress], Coroutine[Any, Any, Sequence[RunResult]]]


async def backup(config: Config, arguments: argparse.Namespace) -> int:
    """Back up VMs now, side by side as far as admission allows."""
    order = BackupOrder(
        vms=arguments.vms,
        target=arguments.target,
        fleecing=arguments.fleecing,
        bwlimit=arguments.bwlimit,
        consistency=Consistency(arguments.consistency),
        full=arguments.full,
    )
    wanted = orders.resolve(order, config)
    if await client.daemon_serves(config.daemon.run_dir):
        return await _by_the_daemon(config, arguments, "/runs", order)
    _must_follow(arguments)
    async with engine.opened(config) as opened:

        async def run_all(on_progress: OnProgress) -> list[RunResult]:
            return await aio.all_or_first_error(
                opened.back_up(vm, wanted.options, on_progress=on_progress) for vm in wanted.vms
            )

        return await _report(run_all, as_json=arguments.json)


async def run_job(config: Config, arguments: argparse.Namespace) -> int:
    """Run a configured job now."""
    job = orders.job_named(config, arguments.job)
    if await client.daemon_serves(config.daemon.run_dir):
        return await _by_the_daemon(config, arguments, f"/jobs/{job}/run", None)
    _must_follow(arguments)
    async with engine.opened(config) as opened:

        async def run_all(on_progress: OnProgress) -> list[RunResult]:
            return await opened.run_job(job, on_progress=on_progress)

        return await _report(run_all, as_json=arguments.json)


async def list_jobs(config: Config, arguments: argparse.Namespace) -> int:
    """The jobs that are in force and when each is due next; without a daemon, those that are configured."""
    found = await client.ask(config.daemon.run_dir, "/jobs", Jobs) or desk.jobs(config)
    if arguments.json:
        render.print_document(found)
        return EXIT_OK
    table = Table("JOB", "NEXT DUE", "SCHEDULE", "TARGET", "VMS", box=None, pad_edge=False)
    for job in found.jobs:
        table.add_row(
            job.job,
            render.moment(job.next_due) if job.next_due else "-",
            job.schedule or "-",
            job.target,
            ", ".join(job.vms),
        )
    render.print_table(table)
    return EXIT_OK


async def _by_the_daemon(config: Config, arguments: argparse.Namespace, route: str, body: BaseModel | None) -> int:
    run_dir = config.daemon.run_dir
    if arguments.detach:
        _print_begun(await following.begin(run_dir, route, body), as_json=arguments.json)
        return EXIT_OK

    async def run_all(on_progress: OnProgress) -> Sequence[RunResult]:
        request = await following.carried_out(run_dir, route, body, following.telling(on_progress=on_progress))
        return request.results

    return await _report(run_all, as_json=arguments.json)


def _must_follow(arguments: argparse.Namespace) -> None:
    """Raises ConfigError if it was asked to go on after this command: only the daemon can."""
    if arguments.detach:
        raise ConfigError(
            "--detach needs the daemon, and it does not run",
            hint="start the daemon, or leave --detach out: the backup then ends with this command",
        )


def _print_begun(request: Request, *, as_json: bool) -> None:
    if as_json:
        runs = [{"vm": one.vm, "run": one.run} for one in request.runs]
        render.print_json({"request": request.request, "vms": list(request.vms), "runs": runs})
        return
    for one in request.runs:
        render.print_line(f"{one.vm}: run {one.run} has begun; `vmfleece run show {one.run}` says how far it is")
    if not request.runs:
        render.print_line(f"begun, for {', '.join(request.vms)}; `vmfleece status` says how far it is")


async def _report(run_all: RunAll, *, as_json: bool) -> int:
    if as_json:
        results = await run_all(lambda _progress: None)
        render.print_json({"runs": [result.as_json() for result in results]})
    else:
        with Display() as display:
            results = await run_all(display.update)
        for result in results:
            render.print_result(result_lines(result), result)
    failed = sum(result.error is not None for result in results)
    if not failed:
        return EXIT_OK
    return EXIT_FAILED if failed == len(results) else EXIT_SOME_FAILED
