"""Errors that an operator may see say what can be done: each is raised with a hint."""

import ast
from collections.abc import Iterator
from pathlib import Path

from orchestrator import errors
from orchestrator.causes import CODES
from orchestrator.errors import VmfleeceError

ROOT = Path(__file__).parents[2] / "orchestrator"
INTERNAL = {"NbdError", "CommandFailed", "UnknownName", "NotifyError"}
"""UnknownName makes its own hint. NbdError comes out as the run's or the export's, NotifyError only as a line of
the log, and what QEMU refuses is explained where it was asked for."""

INSIDE = {"target/repository/draft.py", "target/restic/writer.py"}
"""Errors there are mistakes of ours, or follow another error that was raised before."""


def below(error: type[VmfleeceError]) -> Iterator[str]:
    for one in error.__subclasses__():
        if one.__module__ == errors.__name__:
            yield one.__name__
            yield from below(one)


def constants(node: ast.AST) -> Iterator[str]:
    """All texts in a piece of code."""
    for one in ast.walk(node):
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
            yield one.value


def test_neither_message_nor_hint_says_what_is_said_between_them() -> None:
    """`causes` says why for each code, between what happened and what to do."""
    whys = {one.why for one in CODES.values()}
    said = {
        text
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "causes.py"
        for text in constants(ast.parse(path.read_text()))
    }
    assert "wait until it has ended" in said
    assert whys & said == set()


def test_every_error_says_what_to_do() -> None:
    names = {*below(VmfleeceError)} - INTERNAL
    assert {"ConfigError", "TargetError", "NobodyThere"} <= names
    seen = 0
    without = []
    for path in sorted(ROOT.rglob("*.py")):
        if str(path.relative_to(ROOT)) in INSIDE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id=name), args=[_, *_], keywords=keywords) if name in names:
                    seen += 1
                    given = {keyword.arg for keyword in keywords}
                    if not given & {"hint", "problems"}:
                        without.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert without == []
    assert seen > 100
