"""What a disk's content is read from: its snapshot's image, and those that this one builds on.

None of them carries checksums of its own. The one that stands alone is known by the hash of its content, those
that build on it by the hashes of their files: so all are checked with one pass over each, and the backing file's
name in a header is checked with the rest of the file. A reader holds every folder of the chain, and reads its
manifest only once it has it: nobody removes or changes the images meanwhile.
"""

import asyncio
import contextlib
import hashlib
import io
import os
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import aio
from orchestrator.errors import TargetError, ToolError
from orchestrator.qemu import tools
from orchestrator.target.base import SnapshotDisk
from orchestrator.target.images import locks, manifest, qcow2
from orchestrator.target.images.errors import explained, gone

_ANOTHER_ONE = "restore one that does not build on it, or one of another target"


@dataclass(frozen=True, slots=True)
class Link:
    """One image of a chain: whose it is, where, and what its manifest says of it."""

    snapshot: str
    image: Path
    disk: SnapshotDisk


@dataclass(slots=True)
class _Held:
    """The links, newest first, and their folders' locks."""

    links: list[Link] = field(default_factory=list)
    locks: list[int] = field(default_factory=list)

    async def let_go(self) -> None:
        while self.locks:
            os.close(self.locks.pop())


@contextlib.asynccontextmanager
async def held(vm_folder: Path, snapshot: str, disk: str, *, target: str) -> AsyncIterator[Sequence[Link]]:
    """All that a snapshot's disk is read from, newest first, kept as it is for the block.

    TargetError's code is "no-snapshot" if the snapshot is gone, "content-wrong" if something that it builds on is.
    """
    found = await aio.acquire(asyncio.to_thread(_hold, vm_folder, snapshot, disk, target), _Held.let_go)
    try:
        yield tuple(found.links)
    finally:
        await found.let_go()


def _hold(vm_folder: Path, snapshot: str, disk: str, target: str) -> _Held:
    found = _Held()
    try:
        wanted: str | None = snapshot
        while wanted is not None:
            folder = vm_folder / wanted.rpartition("/")[2]
            with explained(target, folder):
                lock = locks.hold(folder) if wanted not in {link.snapshot for link in found.links} else None
            if lock is None:
                raise _missing(found.links[-1].snapshot, wanted) if found.links else gone(wanted)
            found.locks.append(lock)
            read = manifest.read(folder / manifest.NAME, target=target)
            found.links.append(Link(read.id, folder / manifest.disk_file(disk), read.disk(disk)))
            wanted = found.links[-1].disk.parent
    except BaseException:
        while found.locks:
            os.close(found.locks.pop())
        raise
    return found


async def read(links: Sequence[Link], reading: Coroutine[Any, Any, None]) -> str:
    """Await what reads the content, check what it is read from, and return the content's SHA-256 in hex.

    An image that stands alone is not checked by itself: its hash is known, and what was read is held against it.
    Raises what `reading` does, and as `check` does; that comes first, since it is the reason of the other.
    """
    if len(links) == 1:
        await reading
        return links[0].disk.sha256
    failure, digest, _ = await aio.all_or_first_error(
        (_failure(reading), _content(links[0]), check(links)),
    )
    for outcome in (failure, digest):
        if isinstance(outcome, ToolError):
            raise outcome
    return str(digest)


async def check(links: Sequence[Link]) -> None:
    """Raise TargetError "content-wrong" that names an image of the chain that is not as it was made."""
    *increments, base = links
    await aio.all_or_first_error((_check_base(base), _check_increments(increments)))


async def file_sha256(path: Path) -> str:
    """The SHA-256 of a file as it is, in hex, as sha256sum prints it. Raises OSError."""
    with await asyncio.to_thread(_Stoppable, path) as file:
        return await aio.in_thread(_digest, file, end=file.stop)


class _Stoppable(io.FileIO):
    """A file that can be made to end wherever it is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def readinto(self, buffer: Any) -> int | None:
        return 0 if self._stopped else super().readinto(buffer)


def _digest(file: _Stoppable) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # all it needs is readinto()


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
            _compare(link, await file_sha256(link.image))
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
