"""Counting the steps of everything that a piece of work does, and cancelling it at one of them.

A step ends where a coroutine, of whichever task, gives way to the loop: those are the places where a
cancellation can come in.
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Generator, Iterator
from typing import Any


class Steps:
    """Counts steps; at those in `cancel_at` it cancels `root`."""

    def __init__(self, *cancel_at: int) -> None:
        self.count = 0
        self.root: asyncio.Task[Any] | None = None
        self._cancel_at = cancel_at

    async def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do the work in a task of its own; its result, or its error."""
        with self._counting():
            self.root = asyncio.get_running_loop().create_task(work)
        # Tasks that it starts are counted as long as it runs.
        with self._counting():
            await asyncio.wait([self.root])
        return self.root.result()

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(self._task)
        try:
            yield
        finally:
            loop.set_task_factory(None)

    def _task(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> "asyncio.Task[Any]":
        return asyncio.Task(_Counted(work, self), loop=loop, **options)

    def stepped(self) -> None:
        """One more step was done."""
        if self.count in self._cancel_at and self.root is not None:
            self.root.cancel()
        self.count += 1


class _Counted(Coroutine[Any, Any, Any]):
    """A coroutine that tells of its steps."""

    def __init__(self, work: Coroutine[Any, Any, Any], steps: Steps) -> None:
        self._work = work
        self._steps = steps

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._work.__await__()

    def send(self, value: Any) -> Any:
        given = self._work.send(value)
        self._steps.stepped()
        return given

    def throw(self, *error: Any) -> Any:
        given = self._work.throw(*error)
        self._steps.stepped()
        return given

    def close(self) -> None:
        self._work.close()
