"""`vmfleece completion`: the script by which a shell completes commands, options and names.

Made from the parser that `--help` is made from, so that it cannot lag behind. Names of VMs, targets and jobs are
read from the headings of the configuration ($VMFLEECE_CONFIG, or the default one) by the shell itself: starting
vmfleece would take longer than one waits for a key. Who cannot read that file gets no names.
Snapshots are not looked up, since that may ask for a repository over the network: `VM@latest` is offered.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import shtab

from orchestrator.config import DEFAULT_PATH
from orchestrator.errors import EXIT_OK

SECTIONS = {"VM": "vm", "T": "target", "JOB": "job", "SNAPSHOT": "snapshot"}
"""The metavars that stand for a name, and the tables of the configuration that the names head."""

_NAMES = r"""
_vmfleece_names() {
  table="$1"; after=""
  [ "$table" = snapshot ] && { table=vm; after="@latest"; }
  sed -n -e "s/^[[:space:]]*\[$table\.\([A-Za-z0-9_-]*\)\].*/\1$after/p" \
    -e "s/^[[:space:]]*\[$table\.[\"']\([^\"']*\)[\"']\].*/\1$after/p" \
    "${VMFLEECE_CONFIG:-DEFAULT_PATH}" 2>/dev/null
}
"""

_PREAMBLE = {
    "bash": _NAMES + '_vmfleece_TABLE() { compgen -W "$(_vmfleece_names TABLE)" -- "$1"; }',
    "zsh": _NAMES + '_vmfleece_TABLE() { compadd "$@" -- ${(f)"$(_vmfleece_names TABLE)"}; }',
    "fish": "function _vmfleece_TABLE; sh -c '"
    + _NAMES.replace("\\", "\\\\").replace("'", "\\'").strip()
    + "\n_vmfleece_names TABLE'; end",
}


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What the shell sources. `shell`: one of arguments.SHELLS."""
    for action in _actions(parser):
        if completed := _by(action):
            action.complete = completed  # type: ignore[attr-defined]  # where shtab looks for it
    text = shtab.complete(parser, shell)
    # shtab writes "several" so that zsh completes only the first.
    return re.sub(r'"\(\*\)::?', '"*:', text) if shell == "zsh" else text


def completion(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Print it."""
    print(script(parser, arguments.shell))
    return EXIT_OK


def _by(action: argparse.Action) -> dict[str, Any] | None:
    """How a shell completes an argument; None: not at all, or by its choices."""
    if action.type is Path:
        return shtab.FILE
    table = SECTIONS.get(str(action.metavar))
    if table is None:
        return None
    preamble = {
        shell: text.replace("TABLE", table).replace("DEFAULT_PATH", DEFAULT_PATH)
        for shell, text in _PREAMBLE.items()
    }
    function = f"_vmfleece_{table}"
    return {"bash": function, "zsh": function, "fish": f"({function})", "preamble": preamble}


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All arguments of a parser and of the commands below it."""
    found: list[argparse.Action] = []
    for action in parser._actions:  # noqa: SLF001  (argparse has no other way to ask, nor has shtab)
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for below in action.choices.values():
                found += _actions(below)
    return found
