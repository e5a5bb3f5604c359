"""What becomes of a configuration that is in force when the file was changed. Pure.

A table is named as in the file, `vm.web01`; a key of the service's, `daemon.max_runs`. A job has changed also if
only the VMs that its patterns mean have.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from orchestrator.config.schema import NAMED
from orchestrator.config.settings import Config, DaemonSettings

FIXED = ("state_dir", "run_dir")
"""What the service opens when it starts, and holds to its end."""


@dataclass(frozen=True, slots=True)
class Change:
    """The tables and keys that are new, other than before, and gone."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


def between(old: Config, new: Config) -> Change:
    """What differs; nothing if both say the same."""
    before, after = dict(_parts(old)), dict(_parts(new))
    return Change(
        added=tuple(name for name in after if name not in before),
        changed=tuple(name for name, part in after.items() if name in before and before[name] != part),
        removed=tuple(name for name in before if name not in after),
    )


def refusals(old: Config, new: Config, *, busy: bool) -> tuple[str, ...]:
    """Why the new one cannot take the place of the old one now, in words; `busy`: runs are not over."""
    problems = [
        f"daemon.{key}: cannot be changed while vmfleece runs (in force: {getattr(old.daemon, key)}); restart it"
        for key in FIXED
        if getattr(old.daemon, key) != getattr(new.daemon, key)
    ]
    problems += [
        f"storage.{name}.path: cannot be changed while runs are under way, whose images are in {before.path};"
        " reload once they are over, or give the new folder to a storage of another name"
        for name, before in old.storage.items()
        if busy and name in new.storage and new.storage[name].path != before.path
    ]
    return tuple(problems)


def _parts(config: Config) -> Iterator[tuple[str, Any]]:
    daemon: DaemonSettings = config.daemon
    for one in fields(daemon):
        yield f"daemon.{one.name.removesuffix('_seconds')}", getattr(daemon, one.name)
    for section in NAMED:
        tables: Mapping[str, Any] = getattr(config, section)
        for name, table in tables.items():
            yield f"{section}.{name}", table
