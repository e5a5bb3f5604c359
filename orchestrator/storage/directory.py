"""A storage in a folder of a local file system: images without a name.

An image is opened with O_TMPFILE, or, where the file system lacks that, created and unlinked at once. Either way
it has no name when QEMU gets it by descriptor, so nothing can be left behind: the kernel frees it when QEMU and
we let go of it, whatever died.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import StorageError
from orchestrator.storage.base import ImageFile, Space, Storage
from orchestrator.units import Share

BLOCK = 512
"""What st_blocks counts in, whatever the file system's block size (POSIX sys/stat.h)."""
NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
NAMELESS = os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
"""O_EXCL: nobody can give the file a name later, either (open(2))."""
PRIVATE = 0o600


class DescriptorFile(ImageFile):
    """A file that only its descriptor keeps alive."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def descriptor(self) -> int:
        return self._descriptor

    def used_bytes(self) -> int:
        return os.fstat(self._descriptor).st_blocks * BLOCK if self._descriptor >= 0 else 0

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class DirectoryStorage(Storage):
    """See the contract, `Storage`. `min_free` is bytes or a share of the file system."""

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        quota_bytes: int,
        min_free: Share | int,
        max_runs: int | None = None,
    ) -> None:
        self.name = name
        self.path = path
        self.quota_bytes = quota_bytes
        self.max_runs = max_runs
        self._min_free = min_free

    def prepare(self) -> None:
        with self._explained("use it"):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.create().close()

    def create(self) -> ImageFile:
        with self._explained("create a fleecing image in it"):
            try:
                descriptor = os.open(self.path, NAMELESS, PRIVATE)
            except OSError as error:
                if error.errno not in NO_TMPFILE or not self.path.is_dir():
                    raise
                descriptor = self._create_unlinked()
        return DescriptorFile(descriptor)

    def _create_unlinked(self) -> int:
        path = self.path / f"vmf-{secrets.token_hex(8)}"
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        descriptor = os.open(path, flags, PRIVATE)
        path.unlink()
        return descriptor

    def space(self) -> Space:
        with self._explained("ask for its free space"):
            status = os.statvfs(self._existing())
        floor = self._min_free
        if isinstance(floor, Share):
            floor = floor.of(status.f_blocks * status.f_frsize)
        return Space(free_bytes=status.f_bavail * status.f_frsize, floor_bytes=floor)

    def nearness(self, image: Path) -> int:
        with contextlib.suppress(OSError):
            own = Path(os.path.realpath(self.path))  # unlike Path.resolve, bears loops of links
            other = Path(os.path.realpath(image, strict=True))
            if other.is_relative_to(own):
                return 1 + len(own.parts)
            if self._existing().stat().st_dev == other.stat().st_dev:
                return 1
        return 0

    def _existing(self) -> Path:
        """The folder, or the one that it will be made in."""
        own = Path(os.path.realpath(self.path))
        existing = next(path for path in (own, *own.parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
        return existing

    @contextlib.contextmanager
    def _explained(self, act: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"storage {self.name}: cannot {act}: {self.path}: {error.strerror}",
                hint="the path must be a folder on a local file system that vmfleece may write to",
            ) from error
