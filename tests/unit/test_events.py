"""docs/events.md lists every event that the code can log, with its level and keys, and no other."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}
NAME = re.compile(r"[a-z]+(?:-[a-z]+)*\.[a-z]+(?:-[a-z]+)*")
KEY = re.compile(r"[a-z]+(?:_[a-z]+)*")
ADDED = {"event", "level", "timestamp", "vm", "run", "request"}
"""What log.py and the run's task add to a line; docs/events.md explains them once."""


@dataclass
class Event:
    levels: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / "orchestrator").rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def loggers(tree: ast.Module) -> set[str]:
    """The names of a module's structlog loggers."""
    return {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("structlog.")
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def constants(node: ast.expr, where: str) -> list[str]:
    """The event's names: a constant, or one or the other."""
    match node:
        case ast.Constant(value=str(name)):
            return [name]
        case ast.IfExp():
            return constants(node.body, where) + constants(node.orelse, where)
    raise AssertionError(f"{where}: an event's name must be constant: {ast.unparse(node)}")


def calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str, set[str]]]:
    """Every call of a logger, with its method and the levels that `log` is given in the same function."""
    names = loggers(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        levels = set(re.findall(r"logging\.([A-Z]+)", ast.unparse(function)))
        for node in ast.walk(function):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if name in names:
                    yield node, method, {level.lower() for level in levels}


def emitted() -> dict[str, Event]:
    found: dict[str, Event] = {}
    for path, tree in sources():
        for call, method, levels in calls(tree):
            where = f"{path}:{call.lineno}"
            assert method in (*LEVELS, "log"), f"{where}: {method}"
            name = call.args[1 if method == "log" else 0]
            keys = {keyword.arg for keyword in call.keywords}
            assert None not in keys, f"{where}: keys must be written out"
            more = {"exception"} if method == "exception" else set()
            for event in constants(name, where):
                known = found.setdefault(event, Event(keys={str(key) for key in keys} | more))
                known.levels |= levels if method == "log" else {LEVELS[method]}
                assert known.keys == keys | more, f"{where}: {event} has other keys elsewhere"
    return found


def documented() -> dict[str, Event]:
    found: dict[str, Event] = {}
    for line in (ROOT / "docs" / "events.md").read_text().splitlines():
        if row := re.fullmatch(r"\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", line):
            name, levels, keys, meaning = row.groups()
            assert name not in found, f"{name} is documented twice"
            assert meaning.strip()
            found[name] = Event(set(levels.split(", ")), set(re.findall(r"`([^`]+)`", keys)))
    return found


def test_every_event_is_documented_and_every_documented_event_exists() -> None:
    assert documented() == emitted()


def test_the_walk_sees_every_logger() -> None:
    """A logger by another name, or bound anew, would escape it."""
    calls_seen = 0
    for path, tree in sources():
        text = (ROOT / path).read_text()
        if "structlog.get_logger" in text:
            assert loggers(tree) == {"log"}, path
        calls_seen += len({call.lineno for call, _, _ in calls(tree)})
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            assert not (
                isinstance(node, ast.Attribute) and node.attr == "bind" and "log" in ast.unparse(node.value)
            ), path
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log.") and path.name != "main.py":
                assert id(node) in inside, f"{path}:{node.lineno}: logs at import"
    assert calls_seen > 20


def test_names_and_keys_are_written_alike() -> None:
    for name, event in emitted().items():
        assert NAME.fullmatch(name), f"{name} is no noun.verb"
        for key in event.keys:
            assert KEY.fullmatch(key), f"{name}: {key}"
        # Those that the run's task binds may be given by what is not part of it, nothing else.
        assert event.keys & ADDED <= {"vm", "run"}, name


def test_what_is_added_to_each_line_is_documented() -> None:
    text = (ROOT / "docs" / "events.md").read_text()
    for key in ADDED:
        assert f"`{key}`" in text
