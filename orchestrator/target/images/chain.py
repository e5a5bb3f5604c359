"""What a disk's content is read from: its snapshot's image, and those that this one builds on.

None of them carries checksums of its own. Each is known by the hash of its file, so the backing file's name in a
header is checked with the rest; one that was merged is known by the hash of its content, which is the same before
and after its file is exchanged. All are checked with one pass over each. A reader holds every folder of the chain,
and reads its manifest only once it has it: nobody removes or changes the images meanwhile.
"""

import asyncio
import contextlib
import fcntl
import os
import random
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import aio
from orchestrator.errors import TargetError, ToolError, VmfleeceError
from orchestrator.qemu import reading, tools
from orchestrator.target import restored
from orchestrator.target.base import HashOf, Snapshot, SnapshotDisk, Verification, gone
from orchestrator.target.images import locks, manifest, qcow2
from orchestrator.target.images.errors import explained

_ANOTHER_ONE = "restore one that does not build on it, or one of another target"


@dataclass(frozen=True, slots=True)
class Link:
    """One image of a chain: whose it is, where, and what its manifest says of it."""

    snapshot: str
    image: Path
    disk: SnapshotDisk


class Held:
    """A snapshot's disks and all that they are read from. Its folder is as it is until `let_go`."""

    def __init__(self, vm_folder: Path, snapshot: str, disks: Iterable[str], *, target: str) -> None:
        self._vm_folder = vm_folder
        self._target = target
        self._locks: dict[str, int] = {}
        self._known: dict[str, Snapshot] = {}
        try:
            found = self._look(snapshot)
            if found is None:
                raise gone(snapshot)
            self.snapshot = found
            self.links = {disk: tuple(self._follow(found, disk)) for disk in disks}
            """Of each disk, newest first."""
        except BaseException:
            self._close()
            raise

    @property
    def folder(self) -> Path:
        """Where the snapshot is."""
        return self._folder(self.snapshot.id)

    def lock_alone(self) -> bool:
        """Whether nobody else has the snapshot's folder; then it is ours alone, else it is held no longer.

        The VM's folder must be locked: the kernel gives up one lock before it tries to get the other.
        """
        try:
            fcntl.flock(self._locks[self.snapshot.id], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def share(self) -> None:
        """After `lock_alone`, with the VM's folder still locked: let others have the snapshot's folder, too."""
        fcntl.flock(self._locks[self.snapshot.id], fcntl.LOCK_SH)

    async def let_go(self) -> None:
        """Give the folders back."""
        self._close()

    def _close(self) -> None:
        while self._locks:
            os.close(self._locks.popitem()[1])

    def _folder(self, snapshot: str) -> Path:
        return self._vm_folder / snapshot.rpartition("/")[2]

    def _look(self, snapshot: str) -> Snapshot | None:
        """Hold a snapshot, and read its manifest after that; None if it is gone."""
        if snapshot not in self._known:
            folder = self._folder(snapshot)
            with explained(self._target, folder):
                lock = locks.hold(folder)
            if lock is None:
                return None
            self._locks[snapshot] = lock
            self._known[snapshot] = manifest.read(folder / manifest.NAME, target=self._target)
        return self._known[snapshot]

    def _follow(self, newest: Snapshot, disk: str) -> Iterator[Link]:
        one, seen = newest, set[str]()
        while True:
            seen.add(one.id)
            link = Link(one.id, self._folder(one.id) / manifest.disk_file(disk), one.disk(disk))
            yield link
            if link.disk.parent is None:
                return
            parent = self._look(link.disk.parent) if link.disk.parent not in seen else None
            if parent is None:
                raise _missing(one.id, link.disk.parent)
            one = parent


@contextlib.asynccontextmanager
async def held(vm_folder: Path, snapshot: str, disks: Iterable[str], *, target: str) -> AsyncIterator[Held]:
    """All that a snapshot's disks are read from, kept as it is for the block.

    TargetError's code is "no-snapshot" if the snapshot is gone, "content-wrong" if something that it builds on is.
    """
    holding = asyncio.to_thread(Held, vm_folder, snapshot, disks, target=target)
    found = await aio.acquire(holding, Held.let_go)
    try:
        yield found
    finally:
        await found.let_go()


async def read(links: Sequence[Link], work: Coroutine[Any, Any, None]) -> None:
    """Await what reads the content, and check what it is read from.

    Raises what `work` does, and as `check` does; that comes first, since it is the reason of the other.
    """
    failure, _ = await aio.all_or_first_error((_failure(work), check(links)))
    if failure is not None:
        raise failure


async def restore(links: Sequence[Link], to: Path, image_format: str) -> None:
    """Write the content to a file or block device, and see that it is right. TargetError as `Target.extract`."""
    device = await asyncio.to_thread(to.is_block_device)
    await read(links, _write(links[0], to, image_format, into_existing=device))


async def _write(newest: Link, to: Path, image_format: str, *, into_existing: bool) -> None:
    await tools.convert(newest.image, "qcow2", to, image_format, into_existing=into_existing)
    name = f"disk {newest.disk.disk} of {newest.snapshot}"
    size_bytes = newest.disk.size_bytes
    await restored.settle(to, image_format, newest.image, "qcow2", name=name, size_bytes=size_bytes)


async def verify(links: Sequence[Link], *, share: float) -> Verification:
    """Check each image, or a share of them (0 to 1) chosen at random, one at least. Bytes are what they occupy."""
    chosen = random.SystemRandom().sample(links, max(1, round(share * len(links))))
    problems = []
    for link in chosen:
        try:
            await _check(link)
        except TargetError as error:
            problems.append(error.message)
    checked_bytes, total_bytes = (sum(link.disk.stored_bytes for link in some) for some in (chosen, links))
    return Verification(checked_bytes, total_bytes, tuple(problems))


async def check(links: Sequence[Link]) -> None:
    """Raise TargetError "content-wrong" that names an image of the chain that is not as it was made."""
    for link in links:
        await _check(link)


async def _failure(work: Coroutine[Any, Any, None]) -> VmfleeceError | None:
    try:
        await work
    except VmfleeceError as error:
        return error
    return None


async def _check(link: Link) -> None:
    match link.disk.sha256_of:
        case HashOf.FILE:
            await _check_file(link)
        case HashOf.CONTENT:
            await _check_content(link)


async def _check_file(link: Link) -> None:
    try:
        digest = await reading.file_sha256(link.image)
        backing = await asyncio.to_thread(qcow2.backing_name, link.image)
    except OSError as error:
        raise _damaged(link, f"it cannot be read: {error.strerror}") from error
    _compare(link, digest)
    wanted = manifest.backing_name(link.disk.disk, link.disk.parent) if link.disk.parent else ""
    if backing != wanted:
        parent = link.disk.parent or "nothing"
        raise _damaged(link, f"it builds on {backing or 'nothing'}, and its manifest says {parent}")


async def _check_content(link: Link) -> None:
    try:
        digest = await tools.sha256(link.image, "qcow2")
    except ToolError as error:
        if error.code != ToolError.code:
            raise
        raise _damaged(link, error.message) from error
    _compare(link, digest)


def _compare(link: Link, digest: str) -> None:
    if digest != link.disk.sha256:
        raise _damaged(link, f"SHA-256 {digest} instead of {link.disk.sha256}")


def _damaged(link: Link, why: str) -> TargetError:
    return TargetError(
        f"the image of disk {link.disk.disk} in snapshot {link.snapshot} is damaged: {why}",
        hint=_ANOTHER_ONE,
        code="content-wrong",
    )


def _missing(child: str, wanted: str) -> TargetError:
    return TargetError(
        f"snapshot {child} builds on {wanted}, which is not there", hint=_ANOTHER_ONE, code="content-wrong"
    )
