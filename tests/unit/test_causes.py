"""The table of error codes holds every code that the code base has, and docs/operations.md explains each."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator import causes
from orchestrator.causes import CODES, FIRST_PAUSES, Cause
from orchestrator.errors import VmfleeceError
from orchestrator.model import ErrorReport
from orchestrator.run import retry
from orchestrator.target.restic.errors import RepositoryLocked, WrongPassword
from orchestrator.units import format_duration

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
NO_CAUSE = "\N{EN DASH}"
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def constants(node: ast.expr, names: dict[str, str]) -> list[str]:
    """The texts that an expression may be; none where it passes on what came from elsewhere (`error.code`)."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.IfExp():
            return constants(node.body, names) + constants(node.orelse, names)
        case ast.Name(id=name):
            return [names[name]] if name in names else []
    return []


def texts(tree: ast.Module) -> dict[str, str]:
    """A module's constant texts, by name."""
    return {
        target.id: text
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        for text in constants(node.value, {})
        if isinstance(target, ast.Name)
    }


def raised(tree: ast.Module, names: dict[str, str]) -> Iterator[str]:
    """Every code that a module gives to an error: by `code=`, as a class's own, or to an ErrorReport."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=called)):
                if called == "ErrorReport":
                    yield from constants(node.args[0], names)
                for keyword in node.keywords:
                    if keyword.arg == "code":
                        yield from constants(keyword.value, names)
            case ast.ClassDef():
                for line in node.body:
                    if isinstance(line, ast.Assign | ast.AnnAssign) and line.value is not None:
                        target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
                        if ast.unparse(target) == "code":
                            yield from constants(line.value, names)


def in_the_code() -> set[str]:
    paths = (ROOT / "orchestrator").rglob("*.py")
    trees = [ast.parse(path.read_text()) for path in paths if path.name != "causes.py"]
    public = {name: text for tree in trees for name, text in texts(tree).items() if not name.startswith("_")}
    return {code for tree in trees for code in raised(tree, public | texts(tree))}


def rows(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of docs/operations.md."""
    _, _, section = OPERATIONS.partition(f"\n{heading}\n")
    assert section, heading
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[0].splitlines()[2:]]


def test_every_code_is_in_the_table_and_every_code_of_the_table_exists() -> None:
    assert in_the_code() == set(CODES)


def test_a_code_is_entered_once() -> None:
    assert sum(map(len, causes._CODES.values())) == len(CODES)
    assert set(causes._CODES) == set(Cause)
    assert all(CODE.fullmatch(code) for code in CODES)


def test_every_code_is_explained_with_its_cause_and_a_remedy() -> None:
    documented: dict[str, str] = {}
    for codes, cause, happened, remedy in rows("### Error codes"):
        assert happened
        assert remedy
        for code in re.findall(r"`([^`]+)`", codes):
            assert code not in documented, f"{code} is explained twice"
            documented[code] = cause
    assert documented == {
        code: NO_CAUSE if cause is Cause.OTHER else f"`{cause}`" for code, cause in CODES.items()
    }


def test_every_cause_is_explained_with_when_it_is_tried_again() -> None:
    documented = {cause.strip("`"): again for cause, _, again in rows("### What is tried again, and when")}
    assert documented == {
        cause.value: format_duration(FIRST_PAUSES[cause] * 60) if FIRST_PAUSES.get(cause) else again(cause)
        for cause in Cause
        if cause is not Cause.OTHER
    }


def again(cause: Cause) -> str:
    return "at the next start" if cause.may_pass else "never"


@pytest.mark.parametrize("code", CODES)
def test_an_error_and_its_report_tell_the_cause_of_their_code(code: str) -> None:
    error, report = VmfleeceError("what", code=code), ErrorReport(code, "what")
    assert error.cause is report.cause is CODES[code]
    assert error.retryable is CODES[code].may_pass


def test_the_causes_of_what_waiting_cannot_help() -> None:
    assert not WrongPassword("no").retryable
    assert RepositoryLocked("no").cause is Cause.TARGET_BUSY
    assert {cause for cause in Cause if not cause.may_pass} == {
        Cause.CANCELLED,
        Cause.CONFIGURATION,
        Cause.DAMAGED,
        Cause.BUG,
        Cause.OTHER,
    }
    assert causes.of("never-entered") is Cause.BUG


# --- when a run is tried again ---


@pytest.mark.parametrize("cause", Cause)
def test_pauses_double_up_to_an_hour(cause: Cause) -> None:
    pauses = [retry.pause_seconds(cause, tries=tries, retries=10) for tries in range(1, 12)]
    assert pauses[-1] is None  # the 11th try was the 10th retry
    if not cause.may_pass:
        assert set(pauses) == {None}
        return
    known = [pause for pause in pauses if pause is not None]
    assert known[0] == FIRST_PAUSES[cause] * 60
    assert all(later == min(2 * pause, 3600) for pause, later in pairwise(known))


def test_without_retries_nothing_is_tried_again() -> None:
    assert {retry.pause_seconds(cause, tries=1, retries=0) for cause in Cause} == {None}


@pytest.mark.parametrize(
    ("unfinished", "retries", "again"),
    [
        ({}, 2, {}),
        ({"web01": 0}, 1, {"web01": 1}),
        ({"web01": 1, "db01": 0}, 2, {"web01": 2, "db01": 1}),
        ({"web01": 1}, 1, {}),  # a run that kills vmfleece each time
        ({"web01": 0}, 0, {}),
        ({"web01": 0, "not of the job any more": 0}, 1, {"web01": 1}),
    ],
)
def test_a_turn_goes_on_after_a_restart_as_often_as_runs_are_tried_again(
    unfinished: dict[str, int], retries: int, again: dict[str, int]
) -> None:
    assert retry.after_restart(unfinished, vms=("web01", "db01"), retries=retries) == again


@pytest.mark.parametrize("cause", Cause)
def test_a_run_that_ran_full_but_may_be_granted_more_is_tried_again_at_once(cause: Cause) -> None:
    pause = retry.pause_seconds(cause, tries=2, retries=2, may_be_granted_more=True)
    if cause is Cause.FLEECING_FULL:
        assert pause == 0
    else:
        assert pause == retry.pause_seconds(cause, tries=2, retries=2)
