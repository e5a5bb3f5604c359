"""What `vmfleece backup` and the API are asked for, checked against the configuration. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.config import Config, parse_fleecing
from orchestrator.config.select import matching
from orchestrator.errors import ConfigError, UnknownName
from orchestrator.model import Consistency, Fleecing, FleecingPolicy, RunOptions
from orchestrator.units import parse_rate


class BackupOrder(BaseModel):
    """VMs that are to be backed up now, side by side as far as admission allows."""

    model_config = ConfigDict(extra="forbid", strict=True)

    vms: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], Field(min_length=1, max_length=200)
    ] = Field(description="Names as configured, or patterns such as web*.")
    target: str | None = Field(None, description="Where to; the only target if absent.")
    fleecing: str | None = Field(
        None,
        description="enabled=1,storage=S; enabled=0: directly to the target. Absent: used where it can be had.",
    )
    bwlimit: Annotated[int, Field(ge=0)] | str | None = Field(
        None, description="KiB/s at most, or a rate such as 50MiB; 0: no limit."
    )
    consistency: Annotated[Consistency, Field(strict=False)] = Field(
        Consistency.PAUSE, description="freeze: have the guest agent freeze its file systems."
    )
    full: bool = Field(False, description="Copy everything, whatever is there already.")


class PruneOrder(BaseModel):
    """What is no longer kept is to be removed now: of all VMs of jobs that say what is kept, or of fewer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    target: str | None = Field(None, description="Only on one target.")
    vm: str | None = Field(None, description="Only of one VM.")
    job: str | None = Field(None, description="Only of one job's VMs.")
    merge: bool = Field(False, description="Have old ends of chains merged, so that they may go, too.")
    dry_run: bool = Field(False, description="Only say what would be removed, and why the rest stays.")


@dataclass(frozen=True, slots=True)
class Backups:
    """What an order comes to."""

    vms: tuple[str, ...]
    options: RunOptions


def resolve(order: BackupOrder, config: Config) -> Backups:
    """Check an order. Raises ConfigError."""
    vms = _chosen(config, order.vms)
    without = [vm for vm in vms if config.vm[vm].agent is None]
    if order.consistency is Consistency.FREEZE and without:
        raise ConfigError(
            f"consistency freeze needs a guest agent, and there is none of {', '.join(without)}",
            hint="set vm.NAME.agent, or leave consistency out",
        )
    return Backups(
        vms,
        RunOptions(
            _target(config, order.target),
            _fleecing(config, order.fleecing),
            consistency=order.consistency,
            bwlimit_bytes_per_second=_rate(order.bwlimit),
            full=order.full,
        ),
    )


def prunable(order: PruneOrder, config: Config) -> list[tuple[str, str]]:
    """The targets and VMs that it is about, each pair once. Raises ConfigError if there are none."""
    for what, name, names in (
        ("target", order.target, config.target),
        ("VM", order.vm, config.vm),
        ("job", order.job, config.job),
    ):
        if name is not None:
            _known(what, name, names, config)
    found = {
        (job.options.target, vm): None
        for job in config.job.values()
        for vm in job.vms
        if job.keep is not None
        and order.job in (None, job.name)
        and order.target in (None, job.options.target)
        and order.vm in (None, vm)
    }
    if not found:
        narrowed = any((order.target, order.vm, order.job))
        raise ConfigError(
            f"no job in {config.path} has prune_backups"
            + (" and backs that up" if narrowed else "")
            + ": everything is kept",
            hint='to change that, give a job prune_backups = "keep-last=3,keep-daily=13"',
        )
    return list(found)


def job_named(config: Config, name: str) -> str:
    """The name, if there is such a job. Raises UnknownName."""
    return _known("job", name, config.job, config)


def target_named(config: Config, name: str) -> str:
    """The name, if there is such a target. Raises UnknownName."""
    return _known("target", name, config.target, config)


def _known(what: str, name: str, names: Iterable[str], config: Config) -> str:
    if name not in names:
        raise UnknownName(what, name, names, place=str(config.path))
    return name


def _chosen(config: Config, wanted: Iterable[str]) -> tuple[str, ...]:
    chosen: dict[str, None] = {}
    for pattern in wanted:
        found = matching([pattern], config.vm)
        if not found:
            raise UnknownName("VM", pattern, config.vm, place=str(config.path))
        chosen |= dict.fromkeys(found)
    return tuple(chosen)


def _fleecing(config: Config, given: str | None) -> Fleecing:
    if given is None:
        return Fleecing(policy=FleecingPolicy.PREFER)
    fleecing = parse_fleecing(given)
    if fleecing.storage is not None:
        _known("storage", fleecing.storage, config.storage, config)
    return fleecing


def _rate(given: int | str | None) -> int:
    try:
        return parse_rate(given) if given is not None else 0
    except ValueError as error:
        raise ConfigError(f"bwlimit {given}: {error}", hint="a plain number is KiB a second") from error


def _target(config: Config, name: str | None) -> str:
    if name is not None:
        return target_named(config, name)
    if len(config.target) != 1:
        raise ConfigError(
            "which target? Name one: --target T",
            hint=f"there are: {', '.join(config.target) or 'none: add a [target.NAME]'}",
        )
    return next(iter(config.target))
