"""The configuration in force, with all that it comes to: one object that never changes, exchanged as a whole.

Whoever begins something (a run, a job's turn) holds what is in force then, to its end: what it began with stays,
whatever the configuration says meanwhile. Quotas and numbers of runs are nobody's own but the admission's: others
hold for all at once.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from orchestrator.config import Config
from orchestrator.run.backup import Means
from orchestrator.storage.directory import DirectoryStorage
from orchestrator.target.base import Target


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """A configuration, its storages and targets by name, and what its runs share."""

    config: Config
    storages: Mapping[str, DirectoryStorage]
    targets: Mapping[str, Target]
    means: Means


class InForce:
    """`now` is what is in force. Those before live as long as somebody holds them."""

    def __init__(self, setup: Setup) -> None:
        self.now = setup
        self._held: Counter[Setup] = Counter()

    @contextlib.contextmanager
    def held(self, setup: Setup) -> Iterator[None]:
        """Something goes on with it, for the block."""
        self._held[setup] += 1
        try:
            yield
        finally:
            self._held[setup] -= 1
            if not self._held[setup]:
                del self._held[setup]

    @property
    def busy(self) -> bool:
        """Whether anybody holds any."""
        return bool(self._held)

    def storages(self) -> dict[str, DirectoryStorage]:
        """All that anybody may use."""
        return {name: one for setup in (*self._held, self.now) for name, one in setup.storages.items()}

    def target_max_runs(self) -> dict[str, int | None]:
        """How many runs may use each target that anybody may use."""
        return {name: one.max_runs for setup in (*self._held, self.now) for name, one in setup.targets.items()}
