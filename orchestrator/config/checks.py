"""What no single key can tell: references between tables, and paths that meet."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from orchestrator.config.draft import Draft, Problem, missing
from orchestrator.config.schema import JobTable, StorageTable, TargetTable
from orchestrator.config.select import matching, select
from orchestrator.config.settings import TargetDriver
from orchestrator.model import Compression, Consistency, FleecingPolicy

_NEEDS_FLEECING = (
    "is a repository, which is written chunk by chunk and cannot be read back by QEMU, "
    "so it needs a fleecing image"
)


def cross_check(draft: Draft) -> Iterator[Problem]:
    """Yield every problem that takes more than one key to see."""
    yield from _sockets(draft)
    yield from _folders(draft)
    for name, target in draft.target.items():
        yield from _driver(name, target)
    for name, job in draft.job.items():
        yield from _references(draft, name, job)
        yield from _selection(draft, name, job)
        yield from _agents(draft, name, job)


def _sockets(draft: Draft) -> Iterator[Problem]:
    owners: dict[Path, str] = {}
    for name, vm in draft.vm.items():
        for key, socket in (("qmp", vm.qmp), ("agent", vm.agent)):
            if socket is None:
                continue
            owner = owners.setdefault(_resolve(socket), f"{name}.{key}")
            if owner != f"{name}.{key}":
                text = f"{str(socket)!r} is the socket of vm.{owner} too; allowed: one of its own"
                yield Problem(("vm", name, key), text)


def _folders(draft: Draft) -> Iterator[Problem]:
    seen: list[tuple[str, str]] = []
    tables: Mapping[str, Mapping[str, StorageTable | TargetTable]]
    tables = {"storage": draft.storage, "target": draft.target}
    for section, named in tables.items():
        for name, table in named.items():
            for key, given, place in _places(table):
                for other, other_place in seen:
                    if how := _meets(place, other_place):
                        text = (
                            f"{given!r} {how} {other}, {other_place!r}; "
                            "allowed: a folder apart from all other storages and targets"
                        )
                        yield Problem((section, name, key), text)
                seen.append((f"{section}.{name}.{key}", place))


def _places(table: StorageTable | TargetTable) -> Iterator[tuple[str, str, str]]:
    """Yield key, value and resolved value of each place that a table gives."""
    if table.path is not None:
        yield "path", str(table.path), str(_resolve(table.path))
    if isinstance(table, TargetTable) and table.url is not None:
        yield "url", table.url, table.url


def _meets(place: str, other: str) -> str:
    if place == other:
        return "is the same folder as"
    folder, other_folder = f"{place.rstrip('/')}/", f"{other.rstrip('/')}/"
    if folder.startswith(other_folder):
        return "lies inside"
    return "contains" if other_folder.startswith(folder) else ""


def _driver(name: str, table: TargetTable) -> Iterator[Problem]:
    """Yield what does not fit the target's driver. A key that is given but None has a problem already."""
    given, path = table.model_fields_set, ("target", name)
    if table.driver is None:
        return
    if not {"path", "url"} & given:
        yield Problem((*path, "path"), missing(TargetTable, "path"))
    if table.driver == TargetDriver.RESTIC:
        if {"path", "url"} <= given:
            yield Problem((*path, "url"), "path is given, too; allowed: one of them")
        if "compress" in given and table.compress is Compression.NONE:
            text = "'none' is not allowed: what is in a repository is always compressed; allowed: 'zstd'"
            yield Problem((*path, "compress"), text)
    else:
        for key in ("url", "password_file", "reclaim"):
            if key in given:
                text = "not for driver 'images', a folder of qcow2 files; allowed: with driver = \"restic\""
                yield Problem((*path, key), text)


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
    if _writes_repository(draft, job):
        yield from _repository(draft, name, job)
    elif wants_fleecing(draft, job) and not draft.storage and storage is None:
        key = "fleecing" if job.fleecing else "fleecing_policy"
        text = (
            "fleecing is required but there is no storage; "
            "allowed: with a [storage.NAME], or fleecing_policy = 'prefer'"
        )
        yield Problem(("job", name, key), text)


def _repository(draft: Draft, name: str, job: JobTable) -> Iterator[Problem]:
    """Yield what does not fit a job that writes to a repository: no fleecing images, and chains."""
    target = f"target {job.target!r} {_NEEDS_FLEECING}"
    if job.fleecing and not job.fleecing.enabled:
        yield Problem(("job", name, "fleecing"), f"{target}; allowed: enabled=1")
    elif not draft.storage and not (job.fleecing and job.fleecing.storage):
        text = f"{target}, and there is no storage; allowed: with a [storage.NAME]"
        yield Problem(("job", name, "target"), text)
    if job.fleecing_policy is FleecingPolicy.PREFER:
        yield Problem(("job", name, "fleecing_policy"), f"{target}; allowed: 'require'")
    for key, allowed in (("full_every", "0"), ("merge_chains", "false")):
        if getattr(job, key):
            text = (
                f"target {job.target!r} is a repository, where no snapshot builds on another; allowed: {allowed}"
            )
            yield Problem(("job", name, key), text)


def _writes_repository(draft: Draft, job: JobTable) -> bool:
    target = draft.target.get(job.target)
    return target is not None and target.driver == TargetDriver.RESTIC


def wants_fleecing(draft: Draft, job: JobTable) -> bool:
    """Say whether the job shall fail where fleecing cannot be had: by default if it or its target asks for it."""
    if _writes_repository(draft, job):
        return True
    if job.fleecing is not None and not job.fleecing.enabled:
        return False
    if job.fleecing_policy is not None:
        return job.fleecing_policy is FleecingPolicy.REQUIRE
    return job.fleecing is not None


def _agents(draft: Draft, name: str, job: JobTable) -> Iterator[Problem]:
    if job.consistency is not Consistency.FREEZE or job.vms is None:
        return
    without = [vm for vm in select(job.vms, job.exclude or [], draft.vm) if draft.vm[vm].agent is None]
    if without:
        text = (
            f"'freeze' needs a guest agent, and there is none of {', '.join(without)}; "
            "allowed: with vm.NAME.agent, or 'pause'"
        )
        yield Problem(("job", name, "consistency"), text)


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
