"""Live progress of runs: bars on a terminal, plain lines elsewhere; and the closing lines of a run."""

import contextlib
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from orchestrator import model
from orchestrator.model import GuestWrites, Phase, RunResult
from orchestrator.units import format_size

LINE_SECONDS = 10.0
"""How often a plain line is printed for a run that goes on."""


class Display:
    """Shows the progress of several runs for as long as its block lasts."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        if sys.stdout.isatty():
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[text]}"),
                console=Console(highlight=False),
            )
        self._tasks: dict[str, TaskID] = {}
        self._copying_since: dict[str, float] = {}
        self._last: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, progress: model.Progress) -> None:
        """Take what a run says of itself."""
        now = time.monotonic()
        if progress.phase is Phase.COPYING:
            self._copying_since.setdefault(progress.run, now)
        text = _text(progress, now - self._copying_since.get(progress.run, now), short=self._bars is not None)
        if self._bars is not None:
            self._update_bar(self._bars, progress, text)
            return
        state = progress.phase + progress.waits_for
        last_state, last_time = self._last.get(progress.run, ("", 0.0))
        if state != last_state or now - last_time >= LINE_SECONDS:
            self._last[progress.run] = (state, now)
            with contextlib.suppress(BrokenPipeError):  # nobody reads (head, less): the run goes on
                print(f"{progress.vm}: {text}", flush=True)

    def _update_bar(self, bars: Progress, progress: model.Progress, text: str) -> None:
        if progress.run not in self._tasks:
            self._tasks[progress.run] = bars.add_task(progress.vm, total=None, text="")
        size, copied = _totals(progress)
        bars.update(self._tasks[progress.run], total=size or None, completed=copied, text=text)


def _totals(progress: model.Progress) -> tuple[int, int]:
    return (
        sum(disk.size_bytes for disk in progress.disks),
        sum(disk.copied_bytes for disk in progress.disks),
    )


def _text(progress: model.Progress, copying_seconds: float, *, short: bool) -> str:
    if progress.phase is Phase.QUEUED and progress.waits_for:
        return f"waits for {progress.waits_for}"
    if progress.phase is not Phase.COPYING:
        return str(progress.phase)
    size, copied = _totals(progress)
    rate = copied / copying_seconds if copying_seconds > 0.5 else 0
    fleecing = sum(disk.fleecing_bytes for disk in progress.disks)
    granted = sum(disk.grant_bytes for disk in progress.disks)
    share = f"{100 * copied // size if size else 100}%"
    speed = f", {format_size(int(rate))}/s" if rate else ""
    held = f", fleecing {format_size(fleecing)}" if granted else ""
    if short:  # beside a bar, on one line of 80 columns
        return f"{share}{speed}{held}"
    of_granted = f" of {format_size(granted)}" if granted else ""
    copied_of = f"{format_size(copied)} of {format_size(size)}"
    slowed = ", slowed for the guest" if progress.slowed_to_bytes_per_second is not None else ""
    return f"{share} ({copied_of}) in {copying_seconds:.0f}s{speed}{held}{of_granted}{slowed}"


def guest_writes(writes: GuestWrites | None) -> str:
    """How long a guest's writes take, for the end of a line; empty if it is not known."""
    if writes is None or writes.mean_ms is None:
        return ""
    before = f" ({writes.before_ms:.1f} ms before)" if writes.before_ms is not None else ""
    return f", guest writes {writes.mean_ms:.1f} ms{before}"


def result_lines(result: RunResult) -> list[str]:
    """How a run ended, for people."""
    guest = f", guest held {result.pause_ms:.1f} ms" if result.pause_ms is not None else ""
    guest += guest_writes(result.guest_writes)
    guest += f", slowed for {result.slowed_seconds:.0f} s" if result.slowed_seconds else ""
    if result.error is not None:
        return [f"{result.vm}: {result.outcome} after {result.duration_seconds:.1f} s{guest}"]
    copied = sum(disk.copied_bytes for disk in result.disks)
    lines = [
        (
            f"{result.vm}: {result.outcome}: {result.snapshot}, {result.kind},"
            f" {format_size(copied)} in {result.duration_seconds:.1f} s{guest}"
        )
    ]
    for disk in result.disks:
        fleecing = "directly to the target"
        if disk.storage is not None:
            fleecing = f"fleecing on {disk.storage}, at most {format_size(disk.fleecing_peak_bytes)}"
        lines.append(f"  {disk.disk}: {format_size(disk.size_bytes)}, {fleecing}")
    return lines
