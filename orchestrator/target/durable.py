"""What survives power loss: a write does, only after its file was synced, a rename only after its folder was."""

import os
from pathlib import Path

BLOCK_BYTES = 4096
"""Of the largest blocks that disks have: what is written past the host's cache is whole ones."""


def write(path: Path, content: bytes) -> None:
    """Make a file of that content, or give one it instead of its own, durably. Blocks; raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable. Blocks; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
