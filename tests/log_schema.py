"""The JSON schema of log lines, docs/log-line.schema.json.

It is made from docs/events.md, which tests/unit/test_events.py holds against the code.

After a change of docs/events.md: `python -m tests.log_schema`.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from orchestrator.causes import Cause
from orchestrator.model import RunResult
from tests.unit.test_events import ADDED, documented

PATH = Path(__file__).parents[1] / "docs" / "log-line.schema.json"
TEXTS = {"vm", "run", "job", "target", "disk", "storage", "snapshot", "code", "cause", "phase", "path", "error"}
"""Keys whose values are texts, or null where there is none."""

ALWAYS: dict[str, Any] = {
    "event": {"type": "string"},
    "level": {"type": "string"},
    "timestamp": {"type": "string", "format": "date-time"},
    "vm": {"type": "string"},
    "run": {"type": "string"},
    "request": {"type": "string"},
}


def schema() -> dict[str, Any]:
    """One alternative for each event; what refers to others is in `$defs`."""
    assert set(ALWAYS) == ADDED
    result = _plain(TypeAdapter(RunResult).json_schema(mode="serialization"))
    report = result["$defs"]["ErrorReport"]
    report["properties"]["cause"] = {"enum": [cause.value for cause in Cause]}  # derived from the code
    for definition in (report, result["$defs"]["DiskResult"], result["$defs"]["GuestWrites"]):
        definition |= {"required": list(definition["properties"]), "additionalProperties": False}
    alternatives = []
    for name, event in documented().items():
        known = {key: _value(key) for key in sorted(event.keys)}
        if name == "run.finished":
            known |= {key: result["properties"][key] for key in event.keys & result["properties"].keys()}
        properties = ALWAYS | known
        properties |= {"event": {"const": name}, "level": {"enum": sorted(event.levels)}}
        alternatives.append(
            {
                "title": name,
                "properties": properties,
                "required": sorted({"event", "level", "timestamp", *event.keys}),
                "additionalProperties": False,
            }
        )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of vmfleece's log",
        "description": "What each event means: events.md, beside this file.",
        "type": "object",
        "oneOf": alternatives,
        "$defs": result["$defs"],
    }


def text() -> str:
    return json.dumps(schema(), indent=1) + "\n"


def _plain(described: Any) -> Any:
    """Without what only says in other words how a class is written."""
    if isinstance(described, list):
        return [_plain(one) for one in described]
    if not isinstance(described, dict):
        return described
    return {
        key: _plain(value)
        for key, value in described.items()
        if key not in ("title", "default") and not (key == "description" and isinstance(value, str))
    }


def _value(key: str) -> dict[str, Any]:
    """What the units in its name say of a key."""
    if key.endswith("_bytes"):
        return {"type": ["integer", "null"], "minimum": 0}
    if key.endswith(("_seconds", "_ms", "_per_second")):
        return {"type": ["number", "null"], "minimum": 0}
    return {"type": ["string", "null"]} if key in TEXTS else {}


if __name__ == "__main__":
    PATH.write_text(text())
