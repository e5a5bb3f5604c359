"""What `vmfleece status` looks like: a Status as lines of text, for terminals and without one. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, chain
from math import ceil

from rich.padding import Padding
from rich.text import Text

from orchestrator.service.status import RunStatus, Status, StorageStatus, WaitingStatus
from orchestrator.units import format_duration, format_size

ONE_LINE_COLUMNS = 104
"""From here on, all of a run fits on one line."""
BAR_COLUMNS = 40
BAR_LEAST_COLUMNS = 8
NAME_COLUMNS = 24
"""A longer name takes its room from what follows it."""
SIZE_COLUMNS = len("1023.9 GiB")
PHASE_COLUMNS = len("snapshotting")
GAP = "  "


@dataclass(frozen=True, slots=True)
class View:
    """Who looks, and when. `width` and `height` are a terminal's; without one nothing is cut or wrapped."""

    now: datetime
    width: int | None = None
    height: int | None = None
    ascii_only: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One line; what does not fit on a terminal's goes on below it, as far to the right as it began."""

    text: Text
    indent: int = 0

    def __rich__(self) -> Padding | Text:
        return Padding(self.text, (0, 0, 0, self.indent), expand=False) if self.indent else self.text

    def __str__(self) -> str:
        return (" " * self.indent + self.text.plain).rstrip()

    def rows(self, view: View) -> int:
        """About how many rows of the terminal it takes."""
        return 1 if view.width is None else max(1, ceil(self.text.cell_len / max(1, view.width - self.indent)))


Block = list[Line]
"""The lines of one storage, run or waiting run: shown together, or not at all."""


def lines(status: Status, view: View) -> list[Line]:
    """All of a status. Where there is less height than lines, it says how many runs are not shown."""
    head = [_title(status, view), *_refused(status), _EMPTY, *_storages(status.storages, view), _EMPTY]
    runs_head, runs = _runs(status.runs, view)
    queue_head, queue = _queue(status.queue, view)
    if view.height is not None:
        room = max(0, view.height - _rows([head, runs_head, [_EMPTY], queue_head], view))
        queue_room = min(_rows(queue, view), max(room // 2, room - _rows(runs, view)))
        runs = _fitting(runs, room - queue_room, view)
        queue = _fitting(queue, queue_room, view)
    return [*head, *runs_head, *chain(*runs), _EMPTY, *queue_head, *chain(*queue)]


_EMPTY = Line(Text())


def _rows(blocks: Sequence[Block], view: View) -> int:
    return sum(line.rows(view) for block in blocks for line in block)


def _fitting(blocks: list[Block], room: int, view: View) -> list[Block]:
    """All blocks if they fit into so many rows; else the first ones, and how many more there are."""
    if _rows(blocks, view) <= room:
        return blocks
    ends = accumulate(_rows([block], view) for block in blocks)
    fitting = sum(end < room for end in ends)
    return [*blocks[:fitting], [Line(Text(f"and {len(blocks) - fitting} more", "dim"))]]


def _refused(status: Status) -> Block:
    """What is wrong with a configuration that did not come into force."""
    if status.config is None or not status.config.refused:
        return []
    problems = [Line(Text(problem), 2) for problem in status.config.refused]
    head = f"{status.config.path} was refused when it was read again; what was in force before still is:"
    return [Line(Text(head, "bold red")), *problems]


def _title(status: Status, view: View) -> Line:
    if status.process is None:
        return Line(Text("no vmfleece is running", "bold"))
    since = f", running for {_since(status.started, view)}" if status.started else ""
    return Line(Text.assemble((f"vmfleece, process {status.process}", "bold"), since))


def _storages(storages: Sequence[StorageStatus], view: View) -> Iterator[Line]:
    if not storages:
        yield Line(Text("no storage is configured", "dim"))
        return
    headings = ("QUOTA", "GRANTED", "USED", "PEAK")
    name_columns = _name_columns("STORAGE", [one.name for one in storages])
    figures = [
        [format_size(size) for size in (one.quota_bytes, one.granted_bytes, one.used_bytes, one.peak_bytes)]
        for one in storages
    ]
    size_columns = max(len(text) for row in [headings, *figures] for text in row)
    bar_columns = _bar_columns(view, name_columns + len(GAP) + 4 * (len(GAP) + size_columns))
    legend = _legend(view) if _legend(view).cell_len <= bar_columns else Text()
    yield _row(
        _left("STORAGE", name_columns, "bold"),
        _padded(legend, bar_columns),
        *(_right(heading, size_columns, "bold") for heading in headings),
    )
    for one, sizes in zip(storages, figures, strict=True):
        yield _row(
            _left(one.name, name_columns),
            _bar(view, bar_columns, of=one.quota_bytes, solid=one.used_bytes, light=one.granted_bytes),
            *(_right(size, size_columns) for size in sizes),
        )
        for warning in _warnings(one):
            yield Line(Text.assemble(("! ", "bold red"), _clean(warning)), indent=2)


def _warnings(storage: StorageStatus) -> Iterator[str]:
    if storage.stranded_bytes:
        yield (
            f"stranded: {format_size(storage.stranded_bytes)} granted is kept for runs that are over,"
            " whose images a QEMU may still hold"
        )
    if storage.free_bytes is None or storage.floor_bytes is None:
        yield f"the file system of {storage.path} cannot be asked: nothing can be granted"
    elif storage.free_bytes < storage.floor_bytes:
        yield (
            f"its file system has {format_size(storage.free_bytes)} free, and must keep"
            f" {format_size(storage.floor_bytes)}: nothing more can be granted"
        )
    for lack in storage.lacks:
        yield f"the file system of {storage.path} lacks {lack}"


def _runs(runs: Sequence[RunStatus], view: View) -> tuple[Block, list[Block]]:
    if not runs:
        return [Line(Text("no run under way", "dim"))], []
    name_columns = _name_columns("RUNNING", [run.vm for run in runs])
    sinces = [_since(run.started, view) for run in runs]
    since_columns = max(len(text) for text in ["SINCE", *sinces])
    copied = [_copied(run) for run in runs]
    fleecing = [_fleecing(run) for run in runs]
    one_line = view.width is None or view.width >= ONE_LINE_COLUMNS
    others = [name_columns, PHASE_COLUMNS, len("100%"), since_columns]
    if one_line:
        copied_columns = max(map(len, copied))
        fleecing_columns = max(len(text) for text in ["FLEECING", *fleecing])
        others += [copied_columns, fleecing_columns]
    bar_columns = _bar_columns(view, sum(others) + len(others) * len(GAP))

    def row(vm: str, phase: str, bar: Text, texts: Sequence[str], style: str = "") -> Line:
        share, of_size, held, since = texts
        cells = [_left(vm, name_columns, style), _left(phase, PHASE_COLUMNS, style), bar, _right(share, 4, style)]
        if one_line:
            cells += [_left(of_size, copied_columns, style), _left(held, fleecing_columns, style)]
        return _row(*cells, _right(since, since_columns, style))

    blocks = []
    for run, of_size, held, since in zip(runs, copied, fleecing, sinces, strict=True):
        bar = _bar(view, bar_columns, of=run.size_bytes, solid=run.copied_bytes)
        share = f"{100 * run.copied_bytes // run.size_bytes}%" if run.size_bytes else ""
        block = [row(run.vm, run.phase, bar, (share, of_size, held, since))]
        if not one_line and of_size:
            block.append(Line(Text(f"{of_size}, fleecing {held}"), indent=name_columns + len(GAP)))
        blocks.append(block)
    heading = row("RUNNING", "PHASE", _left("COPIED", bar_columns, "bold"), ("", "", "FLEECING", "SINCE"), "bold")
    return [heading], blocks


def _copied(run: RunStatus) -> str:
    """Empty before its disks are known."""
    return f"{format_size(run.copied_bytes)} of {format_size(run.size_bytes)}" if run.size_bytes else ""


def _fleecing(run: RunStatus) -> str:
    if not run.size_bytes:
        return ""
    if not run.grant_bytes and not run.fleecing_bytes:
        return "none"
    return f"{format_size(run.fleecing_bytes)} of {format_size(run.grant_bytes)}"


def _queue(queue: Sequence[WaitingStatus], view: View) -> tuple[Block, list[Block]]:
    if not queue:
        return [Line(Text("nobody waits", "dim"))], []
    name_columns = _name_columns("WAITING", [waiting.vm for waiting in queue])
    number_columns = len(str(len(queue)))
    sinces = [_since(waiting.started, view) for waiting in queue]
    since_columns = max(len(text) for text in ["SINCE", *sinces])

    def row(number: str, vm: str, priority: str, since: str, style: str = "") -> Line:
        return _row(
            _right(number, number_columns, style),
            _left(vm, name_columns, style),
            _right(priority, len("PRIORITY"), style),
            _right(since, since_columns, style),
        )

    blocks = []
    for number, (waiting, since) in enumerate(zip(queue, sinces, strict=True), start=1):
        reasons = [Line(Text(_clean(reason)), indent=number_columns + len(GAP)) for reason in waiting.reasons]
        blocks.append([row(str(number), waiting.vm, str(waiting.priority), since), *reasons])
    return [row("#", "WAITING", "PRIORITY", "SINCE", "bold")], blocks


# Cells -------------------------------------------------------------------------------------------------------


def _bar(view: View, columns: int, *, of: int, solid: int, light: int = 0) -> Text:
    """A bar of the whole `of`: the first `solid` of it, then up to `light`, then the rest."""
    full = _cells(solid, of, columns)
    half = max(full, _cells(light, of, columns))
    used, granted, free = _glyphs(view)
    return Text.assemble(
        (used * full, "green"), (granted * (half - full), "green"), (free * (columns - half), "dim")
    )


def _cells(part: int, whole: int, columns: int) -> int:
    """The cells of a part: some if there is any of it, all only if there is all of it."""
    if part <= 0 or whole <= 0:
        return 0
    if part >= whole:
        return columns
    return min(max(1, columns * part // whole), columns - 1)


def _glyphs(view: View) -> tuple[str, str, str]:
    return ("#", "=", "-") if view.ascii_only else ("█", "▒", "░")


def _legend(view: View) -> Text:
    solid, light, free = _glyphs(view)
    return Text.assemble((solid, "green"), " used ", (light, "green"), " granted ", (free, "dim"), " free")


def _bar_columns(view: View, others: int) -> int:
    if view.width is None:
        return BAR_COLUMNS
    return min(max(view.width - others, BAR_LEAST_COLUMNS), BAR_COLUMNS)


def _name_columns(heading: str, names: Sequence[str]) -> int:
    return min(max(Text(_clean(name)).cell_len for name in [heading, *names]), NAME_COLUMNS)


def _row(*cells: Text) -> Line:
    return Line(Text(GAP, overflow="fold").join(cells))


def _left(text: str, columns: int, style: str = "") -> Text:
    return _padded(Text(_clean(text), style), columns)


def _right(text: str, columns: int, style: str = "") -> Text:
    cell = Text(_clean(text), style)
    cell.pad_left(max(0, columns - cell.cell_len))
    return cell


def _padded(cell: Text, columns: int) -> Text:
    cell.pad_right(max(0, columns - cell.cell_len))
    return cell


def _clean(text: str) -> str:
    """Without what would move the cursor or end the line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _since(started: str, view: View) -> str:
    """How long ago that was, as coarse as one looks at it."""
    try:
        seconds = int((view.now - datetime.fromisoformat(started)).total_seconds())
    except (ValueError, TypeError):  # no time, or one without a zone
        return _clean(started)
    for coarsest, grain in ((86400, 3600), (600, 60)):
        if seconds >= coarsest:
            seconds -= seconds % grain
    return format_duration(max(0, seconds))
