"""The API's description, OpenAPI 3.1, made from the routes and the very classes that are answered. Pure."""

import functools
import re
from typing import Any

from pydantic import TypeAdapter

from orchestrator import __version__
from orchestrator.service.api.routes import EVENTS, METRICS, OPENAPI, ROUTES, Route
from orchestrator.service.documents import ErrorBody

REFERENCE = "#/components/schemas/{model}"
NAME = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
IDENTITY = "^[0-9a-f]{8}$"
PATTERNS = {"vm": NAME, "job": NAME, "target": NAME, "run": IDENTITY, "request": IDENTITY}
"""What a name in a path may be; anything else is not there."""
FAILURES = {
    400: "What was given makes no sense",
    401: "By TCP, what changes something needs the token",
    403: "Whoever asks may not",
    404: "There is nothing of that name",
    405: "It cannot be asked that way",
    408: "The body did not come in time",
    409: "It cannot be done now",
    413: "The body is larger than 64 KiB",
    415: "The body is no JSON",
    421: "The request is for another host",
    500: "An error in vmfleece",
    502: "A VM or a target failed",
    503: "Too much is asked at once, or the service is ending",
}
OF_ALL = (400, 403, 421, 500)
OF_CHANGES = (401, 408, 413, 415)


@functools.cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """What reads and writes a class."""
    return TypeAdapter(kind)


@functools.cache
def document() -> dict[str, Any]:
    """The whole description."""
    schemas, definitions = _schemas()
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    for path, summary, content in (
        (EVENTS, "What happens, as server-sent events: each log event of a run, and its progress", _EVENTS),
        (OPENAPI, "This description", {"application/json": {"schema": {"type": "object"}}}),
        (METRICS, "Metrics for Prometheus", {"text/plain": {"schema": {"type": "string"}}}),
    ):
        paths[path] = {"get": _plain(path, summary, content, schemas)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vmfleece",
            "version": __version__,
            "description": "On the control socket, and read-only by TCP. See docs/api.md.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": definitions,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


_EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}


def _schemas() -> tuple[dict[Any, Any], dict[str, Any]]:
    """The schema of each class, and the definitions that these refer to."""
    wanted: dict[tuple[Any, str], Any] = {(ErrorBody, "serialization"): adapter(ErrorBody)}
    for route in ROUTES:
        wanted[route.answer, "serialization"] = adapter(route.answer)
        if route.body is not None:
            wanted[route.body, "validation"] = adapter(route.body)
    inputs: Any = [(kind, mode, one) for (kind, mode), one in wanted.items()]
    schemas, described = TypeAdapter.json_schemas(inputs, ref_template=REFERENCE)
    return dict(schemas), described["$defs"]


def _operation(route: Route, schemas: dict[Any, Any]) -> dict[str, Any]:
    parameters = []
    if route.name:
        parameters.append(
            {
                "name": route.name,
                "in": "path",
                "required": True,
                "schema": {"type": "string", "pattern": PATTERNS[route.name]},
            }
        )
    fields = route.query.model_json_schema()
    for name, schema in fields.get("properties", {}).items():
        parameters.append({"name": name, "in": "query", "schema": _inlined(schema, fields.get("$defs", {}))})
    statuses = {*OF_ALL, *route.fails, *(OF_CHANGES if route.changes else ())}
    operation: dict[str, Any] = {
        "operationId": _identity(route.method, route.path),
        "summary": route.summary,
        "responses": {
            "202" if route.accepted else "200": {
                "description": "Begun" if route.accepted else "The answer",
                "content": {"application/json": {"schema": schemas[route.answer, "serialization"]}},
            },
            **_failures(statuses, schemas),
        },
    }
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        schema = schemas[route.body, "validation"]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if route.changes:
        operation["security"] = [{"token": []}, {}]
    return operation


def _plain(path: str, summary: str, content: dict[str, Any], schemas: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _identity("GET", path),
        "summary": summary,
        "responses": {
            "200": {"description": "The answer", "content": content},
            **_failures({*OF_ALL, *((503,) if path == EVENTS else ())}, schemas),
        },
    }
    if path == EVENTS:
        description = "The id of the last event that was seen: those since then come first."
        operation["parameters"] = [
            {"name": "Last-Event-ID", "in": "header", "description": description, "schema": {"type": "string"}}
        ]
    return operation


def _failures(statuses: set[int], schemas: dict[Any, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schemas[ErrorBody, "serialization"]}}
    return {str(status): {"description": FAILURES[status], "content": content} for status in sorted(statuses)}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """A schema without references, which those of a query would point nowhere."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {key: _inlined(value, definitions) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_inlined(one, definitions) for one in schema]
    return schema


def _identity(method: str, path: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "_", path.removeprefix("/api/v1").lower()).strip("_")
    return f"{method.lower()}_{words}"
