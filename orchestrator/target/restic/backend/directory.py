"""A folder of the local file system, or of one that is mounted.

A file is written under a name that nobody lists, made durable, renamed, and the rename made durable: so power loss
leaves all of it or nothing. Folders are 0700 and files 0400, as restic has them.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from orchestrator.target import durable
from orchestrator.target.restic.backend.base import Backend, Content, File, Kind, Stored, file_of
from orchestrator.target.restic.errors import BackendError, FileExists, FileMissing, Unreachable
from orchestrator.units import MIB

_TEMPORARY = ".vmfleece-"
_DEAD_AFTER_SECONDS = 3600
"""Since something was last written to it; writing one file takes seconds."""
_DIRECT_LEAST_BYTES = MIB
_FULL = (errno.ENOSPC, errno.EDQUOT)
_GONE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH)


class DirectoryBackend(Backend):
    """See the contract. `path` need not exist before `create`."""

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self._path = path

    def create(self) -> None:
        with self._explained():
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for kind in Kind:
                (self._path / kind).mkdir(mode=0o700, exist_ok=True)
            for first in range(256):
                (self._path / Kind.DATA / f"{first:02x}").mkdir(mode=0o700, exist_ok=True)
            for folder in (self._path / Kind.DATA, self._path, self._path.parent):
                durable.sync(folder)

    def save(self, file: File, content: Content, *, replace: bool = True) -> None:
        path = self._path / file.path
        temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
        with self._explained():
            try:
                try:
                    _write(temporary, content)
                except FileNotFoundError:
                    self._make_folder(path.parent)
                    _write(temporary, content)
                if replace:
                    temporary.rename(path)
                else:
                    _rename_new(temporary, path)
                durable.sync(path.parent)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()

    def read(self, file: File, *, offset: int = 0, length: int | None = None) -> bytes:
        with self._explained(), (self._path / file.path).open("rb", buffering=0) as opened:
            end = os.fstat(opened.fileno()).st_size
            wanted = max(0, end - offset) if length is None else max(0, min(length, end - offset))
            content = os.pread(opened.fileno(), wanted, offset)
            while len(content) < wanted:
                part = os.pread(opened.fileno(), wanted - len(content), offset + len(content))
                if not part:
                    break
                content += part
            return content

    def list(self, kind: Kind) -> Iterable[Stored]:
        found: list[Stored] = []
        with self._explained():
            for entry in self._entries(kind):
                name = entry.name
                file = file_of(kind, name)
                if file is None or (kind is Kind.DATA and not entry.path.endswith(f"/{name[:2]}/{name}")):
                    continue
                try:
                    found.append(Stored(file, entry.stat().st_size))
                except FileNotFoundError:
                    continue
        return found

    def remove(self, file: File) -> None:
        path = self._path / file.path
        with contextlib.suppress(FileMissing), self._explained():
            path.unlink()
            durable.sync(path.parent)

    def clean(self) -> int:
        count = 0
        for kind in Kind:
            for entry in self._entries(kind):
                if entry.name.startswith(_TEMPORARY) and _dead(entry):
                    with self._explained():
                        Path(entry.path).unlink(missing_ok=True)
                    count += 1
        return count

    def _make_folder(self, folder: Path) -> None:
        """A copy of a repository may lack what was empty. Not the repository itself: then a mount is missing."""
        folder.mkdir(mode=0o700, exist_ok=True)
        durable.sync(folder.parent)

    def _entries(self, kind: Kind) -> Iterator["os.DirEntry[str]"]:
        folders = [self._path / kind]
        if kind is Kind.DATA:
            folders = [folders[0] / f"{first:02x}" for first in range(256)]
        for folder in folders:
            with contextlib.suppress(FileNotFoundError), self._explained(missing=False):
                yield from list(os.scandir(folder))

    @contextlib.contextmanager
    def _explained(self, *, missing: bool = True) -> Iterator[None]:
        """Turn an OSError into a BackendError; FileNotFoundError only if that means that a file is missing."""
        try:
            yield
        except FileNotFoundError as error:
            if not missing:
                raise
            raise FileMissing(f"there is no {error.filename}") from error
        except FileExistsError as error:
            raise FileExists(f"{error.filename} is there already") from error
        except OSError as error:
            message = f"{error.strerror}: {error.filename or self.place}"
            if error.errno in _GONE:
                raise Unreachable(message, hint="check the disk or the mount that it is on") from error
            if error.errno in _FULL:
                raise BackendError(message, hint="free some space or prune", code="target-full") from error
            raise BackendError(message, hint="let vmfleece write there") from error


def _write(path: Path, content: Content) -> None:
    """Make a durable file. What is left of it after an error is for the caller to remove."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    try:
        view = memoryview(content)
        written = _write_directly(descriptor, view) if len(view) >= _DIRECT_LEAST_BYTES else 0
        while written < len(view):
            written += os.write(descriptor, view[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_directly(descriptor: int, view: memoryview) -> int:
    """Write past the host's cache, which is for the guests, as far as that can be done; return how much was."""
    flags, written = fcntl.fcntl(descriptor, fcntl.F_GETFL), 0
    whole_bytes = len(view) // durable.BLOCK_BYTES * durable.BLOCK_BYTES
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while written < whole_bytes:
            written += os.write(descriptor, view[written:whole_bytes])
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system cannot, or this memory is at no block's boundary
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return written


def _rename_new(temporary: Path, path: Path) -> None:
    """Rename unless the new name is taken: FileExistsError.

    A link says so for sure. Where the file system has none, two who do this in the same moment both succeed.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        temporary.rename(path)


def _dead(entry: "os.DirEntry[str]") -> bool:
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _DEAD_AFTER_SECONDS
    except FileNotFoundError:
        return False
