"""What becomes of what is logged."""

import contextlib
from collections.abc import Iterator

import structlog

from orchestrator import log


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Events are told to those who follow, and not printed, for the block."""

    def drop(*_: object) -> structlog.typing.EventDict:
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, log.tell, drop],
        wrapper_class=structlog.make_filtering_bound_logger("debug"),
    )
    try:
        yield
    finally:
        structlog.configure(**before)
