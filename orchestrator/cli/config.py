"""`vmfleece config`: check the file, show what is in effect, print its schema.

Each function returns the exit code. Where the file has problems, ConfigError goes to the caller,
who prints it; only `check` with `--json` reports them itself, as data.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from orchestrator import config
from orchestrator.errors import EXIT_OK, EXIT_USAGE, ConfigError


def check(path: Path, as_json: bool) -> int:
    """Say whether the file is fine."""
    try:
        loaded = config.load(path)
    except ConfigError as error:
        if not as_json:
            raise
        _print_json({"ok": False, "problems": list(error.problems) or [str(error)]})
        return EXIT_USAGE
    if as_json:
        _print_json({"ok": True, "problems": []})
        return EXIT_OK
    counts = (
        _count("storage", loaded.storage),
        _count("target", loaded.target),
        _count("VM", loaded.vm),
        _count("job", loaded.job),
    )
    _print_line(Text(f"{path}: fine: {', '.join(counts)}"))
    return EXIT_OK


def show(path: Path, as_json: bool) -> int:
    """Print every setting in effect with where it comes from."""
    settings = config.effective(config.load(path))
    if as_json:
        rows = [{"key": each.key, "value": each.value, "origin": each.origin} for each in settings]
        _print_json({"settings": rows})
        return EXIT_OK
    shown = [f"{each.key} = {as_toml(each.value)}" for each in settings]
    width = max(map(len, shown))
    for text, setting in zip(shown, settings, strict=True):
        line = Text(text.ljust(width))
        line.append(f"  # {setting.origin}", style="dim")
        _print_line(line)
    return EXIT_OK


def schema() -> int:
    """Print the JSON schema of the file."""
    _print_json(config.json_schema())
    return EXIT_OK


def _count(noun: str, named: dict[str, Any]) -> str:
    return f"{len(named)} {noun}{'' if len(named) == 1 else 's'}"


def as_toml(value: Any) -> str:
    """A setting as it is written in the file."""
    match value:
        case None:
            return "(not set)"
        case dict():
            pairs = (f"{key} = {as_toml(each)}" for key, each in value.items())
            return f"{{{', '.join(pairs)}}}"
        case list():
            return f"[{', '.join(map(as_toml, value))}]"
        case _:
            return json.dumps(value, ensure_ascii=False)


def _print_line(line: Text) -> None:
    # soft_wrap: a path is never broken, however long; colour only on a terminal.
    Console(file=sys.stdout, highlight=False).print(line, soft_wrap=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
