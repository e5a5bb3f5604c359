"""Whether what a tool has written of a disk is what is in the snapshot."""

from pathlib import Path

from orchestrator.errors import TargetError
from orchestrator.qemu import tools


async def check(
    to: Path, image_format: str, source: Path | str, source_format: str, *, name: str, size_bytes: int
) -> None:
    """Hold the file or block device at `to` against what it was written from, an image or an NBD server's URI.

    `name` says for people what it is. Raises TargetError "content-wrong", ToolError.
    """
    wrong = await tools.difference(to, image_format, source, source_format, size_bytes=size_bytes)
    if wrong:
        raise TargetError(
            f"{name} was restored wrong: {wrong}",
            hint="what was written to does not give back what it was given: restore to another disk",
            code="content-wrong",
        )
