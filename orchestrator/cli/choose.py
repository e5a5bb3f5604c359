"""Which targets and snapshots a command is about.

A target that cannot be listed must not hide what is on the others: it is complained about, and the command goes on
with those unless there are none. Then its error comes out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.cli import render
from orchestrator.config import Config
from orchestrator.errors import ConfigError, TargetError, VmfleeceError
from orchestrator.service import drivers, orders
from orchestrator.target.base import Snapshot, Target, find


@dataclass(frozen=True, slots=True)
class Listed:
    """What is on some targets, by target and VM, and oldest first. `complete`: all of them could be listed."""

    snapshots: list[Snapshot]
    complete: bool


def checked_targets(config: Config, name: str | None) -> dict[str, Target]:
    """All targets by name, or only the one that is named. Raises UnknownName."""
    targets = drivers.targets(config)
    if name is None:
        return targets
    return {name: targets[orders.target_named(config, name)]}


async def list_all(targets: Mapping[str, Target], vm: str | None = None) -> Listed:
    """All snapshots, or those of one VM. Raises the first error if no target can be listed."""
    found: list[Snapshot] = []
    errors: list[VmfleeceError] = []
    for target in targets.values():
        try:
            found += await target.snapshots(vm)
        except VmfleeceError as error:
            errors.append(error)
    if errors and len(errors) == len(targets):
        raise errors[0]
    for problem in errors:
        render.complain(problem)
    return Listed(found, complete=not errors)


def the_one(snapshots: Iterable[Snapshot], wanted: str) -> Snapshot:
    """As `find`, for what is going to be changed: it must be on one target only."""
    known = list(snapshots)
    snapshot = find(known, wanted)
    targets = [one.target for one in known if one.id == snapshot.id]
    if len(targets) > 1:
        raise ConfigError(
            f"snapshot {snapshot.id} is on several targets", hint=f"give --target: {', '.join(targets)}"
        )
    return snapshot


async def the_snapshot(targets: Mapping[str, Target], wanted: str) -> Snapshot:
    """As `find`, for reading only: also one that is not listed, if a target knows it by that name."""
    listed = await list_all(targets)
    try:
        return find(listed.snapshots, wanted)
    except TargetError as error:
        if error.code != "no-snapshot":
            raise
        for target in targets.values():
            if (snapshot := await target.look_up(wanted)) is not None:
                return snapshot
        raise
