"""From the file to a Config, or to every problem at once.

Nothing but the file is read; paths in it are resolved, not required to be there.
"""

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.config.checks import cross_check, wants_fleecing
from orchestrator.config.draft import Draft, Problem, describe, read_tables
from orchestrator.config.places import Places, shown
from orchestrator.config.properties import parse_fleecing_properties
from orchestrator.config.schema import NAMED, SECTIONS, FleecingTable, JobTable, TargetTable
from orchestrator.config.select import select
from orchestrator.config.settings import (
    Config,
    DaemonSettings,
    Hook,
    JobSettings,
    NotifySettings,
    Setting,
    StorageSettings,
    TargetDriver,
    TargetSettings,
)
from orchestrator.errors import ConfigError
from orchestrator.model import Compression, Fleecing, FleecingPolicy, RunOptions, Vm

FLEECING_EXAMPLE = "write it as enabled=1,storage=local, or enabled=0 for none"
DEFAULT_PATH = "/etc/vmfleece/vmfleece.toml"


def default_path() -> Path:
    """Return where the configuration is if nobody says: $VMFLEECE_CONFIG, or below /etc."""
    return Path(os.environ.get("VMFLEECE_CONFIG") or DEFAULT_PATH)


def load(path: Path) -> Config:
    """Read and check the whole file. ConfigError's `problems` are all that is wrong with it."""
    text = _read(path)
    raw = _parse(path, text)
    places = Places(text)
    problems: list[Problem] = []
    draft = read_tables(raw, problems)
    problems += cross_check(draft)
    if problems:
        raise _error(path, places, problems)
    return _config(path, draft, tuple(_settings(path, places, raw, draft)))


def effective(config: Config) -> tuple[Setting, ...]:
    """Return every key with its value and where that comes from, in the file's order."""
    return config.settings


def parse_fleecing(text: str) -> Fleecing:
    """Return what a property string such as `enabled=1,storage=local` asks for."""
    try:
        table = FleecingTable.model_validate(parse_fleecing_properties(text))
    except ValidationError as error:
        reasons = [describe(FleecingTable, each) for each in error.errors()]
        raise ConfigError(f"fleecing: {'; '.join(reasons)}", hint=FLEECING_EXAMPLE) from error
    except ValueError as error:
        raise ConfigError(f"fleecing: {error}", hint=FLEECING_EXAMPLE) from error
    return Fleecing(table.enabled, table.storage)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}",
            hint="name the configuration with --config FILE or $VMFLEECE_CONFIG",
        ) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise _single(path, line, "not UTF-8, as TOML has to be") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise _single(path, 1, "not TOML that can be read: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        reason = str(error)
        at = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", reason)
        line = int(at[1]) if at and at[1] else text.count("\n") + 1 if at else 1
        raise _single(path, line, f"not TOML: {reason}") from error


def _single(path: Path, line: int, text: str) -> ConfigError:
    return ConfigError(f"1 problem in {path}", problems=(f"{path}:{line}: {text}",))


def _error(path: Path, places: Places, problems: list[Problem]) -> ConfigError:
    lines = sorted({(places.line(each.path), shown(each.path), each.text): None for each in problems})
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    texts = tuple(f"{path}:{line}: {key}: {text}" for line, key, text in lines)
    return ConfigError(f"{count} in {path}", problems=texts)


def _settings(path: Path, places: Places, raw: dict[str, Any], draft: Draft) -> Iterator[Setting]:
    for section, model in SECTIONS.items():
        tables = raw.get(section, {})
        # The service has one table, all others have names.
        named = tables.items() if section in NAMED else [("", tables)]
        for name, table in named:
            table_path = (section, name) if name else (section,)
            for key, field in model.model_fields.items():
                value, origin = field.default, "default"
                if key in table:
                    value, origin = table[key], f"{path}:{places.line((*table_path, key))}"
                elif section == "job" and key == "fleecing":
                    value = "enabled=1"
                elif section == "job" and key == "fleecing_policy":
                    value = _policy(draft, draft.job[name]).value
                elif section == "target" and key == "compress":
                    value = _compression(draft.target[name]).value
                yield Setting(shown((*table_path, key)), value, origin)


def _config(path: Path, draft: Draft, settings: tuple[Setting, ...]) -> Config:
    daemon = draft.daemon
    return Config(
        path=path,
        daemon=DaemonSettings(
            state_dir=daemon.state_dir,
            run_dir=daemon.run_dir,
            stop_timeout_seconds=daemon.stop_timeout,
            max_runs=daemon.max_runs,
            log_format=daemon.log_format,
            log_level=daemon.log_level,
            listen=daemon.listen,
            hosts=tuple(daemon.hosts),
            token_file=daemon.token_file,
            metrics_file=daemon.metrics_file,
        ),
        storage={
            name: StorageSettings(name, table.path, table.quota, table.min_free, table.first_grant, table.max_runs)
            for name, table in draft.storage.items()
        },
        target={
            name: TargetSettings(
                name,
                table.driver,
                table.url or str(table.path),
                table.path,
                _compression(table),
                table.password_file,
                table.reclaim,
                table.max_runs,
            )
            for name, table in draft.target.items()
        },
        vm={
            name: Vm(
                name,
                table.qmp,
                table.priority,
                tuple(table.exclude_disks),
                tuple(table.extra_files),
                table.agent,
                table.latency_budget,
            )
            for name, table in draft.vm.items()
        },
        job={name: _job(name, table, draft) for name, table in draft.job.items()},
        notify={
            name: NotifySettings(
                name, table.driver, table.url_file, tuple(table.jobs), tuple(table.states), table.repeat_after
            )
            for name, table in draft.notify.items()
        },
        settings=settings,
    )


def _compression(target: TargetTable) -> Compression:
    return Compression.ZSTD if target.driver is TargetDriver.RESTIC else target.compress


def _policy(draft: Draft, job: JobTable) -> FleecingPolicy:
    return FleecingPolicy.REQUIRE if wants_fleecing(draft, job) else FleecingPolicy.PREFER


def _job(name: str, job: JobTable, draft: Draft) -> JobSettings:
    fleecing = job.fleecing or FleecingTable()
    options = RunOptions(
        target=job.target,
        fleecing=Fleecing(fleecing.enabled, fleecing.storage, _policy(draft, job)),
        consistency=job.consistency,
        cbw_timeout_seconds=job.cbw_timeout,
        bwlimit_bytes_per_second=job.bwlimit,
        discard=job.discard,
        full_every=job.full_every,
        job=name,
    )
    return JobSettings(
        name=name,
        vms=tuple(select(job.vms, job.exclude, draft.vm)),
        options=options,
        schedule=job.schedule,
        randomized_delay_seconds=job.randomized_delay,
        repeat_missed=job.repeat_missed,
        retries=job.retries,
        keep=job.prune_backups,
        merge_chains=job.merge_chains,
        hook=Hook(job.hook, job.hook_timeout) if job.hook else None,
    )
