"""The daemon from its first moment: what must not wait until all of it is imported, which takes most of a second.

Guests that a dead vmfleece left paused go on, and signals are taken: told to stop while it starts, it just ends.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import structlog

from orchestrator import aio
from orchestrator.config import Config
from orchestrator.errors import EXIT_FAILED, EXIT_INTERRUPTED
from orchestrator.service import guests, systemd
from orchestrator.units import format_duration

if TYPE_CHECKING:  # it is what takes so long to import
    from orchestrator.service.engine import Engine

log = structlog.get_logger(__name__)


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises StateError if another vmfleece runs.

    Ends the process with EXIT_FAILED if that takes longer than `stop_timeout`, EXIT_INTERRUPTED if told twice.
    """
    told = Told(config)
    with told.by_signals():
        try:
            async with guests.first(config.daemon.state_dir) as journal:
                from orchestrator.service import daemon  # noqa: PLC0415  guests have gone on by now

                await daemon.serve(config, journal, told)
        except asyncio.CancelledError:
            if not told.stop.is_set():
                raise
    log.info("daemon.stopped")


class Told:
    """What the daemon is told by signals: `stop`, once, and `reload`, again and again.

    Told to stop before it serves, its task is cancelled, which is the one that makes this.
    """

    def __init__(self, config: Config) -> None:
        self.stop = asyncio.Event()
        self.reload = asyncio.Event()
        self._config = config
        self._task = asyncio.current_task()
        self._engine: Engine | None = None

    def serving(self, engine: "Engine") -> None:
        """From now on `stop` is waited for, with an engine that has runs to end."""
        self._engine = engine

    @contextlib.contextmanager
    def by_signals(self) -> Iterator[None]:
        """Take signals for the block, also those that were held until now. After it, SIGHUP does nothing."""
        loop = asyncio.get_running_loop()
        with aio.told_to_stop(self._stop, self._again):
            loop.add_signal_handler(signal.SIGHUP, self.reload.set)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGHUP, *aio.STOP_SIGNALS))
            try:
                yield
            finally:
                loop.add_signal_handler(signal.SIGHUP, lambda: None)

    def _stop(self) -> None:
        daemon = (self._engine.config if self._engine else self._config).daemon
        log.info("daemon.stopping", timeout_seconds=daemon.stop_timeout_seconds)
        systemd.notify(STOPPING="1", STATUS="ending the runs under way")
        # Not taken back: after the runs, it is threads that may hang, in a file system that does not answer.
        why = f"not ended within {format_duration(daemon.stop_timeout_seconds)} (daemon.stop_timeout)"
        asyncio.get_running_loop().call_later(daemon.stop_timeout_seconds, self._abort, why, EXIT_FAILED)
        self.stop.set()
        if self._engine is not None:
            self._engine.stop()
        elif self._task is not None:
            self._task.cancel()

    def _again(self) -> None:
        self._abort("told again", EXIT_INTERRUPTED)

    def _abort(self, why: str, code: int) -> NoReturn:
        """End at once, as a kill does: the next start puts guests and targets right."""
        log.error("daemon.aborted", why=why, runs=self._engine.under_way() if self._engine else [])
        os._exit(code)
