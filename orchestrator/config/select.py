"""Which names a job's patterns mean. Pure."""

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return those of `names` that any pattern matches, in their own order."""
    known_patterns = tuple(patterns)
    return [name for name in names if any(fnmatchcase(name, each) for each in known_patterns)]


def select(vms: Iterable[str], exclude: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the names that `vms` match and `exclude` do not."""
    chosen = matching(vms, names)
    left_out = set(matching(exclude, chosen))
    return [name for name in chosen if name not in left_out]
