"""The contract between the API and what answers: the daemon, or a command that backs up in its own process.

Every method may raise VmfleeceError, which is answered as its code, message and hint. What is asked for by name is
checked by the one who answers: UnknownName.
"""

import abc
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.model import RunState
from orchestrator.service.documents import (
    Cleanup,
    History,
    Jobs,
    Protection,
    Request,
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


class Query(BaseModel):
    """What may stand after the question mark; nothing else may."""

    model_config = ConfigDict(extra="forbid")


class RunsQuery(Query):
    """Which runs."""

    vm: Annotated[str | None, Field(description="Only of one VM.", max_length=64)] = None
    job: Annotated[str | None, Field(description="Only of one job.", max_length=64)] = None
    state: Annotated[RunState | None, Field(description="Only those there, or that ended so.")] = None
    limit: Annotated[int, Field(ge=1, le=1000, description="So many at most.")] = 100


class SnapshotsQuery(Query):
    """Which snapshots."""

    vm: Annotated[str | None, Field(description="Only of one VM.", max_length=64)] = None


class CleanupOrder(BaseModel):
    """Whether to put right what dead runs have left, or only to say what that is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dry_run: bool = Field(False, description="Only say what would be done, and why the rest is left.")


class Service(StrEnum):
    """Who answers."""

    DAEMON = "daemon"
    COMMAND = "command"


class Answers(abc.ABC):
    """What the API asks. `feed` is what it tells of; a COMMAND starts nothing that it is asked for."""

    feed: Feed
    service: Service

    @abc.abstractmethod
    def status(self) -> Status:
        """What is going on right now."""

    @abc.abstractmethod
    async def protection(self) -> Protection:
        """How well each VM is protected. Raises StateError."""

    @abc.abstractmethod
    def storage_history(self) -> History:
        """What storages held over time."""

    @abc.abstractmethod
    async def vms(self) -> Vms:
        """All VMs, each of which is asked."""

    @abc.abstractmethod
    async def vm(self, name: str) -> VmDetails:
        """One VM, and what a backup of it would do."""

    @abc.abstractmethod
    async def runs(self, query: RunsQuery) -> Runs:
        """Runs under way and over, the latest first."""

    @abc.abstractmethod
    async def run(self, run: str) -> RunDetails:
        """One run."""

    @abc.abstractmethod
    async def cancel_run(self, run: str) -> RunDetails:
        """Have a run end; it puts its VM right by itself. Raises RefusedError, code `run-over`, if it is over."""

    @abc.abstractmethod
    async def targets(self) -> Targets:
        """All targets, each of which is listed."""

    @abc.abstractmethod
    async def snapshots(self, target: str, query: SnapshotsQuery) -> Snapshots:
        """What is on a target."""

    @abc.abstractmethod
    def jobs(self) -> Jobs:
        """All jobs."""

    @abc.abstractmethod
    def start(self, order: BackupOrder) -> Request:
        """Begin backups. Raises StateError, code `locked`, if it starts nothing."""

    @abc.abstractmethod
    def start_job(self, job: str) -> Request:
        """Begin a job, as if it were due."""

    @abc.abstractmethod
    def prune(self, order: PruneOrder) -> Request:
        """Begin to remove what retention does not keep."""

    @abc.abstractmethod
    def request(self, request: str) -> Request:
        """What has become of what was asked for; remembered for a while after its end."""

    @abc.abstractmethod
    def cancel_request(self, request: str) -> Request:
        """Have all of its runs end, and begin no more."""

    @abc.abstractmethod
    async def clean_up(self, order: CleanupOrder) -> Cleanup:
        """Find what dead runs have left, and put it right."""

    @abc.abstractmethod
    def metrics(self) -> bytes:
        """All metrics, as Prometheus reads them."""
