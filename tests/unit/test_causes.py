"""The table of error codes holds every code that the code base has, and docs/operations.md explains each."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator import causes
from orchestrator.causes import CODES, FIRST_PAUSES, Cause
from orchestrator.cli import render
from orchestrator.errors import ConfigError, VmfleeceError
from orchestrator.model import ErrorReport
from orchestrator.run import retry
from orchestrator.target.restic.errors import RepositoryLocked, WrongPassword
from orchestrator.units import format_duration

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
NO_CAUSE = "\N{EN DASH}"
LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")
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
    entered = [codes.split() for rows in causes._TABLE.values() for codes, _, _ in rows]
    assert sum(map(len, entered)) == len(CODES)
    assert set(causes._TABLE) == set(Cause)
    assert all(CODE.fullmatch(code) for code in CODES)


def test_every_code_is_documented_as_the_table_explains_it() -> None:
    documented: dict[str, tuple[str, str, str]] = {}
    for codes, cause, why, remedy in rows("### Error codes"):
        for code in re.findall(r"`([^`]+)`", codes):
            assert code not in documented, f"{code} is explained twice"
            documented[code] = (cause, why, LINK.sub(r"\1", remedy))
    assert documented == {
        code: (NO_CAUSE if one.cause is Cause.OTHER else f"`{one.cause}`", one.why, one.remedy)
        for code, one in CODES.items()
    }


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("hint", ["", "do something\nabout it"])
def test_an_error_is_three_lines_of_which_none_is_empty_or_repeats_another(code: str, hint: str) -> None:
    error = VmfleeceError("something\nhappened", hint=hint, code=code)
    lines = render.error_lines(error)
    assert lines == render.error_lines(ErrorReport.of(error))
    texts = [line.partition(": ")[2].strip() for line in lines]
    assert lines == [f"vmfleece: {texts[0]}", f"  why: {texts[1]}", f"  do:  {texts[2]}"]
    assert texts[0] == "something; happened"
    assert texts[2] == ("do something; about it" if hint else CODES[code].remedy)
    assert len(set(texts)) == 3
    assert all(texts)
    assert not any("\n" in text for text in texts)


def test_of_a_wrong_configuration_each_problem_is_a_reason() -> None:
    error = ConfigError("2 problems in a.toml", problems=("a.toml:1: one", "a.toml:2: two"))
    assert render.error_lines(error) == [
        "vmfleece: 2 problems in a.toml",
        "  why: a.toml:1: one",
        "       a.toml:2: two",
        f"  do:  {CODES['config'].remedy}",
    ]
    assert render.error_lines(error, about="web01")[0] == "vmfleece: web01: 2 problems in a.toml"
    named = render.error_lines(VmfleeceError("VM web01: it is gone"), about="web01")
    assert named[0] == "vmfleece: VM web01: it is gone"


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
    assert error.cause is report.cause is CODES[code].cause
    assert error.retryable is CODES[code].cause.may_pass


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
