"""The manual pages: complete, and as man and mandoc want them."""

import argparse
import re
import subprocess
from pathlib import Path

import pytest

from orchestrator import errors
from orchestrator.cli import manual
from orchestrator.cli.arguments import make_parser
from orchestrator.config.schema import SECTIONS, json_schema
from orchestrator.target.restic import errors as restic_errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("man")
    manual.main(path)
    return path


def shown(path: Path) -> str:
    """As on a terminal of any width: no line is broken, and what is written twice for bold is there once."""
    page = subprocess.run(
        ["mandoc", "-T", "ascii", "-O", "width=500", path], capture_output=True, text=True, check=True
    ).stdout
    return re.sub(".\b", "", page)


@pytest.mark.parametrize("page", ["vmfleece.1", "vmfleece.toml.5"])
def test_mandoc_finds_nothing_wrong(folder: Path, page: str) -> None:
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", folder / page], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    below = [one for group in parser._actions if isinstance(group.choices, dict) for one in group.choices.values()]
    return [leaf for one in below for leaf in leaves(one)] or [parser]


def test_every_command_and_option_is_explained(folder: Path) -> None:
    page = shown(folder / "vmfleece.1")
    commands = leaves(make_parser())
    assert len(commands) > 20
    for command in commands:
        heading = re.search(rf"^ +{command.prog}( .*)?$", page, re.MULTILINE)
        assert heading, command.prog
        usage = heading[1] or ""
        for action in command._actions:
            assert action.help != argparse.SUPPRESS
            if action.dest == "help":
                assert "-h, --help" in page
            elif action.option_strings:
                assert any(option in usage for option in action.option_strings), (command.prog, action.dest)
                written = "|".join(map(re.escape, action.option_strings))
                assert re.search(rf"^ +(-\w, )?({written})\b", page, re.MULTILINE), action.option_strings
            else:
                assert str(action.metavar or action.dest) in usage or action.choices


def test_every_exit_code_is_explained() -> None:
    codes = {
        value
        for module in (errors, restic_errors)
        for name, value in vars(module).items()
        if name.startswith("EXIT_")
    }
    raised = {one.exit_code for one in _all_below(errors.VmfleeceError)}
    assert codes | raised == set(manual.EXIT_CODES)


def _all_below(error: type[errors.VmfleeceError]) -> set[type[errors.VmfleeceError]]:
    return {error}.union(*(_all_below(one) for one in error.__subclasses__()))


def test_every_key_is_explained(folder: Path) -> None:
    page = shown(folder / "vmfleece.toml.5")
    schema = json_schema()["$defs"]
    for name, table in SECTIONS.items():
        section = page.split(manual.heading(name))[1]
        for key, told in schema[table.__name__]["properties"].items():
            assert re.search(rf"^ +{key}\b", section, re.MULTILINE), key
            assert " ".join(told["description"].split()) in page, key
