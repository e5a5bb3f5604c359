"""Structured logs: one constant event name a line, everything else as keys.

Events and their keys are an interface: docs/events.md lists them all, and a test holds it against the code.
Whoever is told of events inside this process is told of all, also of those that are not written.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import structlog

Listener = Callable[[Mapping[str, Any]], None]

_listeners: list[Listener] = []


def configure(*, log_format: str, level: str) -> None:
    """Set up structlog for this process. `log_format` is `json` or `console`; both go to standard error."""
    renderer: structlog.typing.Processor
    if log_format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            tell,
            _Least(level),
            *([structlog.processors.format_exc_info] if log_format == "json" else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


@contextlib.contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Have all events told to a listener for the block, in whatever thread they come; it must not fail or wait."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Tell the listeners: a processor of structlog's."""
    for listener in _listeners:
        listener({key: value for key, value in event.items() if key not in ("exc_info", "stack_info")})
    return event


class _Least:
    """Drops what is less important than a level: a processor of structlog's."""

    def __init__(self, level: str) -> None:
        self._least = logging.getLevelNamesMapping()[level.upper()]

    def __call__(
        self, _logger: object, _method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        if logging.getLevelNamesMapping()[event["level"].upper()] < self._least:
            raise structlog.DropEvent
        return event
