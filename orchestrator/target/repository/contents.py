"""Reading files of a repository back: onto a disk, by NBD for anybody's tools, or only to see that all is there.

The repository is open and locked and its index loaded for as long as any of this takes. Every chunk that is read
is checked; what is damaged is an I/O error for an NBD client, and its cause is told beside that.
"""

import asyncio
import contextlib
import logging
import random
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path

import structlog

from orchestrator import aio
from orchestrator.errors import TargetError, ToolError
from orchestrator.nbd.connection import Report, Trouble
from orchestrator.nbd.export import BlockSizes, Data, Export
from orchestrator.nbd.protocol import Allocation, Piece
from orchestrator.nbd.server import NbdServer
from orchestrator.qemu import serving, tools
from orchestrator.target import restored
from orchestrator.target.base import Verification
from orchestrator.target.repository import raw_file
from orchestrator.target.repository.chunks import Chunks, Extent, Layout, chunks_of, wrong_length
from orchestrator.target.restic.errors import Damaged
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.tree import FileContent
from orchestrator.units import MIB

log = structlog.get_logger(__name__)

SOCKET = "nbd.sock"
MOST_PROBLEMS = 100
"""Of a verification are told one by one."""
_HOLE = Allocation.HOLE | Allocation.ZERO
_ELSEWHERE = "restore another snapshot; `restic check --read-data` says what else is damaged"


class DiskExport(Export):
    """A file of a repository as a disk that can only be read. Chunks that are zero are holes."""

    read_only = True
    block_sizes = BlockSizes(preferred=MIB)

    def __init__(self, chunks: Chunks, layout: Layout) -> None:
        self._chunks = chunks
        self._layout = layout

    @property
    def size_bytes(self) -> int:
        return self._layout.size_bytes

    async def read(self, offset: int, length: int) -> Data:
        parts = [self._part(number, extent) for number, extent in self._layout.extents(offset, length)]
        if len(parts) == 1:
            return await parts[0]
        return b"".join(await aio.all_or_first_error(parts))

    async def _part(self, number: int, extent: Extent) -> Data:
        if extent.identity in self._layout.zeroes:
            return bytes(extent.length)
        content = await self._chunks.read(extent.identity)
        if len(content) != self._layout.length(number):
            raise wrong_length(extent.identity, len(content), self._layout.length(number))
        return memoryview(content)[extent.skip : extent.skip + extent.length]

    async def flush(self) -> None:
        """Nothing is written."""

    async def status(self, offset: int, length: int) -> Sequence[Piece]:
        zeroes = self._layout.zeroes
        return [
            Piece(extent.length, _HOLE if extent.identity in zeroes else 0)
            for _, extent in self._layout.extents(offset, length)
        ]


async def extract(repository: Repository, content: FileContent, *, name: str, to: Path, image_format: str) -> None:
    """Write a file's content to the file or block device at `to`, durably, and see that it is right.

    `name` says for people what it is. TargetError's code is "content-wrong" if some of it is damaged. Raises
    BackendError, and ToolError if it cannot be written. After an error or cancellation, part of it may be there.
    """
    device = await asyncio.to_thread(to.is_block_device)
    if image_format == "raw" and not device:
        layout = await _layout(repository, content, name)
        try:
            await raw_file.write(repository, layout, to)
        except Damaged as error:
            raise _explained(name, error) from error
        return
    troubles: list[Trouble] = []
    with tempfile.TemporaryDirectory(prefix="vmfleece-") as folder:
        path = Path(folder) / SOCKET
        async with _served(repository, {name: content}, path, troubles.append):
            try:
                uri = serving.uri(path, name)
                await tools.convert(uri, "raw", to, image_format, into_existing=device)
                await restored.settle(to, image_format, uri, "raw", name=name, size_bytes=content.size_bytes)
            except ToolError as error:
                causes = [trouble.error for trouble in troubles if isinstance(trouble.error, TargetError)]
                if not causes:
                    raise
                raise _explained(name, causes[0]) from error


@contextlib.asynccontextmanager
async def exported(
    repository: Repository, contents: Mapping[str, FileContent], folder: Path
) -> AsyncIterator[Mapping[str, str]]:
    """Serve disks to be read by NBD for the block, on a socket in `folder` that is its owner's alone.

    Gives their URIs. Raises NbdError, BackendError, and TargetError "content-wrong" for what cannot be served.
    """
    path = folder / SOCKET
    async with _served(repository, contents, path, _log):
        yield {disk: serving.uri(path, disk) for disk in contents}


async def verify(repository: Repository, contents: Mapping[str, FileContent], *, share: float) -> Verification:
    """Read each chunk of some disks once, or a share of them (0 to 1) chosen at random, one at least.

    Bytes are those of distinct chunks; how many disks have a chunk does not count. Raises BackendError.
    """
    lengths, problems = await asyncio.to_thread(_look_up, repository, contents)
    count = max(1, round(share * len(lengths))) if lengths else 0
    chosen = random.SystemRandom().sample(sorted(lengths), count)
    damaged = await _damaged(repository, chosen)
    problems += [f"{_owners(contents, identity)}: {cause.message}" for identity, cause in damaged.items()]
    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
    return Verification(sum(lengths[identity] for identity in chosen), sum(lengths.values()), tuple(problems))


@contextlib.asynccontextmanager
async def _served(
    repository: Repository, contents: Mapping[str, FileContent], path: Path, report: Report
) -> AsyncIterator[None]:
    """Serve files by their names on a new socket. TargetError "content-wrong" if one's layout is not known."""
    layouts = {name: await _layout(repository, content, name) for name, content in contents.items()}
    async with chunks_of(repository) as chunks:
        exports = {name: DiskExport(chunks, layout) for name, layout in layouts.items()}
        async with NbdServer(exports, report=report).at(path):
            yield


async def _layout(repository: Repository, content: FileContent, name: str) -> Layout:
    try:
        return await asyncio.to_thread(Layout.of, repository, content)
    except Damaged as error:
        raise _explained(name, error) from error


def _explained(name: str, cause: TargetError) -> TargetError:
    """The error of reading a file; of what is not damaged but cannot be reached, its own."""
    if not isinstance(cause, Damaged):
        return cause
    return TargetError(f"{name} cannot be read: {cause.message}", hint=_ELSEWHERE, code="content-wrong")


def _log(trouble: Trouble) -> None:
    level = logging.WARNING if isinstance(trouble.error, TargetError) else logging.INFO
    log.log(level, "export.failed", disk=trouble.export, error=str(trouble.error))


def _look_up(repository: Repository, contents: Mapping[str, FileContent]) -> tuple[dict[bytes, int], list[str]]:
    """How long the distinct chunks are, 0 for those that are not there; and which disks' lengths are wrong."""
    distinct = {identity for content in contents.values() for identity in content.chunks}
    lengths = {identity: repository.chunk_bytes(identity) or 0 for identity in distinct}
    problems = []
    for disk, content in contents.items():
        size_bytes = sum(lengths[identity] for identity in content.chunks)
        if size_bytes != content.size_bytes and all(lengths[identity] for identity in content.chunks):
            problems.append(f"{disk}: its chunks are {size_bytes} bytes, and it has {content.size_bytes}")
    return lengths, problems


async def _damaged(repository: Repository, identities: Iterable[bytes]) -> dict[bytes, Damaged]:
    """Read chunks; those that are damaged, and why."""
    found: dict[bytes, Damaged] = {}

    def read(identity: bytes) -> None:
        try:
            repository.read_blob(identity)
        except Damaged as error:
            found[identity] = error

    await raw_file.in_threads(read, identities)
    return found


def _owners(contents: Mapping[str, FileContent], identity: bytes) -> str:
    return ", ".join(disk for disk, content in contents.items() if identity in content.chunks)
