"""Keys and values whose feature is not there yet: refused, never ignored. Pure.

When a feature comes, its line here goes; a key that is refused altogether gets its field in
`schema`.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Later:
    """Refuses `section.*.key`: every value but `only`, or the key altogether."""

    section: str
    key: str
    only: str | int | None = None
    instead: str = ""

    @property
    def whole_key(self) -> bool:
        """Whether the key itself is refused, whatever its value."""
        return self.only is None

    def refusal(self, value: Any) -> str | None:
        """Return why `value` is refused, None if it is not."""
        instead = f"; {self.instead}" if self.instead else ""
        if self.whole_key:
            return f"not available yet{instead}"
        if value == self.only or type(value) is not type(self.only):
            return None  # a wrong type is the schema's to tell
        return f"{value!r} is not available yet; allowed: {self.only!r}"


LATER = (
    Later("daemon", "ledger", only="sqlite"),
    Later("storage", "driver", only="directory"),
    Later("vm", "libvirt", instead="give qmp, a monitor socket of its own"),
)
