"""What the guest says on its serial console, parsed: lines that start with `VMF `."""

from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True)
class StatLine:
    """One line a second: writes and errors since the writer's start, latencies of that second.

    By the guest's clock, which stands still while the VM is paused: a pause shows in no latency.
    """

    t: float
    writes: int
    errors: int
    p50_us: int
    p99_us: int
    max_us: int
    mean_us: int


def read(path: Path) -> str:
    """Return the console's text so far."""
    try:
        return path.read_text(errors="replace").replace("\r", "")
    except FileNotFoundError:
        return ""


def whole_lines(text: str, kind: str) -> list[dict[str, str]]:
    """Return the NAME=value words of each complete `VMF kind` line."""
    complete = text[: text.rfind("\n") + 1].splitlines()
    wanted = [line for line in complete if line.startswith(f"VMF {kind}")]
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in wanted]


def stats(text: str) -> list[StatLine]:
    """Return all statistics lines."""
    kinds = {field.name: float if field.name == "t" else int for field in fields(StatLine)}
    return [
        StatLine(**{name: kind(words[name]) for name, kind in kinds.items()})  # type: ignore[arg-type]  # by name
        for words in whole_lines(text, "stat ")
    ]


def stalls_us(text: str) -> list[int]:
    """Return the length of each write that took more than 200 ms."""
    return [int(words["us"]) for words in whole_lines(text, "stall ")]


def errors(text: str) -> int:
    """Return how many writes failed, or 1 when the writer gave up."""
    return len(whole_lines(text, "error ")) + len(whole_lines(text, "fatal "))


def tail(path: Path, lines: int = 25) -> str:
    """Return the end of a text file, for error messages."""
    return "\n".join(read(path).splitlines()[-lines:])
