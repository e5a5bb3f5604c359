"""A snapshot being written to a repository: a mover process of its own, and a connection to it for each disk."""

import json
import socket
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import structlog

from orchestrator import aio
from orchestrator.errors import TargetError
from orchestrator.model import Disk
from orchestrator.target.base import Draft, NbdSink, ParentUnusable, Snapshot, SnapshotDisk, check_disk_name
from orchestrator.target.extra_files import ExtraFile
from orchestrator.target.mover.process import Mover
from orchestrator.target.repository import listing
from orchestrator.target.restic.snapshot import ResticSnapshot

if TYPE_CHECKING:
    from orchestrator.target.repository.target import RepositoryTarget

log = structlog.get_logger(__name__)


class RepositoryDraft(Draft):
    """See the contract, `Draft`."""

    def __init__(
        self, target: "RepositoryTarget", vm: str, snapshot_id: str, created: datetime, mover: aio.Kept[Mover]
    ) -> None:
        self.snapshot_id = snapshot_id
        self._target = target
        self._vm = vm
        self._created = created
        self._mover = mover
        self._connections: dict[str, socket.socket] = {}
        self._parents: dict[str, bytes] = {}
        self._disks: list[str] = []
        self._sealed: dict[str, SnapshotDisk] = {}
        self._note: dict[str, Any] | None = None
        self._committed: Snapshot | None = None

    async def add_disk(self, disk: Disk, *, compressible: bool, parent: str | None = None) -> NbdSink:
        del compressible  # the mover does that, chunk by chunk
        check_disk_name(disk)
        if disk.id in self._disks:
            raise TargetError(f"disk {disk.id} is in the draft of {self.snapshot_id} already")
        identity = await self._identity(parent) if parent is not None else None
        ours, theirs = socket.socketpair()
        try:
            await self._mover.value.add(disk.id, disk.size_bytes, theirs, parent=identity)
        except BaseException:
            ours.close()
            raise
        self._connections[disk.id] = ours
        self._disks.append(disk.id)
        if identity is not None:
            self._parents[disk.id] = identity
        return NbdSink(ours.fileno(), disk.id)

    async def _identity(self, snapshot: str) -> bytes:
        for one in await self._target.snapshots(self._vm):
            if one.id == snapshot:
                return bytes.fromhex(one.details[listing.RESTIC_ID])
        raise ParentUnusable(f"there is no snapshot {snapshot} any more")

    async def why_unwritten(self, disk: Disk) -> TargetError | None:
        return await self._mover.value.trouble(disk.id)

    async def lost(self) -> NoReturn:
        await self._mover.value.lost()

    async def cut_off(self) -> None:
        if self._committed is None:
            self._mover.value.kill()

    async def seal(self, disk: Disk) -> SnapshotDisk:
        self._connections.pop(disk.id).close()
        done = await self._mover.value.seal(disk.id)
        self._sealed[disk.id] = SnapshotDisk(disk.id, done.size_bytes, None, done.stored_bytes)
        return self._sealed[disk.id]

    async def commit(self, details: dict[str, Any], files: Sequence[ExtraFile] = ()) -> Snapshot:
        if self._committed is None:
            snapshot = Snapshot(
                id=self.snapshot_id,
                target=self._target.name,
                vm=self._vm,
                created=self._created,
                kind=str(details["kind"]),
                disks=tuple(self._sealed[disk] for disk in self._disks),
                details=details,
            )
            identity = await self._listed_as(snapshot, files)
            await self._end()
            self._committed = replace(snapshot, details=details | {listing.RESTIC_ID: identity.hex()})
        return self._committed

    async def _listed_as(self, snapshot: Snapshot, files: Sequence[ExtraFile]) -> bytes:
        """Have it listed, unless it is since an earlier call whose answer was lost; returns its id."""
        if not await self._found():
            self._note = json.loads(json.dumps(listing.note(snapshot)))
            await self._mover.value.commit(
                self._vm,
                self._created,
                listing.vm_json(snapshot, files),
                tags=listing.tags(snapshot),
                parent=next(iter(self._parents.values()), None),
                note=self._note,
            )
        (made,) = await self._found()
        # Only now, since there is no other moment at which of two writers one at least sees the other's.
        if len(await self._target.all_of(snapshot)) > 1:
            await (await self._target.repository()).forget(made)
            raise TargetError(
                f"there is a snapshot {snapshot.id} already, of somebody else's run",
                hint=f"if two VMs are called {self._vm}, on two hosts say, rename one",
                code="snapshot-exists",
            )
        assert made.identity is not None  # noqa: S101  it was read
        return made.identity

    async def _found(self) -> list[ResticSnapshot]:
        """What was listed of it. Its note tells it from others' of that name."""
        if self._note is None:
            return []
        return [made for made, _ in await self._target.listed(self._vm) if made.note == self._note]

    async def abort(self) -> None:
        if self._committed is None:
            await self._end()
            for made in await self._found():
                await (await self._target.repository()).forget(made)
            self._target.give_up(self.snapshot_id)

    async def _end(self) -> None:
        while self._connections:
            self._connections.popitem()[1].close()
        await self._mover.close()
