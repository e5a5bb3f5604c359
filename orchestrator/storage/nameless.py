"""Files that only their descriptors keep alive: the kernel frees one when the last is closed, whatever died.

A file is opened with O_TMPFILE, or, where the file system lacks that, created and unlinked at once. Only a crash
between those two leaves something behind: an empty file.
"""

import errno
import os
import secrets
from pathlib import Path

BLOCK = 512
"""What st_blocks counts in, whatever the file system's block size (POSIX sys/stat.h)."""
NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
NAMELESS = os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
"""O_EXCL: nobody can give the file a name later, either (open(2))."""
NEW = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
PRIVATE = 0o600


def open_nameless(folder: Path) -> int | None:
    """An empty file that never had a name; None where the file system has no such files. Raises OSError."""
    try:
        return os.open(folder, NAMELESS, PRIVATE)
    except OSError as error:
        if error.errno not in NO_TMPFILE or not folder.is_dir():
            raise
        return None


def open_unlinked(folder: Path, name: str) -> int:
    """An empty file that had a name for a moment: this one, or one like it if it is taken. Raises OSError."""
    path = folder / name
    try:
        descriptor = os.open(path, NEW, PRIVATE)
    except FileExistsError:
        path = folder / f"{name}-{secrets.token_hex(8)}"
        descriptor = os.open(path, NEW, PRIVATE)
    try:
        path.unlink()
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def occupied_bytes(descriptor: int) -> int:
    """The bytes that a file occupies, unlike its length. Raises OSError."""
    return os.fstat(descriptor).st_blocks * BLOCK
