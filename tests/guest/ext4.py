"""An ext4 file system in a raw image, seen from outside: made, and what the guest's files.c left in it.

The journal is never replayed here: what is not in place without that counts as missing.
"""

import os
import shutil
import tempfile
from pathlib import Path

from tests.guest import images

LINES = 256


async def make(path: Path, size_bytes: int) -> None:
    """Create an image with an empty file system."""
    with path.open("xb") as file:
        file.truncate(size_bytes)
    await _tool("mkfs.ext4", "-q", path)


async def needs_recovery(image: Path) -> bool:
    """Whether it was mounted and written to at that moment. e2fsck -n says nothing of that."""
    return "needs_recovery" in await _tool("dumpe2fs", "-h", image)


async def check(image: Path) -> None:
    """Check the whole file system. Raises RuntimeError with what is wrong."""
    await _tool("e2fsck", "-f", "-n", image)


async def wrong_files(image: Path, newest: int) -> list[int]:
    """Return which of the files 1 to `newest` are missing or have another content."""
    with tempfile.TemporaryDirectory(dir=image.parent) as folder:
        await _tool("debugfs", "-R", f"rdump / {folder}", image)
        return [number for number in range(1, newest + 1) if not _is_right(Path(folder), number)]


def _is_right(folder: Path, number: int) -> bool:
    path = folder / str(number)
    return path.exists() and path.read_text() == f"{number:015}\n" * LINES


async def _tool(name: str, *arguments: str | Path) -> str:
    # It is in /usr/sbin, which not every user's PATH has.
    program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or name
    return await images.run_tool(program, *map(str, arguments))
