"""What no single key can tell: references between tables, and paths that meet."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from orchestrator.config.draft import Draft, Problem
from orchestrator.config.schema import JobTable, StorageTable, TargetTable
from orchestrator.config.select import matching, select
from orchestrator.model import FleecingPolicy


def cross_check(draft: Draft) -> Iterator[Problem]:
    """Yield every problem that takes more than one key to see."""
    yield from _sockets(draft)
    yield from _folders(draft)
    for name, job in draft.job.items():
        yield from _references(draft, name, job)
        yield from _selection(draft, name, job)


def _sockets(draft: Draft) -> Iterator[Problem]:
    owners: dict[Path, str] = {}
    for name, vm in draft.vm.items():
        if vm.qmp is None:
            continue
        owner = owners.setdefault(_resolve(vm.qmp), name)
        if owner != name:
            text = f"{str(vm.qmp)!r} is the socket of vm.{owner} too; allowed: one of its own"
            yield Problem(("vm", name, "qmp"), text)


def _folders(draft: Draft) -> Iterator[Problem]:
    seen: list[tuple[str, Path]] = []
    tables: Mapping[str, Mapping[str, StorageTable | TargetTable]]
    tables = {"storage": draft.storage, "target": draft.target}
    for section, named in tables.items():
        for name, table in named.items():
            if table.path is None:
                continue
            path = _resolve(table.path)
            for other, other_path in seen:
                if how := _meets(path, other_path):
                    text = (
                        f"{str(table.path)!r} {how} {other}.path, {str(other_path)!r}; "
                        "allowed: a folder apart from all other storages and targets"
                    )
                    yield Problem((section, name, "path"), text)
            seen.append((f"{section}.{name}", path))


def _meets(path: Path, other: Path) -> str:
    if path == other:
        return "is the same folder as"
    if path.is_relative_to(other):
        return "lies inside"
    return "contains" if other.is_relative_to(path) else ""


def _resolve(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, bears loops of links


def _references(draft: Draft, name: str, job: JobTable) -> Iterator[Problem]:
    if job.target is not None and job.target not in draft.target:
        text = f"there is no target {job.target!r}; targets: {_listed(draft.target)}"
        yield Problem(("job", name, "target"), text)
    storage = job.fleecing.storage if job.fleecing else None
    if storage is not None and storage not in draft.storage:
        text = f"there is no storage {storage!r}; storages: {_listed(draft.storage)}"
        yield Problem(("job", name, "fleecing", "storage"), text)
    if wants_fleecing(job) and not draft.storage and storage is None:
        key = "fleecing" if job.fleecing else "fleecing_policy"
        text = (
            "fleecing is required but there is no storage; "
            "allowed: with a [storage.NAME], or fleecing_policy = 'prefer'"
        )
        yield Problem(("job", name, key), text)


def wants_fleecing(job: JobTable) -> bool:
    """Say whether the job shall fail where fleecing cannot be had: by default if it asks for it."""
    if job.fleecing is not None and not job.fleecing.enabled:
        return False
    if job.fleecing_policy is not None:
        return job.fleecing_policy is FleecingPolicy.REQUIRE
    return job.fleecing is not None


def _selection(draft: Draft, name: str, job: JobTable) -> Iterator[Problem]:
    if job.vms is None:
        return
    useless = [(index, pattern) for index, pattern in enumerate(job.vms) if not matching([pattern], draft.vm)]
    for index, pattern in useless:
        text = f"no VM is called {pattern!r}; VMs: {_listed(draft.vm)}"
        yield Problem(("job", name, "vms", index), text)
    if not useless and job.exclude and not select(job.vms, job.exclude, draft.vm):
        text = f"{job.exclude!r} leaves none of the job's VMs; VMs: {_listed(draft.vm)}"
        yield Problem(("job", name, "exclude"), text)


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "none"
