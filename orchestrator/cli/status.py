"""`vmfleece status`: what is going on, once or until Ctrl-C."""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from orchestrator.cli import render
from orchestrator.cli.status_view import View, lines
from orchestrator.config import Config
from orchestrator.errors import EXIT_OK, VmfleeceError
from orchestrator.service import client, offline
from orchestrator.service.status import Status

REFRESH_SECONDS = 1.0

Seen = Status | VmfleeceError


async def status(config: Config, arguments: argparse.Namespace) -> int:
    """What is going on, once or until Ctrl-C. Whether a vmfleece runs or not, exit code 0."""
    found = await _ask(config)
    if not arguments.watch:
        if arguments.json:
            render.print_json(found.as_json())
        else:
            _print(found)
    elif arguments.json:
        await _watch(config, found, _print_compact)
    elif not _is_live():
        await _watch(config, found, _print_block)
    else:
        console = render.console()
        with Live(console=console, screen=True, auto_refresh=False) as live:
            await _watch(config, found, lambda seen: live.update(_screen(console, seen), refresh=True))
    return EXIT_OK


async def _ask(config: Config) -> Status:
    answer = await client.status(config.daemon.run_dir)
    return await offline.status(config) if answer is None else answer


async def _watch(
    config: Config, seen: Status | VmfleeceError, show: Callable[[Status | VmfleeceError], None]
) -> None:
    """Show what was seen, and what is from then on. Returns when cancelled: Ctrl-C is how watching ends."""
    try:
        while True:
            show(seen)
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                seen = await _ask(config)
            except VmfleeceError as error:  # it is ending, starting or hanging: it may answer again
                seen = error
    except asyncio.CancelledError:
        return


def _is_live() -> bool:
    """Whether standard output can be drawn on again and again; a pipe cannot, whatever FORCE_COLOR says."""
    console = render.console()
    return sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal


def _screen(console: Console, seen: Seen) -> Group:
    if isinstance(seen, VmfleeceError):
        what, *more = render.error_lines(seen)
        return Group(Text(what, "bold red"), *map(Text, more))
    return Group(*lines(seen, _view(console, height=console.height)))


def _print(seen: Status) -> None:
    console = render.console()
    if sys.stdout.isatty():
        console.print(*lines(seen, _view(console)), sep="\n")
        return
    for line in lines(seen, View(datetime.now(UTC), ascii_only=console.options.ascii_only)):
        print(line)
    sys.stdout.flush()


def _print_block(seen: Seen) -> None:
    if isinstance(seen, VmfleeceError):
        print(*render.error_lines(seen), sep="\n")
    else:
        _print(seen)
    print(flush=True)


def _print_compact(seen: Seen) -> None:
    document = {"error": render.error_json(seen)} if isinstance(seen, VmfleeceError) else seen.as_json()
    print(json.dumps(document, ensure_ascii=False, separators=(",", ":")), flush=True)


def _view(console: Console, *, height: int | None = None) -> View:
    return View(datetime.now(UTC), width=console.width, height=height, ascii_only=console.options.ascii_only)
