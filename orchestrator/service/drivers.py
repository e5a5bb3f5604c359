"""The configured storages and targets, each by its driver: the only place that knows all of these."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.config import Config
from orchestrator.config.settings import TargetDriver, TargetSettings
from orchestrator.run.survey import Storages
from orchestrator.storage.base import Storage
from orchestrator.storage.directory import DirectoryStorage
from orchestrator.target.base import Target
from orchestrator.target.images.target import ImagesTarget
from orchestrator.target.repository.password import read_password
from orchestrator.target.repository.target import RepositoryTarget


def storages(config: Config) -> dict[str, DirectoryStorage]:
    """The configured storages, by name."""
    return {
        name: DirectoryStorage(
            name,
            settings.path,
            quota_bytes=settings.quota_bytes,
            min_free=settings.min_free,
            max_runs=settings.max_runs,
        )
        for name, settings in config.storage.items()
    }


def storages_for_plans(
    config: Config,
    by_name: Mapping[str, Storage],
    past_results: Callable[[str], Sequence[Mapping[str, Any]]],
    used_bytes: Callable[[str], int] = lambda _storage: 0,
) -> Storages:
    """The storages with all that first grants are made of; `used_bytes` is what live images occupy of one."""
    first_shares = {name: settings.first_grant for name, settings in config.storage.items()}
    return Storages(by_name, first_shares, past_results, used_bytes)


def targets(config: Config) -> dict[str, Target]:
    """The configured targets, by name."""
    return {name: _target(settings) for name, settings in config.target.items()}


def _target(settings: TargetSettings) -> Target:
    if settings.driver is TargetDriver.RESTIC:
        password = partial(read_password, settings.name, settings.password_file)
        return RepositoryTarget(settings.name, settings.place, password, max_runs=settings.max_runs)
    return ImagesTarget(
        settings.name, Path(settings.place), compression=settings.compress, max_runs=settings.max_runs
    )
