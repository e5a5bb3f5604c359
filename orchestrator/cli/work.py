"""Progress of long work other than backups: a bar on a terminal; elsewhere, a plain line now and then.

Work that is soon done prints no line, so that what reads a command's output sees only that.
"""

import contextlib
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from orchestrator.cli.progress import LINE_SECONDS
from orchestrator.units import format_size


class Work:
    """So many bytes of work, done in steps. `shown` False, as for JSON: nothing at all."""

    def __init__(self, total_bytes: int, *, shown: bool = True) -> None:
        self._total_bytes = total_bytes
        self._shown = shown
        self._step = ""
        self._before_bytes = 0
        self._line_due = time.monotonic() + LINE_SECONDS
        self._bar: Progress | None = None
        if shown and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(highlight=False),
                transient=True,
            )
            self._task = self._bar.add_task("", total=total_bytes, text="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, step: str, *, before_bytes: int) -> None:
        """Go on to a step, when so much of all is done."""
        self._step, self._before_bytes = step, before_bytes
        self.done(0)

    def done(self, step_bytes: int) -> None:
        """So much of the step is done."""
        done_bytes = min(self._before_bytes + step_bytes, self._total_bytes)
        share = f"{100 * done_bytes // self._total_bytes if self._total_bytes else 100}%"
        if self._bar is not None:
            self._bar.update(self._task, description=_escaped(self._step), completed=done_bytes, text=share)
        elif self._shown and (now := time.monotonic()) >= self._line_due:
            self._line_due = now + LINE_SECONDS
            of_all = f"{format_size(done_bytes)} of {format_size(self._total_bytes)}"
            with contextlib.suppress(BrokenPipeError):  # nobody reads (head, less): the work goes on
                print(f"{self._step}: {share} ({of_all})", flush=True)


def _escaped(text: str) -> str:
    return Text(text).markup
