"""`vmfleece target`: the places where backups go, and the keys, locks and space of repositories."""

import argparse
import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.cli import render
from orchestrator.config import Config, TargetDriver, TargetSettings
from orchestrator.errors import EXIT_FAILED, EXIT_OK, EXIT_SOME_FAILED, TargetError
from orchestrator.service import client, drivers, targets
from orchestrator.service.documents import Targets
from orchestrator.service.orders import target_named
from orchestrator.target import durable
from orchestrator.target.images.errors import explained
from orchestrator.target.repository import upkeep
from orchestrator.target.repository.password import password_path, read_password
from orchestrator.target.restic.keys import KeyInfo
from orchestrator.target.restic.repository import Repository
from orchestrator.units import format_size

DEADLINE_SECONDS = 120.0
"""Targets that are silent take their time."""


async def init(config: Config, arguments: argparse.Namespace) -> int:
    """Make the repository, or the folder; refused if there is one."""
    settings = _settings(config, arguments)
    document = {"target": settings.name, "driver": settings.driver, "place": settings.place}
    if settings.driver is TargetDriver.IMAGES:
        await asyncio.to_thread(_make_folder, settings.name, Path(settings.place))
        said = [f"{settings.place}: made"]
    else:
        identity = (await upkeep.create(settings)).identity.hex()
        password_file = str(password_path(settings.name, settings.password_file))
        document |= {"id": identity, "password_file": password_file}
        said = [
            f"{settings.place}: repository {identity} made",
            f"its password is in {password_file}: nobody can recover a lost password, so keep it elsewhere, too",
        ]
    if arguments.json:
        render.print_json(document)
    else:
        render.print_line("\n".join(said))
    return EXIT_OK


def _make_folder(name: str, path: Path) -> None:
    with explained(name, path):
        try:
            path.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            raise TargetError(
                f"{path} is there already",
                hint="nothing: a folder can be backed up to as it is",
                code="folder-exists",
            ) from None
        durable.sync(path.parent)


async def list_targets(config: Config, arguments: argparse.Namespace) -> int:
    """All targets, and what is wrong with those that cannot be used: for the daemon, if one runs."""
    asked = client.ask(config.daemon.run_dir, "/targets", Targets, deadline_seconds=DEADLINE_SECONDS)
    found = await asked or await targets.summaries(config, drivers.targets(config))
    if arguments.json:
        render.print_document(found)
    else:
        table = Table("TARGET", "DRIVER", "SNAPSHOTS", "PLACE", "", box=None, pad_edge=False)
        for one in found.targets:
            count = "-" if one.snapshots is None else str(one.snapshots)
            table.add_row(one.target, one.driver, count, one.place, one.error.code if one.error else "")
        render.print_table(table)
        for one in found.targets:
            if one.error is not None:
                render.complain(one.error, about=one.target)
    failed = sum(one.error is not None for one in found.targets)
    if not failed:
        return EXIT_OK
    return EXIT_FAILED if failed == len(found.targets) else EXIT_SOME_FAILED


async def show(config: Config, arguments: argparse.Namespace) -> int:
    """One target; of a repository also its keys, packs and locks."""
    settings = _settings(config, arguments)
    count = await targets.count(settings, drivers.targets(config)[settings.name])
    document: dict[str, Any] = {"target": settings.name, "driver": settings.driver, "place": settings.place}
    document["snapshots"] = count
    if settings.driver is TargetDriver.IMAGES:
        lines = [f"{settings.name}: images in {settings.place}", f"snapshots  {count}"]
    else:
        found = await upkeep.inspect(settings)
        document |= asdict(found) | {"keys": [_key_document(key) for key in found.keys]}
        lines = [
            f"{settings.name}: repository {found.id} in {settings.place}",
            f"format     restic, version {found.format_version}",
            f"keys       {len(found.keys)}",
            f"snapshots  {count} of VMs, {found.all_snapshots} in all",
            f"packs      {found.packs}, {format_size(found.packs_bytes)}",
            *(f"locked     {lock}" for lock in found.locks),
            *(f"damaged    {problem}" for problem in found.damaged),
        ]
    if arguments.json:
        render.print_json(document)
    else:
        render.print_line("\n".join(lines))
    return EXIT_OK


async def list_keys(config: Config, arguments: argparse.Namespace) -> int:
    """The keys, of which each has a password of its own."""
    keys = await (await upkeep.opened(_repository(config, arguments))).keys()
    if arguments.json:
        render.print_json({"keys": [_key_document(key) for key in keys]})
        return EXIT_OK
    table = Table("KEY", "MADE", "BY", "", box=None, pad_edge=False)
    for key in keys:
        table.add_row(
            key.id, render.moment(key.created), f"{key.username}@{key.hostname}", "in use" if key.current else ""
        )
    render.print_table(table)
    return EXIT_OK


async def add_key(config: Config, arguments: argparse.Namespace) -> int:
    """Have another password open the repository, too."""
    settings = _repository(config, arguments)
    password = await asyncio.to_thread(read_password, settings.name, arguments.new_password_file)
    repository = await upkeep.opened(settings)
    identity = (await repository.add_password(password)).hex()
    if arguments.json:
        render.print_json({"target": settings.name, "key": identity})
    else:
        render.print_line(f"{identity}: opens with the password in {arguments.new_password_file}")
    return EXIT_OK


async def remove_key(config: Config, arguments: argparse.Namespace) -> int:
    """Have a password open the repository no more. The one that vmfleece uses stays, so there is always one."""
    settings = _repository(config, arguments)
    repository = await upkeep.opened(settings)
    key = await _the_key(repository, arguments.key)
    await repository.remove_password(bytes.fromhex(key.id))
    if arguments.json:
        render.print_json({"target": settings.name, "key": key.id})
    else:
        render.print_line(f"{key.id}: removed; who knew its password may have copied what it opened")
    return EXIT_OK


async def _the_key(repository: Repository, wanted: str) -> KeyInfo:
    keys = await repository.keys()
    found = [key for key in keys if wanted and key.id.startswith(wanted)]
    if len(found) != 1:
        problem = f"{len(found)} keys begin with" if found else "no key begins with"
        raise TargetError(
            f"{problem} {wanted!r}", hint=f"name one of: {', '.join(key.id for key in keys)}", code="no-key"
        )
    return found[0]


async def check(config: Config, arguments: argparse.Namespace) -> int:
    """Have restic check the repository."""
    settings = _repository(config, arguments)

    def run(on_line: Callable[[str], None]) -> Coroutine[Any, Any, None]:
        return upkeep.check(settings, read_data=arguments.read_data, on_line=on_line)

    return await _with_restic(settings, arguments, run)


async def reclaim(config: Config, arguments: argparse.Namespace) -> int:
    """Have restic free what no snapshot needs any more."""
    settings = _repository(config, arguments)

    def run(on_line: Callable[[str], None]) -> Coroutine[Any, Any, None]:
        return upkeep.reclaim(settings, on_line=on_line)

    return await _with_restic(settings, arguments, run)


async def _with_restic(
    settings: TargetSettings,
    arguments: argparse.Namespace,
    run: Callable[[Callable[[str], None]], Coroutine[Any, Any, None]],
) -> int:
    """Run what restic does, showing what it prints; as JSON, only that it went well."""
    await run(restic_lines(arguments))
    if arguments.json:
        render.print_json({"target": settings.name, "error": None})
    return EXIT_OK


def restic_lines(arguments: argparse.Namespace) -> Callable[[str], None]:
    """What takes the lines that restic prints, and shows them unless JSON is wanted.

    restic goes on where nobody reads them.
    """

    def take(line: str) -> None:
        if not arguments.json:
            with contextlib.suppress(BrokenPipeError):
                render.print_line(line)

    return take


def _settings(config: Config, arguments: argparse.Namespace) -> TargetSettings:
    return config.target[target_named(config, arguments.target)]


def _repository(config: Config, arguments: argparse.Namespace) -> TargetSettings:
    """The settings of a target that has keys, packs and locks. Raises TargetError if it has not."""
    settings = _settings(config, arguments)
    if settings.driver is TargetDriver.IMAGES:
        raise TargetError(
            f"target {settings.name} has no keys, and nothing for restic: it is a folder of qcow2 files",
            hint="nothing: `vmfleece verify` reads snapshots back, and the space of removed ones is free at once",
            code="no-repository-target",
        )
    return settings


def _key_document(key: KeyInfo) -> dict[str, Any]:
    return asdict(key) | {"created": key.created.isoformat()}
