"""Running a command on an event loop, and what signals do to it."""

import asyncio
import concurrent.futures
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

from orchestrator import aio
from orchestrator.errors import EXIT_INTERRUPTED

T = TypeVar("T")

OPEN_FILES = 65536
THREADS = 32
"""Blocking work (fsync, hashing) of several runs side by side."""


def run_async(command: Coroutine[Any, Any, int]) -> int:
    """Run a command. SIGTERM and Ctrl-C cancel it, so that everything is put back; told again, they end it.

    Raises KeyboardInterrupt if it was cancelled.
    """

    async def until_signalled() -> int:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()

        def cancel() -> None:
            loop.call_later(aio.SAME_SECONDS, _say, "putting everything back; interrupt again to end at once")
            if task is not None:
                task.cancel()

        # `restic unlock` sends it to whoever holds a lock, as we do while we read a repository.
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        with aio.told_to_stop(cancel, _end_at_once):
            return await command

    try:
        return on_loop(until_signalled())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def on_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run it on uvloop, as everything of ours is run."""
    _allow_open_files()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(THREADS))
        return runner.run(work)


def _end_at_once() -> None:
    """As a kill does: nothing more is put back."""
    _say("ended at once; what is left in VMs and on targets is put right by the next vmfleece that runs")
    os._exit(EXIT_INTERRUPTED)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads
        print(f"vmfleece: {text}", file=sys.stderr, flush=True)


def _allow_open_files() -> None:
    """Let us and the tools that we start open many files: qemu-img opens all images of a chain at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
