"""Metrics, as Prometheus reads them: what is known right now, told when it is asked for.

Everything is gathered at the moment of a scrape, from the same facts that `vmfleece status` shows and from the
last runs, so no value of a VM or storage that is gone stays behind. What happened before a restart is taken from
the catalogue. docs/metrics.md lists them all, and a test holds it against what is told.
"""

import asyncio
import contextlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator import __version__, aio, schedule
from orchestrator.config import Config
from orchestrator.model import RunResult
from orchestrator.service.protection import GOOD
from orchestrator.service.status import Status
from orchestrator.state.catalogue import Catalogue, Entry

log = structlog.get_logger(__name__)

LAG_SECONDS = 0.5
"""How often it is looked whether the event loop goes round."""
LAG_WINDOW = 120
"""Looks that the largest lag is taken of: a minute."""
FILE_SECONDS = 30.0
FILE_MODE = 0o644
"""node_exporter reads it, as a user of its own."""
PAUSE_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

Values = Mapping[Any, float]
"""By the labels' values, in their order."""
OfVm = tuple[str, str]
"""A VM and the job that backs it up; of backups by hand the job is ''. Prometheus has a label `job` of its own."""


@dataclass(frozen=True, slots=True)
class Last:
    """The last run of a VM by a job."""

    started: datetime
    good: bool
    duration_seconds: float
    size_bytes: int
    copied_bytes: int
    stored_bytes: int
    fleecing_peak_bytes: int
    pause_seconds: float
    write_mean_seconds: float | None
    write_worst_seconds: float | None


@dataclass(slots=True)
class _Pauses:
    """How long guests were held, by upper bound."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(PAUSE_BUCKETS) + 1))
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.seconds += seconds
        self.counts[sum(seconds > bound for bound in PAUSE_BUCKETS)] += 1


class Metrics(Collector):
    """Those of one service; `config` is what is in force, `status` says what is going on."""

    def __init__(self, config: Callable[[], Config], status: Callable[[], Status]) -> None:
        self._config = config
        self._status = status
        self._started = datetime.now(UTC)
        self._last: dict[OfVm, Last] = {}
        self._success: dict[OfVm, datetime] = {}
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._failures: Counter[str] = Counter()
        self._copied_bytes: Counter[str] = Counter()
        self._stored_bytes: Counter[str] = Counter()
        self._pauses = _Pauses()
        self._lags = [0.0] * LAG_WINDOW
        self._registry = CollectorRegistry()
        self._registry.register(self)

    # What is told to it ------------------------------------------------------------------------------------------

    def remember(self, catalogue: Catalogue) -> None:
        """Take up what is known of runs before this service. Blocks. Raises StateError."""
        for entry in catalogue.last_runs():
            if (last := _of_entry(entry)) is not None:
                self._last.setdefault((entry.vm, entry.job or ""), last)
        for entry in catalogue.last_runs(outcomes=GOOD):
            self._success.setdefault((entry.vm, entry.job or ""), datetime.fromisoformat(entry.started))

    def ended(self, result: RunResult, *, job: str | None, target: str) -> None:
        """A run is over."""
        key = (result.vm, job or "")
        last = self._last[key] = _of_result(result)
        if last.good:
            self._success[key] = result.started
        self._outcomes[job or "", result.outcome] += 1
        if result.error is not None:
            self._failures[result.error.code] += 1
        self._copied_bytes[target] += last.copied_bytes
        self._stored_bytes[target] += last.stored_bytes
        if result.pause_ms is not None:
            self._pauses.add(result.pause_ms / 1000)

    async def serve(self) -> None:
        """Watch the event loop, and write the file if one is configured. Runs until cancelled."""
        async with aio.background(self._keep_file()):
            looks = 0
            while True:
                due = time.monotonic() + LAG_SECONDS
                await asyncio.sleep(LAG_SECONDS)
                self._lags[looks % LAG_WINDOW] = max(0.0, time.monotonic() - due)
                looks += 1

    async def _keep_file(self) -> None:
        trouble = ""
        while True:
            if (path := self._config().daemon.metrics_file) is not None:
                trouble = await self._write(path, trouble)
            await asyncio.sleep(FILE_SECONDS)

    async def _write(self, path: Path, trouble: str) -> str:
        """Write the file; what keeps it from that is logged when it is news, and returned."""
        try:
            await asyncio.to_thread(_replace, path, self.text())
        except OSError as error:
            if (news := error.strerror or str(error)) != trouble:
                log.warning("metrics.unwritable", path=str(path), error=news)
            return error.strerror or str(error)
        return ""

    # What it tells -----------------------------------------------------------------------------------------------

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are the same whatever the state, and asking would need one."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All of them, as they are now."""
        status = self._status()
        yield _gauge("vmfleece_build_info", "Always 1; which version it is.", ["version"], {(__version__,): 1})
        started = self._started.timestamp()
        yield _gauge("vmfleece_start_time_seconds", "When the service started.", [], {(): started})
        lag = "How late the event loop was at most, in the last minute."
        yield _gauge("vmfleece_event_loop_lag_seconds", lag, [], {(): max(self._lags)})
        yield from self._of_vms()
        yield from self._totals()
        yield from _of_runs(status)
        yield from _of_queue(status)
        yield from _of_storages(status)

    def _of_vms(self) -> Iterator[Metric]:
        """Of all that are configured, whether they were ever backed up or not; and of others nothing."""
        config = self._config()
        by_job = [(vm, job.name) for job in config.job.values() for vm in job.vms]
        by_hand = [key for key in {*self._last, *self._success} if not key[1] and key[0] in config.vm]
        keys = [*by_job, *sorted(by_hand)]
        labels = ["vm", "backup_job"]
        success = {key: self._success[key].timestamp() if key in self._success else 0.0 for key in keys}
        about = "When the last good backup of a VM began: its content is of then. 0: there is none."
        yield _gauge("vmfleece_last_success_timestamp_seconds", about, labels, success)
        due = {key: due.timestamp() for key in by_job if (due := self._due(*key)) is not None}
        about = "When the next good backup of a VM is due at the latest, by its job's schedule."
        yield _gauge("vmfleece_backup_due_timestamp_seconds", about, labels, due)
        lasts = {key: self._last[key] for key in keys if key in self._last}
        for name, about, value in (
            ("timestamp_seconds", "When the last run began.", lambda last: last.started.timestamp()),
            ("success", "Whether the last run was good: 1 or 0.", lambda last: float(last.good)),
            ("duration_seconds", "How long the last run took.", lambda last: last.duration_seconds),
            ("size_bytes", "What the disks of the last run hold.", lambda last: last.size_bytes),
            ("copied_bytes", "What the last run read of the disks and copied.", lambda last: last.copied_bytes),
            (
                "stored_bytes",
                "What the last run's snapshot takes on its target.",
                lambda last: last.stored_bytes,
            ),
            (
                "fleecing_peak_bytes",
                "What the fleecing images of the last run occupied at their fullest.",
                lambda last: last.fleecing_peak_bytes,
            ),
            ("pause_seconds", "How long the last run held the guest.", lambda last: last.pause_seconds),
            (
                "guest_write_mean_seconds",
                "What the guest's writes took on average during the last run.",
                lambda last: last.write_mean_seconds,
            ),
            (
                "guest_write_worst_seconds",
                "What they took on average in the slowest second of it.",
                lambda last: last.write_worst_seconds,
            ),
        ):
            known = {key: value(last) for key, last in lasts.items()}
            values = {key: float(number) for key, number in known.items() if number is not None}
            yield _gauge(f"vmfleece_last_run_{name}", about, labels, values)

    def _due(self, vm: str, job: str) -> datetime | None:
        """The turn after the last good one; after the start, where there was none. None: no schedule."""
        settings = self._config().job[job]
        if settings.schedule is None:
            return None
        due = schedule.next_due(settings.schedule, self._success.get((vm, job), self._started))
        return None if due is None else due + timedelta(seconds=settings.randomized_delay_seconds)

    def _totals(self) -> Iterator[Metric]:
        about = "Runs that are over, since the service started."
        yield _counter("vmfleece_runs", about, ["backup_job", "outcome"], self._outcomes)
        about = "Runs that failed or were cancelled, by error code, since the service started."
        codes = {(code,): count for code, count in self._failures.items()}
        yield _counter("vmfleece_run_failures", about, ["code"], codes)
        for name, about, by_target in (
            ("vmfleece_copied_bytes", "What was read of disks and copied to a target.", self._copied_bytes),
            (
                "vmfleece_stored_bytes",
                "What snapshots took on a target when they were made.",
                self._stored_bytes,
            ),
        ):
            values = {(target,): by_target[target] for target in self._config().target}
            yield _counter(name, about, ["target"], values)
        pauses = HistogramMetricFamily("vmfleece_guest_pause_seconds", "How long guests were held for a snapshot.")
        counts, total = [], 0
        for bound, count in zip((*map(str, PAUSE_BUCKETS), "+Inf"), self._pauses.counts, strict=True):
            total += count
            counts.append((bound, float(total)))
        pauses.add_metric([], counts, self._pauses.seconds)
        yield pauses


def _of_runs(status: Status) -> Iterator[Metric]:
    phases = Counter((run.phase,) for run in status.runs)
    yield _gauge("vmfleece_runs_under_way", "Runs under way, by phase.", ["phase"], phases)
    latest = {(run.vm,): run.recent_write_ms[-1] for run in status.runs if run.recent_write_ms}
    writes = {vm: milliseconds / 1000 for vm, milliseconds in latest.items() if milliseconds is not None}
    about = "What the writes of a guest that is backed up took on average in the last second."
    yield _gauge("vmfleece_guest_write_latency_seconds", about, ["vm"], writes)


def _of_queue(status: Status) -> Iterator[Metric]:
    waiting = [one for one in status.queue if one.until is None]
    yield _gauge("vmfleece_queue_length", "Runs that wait to begin.", [], {(): len(waiting)})
    now = datetime.now(UTC)
    oldest = max(((now - datetime.fromisoformat(one.started)).total_seconds() for one in waiting), default=0.0)
    about = "How long the run that waits for longest has been waiting."
    yield _gauge("vmfleece_queue_oldest_wait_seconds", about, [], {(): max(0.0, oldest)})
    retries = len(status.queue) - len(waiting)
    yield _gauge("vmfleece_retries_waiting", "Runs that failed and wait to be tried again.", [], {(): retries})


def _of_storages(status: Status) -> Iterator[Metric]:
    for name, about in (
        ("quota_bytes", "What all fleecing images of a storage may occupy together."),
        ("granted_bytes", "What those there are may occupy right now."),
        ("stranded_bytes", "What of that is kept for runs that are over but may still hold it."),
        ("used_bytes", "What they do occupy."),
        ("peak_bytes", "The most that they occupied since the service started."),
        ("free_bytes", "What is free on a storage's file system."),
        ("floor_bytes", "What is to stay free there."),
        ("runs", "Runs that use a storage."),
    ):
        found = {(one.name,): getattr(one, name) for one in status.storages}
        known = {key: value for key, value in found.items() if value is not None}
        yield _gauge(f"vmfleece_storage_{name}", about, ["storage"], known)


def _gauge(name: str, about: str, labels: list[str], values: Values) -> Metric:
    family = GaugeMetricFamily(name, about, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, about: str, labels: list[str], values: Values) -> Metric:
    family = CounterMetricFamily(name, about, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _of_result(result: RunResult) -> Last:
    writes = result.guest_writes
    return Last(
        started=result.started,
        good=result.error is None,
        duration_seconds=result.duration_seconds,
        size_bytes=sum(disk.size_bytes for disk in result.disks),
        copied_bytes=sum(disk.copied_bytes for disk in result.disks),
        stored_bytes=result.stored_bytes or 0,
        fleecing_peak_bytes=sum(disk.fleecing_peak_bytes for disk in result.disks),
        pause_seconds=(result.pause_ms or 0.0) / 1000,
        write_mean_seconds=_seconds(writes.mean_ms if writes else None),
        write_worst_seconds=_seconds(writes.worst_ms if writes else None),
    )


def _of_entry(entry: Entry) -> Last | None:
    """A run of before; None if what was entered of it cannot be read any more."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        result = entry.result or {}
        disks = result["disks"]
        writes = result.get("guest_writes") or {}
        return Last(
            started=datetime.fromisoformat(entry.started),
            good=entry.outcome in GOOD,
            duration_seconds=float(result["duration_seconds"]),
            size_bytes=sum(disk["size_bytes"] for disk in disks),
            copied_bytes=sum(disk["copied_bytes"] for disk in disks),
            stored_bytes=int(result.get("stored_bytes") or 0),
            fleecing_peak_bytes=sum(disk["fleecing_peak_bytes"] for disk in disks),
            pause_seconds=float(result["pause_ms"] or 0.0) / 1000,
            write_mean_seconds=_seconds(writes.get("mean_ms")),
            write_worst_seconds=_seconds(writes.get("worst_ms")),
        )
    return None


def _seconds(milliseconds: float | None) -> float | None:
    return milliseconds / 1000 if milliseconds is not None else None


def _replace(path: Path, text: bytes) -> None:
    """Have the file hold this, at once: whoever reads it finds the old or the new one. Raises OSError."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
            os.fchmod(file.fileno(), FILE_MODE)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
