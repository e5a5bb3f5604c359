"""What can be asked, as a table: the routes, what each takes and answers, and which of them change something.

The handlers that serve it and the description that is served (`openapi`) are made from this table alone.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any

from pydantic import BaseModel

from orchestrator import __version__
from orchestrator.service.api.base import Answers, CleanupOrder, Query, RunsQuery, Service, SnapshotsQuery
from orchestrator.service.documents import (
    Cleanup,
    Health,
    History,
    Jobs,
    Protection,
    Queue,
    Request,
    RunDetails,
    Runs,
    Snapshots,
    Storages,
    Targets,
    VmDetails,
    Vms,
)
from orchestrator.service.orders import BackupOrder, PruneOrder
from orchestrator.service.status import Status

PREFIX = "/api/v1"
EVENTS = f"{PREFIX}/events"
OPENAPI = f"{PREFIX}/openapi.json"
METRICS = "/metrics"


@dataclass(frozen=True, slots=True)
class Call:
    """What was asked: the name in the path, the query and the body, each checked by its model."""

    name: str
    query: Any
    body: Any


Ask = Callable[[Answers, Call], Any]
"""Asks, and gives the answer or something to be awaited for it."""


@dataclass(frozen=True, slots=True)
class Route:
    """One of them. `answer` is a dataclass of `documents`; `names` says what the name in the path is.

    `accepted`: it has only begun when it is answered. `fails` are further statuses that it may be answered with.
    """

    method: str
    path: str
    summary: str
    answer: type
    ask: Ask
    name: str = ""
    query: type[Query] = Query
    body: type[BaseModel] | None = None
    accepted: bool = False
    fails: tuple[int, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether it changes something: then it needs a right."""
        return self.method != "GET"

    async def answered(self, answers: Answers, call: Call) -> Any:
        """Ask. Raises VmfleeceError."""
        found = self.ask(answers, call)
        return await _awaited(found) if isawaitable(found) else found


async def _awaited(found: Awaitable[Any]) -> Any:
    return await found


def _get(
    path: str,
    summary: str,
    answer: type,
    ask: Ask,
    *,
    prefix: str = PREFIX,
    **more: Any,
) -> Route:
    return Route("GET", f"{prefix}{path}", summary, answer, ask, **more)


def _post(path: str, summary: str, answer: type, ask: Ask, **more: Any) -> Route:
    return Route("POST", f"{PREFIX}{path}", summary, answer, ask, **more)


def _health(answers: Answers, _call: Call) -> Health:
    return Health("ok", __version__, answers.service is Service.DAEMON)


ROUTES = (
    _get("/healthz", "That it serves", Health, _health, prefix=""),
    _get(
        "/status",
        "What is going on: storages, runs, and who waits",
        Status,
        lambda a, _: a.status(),
    ),
    _get("/queue", "The runs that wait, and why", Queue, lambda a, _: Queue(a.status().queue)),
    _get("/storages", "Storages: quota, granted, used", Storages, lambda a, _: Storages(a.status().storages)),
    _get(
        "/storages/history",
        "Storages over time: the most that was granted and used",
        History,
        lambda a, _: a.storage_history(),
    ),
    _get(
        "/protection",
        "How well each VM is protected: its last good run against its schedules",
        Protection,
        lambda a, _: a.protection(),
    ),
    _get("/vms", "All VMs; each is asked, which takes a while if it is silent", Vms, lambda a, _: a.vms()),
    _get(
        "/vms/{vm}",
        "One VM, and what a backup of it would do",
        VmDetails,
        lambda a, call: a.vm(call.name),
        name="vm",
        fails=(404, 409, 502),
    ),
    _get(
        "/runs",
        "Runs under way and over, the latest first",
        Runs,
        lambda a, call: a.runs(call.query),
        query=RunsQuery,
    ),
    _get("/runs/{run}", "One run", RunDetails, lambda a, call: a.run(call.name), name="run", fails=(404,)),
    _post(
        "/runs",
        "Back up VMs now",
        Request,
        lambda a, call: a.start(call.body),
        body=BackupOrder,
        accepted=True,
        fails=(404, 409, 503),
    ),
    _post(
        "/runs/{run}/cancel",
        "End a run; it puts its VM right by itself",
        RunDetails,
        lambda a, call: a.cancel_run(call.name),
        name="run",
        accepted=True,
        fails=(404, 409),
    ),
    _get(
        "/requests/{request}",
        "What became of what was asked for",
        Request,
        lambda a, call: a.request(call.name),
        name="request",
        fails=(404,),
    ),
    _post(
        "/requests/{request}/cancel",
        "End all runs of a request",
        Request,
        lambda a, call: a.cancel_request(call.name),
        name="request",
        accepted=True,
        fails=(404,),
    ),
    _get("/targets", "All targets, and what is wrong with any", Targets, lambda a, _: a.targets()),
    _get(
        "/targets/{target}/snapshots",
        "What is on a target",
        Snapshots,
        lambda a, call: a.snapshots(call.name, call.query),
        name="target",
        query=SnapshotsQuery,
        fails=(404, 502),
    ),
    _get("/jobs", "All jobs, and when each is due", Jobs, lambda a, _: a.jobs()),
    _post(
        "/jobs/{job}/run",
        "Run a job now",
        Request,
        lambda a, call: a.start_job(call.name),
        name="job",
        accepted=True,
        fails=(404, 409, 503),
    ),
    _post(
        "/prune",
        "Remove what retention does not keep, or say what that is",
        Request,
        lambda a, call: a.prune(call.body),
        body=PruneOrder,
        accepted=True,
        fails=(404, 409, 503),
    ),
    _post(
        "/cleanup",
        "Put right what dead runs have left anywhere",
        Cleanup,
        lambda a, call: a.clean_up(call.body),
        body=CleanupOrder,
        fails=(409, 502),
    ),
)
