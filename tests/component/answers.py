"""Answers without an engine behind them: for what the API does by itself, whoever answers."""

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from orchestrator.config import Address, DaemonSettings, LogFormat, LogLevel
from orchestrator.errors import UnknownName
from orchestrator.service.api.base import Answers, CleanupOrder, RunsQuery, Service, SnapshotsQuery
from orchestrator.service.api.server import served as serve
from orchestrator.service.documents import (
    Cleanup,
    History,
    Jobs,
    Protection,
    Request,
    RequestState,
    RunDetails,
    Runs,
    Snapshots,
    Targets,
    VmDetails,
    Vms,
)
from orchestrator.service.feed import Feed
from orchestrator.service.orders import BackupOrder, PruneOrder
from orchestrator.service.status import Status


class Recorded(Answers):
    """Says what it is told to say, and records what it is asked to change."""

    def __init__(self, status: Callable[[], Status], service: Service) -> None:
        self.feed = Feed()
        self.service = service
        self.asked: list[object] = []
        self._status = status

    def status(self) -> Status:
        return self._status()

    async def protection(self) -> Protection:
        return Protection("2026-11-23T02:30:00+00:00", ())

    def storage_history(self) -> History:
        return History(10, (), ())

    async def vms(self) -> Vms:
        return Vms(())

    async def vm(self, name: str) -> VmDetails:
        raise UnknownName("VM", name, ["web01"], place="the test")

    async def runs(self, query: RunsQuery) -> Runs:
        self.asked.append(query)
        return Runs(())

    async def run(self, run: str) -> RunDetails:
        raise UnknownName("run", run, (), place="the test")

    async def cancel_run(self, run: str) -> RunDetails:
        self.asked.append(run)
        raise UnknownName("run", run, (), place="the test")

    async def targets(self) -> Targets:
        return Targets(())

    async def snapshots(self, target: str, query: SnapshotsQuery) -> Snapshots:
        self.asked.append((target, query))
        return Snapshots(())

    def jobs(self) -> Jobs:
        return Jobs(())

    def start(self, order: BackupOrder) -> Request:
        self.asked.append(order)
        return Request("0badcafe", None, tuple(order.vms), RequestState.UNDER_WAY, "2026-11-23T02:30:00+00:00")

    def start_job(self, job: str) -> Request:
        self.asked.append(job)
        return Request("0badcafe", job, (), RequestState.UNDER_WAY, "2026-11-23T02:30:00+00:00")

    def prune(self, order: PruneOrder) -> Request:
        self.asked.append(order)
        return Request("0badcafe", None, (), RequestState.UNDER_WAY, "2026-11-23T02:30:00+00:00")

    def request(self, request: str) -> Request:
        raise UnknownName("request", request, (), place="the test")

    def cancel_request(self, request: str) -> Request:
        raise UnknownName("request", request, (), place="the test")

    async def clean_up(self, order: CleanupOrder) -> Cleanup:
        self.asked.append(order)
        return Cleanup(order.dry_run, ())

    def metrics(self) -> bytes:
        return b"# TYPE vmfleece_test gauge\nvmfleece_test 1.0\n"


def settings(
    run_dir: Path, *, listen: Address | None = None, hosts: tuple[str, ...] = (), token_file: Path | None = None
) -> DaemonSettings:
    """Those that the API looks at."""
    return DaemonSettings(
        state_dir=run_dir / "state",
        run_dir=run_dir,
        stop_timeout_seconds=60,
        max_runs=4,
        log_format=LogFormat.JSON,
        log_level=LogLevel.INFO,
        listen=listen,
        hosts=hosts,
        token_file=token_file,
    )


@contextlib.asynccontextmanager
async def served(run_dir: Path, status: Callable[[], Status]) -> AsyncIterator[Recorded]:
    """The control socket, for the block."""
    answers = Recorded(status, Service.COMMAND)
    async with serve(settings(run_dir), answers):
        yield answers
