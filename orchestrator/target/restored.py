"""What a tool has written of a disk: durable, and what is in the snapshot."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

from orchestrator import aio
from orchestrator.errors import TargetError
from orchestrator.qemu import tools
from orchestrator.target import durable


async def settle(
    to: Path, image_format: str, source: Path | str, source_format: str, *, name: str, size_bytes: int
) -> None:
    """Make the file or block device at `to` durable, and hold it against what it was written from.

    That is an image or an NBD server's URI. `name` says for people what it is. Raises TargetError "content-wrong",
    and "restore-path" if it cannot be made durable; ToolError.
    """
    comparing = _compare(to, image_format, source, source_format, name=name, size_bytes=size_bytes)
    await aio.all_or_first_error((comparing, _sync(to)))


async def _compare(
    to: Path, image_format: str, source: Path | str, source_format: str, *, name: str, size_bytes: int
) -> None:
    wrong = await tools.difference(to, image_format, source, source_format, size_bytes=size_bytes)
    if wrong:
        raise TargetError(
            f"{name} was restored wrong: {wrong}",
            hint="what was written to does not give back what it was given: restore to another disk",
            code="content-wrong",
        )


async def _sync(to: Path) -> None:
    with explained(to):
        await asyncio.to_thread(durable.sync, to)


@contextlib.contextmanager
def explained(to: Path) -> Iterator[None]:
    """Turn the OSError of writing to `to` into a TargetError."""
    try:
        yield
    except OSError as error:
        raise TargetError(
            f"cannot write {to}: {error.strerror}",
            hint="see that there is room and that it may be written to, or give another --to",
            code="restore-path",
        ) from error
