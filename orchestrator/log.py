"""Structured logs: one constant event name a line, everything else as keys.

Events and their keys are an interface: docs/events.md lists them all, and a test holds it against the code.
Whoever is told of events inside this process is told of all, also of those that are not written.
Where standard error is the journal itself, each line begins with its priority, as sd-daemon(3) has it; journald
takes it off again. What goes into a file or a pipe is not touched.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import structlog

Listener = Callable[[Mapping[str, Any]], None]

_listeners: list[Listener] = []

PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Of syslog(3), by level."""


def configure(*, log_format: str, level: str) -> None:
    """Set up structlog for this process. `log_format` is `json` or `console`; both go to standard error."""
    renderer: structlog.typing.Processor
    if log_format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"))
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            tell,
            _Least(level),
            *([structlog.processors.format_exc_info] if log_format == "json" else []),
            _Prioritized(renderer) if _goes_to_the_journal() else renderer,
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


def _goes_to_the_journal() -> bool:
    """Whether standard error is what systemd says is connected to the journal (systemd.exec(5))."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class _Prioritized:
    """Writes the priority before each line of what another renderer makes of an event."""

    def __init__(self, renderer: structlog.typing.Processor) -> None:
        self._renderer = renderer

    def __call__(self, logger: object, method: str, event: structlog.typing.EventDict) -> str:
        prefix = f"<{PRIORITIES[event['level']]}>"
        lines = str(self._renderer(logger, method, event)).splitlines()
        return "\n".join(f"{prefix}{line}" for line in lines)


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
