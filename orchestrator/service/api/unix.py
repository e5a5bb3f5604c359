"""The control socket, `run_dir/api.sock`.

Invariants:
- it is open to its owner and its group, and there is no moment at which somebody else could connect;
- one server a run_dir. A lock on the folder says so while it lives, and the kernel gives it back when it dies.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import StateError
from orchestrator.qemu.qmp import SUN_PATH_BYTES

SOCKET_NAME = "api.sock"
FOLDER_MODE = 0o750
SOCKET_MODE = 0o660


def socket_path(run_dir: Path) -> Path:
    """The control socket of a run_dir. Raises StateError if its path is longer than a socket's may be."""
    path = run_dir / SOCKET_NAME
    length_bytes = len(os.fsencode(path))
    if length_bytes > SUN_PATH_BYTES:
        raise StateError(
            f"the path of the control socket, {path}, has {length_bytes} bytes;"
            f" a unix socket's has at most {SUN_PATH_BYTES}",
            hint="set daemon.run_dir to a shorter path, such as /run/vmfleece",
            code="state-unusable",
        )
    return path


@contextlib.contextmanager
def bound(path: Path) -> Iterator[socket.socket]:
    """A socket of this name for the block; whoever is given it closes it.

    Makes run_dir if it is missing. Raises StateError: `run-dir-in-use` if somebody serves there already,
    `state-unusable` if no socket can be made there. The name is gone at the end.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = _open_folder(path.parent)
            stack.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _in_use(path) from error
            _remove_stale(path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # Linux makes the name's inode with the mode of the socket's own (net/unix/af_unix.c, unix_bind).
                os.fchmod(listener.fileno(), SOCKET_MODE)
                listener.bind(str(path))
                stack.callback(_remove, path)
                path.chmod(SOCKET_MODE)  # our own umask has taken from it
            except BaseException:
                listener.close()
                raise
        except OSError as error:
            raise StateError(
                f"cannot make the control socket {path}: {error.strerror or error}",
                hint=f"vmfleece must be able to write to {path.parent}: run it as root, or set daemon.run_dir",
                code="state-unusable",
            ) from error
        yield listener


def _open_folder(run_dir: Path) -> int:
    with contextlib.suppress(FileExistsError):
        run_dir.mkdir(mode=0o700, parents=True)
        run_dir.chmod(FOLDER_MODE)  # whatever the umask
    return os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on. Raises StateError if somebody does, OSError."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "something that is no socket has this name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            # Never blocks: a unix socket connects at once, or fails (EAGAIN if its backlog is full).
            asking.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise _in_use(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # systemd may have removed the folder already
        path.unlink()


def _in_use(path: Path) -> StateError:
    return StateError(
        f"another vmfleece is using run_dir {path.parent}: it answers on {path.name}",
        hint="end it, or set daemon.run_dir to another folder",
        code="run-dir-in-use",
    )
