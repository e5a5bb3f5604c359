"""Runs under way and over, as the API and `vmfleece run` show them."""

from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orchestrator.errors import UnknownName
from orchestrator.model import RunResult, RunState
from orchestrator.service.api.base import RunsQuery
from orchestrator.service.documents import RunDetails, Runs, RunSummary
from orchestrator.service.status import Status
from orchestrator.state.catalogue import Catalogue, Entry

_RESULT: TypeAdapter[RunResult] = TypeAdapter(RunResult)
OVER = (RunState.SUCCEEDED, RunState.WARNING, RunState.FAILED, RunState.CANCELLED, RunState.LOST)
"""How a run can have ended; any other state is one of a run under way."""


def runs(catalogue: Catalogue | None, query: RunsQuery, live: Status) -> Runs:
    """Those that are meant, the latest first. `catalogue` None: there is no history yet. Blocks."""
    under_way = list(_under_way(live))
    known = {one.run for one in under_way}
    found = [one for one in under_way if _is_meant(one, query)]
    if catalogue is not None and (query.state is None or query.state in OVER):
        outcomes = None if query.state is None else [None if query.state is RunState.LOST else query.state.value]
        entries = catalogue.entries(vm=query.vm, job=query.job, outcomes=outcomes, limit=query.limit + len(known))
        found += [_summary(entry) for entry in entries if entry.run not in known]
    found.sort(key=lambda one: one.started, reverse=True)
    return Runs(tuple(found[: query.limit]))


def run(catalogue: Catalogue | None, identity: str, live: Status) -> RunDetails:
    """One run. Blocks. Raises UnknownName."""
    for one in live.runs:
        if one.run == identity:
            return RunDetails(one.run, one.vm, one.job, RunState(one.phase), one.started, progress=one)
    for waits in live.queue:
        if waits.run == identity:
            return RunDetails(waits.run, waits.vm, waits.job, RunState.QUEUED, waits.started, waiting=waits)
    entry = catalogue.entry(identity) if catalogue is not None else None
    if entry is None:
        raise UnknownName(
            "run", identity, place="the history", hint="`vmfleece run list` tells the runs that there are"
        )
    return RunDetails(entry.run, entry.vm, entry.job, _state(entry), entry.started, result=_result(entry.result))


def _under_way(live: Status) -> Iterable[RunSummary]:
    for one in live.runs:
        state = RunState(one.phase)
        yield RunSummary(one.run, one.vm, one.job, state, one.started, copied_bytes=one.copied_bytes)
    for waits in live.queue:
        yield RunSummary(waits.run, waits.vm, waits.job, RunState.QUEUED, waits.started)


def _is_meant(one: RunSummary, query: RunsQuery) -> bool:
    return (
        query.vm in (None, one.vm)
        and query.job in (None, one.job)
        and (query.state is None or query.state is one.state)
    )


def _state(entry: Entry) -> RunState:
    return RunState.LOST if entry.outcome is None else RunState(entry.outcome)


def _summary(entry: Entry) -> RunSummary:
    result = _result(entry.result)
    if result is None:
        return RunSummary(entry.run, entry.vm, entry.job, _state(entry), entry.started)
    return RunSummary(
        entry.run,
        entry.vm,
        entry.job,
        _state(entry),
        entry.started,
        duration_seconds=result.duration_seconds,
        snapshot=result.snapshot,
        kind=result.kind,
        copied_bytes=sum(disk.copied_bytes for disk in result.disks),
        error=result.error,
    )


def _result(document: dict[str, Any] | None) -> RunResult | None:
    """What a run left, also one of an older vmfleece; None if that cannot be read any more."""
    if document is None:
        return None
    try:
        return _RESULT.validate_python(document)
    except ValidationError:
        return None
