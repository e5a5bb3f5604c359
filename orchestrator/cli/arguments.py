"""The command line: all commands and options. `--help`, the completion scripts and vmfleece(1) are made from it.

It imports little, since it comes before everything else that `vmfleece daemon` does.
"""

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.model import Consistency, RunState

SNAPSHOT_HELP = "an id, VM@latest, VM@2026-11-22T02:30, or restic's id"
STATE_HELP = "such as copying, queued, failed"
DETACH_HELP = "have the daemon do it, and return at once"
SHELLS = ("bash", "zsh", "fish")


def make_parser() -> argparse.ArgumentParser:
    """All commands and options; `--help`, the completion scripts and vmfleece(1) are made from it."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the configuration (default: $VMFLEECE_CONFIG or /etc/vmfleece/vmfleece.toml)",
    )
    common.add_argument("--verbose", "-v", action="store_true", help="show the log as well")
    reporting = argparse.ArgumentParser(add_help=False)
    reporting.add_argument("--json", action="store_true", help="print JSON for programs")

    parser = argparse.ArgumentParser(
        prog="vmfleece", description="Back up running QEMU virtual machines without slowing their guests down."
    )
    parser.add_argument("--version", action="version", version=f"vmfleece {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("daemon", parents=[common], help="the service: run jobs when they are due")
    _add_actions(commands, common, reporting)
    one = commands.add_parser("status", parents=[common, reporting], help="storages, runs, and why others wait")
    one.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    one = commands.add_parser("backup", parents=[common, reporting], help="back up VMs now")
    one.add_argument("vms", nargs="+", metavar="VM", help="names as configured, or patterns such as 'web*'")
    one.add_argument("--target", metavar="T", help="where to (default: the only one configured)")
    one.add_argument(
        "--fleecing", metavar="PROPERTIES", help="enabled=1,storage=S; enabled=0: directly to the target"
    )
    one.add_argument("--bwlimit", metavar="KIB", help="KiB/s at most, or a rate such as 50MiB; 0: no limit")
    one.add_argument(
        "--consistency",
        choices=[one.value for one in Consistency],
        default=Consistency.PAUSE,
        help="freeze: have the guest agent freeze its file systems (default: pause)",
    )
    one.add_argument("--full", action="store_true", help="copy everything, whatever is there already")
    one.add_argument("--detach", action="store_true", help=DETACH_HELP)

    _add_reading(commands, [common, reporting])
    back = commands.add_parser(
        "restore",
        parents=[common, reporting],
        help="give disks of a snapshot back",
        description="Give disks of a snapshot back, and check them. Interrupted, it leaves no file (on a block"
        " device, a part of the disk), and the next one starts over.",
    )
    back.add_argument("snapshot", metavar="SNAPSHOT", help=SNAPSHOT_HELP)
    which = back.add_mutually_exclusive_group(required=True)
    which.add_argument("--disk", metavar="DISK", help="one disk")
    which.add_argument("--all", action="store_true", help="all disks, into the folder given by --to")
    back.add_argument("--to", type=Path, required=True, metavar="PATH", help="a new file or a block device")
    back.add_argument("--format", choices=["raw", "qcow2"], default="raw", help="default: raw")
    back.add_argument("--target", metavar="T", help="look only on this target")
    back.add_argument("--force", action="store_true", help="overwrite a block device")

    one = commands.add_parser(
        "cleanup", parents=[common, reporting], help="put right what dead runs have left anywhere"
    )
    one.add_argument("--dry-run", action="store_true", help="say what would be done, and why the rest is left")
    one = commands.add_parser(
        "prune", parents=[common, reporting], help="remove what jobs' retention does not keep"
    )
    one.add_argument("--target", metavar="T", help="only on one target")
    one.add_argument("--vm", metavar="VM", help="only of one VM")
    one.add_argument("--job", metavar="JOB", help="only of one job's VMs")
    one.add_argument(
        "--merge", action="store_true", help="have old ends of chains merged, so that they may go, too"
    )
    how = one.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="say what would be removed, and why the rest stays")
    how.add_argument(
        "--reclaim", action="store_true", help="then have restic free what repositories do not need any more"
    )
    one = commands.add_parser(
        "completion",
        help="print what makes a shell complete commands, options and names",
        description="Print the script by which a shell completes commands, options, and names as configured."
        " bash: into /usr/share/bash-completion/completions/vmfleece; zsh: into a file _vmfleece in a folder of"
        " $fpath; fish: into /usr/share/fish/vendor_completions.d/vmfleece.fish.",
    )
    one.add_argument("shell", choices=SHELLS, help="which shell")
    return parser


def _add_reading(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    one = commands.add_parser("export", parents=parents, help="serve disks of a snapshot by NBD, read-only")
    one.add_argument("snapshot", metavar="SNAPSHOT", help=SNAPSHOT_HELP)
    one.add_argument("--disk", action="append", metavar="DISK", help="only this one; may be given several times")
    one.add_argument("--target", metavar="T", help="look only on this target")

    one = commands.add_parser("verify", parents=parents, help="read snapshots back, and check all hashes")
    one.add_argument("snapshots", nargs="*", metavar="SNAPSHOT", help=f"{SNAPSHOT_HELP}; none: all")
    one.add_argument("--target", metavar="T", help="only on one target")
    one.add_argument("--vm", metavar="VM", help="of all, only those of one VM")
    one.add_argument(
        "--sample", type=_share, default=1.0, metavar="PERCENT", help="so much of each, at random, such as 10%%"
    )


def _count(given: str) -> int:
    """A number from 1 to 1000."""
    with contextlib.suppress(ValueError):
        if 1 <= int(given) <= 1000:
            return int(given)
    raise argparse.ArgumentTypeError(f"{given!r} is no number from 1 to 1000")


def _share(given: str) -> float:
    """A share from above 0% to 100%, as a number up to 1."""
    with contextlib.suppress(ValueError):
        share = float(given.removesuffix("%")) / 100
        if given.endswith("%") and 0 < share <= 1:
            return share
    raise argparse.ArgumentTypeError(f"{given!r} is no share above 0% up to 100%, such as 10%")


def _add_actions(commands: Any, common: argparse.ArgumentParser, reporting: argparse.ArgumentParser) -> None:
    """Commands that are a noun and a verb."""
    group = commands.add_parser("config", help="the configuration").add_subparsers(dest="action", required=True)
    group.add_parser("check", parents=[common, reporting], help="check it: all errors at once")
    group.add_parser("show", parents=[common, reporting], help="what is in effect, and where it comes from")
    group.add_parser("schema", parents=[common], help="the JSON schema of the configuration")

    group = commands.add_parser("vm", help="virtual machines").add_subparsers(dest="action", required=True)
    group.add_parser("list", parents=[common, reporting], help="which VMs can be reached")
    one = group.add_parser("show", parents=[common, reporting], help="a VM's disks, and what a backup would do")
    one.add_argument("vm", metavar="VM")

    group = commands.add_parser("job", help="jobs").add_subparsers(dest="action", required=True)
    group.add_parser("list", parents=[common, reporting], help="when each job is due")
    one = group.add_parser("run", parents=[common, reporting], help="run a job now")
    one.add_argument("job", metavar="JOB")
    one.add_argument("--detach", action="store_true", help=DETACH_HELP)

    group = commands.add_parser("run", help="runs, now and before").add_subparsers(dest="action", required=True)
    one = group.add_parser("list", parents=[common, reporting], help="the latest first")
    one.add_argument("--vm", metavar="VM", help="of one VM")
    one.add_argument("--job", metavar="JOB", help="of one job")
    one.add_argument("--state", choices=[state.value for state in RunState], metavar="STATE", help=STATE_HELP)
    one.add_argument("--limit", type=_count, default=100, metavar="N", help="default: 100")
    for name, explanation in (("show", "one of them"), ("cancel", "end one; it puts its VM right by itself")):
        one = group.add_parser(name, parents=[common, reporting], help=explanation)
        one.add_argument("run", metavar="RUN")

    _add_target_actions(commands, [common, reporting])

    group = commands.add_parser("snapshot", help="what is there").add_subparsers(dest="action", required=True)
    listing = group.add_parser("list", parents=[common, reporting], help="all snapshots")
    listing.add_argument("--vm", metavar="VM", help="of one VM")
    listing.add_argument("--target", metavar="T", help="on one target")
    one = group.add_parser("show", parents=[common, reporting], help="one snapshot")
    one.add_argument("snapshot", metavar="SNAPSHOT", help="an id, VM@latest or VM@2026-11-22T02:30")
    one.add_argument("--target", metavar="T", help="look only on this target")
    one = group.add_parser("protect", parents=[common, reporting], help="keep a snapshot, whatever retention says")
    one.add_argument("snapshot", metavar="SNAPSHOT", help="an id, VM@latest or VM@2026-11-22T02:30")
    one.add_argument("--off", action="store_true", help="leave it to retention again")
    one.add_argument("--target", metavar="T", help="look only on this target")
    one = group.add_parser("forget", parents=[common, reporting], help="remove snapshots")
    one.add_argument("snapshots", nargs="+", metavar="SNAPSHOT", help=SNAPSHOT_HELP)
    one.add_argument("--target", metavar="T", help="look only on this target")


def _add_target_actions(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("target", help="where backups go").add_subparsers(dest="action", required=True)
    group.add_parser("list", parents=parents, help="all targets, and what is wrong with any")
    on_one = _add_on_a_target(
        group,
        parents,
        {
            "init": "make the repository, or the folder",
            "show": "what is in a target, and who works on it",
            "check": "have restic check a repository",
            "reclaim": "have restic free what no snapshot needs any more",
        },
    )
    on_one["check"].add_argument("--read-data", action="store_true", help="read all of it, which takes long")

    keys = group.add_parser("key", help="passwords that open a repository")
    on_keys = _add_on_a_target(
        keys.add_subparsers(dest="key_action", required=True),
        parents,
        {"list": "all keys, each with a password", "add": "one password more", "remove": "one less"},
    )
    on_keys["add"].add_argument(
        "--new-password-file", type=Path, required=True, metavar="FILE", help="its one line is the password"
    )
    on_keys["remove"].add_argument("key", metavar="KEYID", help="its first digits are enough")


def _add_on_a_target(
    group: Any, parents: list[argparse.ArgumentParser], helps: Mapping[str, str]
) -> dict[str, argparse.ArgumentParser]:
    """Actions of which each is about one target, by name: their parsers."""
    made = {name: group.add_parser(name, parents=parents, help=text) for name, text in helps.items()}
    for one in made.values():
        one.add_argument("target", metavar="T")
    return made
