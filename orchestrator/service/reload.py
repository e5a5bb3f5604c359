"""Reading the configuration again, on SIGHUP: all of it takes effect, or nothing.

`restic unlock` sends SIGHUP, too, to whoever holds a lock of a repository, as the daemon does while it reads one:
a configuration that says the same as before changes nothing.
"""

import asyncio
import time
from collections.abc import Callable

import structlog

from orchestrator.config import Config, load
from orchestrator.errors import ConfigError, VmfleeceError
from orchestrator.log import configure
from orchestrator.service import systemd
from orchestrator.service.engine import Engine

log = structlog.get_logger(__name__)


async def serve(
    told: asyncio.Event, engine: Engine, *, follow: Callable[[Config], None], say: Callable[[str], None]
) -> None:
    """Read the file again whenever it is told, until cancelled.

    `follow` is called with what is in force then; `say` tells systemd what comes of it, in words.
    """
    while True:
        await told.wait()
        told.clear()  # whoever tells it from now on may have written the file after it is read
        systemd.notify(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))
        try:
            say(await _reload(engine, follow))
        finally:
            systemd.notify(READY="1")


async def _reload(engine: Engine, follow: Callable[[Config], None]) -> str:
    path = engine.config.path
    try:
        before = engine.config.daemon
        config = await asyncio.to_thread(load, path)
        change = await engine.reload(config)
    except VmfleeceError as error:
        return _refuse(engine, error)
    except Exception as bug:  # it must not end the service
        log.exception("config.bug", path=str(path))
        engine.in_force.refused = (f"bug: {type(bug).__name__}: {bug}",)
        return "the configuration could not be read again: a bug"
    if (before.log_format, before.log_level) != (config.daemon.log_format, config.daemon.log_level):
        configure(log_format=config.daemon.log_format, level=config.daemon.log_level)
    follow(config)
    log.info(
        "config.reloaded",
        path=str(path),
        added=list(change.added),
        changed=list(change.changed),
        removed=list(change.removed),
    )
    return ""


def _refuse(engine: Engine, error: VmfleeceError) -> str:
    problems = error.problems if isinstance(error, ConfigError) and error.problems else (str(error),)
    engine.in_force.refused = problems
    log.error("config.refused", path=str(engine.config.path), code=error.code, problems=list(problems))
    return f"{error.message}: the old one stays in force"
