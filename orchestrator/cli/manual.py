"""vmfleece(1) and vmfleece.toml(5), made from what `--help` and `vmfleece config schema` are made from.

`python -m orchestrator.cli.manual FOLDER` writes both; `make man` does that. Options that several commands share
are explained once.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.cli.arguments import make_parser
from orchestrator.cli.config import as_toml
from orchestrator.config import DEFAULT_PATH, json_schema
from orchestrator.config.schema import NAMED, SECTIONS

EXIT_CODES = {
    0: "fine",
    1: "failed",
    2: "the command line or the configuration is wrong",
    3: "some of several failed",
    10: "no repository there",
    11: "locked: another vmfleece is at work, or somebody works on the repository alone",
    12: "wrong password",
    130: "interrupted",
}


def command_page(parser: argparse.ArgumentParser) -> str:
    """vmfleece(1), in man(7)'s macros."""
    commands = list(_commands(parser))
    counts = Counter(id(action) for one, _ in commands for action in _arguments(one))
    lines = [
        *_head(
            "VMFLEECE", 1, "vmfleece", "back up running QEMU virtual machines without slowing their guests down"
        ),
        ".SH SYNOPSIS",
        ".B vmfleece",
        r"\fICOMMAND\fR [\fIARGUMENTS\fR]",
        ".SH DESCRIPTION",
        _roff(parser.description or ""),
        ".SH COMMANDS",
    ]
    shared: dict[int, argparse.Action] = {}
    for one, explanation in commands:
        lines += [".TP", rf"\fB{_roff(one.prog)}\fR {_roff(_usage(one))}".rstrip(), _roff(explanation)]
        own = []
        for action in _arguments(one):
            if counts[id(action)] > 1:  # those of a common parent are the same objects
                shared[id(action)] = action
            elif action.help:
                own.append(action)
        lines += [".RS", *(line for action in own for line in _explained(action)), ".RE"] if own else []
    lines += [".SH COMMON OPTIONS", *(line for action in shared.values() for line in _explained(action))]
    lines += [".TP", r"\fB\-h\fR, \fB\-\-help\fR", "Say what a command takes."]
    lines += [".TP", r"\fB\-\-version\fR", "Say which version this is; without a command."]
    lines += [".SH EXIT STATUS"]
    lines += [line for code, meaning in EXIT_CODES.items() for line in (".TP", rf"\fB{code}\fR", _roff(meaning))]
    lines += [".SH ENVIRONMENT", ".TP", r"\fBVMFLEECE_CONFIG\fR", "The configuration, unless an option names it."]
    lines += [".TP", r"\fBNO_COLOR\fR", "If it is set and not empty, nothing is coloured."]
    lines += [".SH FILES", ".TP", rf"\fI{_roff(DEFAULT_PATH)}\fR", "The configuration."]
    lines += [".SH SEE ALSO", r"\fBvmfleece.toml\fR(5), \fBqemu\-img\fR(1), \fBrestic\fR(1)"]
    return "\n".join(lines) + "\n"


def configuration_page() -> str:
    """vmfleece.toml(5), in man(7)'s macros."""
    tables = json_schema()["$defs"]
    lines = [
        *_head("VMFLEECE.TOML", 5, "vmfleece.toml", "what vmfleece backs up, when, where to and how"),
        ".SH DESCRIPTION",
        "One TOML file, checked as a whole: a key that is not known is an error.",
        r"\fBvmfleece config check\fR lists all problems at once.",
        r"\fBvmfleece config show\fR says what is in effect and where it comes from.",
    ]
    for name, table in SECTIONS.items():
        definition = tables[table.__name__]
        lines += [
            f".SH {_roff(heading(name))}",
            _roff((table.__doc__ or "").partition(". ")[0].removesuffix(".") + "."),
        ]
        for key, told in definition["properties"].items():
            needed = key in definition.get("required", ())
            lines += [".TP", rf"\fB{_roff(key)}\fR", _roff(told["description"]), *_value(told, needed=needed)]
    lines += [".SH SEE ALSO", r"\fBvmfleece\fR(1), \fBsystemd.time\fR(7)"]
    return "\n".join(lines) + "\n"


def heading(table: str) -> str:
    """How a table begins in the file."""
    return f"[{table}.NAME]" if table in NAMED else f"[{table}]"


def main(folder: Path) -> None:
    """Write both."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vmfleece.1").write_text(command_page(make_parser()))
    (folder / "vmfleece.toml.5").write_text(configuration_page())


def _head(title: str, section: int, name: str, purpose: str) -> list[str]:
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    return [
        f'.TH {title} {section} "{today}" "vmfleece {__version__}"',
        ".SH NAME",
        rf"{_roff(name)} \- {_roff(purpose)}",
    ]


def _commands(
    parser: argparse.ArgumentParser, explanation: str = ""
) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """All commands that do something, with what they do."""
    groups = [action for action in _all_arguments(parser) if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001
    if not groups:
        yield parser, parser.description or f"{explanation[:1].upper()}{explanation[1:]}."
    for group in groups:
        helps = {choice.dest: choice.help or "" for choice in group._choices_actions}  # noqa: SLF001
        for name, one in group.choices.items():
            yield from _commands(one, helps[name])


def _all_arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return parser._actions  # noqa: SLF001  (argparse has no other way to ask)


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """But --help."""
    return [action for action in _all_arguments(parser) if action.dest != "help"]


def _usage(parser: argparse.ArgumentParser) -> str:
    """Its arguments, without those that all have."""
    return " ".join(parser.format_usage().split()).removeprefix(f"usage: {parser.prog} [-h]").strip()


def _explained(action: argparse.Action) -> list[str]:
    name = action.metavar or action.dest
    value = rf" \fI{_roff(str(name))}\fR" if action.nargs != 0 else ""
    if action.choices is not None:
        value = " " + "|".join(rf"\fI{_roff(str(choice))}\fR" for choice in action.choices)
    names = ", ".join(rf"\fB{_roff(option)}\fR" for option in action.option_strings)
    return [".TP", f"{names}{value}" if names else value.strip(), _roff((action.help or "").replace("%%", "%"))]


def _value(told: dict[str, Any], *, needed: bool) -> list[str]:
    said = []
    if allowed := told.get("enum"):
        said.append(f"One of: {', '.join(map(as_toml, allowed))}.")
    if needed:
        said.append("Needed.")
    elif told.get("default") not in (None, [], {}):
        said.append(f"Default: {as_toml(told['default'])}.")
    if (example := next(iter(told.get("examples", ())), None)) not in (None, told.get("default")):
        said.append(f"Example: {as_toml(example)}.")
    return [_roff(" ".join(said))] if said else []


def _roff(text: str) -> str:
    """Text without anything that troff would take for its own."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("\n", " ").replace("…", "...")
    return rf"\&{escaped}" if escaped.startswith((".", "'")) else escaped


if __name__ == "__main__":
    main(Path(sys.argv[1]))
