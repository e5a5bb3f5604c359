"""All commands but `daemon`, and which is meant."""

import argparse
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from orchestrator import config, log
from orchestrator.cli import backup, cleanup, export, prune, snapshot, status, target, verify, vm
from orchestrator.cli import completion as completion_command
from orchestrator.cli import config as config_command
from orchestrator.cli import run as run_command
from orchestrator.cli.arguments import make_parser
from orchestrator.cli.running import run_async

Command = Callable[[config.Config, argparse.Namespace], Coroutine[Any, Any, int]]

QUIET = {"backup": "critical", "job": "critical", "run": "critical", "status": "critical"}
"""Their output says it all; other commands show warnings, such as of an unreadable snapshot."""

COMMANDS: dict[tuple[str, ...], Command] = {
    ("vm", "list"): vm.list_vms,
    ("vm", "show"): vm.show,
    ("backup",): backup.backup,
    ("job", "list"): backup.list_jobs,
    ("job", "run"): backup.run_job,
    ("status",): status.status,
    ("run", "list"): run_command.list_runs,
    ("run", "show"): run_command.show,
    ("run", "cancel"): run_command.cancel,
    ("snapshot", "list"): snapshot.list_snapshots,
    ("snapshot", "show"): snapshot.show,
    ("snapshot", "protect"): snapshot.protect,
    ("snapshot", "forget"): snapshot.forget,
    ("restore",): snapshot.restore,
    ("export",): export.export,
    ("verify",): verify.verify,
    ("prune",): prune.prune,
    ("cleanup",): cleanup.cleanup,
    ("target", "init"): target.init,
    ("target", "list"): target.list_targets,
    ("target", "show"): target.show,
    ("target", "check"): target.check,
    ("target", "reclaim"): target.reclaim,
    ("target", "key", "list"): target.list_keys,
    ("target", "key", "add"): target.add_key,
    ("target", "key", "remove"): target.remove_key,
}
"""By their words; but `config`, which works without a configuration that is fine, and `completion`."""


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; the exit code. Raises VmfleeceError, KeyboardInterrupt."""
    if arguments.command == "completion":
        return completion_command.completion(make_parser(), arguments)
    path = arguments.config or config.default_path()
    if arguments.command == "config":
        return _config(arguments, path)
    words = (arguments.command, getattr(arguments, "action", None), getattr(arguments, "key_action", None))
    command = COMMANDS[tuple(word for word in words if word)]
    loaded = config.load(path)
    level = loaded.daemon.log_level if arguments.verbose else QUIET.get(arguments.command, "warning")
    log.configure(log_format="console", level=level)
    return run_async(command(loaded, arguments))


def _config(arguments: argparse.Namespace, path: Path) -> int:
    match arguments.action:
        case "check":
            return config_command.check(path, arguments.json)
        case "show":
            return config_command.show(path, arguments.json)
        case _:
            return config_command.schema()
