"""What a disk's content is read from: its snapshot's image, and those that this one builds on.

None of them carries checksums of its own. The one that stands alone is known by the hash of its content, those
that build on it by the hashes of their files: so all are checked with one pass over each, and the backing file's
name in a header is checked with the rest of the file. A reader holds every folder of the chain, and reads its
manifest only once it has it: nobody removes or changes the images meanwhile.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import random
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import aio
from orchestrator.errors import TargetError, ToolError
from orchestrator.qemu import reading, tools
from orchestrator.target.base import Content, Snapshot, SnapshotDisk, Verification, gone
from orchestrator.target.images import locks, manifest, qcow2
from orchestrator.target.images.errors import explained

_ANOTHER_ONE = "restore one that does not build on it, or one of another target"


@dataclass(frozen=True, slots=True)
class Link:
    """One image of a chain: whose it is, where, and what its manifest says of it."""

    snapshot: str
    image: Path
    disk: SnapshotDisk


class HashedContent(Content):
    """What a disk must hold, by the SHA-256 of it all, in hex."""

    def __init__(self, sha256: str) -> None:
        self.sha256 = sha256
        self._digest = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        self._digest.update(data)

    def problem(self) -> str:
        digest = self._digest.hexdigest()
        return "" if digest == self.sha256 else f"SHA-256 {digest} instead of {self.sha256}"


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


async def read(links: Sequence[Link], work: Coroutine[Any, Any, None]) -> str:
    """Await what reads the content, check what it is read from, and return the content's SHA-256 in hex.

    An image that stands alone is not checked by itself: its hash is known, and what was read is held against it.
    Raises what `work` does, and as `check` does; that comes first, since it is the reason of the other.
    """
    if len(links) == 1:
        await work
        return str(links[0].disk.sha256)
    failure, digest, _ = await aio.all_or_first_error(
        (_failure(work), _content(links[0]), check(links)),
    )
    for outcome in (failure, digest):
        if isinstance(outcome, ToolError):
            raise outcome
    return str(digest)


async def verify(links: Sequence[Link], *, share: float) -> Verification:
    """Check each image, or a share of them (0 to 1) chosen at random, one at least. Bytes are what they occupy."""
    chosen = random.SystemRandom().sample(links, max(1, round(share * len(links))))
    problems = []
    for link in chosen:
        try:
            await (_check_base(link) if link.disk.parent is None else _check_increments([link]))
        except TargetError as error:
            problems.append(error.message)
    checked_bytes, total_bytes = (sum(link.disk.stored_bytes for link in some) for some in (chosen, links))
    return Verification(checked_bytes, total_bytes, tuple(problems))


async def check(links: Sequence[Link]) -> None:
    """Raise TargetError "content-wrong" that names an image of the chain that is not as it was made."""
    *increments, base = links
    await aio.all_or_first_error((_check_base(base), _check_increments(increments)))


async def _failure(work: Coroutine[Any, Any, None]) -> ToolError | None:
    try:
        await work
    except ToolError as error:
        return error
    return None


async def _content(link: Link) -> str | ToolError:
    try:
        return await tools.sha256(link.image, "qcow2")
    except ToolError as error:
        return error


async def _check_base(link: Link) -> None:
    digest = await _content(link)
    if isinstance(digest, ToolError):
        if digest.code != ToolError.code:
            raise digest
        raise _damaged(link, digest.message) from digest
    _compare(link, digest)


async def _check_increments(links: Sequence[Link]) -> None:
    for link in links:
        try:
            _compare(link, await reading.file_sha256(link.image))
            backing = await asyncio.to_thread(qcow2.backing_name, link.image)
        except OSError as error:
            raise _damaged(link, f"it cannot be read: {error.strerror}") from error
        if backing != manifest.backing_name(link.disk.disk, str(link.disk.parent)):
            raise _damaged(link, f"it builds on {backing or 'nothing'}, and its manifest says {link.disk.parent}")


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
