"""Printing: tables for people, JSON for programs, complaints on standard error."""

import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from orchestrator.errors import VmfleeceError
from orchestrator.model import RunResult
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
        complain(f"{result.vm}: {result.error.message}", result.error.hint)
    for warning in result.warnings:
        complain(f"{result.vm}: warning: {warning}")


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


def complain(message: str, hint: str = "") -> None:
    """A problem and what to do, on standard error."""
    print(f"vmfleece: {message}", file=sys.stderr)
    if hint:
        print(f"  {hint}", file=sys.stderr)


def error_json(error: VmfleeceError) -> dict[str, str]:
    """An error as programs see it everywhere."""
    return {"code": error.code, "message": error.message, "hint": error.hint}
