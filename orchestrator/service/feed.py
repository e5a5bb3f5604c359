"""What happens, for whoever follows it: a bounded ring of the latest log events of runs, and their progress.

Invariants:
- nobody who follows can hold up a run, or make us keep more than so many events for him: one who falls behind is
  told so, and comes back with the id of the last event that he saw;
- an id is unique over restarts, so that an id of an earlier process is never taken for one of ours;
- progress has no id and is not kept: what counts is the latest, which the next one tells.
"""

import asyncio
import contextlib
import json
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from orchestrator import log
from orchestrator.model import MergeProgress, Progress

RING = 1000
BACKLOG = 1000
"""Events that a follower may be behind."""
PROGRESS_SECONDS = 0.5
"""How often a run's progress is told, unless it enters another phase."""
OF_RUNS = {"run", "job", "request", "snapshot"}
"""Events with one of these keys are told."""
LOST = "events.lost"
"""Told first if something happened, after the event that is named, that is not kept any more."""
PROGRESS = "run.progress"
MERGING = "merge.progress"


@dataclass(frozen=True, slots=True)
class Told:
    """One event: a JSON object. `id` None: it is not kept."""

    id: str | None
    data: str


class Follower:
    """What one follower has still to be told."""

    def __init__(self, waiting: list[Told]) -> None:
        self._waiting = deque(waiting)
        self._news = asyncio.Event()
        self._over = False
        if waiting:
            self._news.set()

    def tell(self, told: Told) -> None:
        """Have him told. One who is too far behind is told nothing more."""
        if len(self._waiting) >= BACKLOG:
            self.end()
        if not self._over:
            self._waiting.append(told)
            self._news.set()

    def end(self) -> None:
        """Nothing more will come."""
        self._over = True
        self._news.set()

    async def next(self) -> list[Told]:
        """All that he was not told yet, as soon as there is any; nothing if it is over."""
        await self._news.wait()
        told = list(self._waiting)
        self._waiting.clear()
        if not self._over:
            self._news.clear()
        return told


class Feed:
    """The ring and those who follow. Made, and followed, on the event loop; told from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._origin = secrets.token_hex(4)
        self._count = 0
        self._ring: deque[Told] = deque(maxlen=RING)
        self._followers: set[Follower] = set()
        self._last_progress: dict[str, tuple[str, float]] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the log's events of runs, for the block. Whoever follows is told the end of it."""
        with log.told_to(self._take):
            try:
                yield
            finally:
                self.end()

    @property
    def followers(self) -> int:
        """How many follow."""
        return len(self._followers)

    def end(self) -> None:
        """Nothing more will come, for those who follow now."""
        for follower in self._followers:
            follower.end()

    @contextlib.contextmanager
    def followed(self, after: str | None = None) -> Iterator[Follower]:
        """Follow for the block: what comes, and first all that is kept since the event of the id `after`."""
        follower = Follower(self._since(after) if after is not None else [])
        self._followers.add(follower)
        try:
            yield follower
        finally:
            self._followers.discard(follower)

    def _since(self, after: str) -> list[Told]:
        kept = list(self._ring)
        ids = [told.id for told in kept]
        if after in ids:
            return kept[ids.index(after) + 1 :]
        return [Told(None, json.dumps({"event": LOST, "after": after})), *kept]

    def progress(self, progress: Progress) -> None:
        """Tell how far a run is, unless it has just been told."""
        now, state = time.monotonic(), f"{progress.phase} {progress.waits_for}"
        last_state, last = self._last_progress.get(progress.run, ("", 0.0))
        if state == last_state and now - last < PROGRESS_SECONDS:
            return
        self._last_progress[progress.run] = (state, now)
        self._tell_unkept(PROGRESS, asdict(progress))

    def merging(self, progress: MergeProgress) -> None:
        """Tell how far a merge is; whoever merges tells it now and then only."""
        self._tell_unkept(MERGING, asdict(progress))

    def _tell_unkept(self, event: str, keys: Mapping[str, Any]) -> None:
        bound = structlog.contextvars.get_contextvars()
        stamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        self._tell(None, {"event": event, **bound, **keys, "timestamp": stamp})

    def forget(self, run: str) -> None:
        """The run is over."""
        self._last_progress.pop(run, None)

    def _take(self, event: Mapping[str, Any]) -> None:
        if not OF_RUNS.isdisjoint(event):
            if threading.get_ident() == self._thread:
                self._keep(event)
            else:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._keep, event)

    def _keep(self, event: Mapping[str, Any]) -> None:
        self._count += 1
        self._ring.append(self._tell(f"{self._origin}-{self._count}", event))

    def _tell(self, identity: str | None, event: Mapping[str, Any]) -> Told:
        told = Told(identity, json.dumps(event, default=str, ensure_ascii=False))
        for follower in self._followers:
            follower.tell(told)
        return told
