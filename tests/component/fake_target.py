"""A target in memory: what a run needs of one, in microseconds and without QEMU's tools."""

import asyncio
import hashlib
import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from orchestrator.errors import TargetError
from orchestrator.model import Disk
from orchestrator.qemu.commands import CLUSTER_BYTES
from orchestrator.target.base import (
    Draft,
    FileSink,
    OnBytes,
    Snapshot,
    SnapshotDisk,
    Target,
    Verification,
    untold,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from orchestrator.target.extra_files import ExtraFile


class FakeTarget(Target):
    """See the contract, `Target`. `drafts` are those neither committed nor aborted."""

    granule_bytes = CLUSTER_BYTES
    reads_sinks = True

    def __init__(self, name: str, *, max_runs: int | None = None) -> None:
        self.name = name
        self.max_runs = max_runs
        self.listed: list[Snapshot] = []
        self.begun = 0
        self.compresses = False
        self.losing = asyncio.Event()
        self.drafts: list[FakeDraft] = []
        self.contents: dict[tuple[str, str], bytes] = {}
        self.files: dict[str, list[ExtraFile]] = {}
        self.before: Callable[[str], None] = lambda _step: None
        """Called with the name of each step that is about to be done; may raise."""

    async def prepare(self) -> None:
        await self.step("prepare")

    async def begin(self, vm: str, started: datetime) -> "FakeDraft":
        await self.step("begin")
        return FakeDraft(self, vm, started)

    async def snapshots(self, vm: str | None = None) -> list[Snapshot]:
        return [snapshot for snapshot in self.listed if vm in (None, snapshot.vm)]

    async def extract(self, snapshot: Snapshot, disk: str, *, to: Path, image_format: str) -> None:
        raise NotImplementedError

    def exported(
        self, snapshot: Snapshot, disks: "Sequence[str]", folder: Path
    ) -> "AbstractAsyncContextManager[Mapping[str, str]]":
        raise NotImplementedError

    async def look_up(self, wanted: str) -> Snapshot | None:
        raise NotImplementedError

    async def extra_files(self, snapshot: Snapshot) -> "list[ExtraFile]":
        raise NotImplementedError

    async def verify(self, snapshot: Snapshot, *, share: float) -> Verification:
        raise NotImplementedError

    async def leftovers(self) -> list[str]:
        return []

    async def clear(self) -> None:
        await self.step("clear")

    async def remove(self, snapshot: Snapshot) -> None:
        await self.step("remove")
        listed = next((one for one in self.listed if one.id == snapshot.id), None)
        if listed is None:
            return
        if listed.protected:
            raise TargetError(f"snapshot {snapshot.id} is protected", code="protected")
        needed_by = [one.id for one in self.listed if snapshot.id in one.parents]
        needed_by += [one.snapshot_id for one in self.drafts if snapshot.id in one.parents.values()]
        if needed_by:
            raise TargetError(f"snapshot {snapshot.id} is needed by {', '.join(needed_by)}", code="needed")
        self.listed.remove(listed)

    async def merge(self, snapshot: Snapshot, on_progress: OnBytes = untold) -> None:
        await self.step("merge")
        on_progress(1, 2)
        for position, one in enumerate(self.listed):
            if one.id == snapshot.id:
                disks = tuple(replace(disk, parent=None) for disk in one.disks)
                self.listed[position] = replace(one, kind="full", disks=disks)
                return
        raise TargetError(f"there is no snapshot {snapshot.id} any more", code="no-snapshot")

    async def protect(self, snapshot: Snapshot, *, protected: bool) -> Snapshot:
        await self.step("protect")
        for position, one in enumerate(self.listed):
            if one.id == snapshot.id:
                self.listed[position] = replace(one, protected=protected)
                return self.listed[position]
        raise TargetError(f"there is no snapshot {snapshot.id} any more", code="no-snapshot")

    async def step(self, name: str) -> None:
        """Let others run, as each step of a real target does."""
        await asyncio.sleep(0)
        self.before(name)


class FakeDraft(Draft):
    """See the contract, `Draft`."""

    def __init__(self, target: FakeTarget, vm: str, started: datetime) -> None:
        self.snapshot_id = f"{vm}/{target.begun}"
        target.begun += 1
        self._target = target
        self._vm = vm
        self._started = started
        self._files: dict[str, int] = {}
        self._sealed: dict[str, SnapshotDisk] = {}
        self.parents: dict[str, str | None] = {}
        target.drafts.append(self)

    async def add_disk(self, disk: Disk, *, compressible: bool, parent: str | None = None) -> FileSink:
        await self._target.step("add_disk")
        self.parents[disk.id] = parent
        self._files[disk.id] = os.memfd_create(f"target-{disk.id}")
        os.ftruncate(self._files[disk.id], disk.size_bytes)
        if parent is not None:
            os.pwrite(self._files[disk.id], self._target.contents[parent, disk.id], 0)
        return FileSink(self._files[disk.id], compress=compressible and self._target.compresses)

    async def why_unwritten(self, disk: Disk) -> TargetError | None:  # noqa: ARG002
        return None

    async def lost(self) -> NoReturn:
        while True:
            await self._target.losing.wait()
            raise TargetError("the target is gone", code="target-gone")

    async def cut_off(self) -> None:
        await self._target.step("cut_off")

    async def seal(self, disk: Disk) -> SnapshotDisk:
        await self._target.step("seal")
        descriptor = self._files.pop(disk.id)
        content = os.pread(descriptor, disk.size_bytes, 0)
        os.close(descriptor)
        self._target.contents[self.snapshot_id, disk.id] = content
        parent = self.parents[disk.id]
        # What it stores of one that builds on another is not its content alone.
        digest = hashlib.sha256(content + str(parent or "").encode()).hexdigest()
        self._sealed[disk.id] = SnapshotDisk(disk.id, disk.size_bytes, digest, len(content), parent)
        return self._sealed[disk.id]

    async def commit(self, details: dict[str, Any], files: "Sequence[ExtraFile]" = ()) -> Snapshot:
        await self._target.step("commit")
        disks = tuple(self._sealed.values())
        snapshot = Snapshot(
            self.snapshot_id, self._target.name, self._vm, self._started, str(details["kind"]), disks, details
        )
        self._target.listed.append(snapshot)
        self._target.files[snapshot.id] = list(files)
        self._target.drafts.remove(self)
        return snapshot

    async def abort(self) -> None:
        await self._target.step("abort")
        while self._files:
            os.close(self._files.popitem()[1])
        if self in self._target.drafts:
            self._target.drafts.remove(self)
