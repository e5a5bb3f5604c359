"""Keys and values whose feature is not there yet: refused, never ignored. Pure.

When a feature comes, its line here goes; a key that is refused altogether gets its field in
`schema`.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Later:
    """Refuses `section.*.key`: every value but `only`, or the `values`, or the key altogether."""

    section: str
    key: str
    only: str | int | None = None
    values: tuple[str, ...] = ()
    instead: str = ""

    @property
    def whole_key(self) -> bool:
        """Whether the key itself is refused, whatever its value."""
        return self.only is None and not self.values

    def refusal(self, value: Any) -> str | None:
        """Return why `value` is refused, None if it is not."""
        instead = f"; {self.instead}" if self.instead else ""
        if self.whole_key:
            return f"not available yet{instead}"
        if self.only is not None:
            if value == self.only or type(value) is not type(self.only):
                return None  # a wrong type is the schema's to tell
            return f"{value!r} is not available yet; allowed: {self.only!r}"
        return f"{value!r} is not available yet{instead}" if value in self.values else None


LATER = (
    Later("daemon", "listen"),
    Later("daemon", "ledger", only="sqlite"),
    Later("storage", "driver", only="directory"),
    Later("vm", "libvirt", instead="give qmp, a monitor socket of its own"),
    Later("vm", "agent"),
    Later("job", "consistency", values=("freeze",), instead="allowed: 'pause' or 'none'"),
    Later("job", "hook"),
)


def refused_values(section: str, key: str) -> set[str]:
    """Return the values that a key will have later, but has not yet."""
    return {value for later in LATER if (later.section, later.key) == (section, key) for value in later.values}
