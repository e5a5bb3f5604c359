"""The tables of a file as far as they are good, and what is wrong with the rest. Pure.

Each table is checked by its pydantic model, and key by key where the model refuses it. A key with a
problem is None in the draft, whatever its type says, so that the checks between tables see all that
is good; a Config is only made from a draft without problems.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.config import later
from orchestrator.config.places import KeyPath, shown
from orchestrator.config.schema import (
    NAMED,
    SECTIONS,
    DaemonTable,
    FleecingTable,
    JobTable,
    NotifyTable,
    StorageTable,
    Table,
    TargetTable,
    VmTable,
)
from orchestrator.config.values import Name

_TableT = TypeVar("_TableT", bound=Table)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with the key at `path`."""

    path: KeyPath
    text: str


@dataclass(slots=True)
class Draft:
    """The tables as far as they could be read."""

    daemon: DaemonTable = field(default_factory=DaemonTable)
    storage: dict[str, StorageTable] = field(default_factory=dict)
    target: dict[str, TargetTable] = field(default_factory=dict)
    vm: dict[str, VmTable] = field(default_factory=dict)
    job: dict[str, JobTable] = field(default_factory=dict)
    notify: dict[str, NotifyTable] = field(default_factory=dict)


def read_tables(raw: Mapping[str, Any], problems: list[Problem]) -> Draft:
    """Return the tables of a parsed file; add what is wrong with them to `problems`."""
    draft = Draft()
    for section, content in raw.items():
        if section not in SECTIONS:
            problems.append(Problem((section,), _unknown(section, list(SECTIONS))))
        elif not isinstance(content, Mapping):
            heading = f"[{section}.NAME]" if section in NAMED else f"[{section}]"
            problems.append(Problem((section,), f"is no table; allowed: {heading}"))
        elif section == "daemon":
            draft.daemon = _table(DaemonTable, ("daemon",), content, problems)
        else:
            tables = getattr(draft, section)
            for name, table in content.items():
                path = (section, name)
                problems += _name_problems(path)
                tables[name] = _table(NAMED[section], path, table, problems)
    return draft


def _name_problems(path: tuple[str, str]) -> Iterator[Problem]:
    try:
        TypeAdapter(Name).validate_python(path[1])
    except ValidationError as error:
        for each in error.errors():
            yield Problem(path, describe(Table, each))


def _table(model: type[_TableT], path: KeyPath, raw: Any, problems: list[Problem]) -> _TableT:
    """Return the table, with None for each key that has a problem."""
    if not isinstance(raw, Mapping):
        problems.append(Problem(path, f"{raw!r} is no table; allowed: [{shown(path)}]"))
        return _partly(model, dict.fromkeys(model.model_fields))
    refused = {
        key: reason
        for each in later.LATER
        if each.section == path[0] and (key := each.key) in raw
        if (reason := each.refusal(raw[key]))
    }
    problems += (Problem((*path, key), reason) for key, reason in refused.items())
    values = {key: value for key, value in raw.items() if key not in refused}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
    problems += (Problem((*path, *each["loc"]), _explain(model, path, each)) for each in errors)
    bad = {each["loc"][0] for each in errors}
    good = {key: _field(model, key).validate_python(value) for key, value in values.items() if key not in bad}
    nothing = {str(key): None for key in bad if key in model.model_fields}
    return _partly(model, {**good, **nothing})


def _partly(model: type[_TableT], values: dict[str, Any]) -> _TableT:
    return cast("_TableT", model.model_construct(**values))  # pydantic's plugin returns Table


def _field(model: type[Table], key: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(model, include_extras=True)[key])


def _explain(model: type[Table], path: KeyPath, error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden" and isinstance(error["input"], Mapping):
        section, name, *rest = (*path, *error["loc"])
        if rest:
            dotted = f"{name}.{rest[0]}"
            return f'unknown; a name with dots needs quotes, as in [{section}."{dotted}"]'
    return describe(model, error)


def describe(model: type[Table], error: ErrorDetails) -> str:
    """Return pydantic's `error` about a `model` in our words."""
    given, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "value_error":
            return str(context["error"])
        case "missing":
            return missing(model, str(error["loc"][0]))
        case "extra_forbidden":
            table = FleecingTable if len(error["loc"]) > 1 else model
            return _unknown(str(error["loc"][-1]), list(table.model_fields))
        case "enum":
            allowed = context["expected"].replace(" or ", ", ")
        case "greater_than_equal":
            allowed = f"at least {context['ge']}"
        case "less_than_equal":
            allowed = f"at most {context['le']}"
        case kind:
            allowed = _ALLOWED.get(kind, error["msg"])
    shown = str(given).lower() if isinstance(given, bool) else repr(given)
    return f"{shown} is not allowed; allowed: {allowed}"


def missing(model: type[Table], key: str) -> str:
    """Return that a key of a `model` is needed."""
    wanted = model.model_fields[key]
    example = json.dumps((wanted.examples or [""])[0])
    return f"missing, but needed: {wanted.description} For example {example}"


_ALLOWED = {
    "string_type": "a text in quotes",
    "string_too_short": "a text that is not empty",
    "path_type": "a text in quotes",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "list_type": 'a list, such as ["web01", "db*"]',
    "too_short": "a list that is not empty",
}


def _unknown(key: str, known: list[str]) -> str:
    close = get_close_matches(key, known, n=1)
    if close:
        return f"unknown; did you mean {close[0]!r}?"
    return f"unknown; allowed: {', '.join(known)}"
