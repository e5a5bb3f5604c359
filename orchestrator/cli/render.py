"""Printing: tables for people, JSON for programs, complaints on standard error."""

import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from orchestrator import causes
from orchestrator.errors import ConfigError, VmfleeceError
from orchestrator.model import ErrorReport, RunResult
from orchestrator.units import format_moment

WIDE = 200
"""Columns where standard output is no terminal: nothing is cut or wrapped for a program."""


def console() -> Console:
    """Standard output, as wide as it is, or wide enough."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDE)


def print_json(document: Any) -> None:
    """One JSON document."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def print_document(document: object) -> None:
    """One document of the API's, as the API gives it."""
    print_json(TypeAdapter(type(document)).dump_python(document, mode="json"))


def print_result(lines: Iterable[str], result: RunResult) -> None:
    """How a run ended, and what is wrong with that."""
    for line in lines:
        print_line(line)
    if result.error is not None:
        complain(result.error, about=result.vm)
    for warning in result.warnings:
        warn(f"{result.vm}: warning: {warning}")


def moment(at: datetime | str) -> str:
    """A moment, also as JSON has it, for people: in the local zone, and how long ago it was."""
    known = datetime.fromisoformat(at) if isinstance(at, str) else at
    return format_moment(known, now=datetime.now(UTC))


def print_table(table: Table) -> None:
    """A table; a long path is folded on a terminal, never cut."""
    for column in table.columns:
        column.overflow = "fold"
    console().print(table)


def print_line(text: str) -> None:
    """One line, as it is."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Something that is not as it should be, on standard error."""
    print(f"vmfleece: {text}", file=sys.stderr)


def complain(error: VmfleeceError | ErrorReport, *, about: str = "") -> None:
    """An error on standard error; `about` says whose it is, where its message does not."""
    print("\n".join(error_lines(error, about=about)), file=sys.stderr)


def error_lines(error: VmfleeceError | ErrorReport, *, about: str = "") -> list[str]:
    """An error for people: what happened, why, and what to do, a line each; of several problems, one each."""
    explained = causes.explained(error.code)
    problems = error.problems if isinstance(error, ConfigError) else ()
    first, *more = problems or (explained.why,)
    what = _one_line(error.message)
    if about and not what.startswith((f"VM {about}: ", f"target {about}: ", f"snapshot {about} ")):
        what = f"{about}: {what}"
    return [
        f"vmfleece: {what}",
        f"  why: {_one_line(first)}",
        *(f"       {_one_line(problem)}" for problem in more),
        f"  do:  {_one_line(error.hint or explained.remedy)}",
    ]


def _one_line(text: str) -> str:
    """A tool's own words may be several."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def error_json(error: VmfleeceError) -> dict[str, str]:
    """An error as programs see it everywhere."""
    return {"code": error.code, "message": error.message, "hint": error.hint}
