"""A storage in a folder of a local file system: images without a name.

An image has no name when QEMU gets it by descriptor, so nothing can be left behind: the kernel frees it when QEMU
and we let go of it, whatever died. What the file system must be able to do is tried out when it is first met.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import StorageError
from orchestrator.storage import nameless, probe
from orchestrator.storage.base import ImageFile, Lack, Space, Storage
from orchestrator.units import Share


class DescriptorFile(ImageFile):
    """A file that only its descriptor keeps alive. `storage` is the name of the storage that it is on."""

    def __init__(self, descriptor: int, *, storage: str, direct: bool) -> None:
        self._descriptor = descriptor
        self._storage = storage
        self._direct = direct

    @property
    def descriptor(self) -> int:
        return self._descriptor

    @property
    def direct(self) -> bool:
        return self._direct

    def extend(self, length_bytes: int) -> None:
        try:
            os.ftruncate(self._descriptor, length_bytes)
        except OSError as error:
            raise StorageError(
                f"storage {self._storage}: cannot make a sparse file of {length_bytes} bytes: {error.strerror}",
                hint="its file system must allow sparse files as large as the VM's largest disk",
            ) from error

    def used_bytes(self) -> int:
        return nameless.occupied_bytes(self._descriptor) if self._descriptor >= 0 else 0

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
        self._probed: tuple[int, int] | None = None
        self.limit(quota_bytes=quota_bytes, min_free=min_free, max_runs=max_runs)

    def limit(self, *, quota_bytes: int, min_free: Share | int, max_runs: int | None) -> None:
        """Have other limits from now on; what is there already stays."""
        self.quota_bytes = quota_bytes
        self.max_runs = max_runs
        self._min_free = min_free

    def prepare(self) -> tuple[Lack, ...]:
        with self._explained("use it"):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self._file_system()
            if found == self._probed:
                os.close(self._open("vmf-probe"))
                return self.lacks
            self._probed = None
            self.lacks = probe.find_lacks(self.path)
        if needed := [lack.consequence for lack in self.lacks if lack.required]:
            raise StorageError(
                f"storage {self.name}: no fleecing images can be made in {self.path}: its file system lacks"
                f" {'; '.join(needed)}",
                hint="use a folder on ext4, XFS, btrfs, ZFS or tmpfs",
            )
        self._probed = found
        return self.lacks

    def create(self, name: str, length_bytes: int) -> ImageFile:  # noqa: ARG002  a file gets its length later
        with self._explained("create a fleecing image in it"):
            direct = probe.keeps_punched_extents(self.path)
            return DescriptorFile(self._open(name), storage=self.name, direct=direct)

    def _open(self, name: str) -> int:
        descriptor = nameless.open_nameless(self.path)
        return nameless.open_unlinked(self.path, name) if descriptor is None else descriptor

    def space(self) -> Space:
        with self._explained("ask for its free space"):
            try:
                status = os.statvfs(f"{self.path}/")  # the slash: nothing but a folder
            except OSError:
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

    def _file_system(self) -> tuple[int, int]:
        # st_dev alone is given to the next one that is mounted, be it on the same loop device or another tmpfs.
        return self.path.stat().st_dev, os.statvfs(self.path).f_fsid

    @contextlib.contextmanager
    def _explained(self, act: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in probe.FULL
            raise StorageError(
                f"storage {self.name}: cannot {act}: {self.path}: {error.strerror}",
                hint="its file system is full: free some space there"
                if full
                else "make the path a folder on a local file system that vmfleece may write to",
            ) from error
