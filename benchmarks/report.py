"""What a benchmark comes to, and how it is shown: data first, Markdown at the edge.

Each benchmark is a module with `async def measure(...) -> Section` and `main(measure)` at its end. Alone it prints
its section; `python -m benchmarks` runs all of them, each in a process of its own, and writes RESULTS.md.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from orchestrator import log
from orchestrator.cli.running import run_async


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells as they are shown; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Bound:
    """What must hold: a figure that is `least` at least, or `most` at most.

    `cause`: why it falls short where it does, if that is known.
    """

    what: str
    measured: float
    least: float | None = None
    most: float | None = None
    unit: str = ""
    cause: str = ""

    @property
    def held(self) -> bool:
        """Whether it is as wanted."""
        above = self.least is None or self.measured >= self.least
        return above and (self.most is None or self.measured <= self.most)


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot that was drawn, by its path in the project."""

    path: str
    shows: str


@dataclass(frozen=True, slots=True)
class Section:
    """One benchmark: what was done, and what came of it. `how` is Markdown, indented or not."""

    title: str
    how: str
    tables: tuple[Table, ...]
    bounds: tuple[Bound, ...] = ()
    pictures: tuple[Picture, ...] = ()


def markdown(section: Section, *, root: str = "") -> str:
    """A section as it is read; pictures lie below `root`, which ends with a slash or is empty."""
    parts = [f"## {section.title}", inspect.cleandoc(section.how)]
    parts += [markdown_table(table) for table in section.tables]
    if section.bounds:
        parts.append("\n".join(f"- {_verdict(bound)}" for bound in section.bounds))
    parts += [f"![{picture.shows}]({root}{picture.path})" for picture in section.pictures]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table in Markdown, under its caption if it has one."""
    lines = [_row(table.columns), _row(["---"] * len(table.columns)), *map(_row, table.rows)]
    return "\n".join([table.caption, "", *lines] if table.caption else lines)


def bounds_table(sections: Sequence[Section]) -> Table:
    """All bounds of all sections, with what was wanted and what came of it."""
    rows = [(bound.what, wanted(bound), figure(bound), verdict(bound)) for one in sections for bound in one.bounds]
    return Table(("what must hold", "wanted", "measured", ""), tuple(rows))


def wanted(bound: Bound) -> str:
    """What a bound asks for: `≥ 0.95`."""
    least = [f"≥ {bound.least:g}{_unit(bound)}"] if bound.least is not None else []
    most = [f"≤ {bound.most:g}{_unit(bound)}"] if bound.most is not None else []
    return ", ".join(least + most)


def figure(bound: Bound) -> str:
    """What was measured."""
    return f"{bound.measured:.3g}{_unit(bound)}"


def verdict(bound: Bound) -> str:
    """`held`, or that it falls short and why."""
    if bound.held:
        return "held"
    return f"**falls short**: {bound.cause or 'cause not known yet'}"


def _verdict(bound: Bound) -> str:
    return f"{bound.what}: {figure(bound)} (wanted: {wanted(bound)}): {verdict(bound)}"


def _unit(bound: Bound) -> str:
    return f" {bound.unit}" if bound.unit else ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def percentile(values: Sequence[float], percent: int) -> float:
    """The least of the values that so many percent of them do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def say(text: str) -> None:
    """Tell who waits what is measured now."""
    print(f"  {text}", file=sys.stderr, flush=True)


def main(measure: Callable[..., Coroutine[Any, Any, Section]], **sizes: int) -> None:
    """Measure and print; end with 1 if a bound falls short. `sizes`: the command's options and their defaults."""
    parser = argparse.ArgumentParser(description=(sys.modules["__main__"].__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the section there instead of printing it")
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    arguments = vars(parser.parse_args())
    file: Path | None = arguments.pop("json")
    log.configure(log_format="console", level="critical")

    async def command() -> int:
        section = await measure(**arguments)
        if file is not None:
            file.write_bytes(msgspec.json.encode(section))
        else:
            print(markdown(section))
        return 0 if all(bound.held for bound in section.bounds) else 1

    sys.exit(run_async(command()))


def load(file: Path) -> Section:
    """The section that `main` has written."""
    return msgspec.json.decode(file.read_bytes(), type=Section)


def with_command(section: Section, command: str, seconds: float) -> Section:
    """The section, saying how it was made."""
    return replace(section, how=f"`{command}` ({seconds:.0f} s)\n\n{inspect.cleandoc(section.how)}")
