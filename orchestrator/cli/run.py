"""`vmfleece run list`, `run show` and `run cancel`: runs under way, and the history of those that are over."""

import argparse
import asyncio

from rich.table import Table

from orchestrator.cli import render
from orchestrator.cli.progress import guest_writes, result_lines
from orchestrator.config import Config
from orchestrator.errors import EXIT_OK, RefusedError
from orchestrator.model import RunState
from orchestrator.service import client, history
from orchestrator.service.api.base import RunsQuery
from orchestrator.service.documents import RunDetails, Runs
from orchestrator.service.status import Status
from orchestrator.state.catalogue import Catalogue
from orchestrator.units import format_duration, format_size

POLL_SECONDS = 0.5
NOBODY = Status(process=None, started=None)


async def list_runs(config: Config, arguments: argparse.Namespace) -> int:
    """Runs, the latest first, whether a vmfleece runs or not."""
    query = RunsQuery(vm=arguments.vm, job=arguments.job, state=arguments.state, limit=arguments.limit)
    asked = {name: str(value) for name, value in query.model_dump(mode="json", exclude_none=True).items()}
    found = await client.ask(config.daemon.run_dir, "/runs", Runs, query=asked)
    if found is None:
        found = await asyncio.to_thread(history.runs, _catalogue(config), query, NOBODY)
    if arguments.json:
        render.print_document(found)
        return EXIT_OK
    table = Table(
        "RUN", "VM", "STARTED", "STATE", "TOOK", "KIND", "COPIED", "JOB", "WHY", box=None, pad_edge=False
    )
    for run in found.runs:
        table.add_row(
            run.run,
            run.vm,
            render.moment(run.started),
            run.state,
            "-" if run.duration_seconds is None else format_duration(round(run.duration_seconds)),
            run.kind or "-",
            "-" if run.copied_bytes is None else format_size(run.copied_bytes),
            run.job or "-",
            f"{run.error.code}: {run.error.message}" if run.error else "",
        )
    render.print_table(table)
    return EXIT_OK


async def show(config: Config, arguments: argparse.Namespace) -> int:
    """One run: how far it is, or what it came to."""
    found = await client.ask(config.daemon.run_dir, f"/runs/{arguments.run}", RunDetails)
    if found is None:
        found = await asyncio.to_thread(history.run, _catalogue(config), arguments.run, NOBODY)
    _print(found, as_json=arguments.json)
    return EXIT_OK


async def cancel(config: Config, arguments: argparse.Namespace) -> int:
    """End a run, and wait until its VM is as before. Ctrl-C ends the waiting only."""
    run_dir = config.daemon.run_dir
    found = await client.ask(run_dir, f"/runs/{arguments.run}/cancel", RunDetails, method="POST")
    if found is None:
        raise RefusedError(
            f"no vmfleece is running, so run {arguments.run} is not under way",
            hint=f"`vmfleece run show {arguments.run}` says what became of it",
            code="run-over",
        )
    while found is not None and found.state not in history.OVER:
        await asyncio.sleep(POLL_SECONDS)
        found = await client.ask(run_dir, f"/runs/{arguments.run}", RunDetails)
    if found is None:
        found = await asyncio.to_thread(history.run, _catalogue(config), arguments.run, NOBODY)
    _print(found, as_json=arguments.json)
    return EXIT_OK


def _catalogue(config: Config) -> Catalogue | None:
    """The history, if there is any yet."""
    state_dir = config.daemon.state_dir
    return Catalogue(state_dir) if Catalogue.path(state_dir).exists() else None


def _print(run: RunDetails, *, as_json: bool) -> None:
    if as_json:
        render.print_document(run)
        return
    job = f", job {run.job}" if run.job else ""
    render.print_line(f"run {run.run} of {run.vm}{job}, since {render.moment(run.started)}: {run.state}")
    if run.progress is not None:
        one = run.progress
        copied = f"{format_size(one.copied_bytes)} of {format_size(one.size_bytes)}"
        held = f"{format_size(one.fleecing_bytes)} of {format_size(one.grant_bytes)}"
        writes = guest_writes(one.guest_writes)
        render.print_line(f"copied {copied}, fleecing {held}, to {one.target}{writes}")
    if run.waiting is not None:
        for reason in run.waiting.reasons:
            render.print_line(f"waits for {reason}")
    if run.result is not None:
        render.print_result(result_lines(run.result), run.result)
    if run.state is RunState.LOST:
        render.print_line("its vmfleece ended before it; what it left is put right by the next one that runs")
