"""The configuration in force, with all that it comes to: one object that never changes, exchanged as a whole.

Whoever begins something (a run, a job's turn) uses what is in force then, to its end: what it began with stays,
whatever the configuration says meanwhile. Quotas and numbers of runs are nobody's own but the admission's: others
hold for all at once.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from orchestrator.admission.controller import Controller
from orchestrator.config import Config, change
from orchestrator.errors import ConfigError
from orchestrator.run.backup import Means
from orchestrator.service import drivers
from orchestrator.storage.directory import DirectoryStorage
from orchestrator.target.base import Target


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """A configuration, its storages by name, and what its runs share."""

    config: Config
    storages: Mapping[str, DirectoryStorage]
    means: Means

    @property
    def targets(self) -> Mapping[str, Target]:
        """Its targets by name."""
        return self.means.targets

    def followed_by(self, config: Config) -> "Setup":
        """That of a configuration that takes the place of this one; storages that stay have its limits at once."""
        storages, past = self._storages_of(config), self.means.storages
        for_plans = drivers.storages_for_plans(config, storages, past.past_results, past.used_bytes)
        return Setup(config, storages, replace(self.means, storages=for_plans, targets=self._targets_of(config)))

    def _storages_of(self, config: Config) -> dict[str, DirectoryStorage]:
        """Where the folder stays, so does the storage."""
        found = drivers.storages(config)
        for name, one in self.storages.items():
            if name in found and found[name].path == one.path:
                settings = config.storage[name]
                one.limit(quota_bytes=settings.quota_bytes, min_free=settings.min_free, max_runs=settings.max_runs)
                found[name] = one
        return found

    def _targets_of(self, config: Config) -> dict[str, Target]:
        """A target of which nothing changed keeps what it has read."""
        same = {
            name: one
            for name, one in self.targets.items()
            if name in config.target and config.target[name] == self.config.target[name]
        }
        return drivers.targets(config) | same


class InForce:
    """`now` is what is in force. Those before live as long as somebody uses them; admission knows all of these."""

    def __init__(self, setup: Setup, controller: Controller) -> None:
        self.now = setup
        self.since = datetime.now(UTC)
        self.refused: tuple[str, ...] = ()
        """Why the configuration file was refused when it was last read again, in words."""
        self._controller = controller
        self._used: Counter[Setup] = Counter()
        self._limit()

    @property
    def busy(self) -> bool:
        """Whether anybody uses any."""
        return bool(self._used)

    @contextlib.contextmanager
    def using(self, setup: Setup) -> Iterator[None]:
        """What is begun with a configuration may use all of it for the block, whatever is in force meanwhile."""
        self._used[setup] += 1
        try:
            self._limit_if_other(setup)
            yield
        finally:
            self._used[setup] -= 1
            if not self._used[setup]:
                del self._used[setup]
            self._limit_if_other(setup)

    def check(self, config: Config) -> None:
        """Whether it can take effect now. Raises ConfigError with all that is against it."""
        if problems := change.refusals(self.now.config, config, busy=self.busy):
            raise ConfigError(f"{config.path} cannot take effect while vmfleece runs", problems=problems)

    def take(self, config: Config) -> change.Change:
        """Put it in force, after `check` and while admission is at rest; what is other by now. Cannot fail."""
        before = self.now
        self.now = before.followed_by(config)
        self._limit()
        self.since, self.refused = datetime.now(UTC), ()
        return change.between(before.config, config)

    def storages(self) -> dict[str, DirectoryStorage]:
        """All that anybody may use."""
        return {name: one for setup in (*self._used, self.now) for name, one in setup.storages.items()}

    def _limit_if_other(self, setup: Setup) -> None:
        if setup is not self.now:
            self._limit()

    def _limit(self) -> None:
        targets = {name: one for setup in (*self._used, self.now) for name, one in setup.targets.items()}
        self._controller.limit(
            self.storages(),
            max_runs=self.now.config.daemon.max_runs,
            target_max_runs={name: one.max_runs for name, one in targets.items()},
        )
