"""Looking after a repository that the configuration names: making it, what is in it, freeing space, checking.

restic works alone on a repository, and locks of our dead processes would stop it until somebody removes them: so
they are removed before it starts.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.config import TargetSettings
from orchestrator.target.repository import restic_tool
from orchestrator.target.repository.password import password_path, read_password
from orchestrator.target.restic import access, config, lock_file
from orchestrator.target.restic.access import Opened
from orchestrator.target.restic.backend.base import Backend, Kind
from orchestrator.target.restic.errors import Damaged, FileMissing
from orchestrator.target.restic.keys import KeyInfo
from orchestrator.target.restic.place import backend_at, restic_name
from orchestrator.target.restic.repository import Repository


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is in a repository. `all_snapshots`: others' than VMs', too. `locks`: who holds them.

    `damaged`: what is wrong with snapshots and locks.
    """

    id: str
    format_version: int
    keys: tuple[KeyInfo, ...]
    all_snapshots: int
    packs: int
    packs_bytes: int
    locks: tuple[str, ...]
    damaged: tuple[str, ...]


async def create(settings: TargetSettings) -> Repository:
    """Make the repository. Raises as `Repository.create`, and TargetError's code "password-file"."""
    return await Repository.create(backend_at(settings.place), await _password(settings))


async def opened(settings: TargetSettings) -> Repository:
    """Open the repository. Raises as `Repository.open`, and TargetError's code "password-file"."""
    return await Repository.open(backend_at(settings.place), await _password(settings))


async def inspect(settings: TargetSettings) -> Inspection:
    """Look at what there is, without reading any content. Raises as `opened`."""
    backend = backend_at(settings.place)
    key = await asyncio.to_thread(access.open_with, backend, await _password(settings))
    repository = Repository(backend, key)
    listing = await repository.snapshots()
    packs = await asyncio.to_thread(lambda: [stored.size_bytes for stored in backend.list(Kind.DATA)])
    locks = await asyncio.to_thread(lambda: list(_locks(backend, key)))
    damaged = [*listing.damaged, *(one for one in locks if isinstance(one, Damaged))]
    return Inspection(
        id=repository.identity.hex(),
        format_version=config.VERSION,
        keys=tuple(await repository.keys()),
        all_snapshots=len(listing.snapshots),
        packs=len(packs),
        packs_bytes=sum(packs),
        locks=tuple(one for one in locks if isinstance(one, str)),
        damaged=tuple(one.message for one in damaged),
    )


async def reclaim(settings: TargetSettings, *, on_line: Callable[[str], None]) -> None:
    """Free what no snapshot needs any more; as `restic_tool.prune`, which see, and `opened`."""
    await _make_way(settings)
    password_file = password_path(settings.name, settings.password_file)
    await restic_tool.prune(restic_name(settings.place), password_file, on_line=on_line)


async def check(settings: TargetSettings, *, read_data: bool, on_line: Callable[[str], None]) -> None:
    """Check the whole repository; as `restic_tool.check`, which see, and `opened`."""
    await _make_way(settings)
    password_file = password_path(settings.name, settings.password_file)
    await restic_tool.check(restic_name(settings.place), password_file, read_data=read_data, on_line=on_line)


async def _make_way(settings: TargetSettings) -> None:
    await (await opened(settings)).remove_stale_locks()


async def _password(settings: TargetSettings) -> str:
    return await asyncio.to_thread(read_password, settings.name, settings.password_file)


def _locks(backend: Backend, opened: Opened) -> Iterator[str | Damaged]:
    """Who holds locks. One that is gone by now is none, and neither is an empty file."""
    for stored in backend.list(Kind.LOCKS):
        if stored.size_bytes:
            file = stored.file
            try:
                content = backend.read(file)
                lock = lock_file.open_sealed(content, opened.key, identity=file.identity, file=file.path)
                yield lock.described()
            except FileMissing:
                continue
            except Damaged as error:
                yield error
