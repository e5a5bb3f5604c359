"""Snapshots of VMs in a repository of restic's format: one for each run, with one file for each disk.

They are written by a process of its own for each run (`draft`, `mover`), and read by whoever wants them
(`contents`). Nothing in a repository builds on something else: each snapshot lists all of its chunks. What nobody
lists is freed by `restic prune` (`restic_tool`), beside which nobody of us works, since all of us hold a lock.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog

from orchestrator import aio
from orchestrator.errors import TargetError
from orchestrator.target import extra_files
from orchestrator.target.base import (
    OnBytes,
    Snapshot,
    SnapshotDisk,
    Target,
    Verification,
    gone,
    protected_error,
    snapshot_id,
    untold,
)
from orchestrator.target.extra_files import ExtraFile
from orchestrator.target.mover.process import Mover
from orchestrator.target.repository import contents, listing
from orchestrator.target.repository.draft import RepositoryDraft
from orchestrator.target.restic.errors import BackendError, Damaged
from orchestrator.target.restic.pack import CHUNK_BYTES
from orchestrator.target.restic.place import backend_at
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.snapshot import ResticSnapshot
from orchestrator.target.restic.tree import FileContent
from orchestrator.target.restic.writer import VM_FILE

log = structlog.get_logger(__name__)

SHORTEST_ID = 8
"""Digits of an id of restic's that say which snapshot is meant."""
_WRONG = "content-wrong"
_UNWRITABLE = ("target-unwritable", "target-full")
"""Codes of a BackendError without which a lock could be written."""


class RepositoryTarget(Target):
    """See the contract, `Target`. `password` reads the password; it blocks, and raises TargetError."""

    granule_bytes = CHUNK_BYTES
    reads_sinks = False

    def __init__(self, name: str, place: str, password: Callable[[], str], *, max_runs: int | None = None) -> None:
        self.name = name
        self.place = place
        self.max_runs = max_runs
        self._password = password
        self._opening = asyncio.Lock()
        self._repository: Repository | None = None
        self._read: dict[bytes, Snapshot | None] = {}
        self._begun: set[str] = set()  # the names of drafts, and of what became of them

    async def repository(self) -> Repository:
        """The repository, opened when it is first needed. Raises TargetError."""
        async with self._opening:
            if self._repository is None:
                password = await asyncio.to_thread(self._password)
                self._repository = await Repository.open(backend_at(self.place), password)
            return self._repository

    async def prepare(self) -> None:
        opened = await self.repository()
        try:
            await Repository.open_again(backend_at(self.place), opened.opened)
        except Damaged:  # another one was made there since it was opened
            self._repository = None
            await self.repository()

    async def begin(self, vm: str, started: datetime) -> RepositoryDraft:
        taken = {snapshot.id for snapshot in await self.snapshots(vm)}
        repository = await self.repository()
        mover = await aio.Kept.opened(Mover.started(self.place, repository.opened))
        created = started.astimezone(UTC).replace(microsecond=0)
        while (name := snapshot_id(vm, created)) in taken | self._begun:
            created += timedelta(seconds=1)
        self._begun.add(name)
        return RepositoryDraft(self, vm, name, created, mover)

    def give_up(self, name: str) -> None:
        """A draft of that name is none any more."""
        self._begun.discard(name)

    async def snapshots(self, vm: str | None = None) -> list[Snapshot]:
        found: dict[str, Snapshot] = {}
        for _, snapshot in await self.listed(vm):
            known = found.setdefault(snapshot.id, snapshot)
            if snapshot.protected and not known.protected:
                found[snapshot.id] = replace(known, protected=True)
        return sorted(found.values(), key=lambda one: (one.vm, one.created))

    async def listed(self, vm: str | None = None) -> list[tuple[ResticSnapshot, Snapshot]]:
        """The snapshots of VMs, each with restic's.

        One may be there several times: where `restic rewrite` kept the old one, or who exchanged it died. What is
        known to be as it was made comes first, then what is not known to be less.
        """
        repository = await self.repository()
        found = await repository.snapshots()
        for damage in found.damaged:  # one broken snapshot must not hide the others
            log.warning("snapshot.unreadable", target=self.name, error=str(damage))
        wanted = [made for made in found.snapshots if vm in (None, made.hostname)]
        noted = [(made, snapshot) for made in wanted if made.note and (snapshot := self._noted(made)) is not None]
        unknown = [made for made in wanted if not made.note and listing.may_be_ours(made)]
        unknown.sort(key=lambda made: not listing.BESIDE.isdisjoint(made.tags))
        return noted + await self._look_into(repository, unknown) if unknown else noted

    def _noted(self, made: ResticSnapshot) -> Snapshot | None:
        try:
            return listing.described(made, made.note, target=self.name)
        except TargetError as error:
            log.warning("snapshot.unreadable", target=self.name, error=str(error))
            return None

    async def _look_into(
        self, repository: Repository, unknown: Sequence[ResticSnapshot]
    ) -> list[tuple[ResticSnapshot, Snapshot]]:
        """Those that have a `vm.json`, which takes the index to read; so what it says is remembered."""
        found = []
        loaded = False
        for made in unknown:
            assert made.identity is not None  # noqa: S101  it was read
            if made.identity not in self._read:
                try:
                    if not loaded:
                        await repository.load_index()
                        loaded = True
                    self._read[made.identity] = await self._read_vm_json(repository, made)
                except TargetError as error:
                    log.warning("snapshot.unreadable", target=self.name, error=str(error))
                    continue
            if (snapshot := self._read[made.identity]) is not None:
                found.append((made, snapshot))
        return found

    async def _read_vm_json(self, repository: Repository, made: ResticSnapshot) -> Snapshot | None:
        document = await _vm_json(repository, made)
        return listing.described(made, document, target=self.name) if document is not None else None

    async def look_up(self, wanted: str) -> Snapshot | None:
        if len(wanted) < SHORTEST_ID or not set(wanted) <= set("0123456789abcdef"):
            return None
        async with self._reading() as repository:
            for made in (await repository.snapshots()).snapshots:
                assert made.identity is not None  # noqa: S101  it was read
                if made.identity.hex().startswith(wanted):
                    files = dict(await asyncio.to_thread(list, _files(repository, made.tree)))
                    return _of_restic(made, files, target=self.name)
        return None

    async def extract(self, snapshot: Snapshot, disk: str, *, to: Path, image_format: str) -> None:
        async with self._contents(snapshot, [disk]) as (repository, found):
            await contents.extract(
                repository, found[disk], name=f"disk {disk} of {snapshot.id}", to=to, image_format=image_format
            )

    @contextlib.asynccontextmanager
    async def exported(
        self, snapshot: Snapshot, disks: Sequence[str], folder: Path
    ) -> AsyncIterator[Mapping[str, str]]:
        async with (
            self._contents(snapshot, disks) as (repository, found),
            contents.exported(repository, found, folder) as uris,
        ):
            yield uris

    async def extra_files(self, snapshot: Snapshot) -> list[ExtraFile]:
        async with self._reading() as repository:
            made = await self._made(snapshot)
            with _damage_named(snapshot):
                document = await _vm_json(repository, made) if _is_listed(snapshot) else None
        return extra_files.decode((document or {}).get(extra_files.NAME, []), snapshot=snapshot.id)

    async def verify(self, snapshot: Snapshot, *, share: float) -> Verification:
        try:
            async with self._contents(snapshot, [disk.disk for disk in snapshot.disks]) as (repository, found):
                return await contents.verify(repository, found, share=share)
        except TargetError as error:
            if error.code != _WRONG:
                raise
            return Verification(0, sum(disk.size_bytes for disk in snapshot.disks), (error.message,))

    async def leftovers(self) -> list[str]:
        return []

    async def clear(self) -> None:
        await (await self.repository()).remove_stale_locks()

    async def remove(self, snapshot: Snapshot) -> None:
        wanted = await self.all_of(snapshot)
        if any(listing.PROTECTED in made.tags for made in wanted):
            raise protected_error(snapshot)
        await aio.finish(self._forget(wanted))

    async def _forget(self, wanted: Sequence[ResticSnapshot]) -> None:
        repository = await self.repository()
        for made in wanted:
            await repository.forget(made)

    async def merge(self, snapshot: Snapshot, on_progress: OnBytes = untold) -> None:  # noqa: ARG002  nothing to do
        await self._made(snapshot)  # it holds all of its content itself, if it is there

    async def protect(self, snapshot: Snapshot, *, protected: bool) -> Snapshot:
        repository = await self.repository()
        async with repository.lock():
            for made in await self.all_of(snapshot):
                if (listing.PROTECTED in made.tags) is not protected:
                    others = [tag for tag in made.tags if tag != listing.PROTECTED]
                    await repository.replace(made, tags=[*others, listing.PROTECTED] if protected else others)
            for one in await self.snapshots(snapshot.vm):
                if one.id == snapshot.id:
                    return one
            raise gone(snapshot.id)

    async def all_of(self, snapshot: Snapshot) -> list[ResticSnapshot]:
        """All that restic has of a listed snapshot; see `listed`."""
        return [made for made, one in await self.listed(snapshot.vm) if one.id == snapshot.id]

    async def _made(self, snapshot: Snapshot) -> ResticSnapshot:
        """What restic has of a snapshot. TargetError's code is "no-snapshot" if it is gone."""
        found = await (await self.repository()).snapshots()
        wanted = bytes.fromhex(snapshot.details[listing.RESTIC_ID])
        made = found.find(wanted)
        if made is None:
            made = next(iter(await self.all_of(snapshot)), None)
        if made is None:
            raise gone(snapshot.id)
        return made

    @contextlib.asynccontextmanager
    async def _contents(
        self, snapshot: Snapshot, disks: Sequence[str]
    ) -> AsyncIterator[tuple[Repository, dict[str, FileContent]]]:
        """The repository, and where the content of disks is, both for the block."""
        async with self._reading() as repository:
            made = await self._made(snapshot)
            with _damage_named(snapshot):
                files = dict(await asyncio.to_thread(list, _files(repository, made.tree)))
            found = {}
            for disk in disks:
                one = snapshot.disk(disk)  # raises what names those there are
                content = files.get(listing.disk_file(disk) if _is_listed(snapshot) else disk)
                if content is None or content.size_bytes != one.size_bytes:
                    raise TargetError(
                        f"snapshot {snapshot.id} does not hold disk {disk} as it says",
                        hint="see with `restic ls` what is in it, and who rewrote it",
                        code=_WRONG,
                    )
                found[disk] = content
            yield repository, found

    @contextlib.asynccontextmanager
    async def _reading(self) -> AsyncIterator[Repository]:
        """The repository with its index, locked so that nobody prunes it, unless it cannot be written to."""
        repository = await self.repository()
        async with contextlib.AsyncExitStack() as holding:
            try:
                await holding.enter_async_context(repository.lock())
            except BackendError as error:
                if error.code not in _UNWRITABLE:
                    raise
                log.warning("repository.unlocked", target=self.name, error=str(error))
            await repository.load_index()
            yield repository


def _is_listed(snapshot: Snapshot) -> bool:
    """Whether it is a VM's; else it was looked up, and what it calls its disks are the paths of files."""
    return "/" in snapshot.id


@contextlib.contextmanager
def _damage_named(snapshot: Snapshot) -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        raise TargetError(
            f"snapshot {snapshot.id} cannot be read: {error.message}", hint=error.hint, code=_WRONG
        ) from error


async def _vm_json(repository: Repository, made: ResticSnapshot) -> dict[str, Any] | None:
    content = (await repository.files(made)).get(VM_FILE)
    if content is None:
        return None
    text = b"".join(await asyncio.to_thread(list, repository.read_file(content)))
    return listing.read_vm_json(text, file=VM_FILE)


def _files(repository: Repository, tree: bytes, folder: str = "") -> Iterator[tuple[str, FileContent]]:
    """All files below a tree, by their paths from there. Blocks. Raises as `Repository.read_tree`."""
    for node in repository.read_tree(tree):
        if node.kind == "file":
            yield folder + node.name, node.content
        elif node.kind == "dir" and node.subtree is not None:
            yield from _files(repository, node.subtree, f"{folder}{node.name}/")


def _of_restic(made: ResticSnapshot, files: Mapping[str, FileContent], *, target: str) -> Snapshot:
    """A snapshot that any program made: its files, by their paths, as disks."""
    assert made.identity is not None  # noqa: S101  it was read
    return Snapshot(
        id=made.identity.hex()[:SHORTEST_ID],
        target=target,
        vm=made.hostname,
        created=made.time,
        kind="full",
        disks=tuple(SnapshotDisk(name, content.size_bytes, None, 0) for name, content in files.items()),
        details={listing.RESTIC_ID: made.identity.hex()},
    )
