"""The control socket: `run_dir/api.sock`, on which a running vmfleece says what is going on.

HTTP/1.1, one request a connection, JSON. An error is `{"code", "message", "hint"}`. Invariants:
- the socket's inode is made with mode 0600: there is no moment at which somebody else could connect;
- one server a run_dir. A lock on the folder says so while it lives, and the kernel gives it back when it dies;
- nobody who is connected can hold up the end: connections are closed after one answer, and at the end.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

from aiohttp import web

from orchestrator import aio
from orchestrator.errors import StateError, VmfleeceError
from orchestrator.qemu.qmp import SUN_PATH_BYTES
from orchestrator.service.status import Status

SOCKET_NAME = "api.sock"
STATUS_ROUTE = "/api/v1/status"
SHUTDOWN_SECONDS = 1.0
FOLDER_MODE = 0o750
SOCKET_MODE = 0o600

# What it logs about clients would reach the terminal: nobody sets a handler.
logging.getLogger("aiohttp").setLevel(logging.CRITICAL)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


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


@contextlib.asynccontextmanager
async def served(run_dir: Path, status: Callable[[], Status]) -> AsyncIterator[None]:
    """Answer on the control socket for the block; `status` is called for each request.

    Makes run_dir if it is missing. Raises StateError: `run-dir-in-use` if somebody serves there already,
    `state-unusable` if no socket can be made there. The socket is gone at the end, however the block ends.
    """
    with _bound(socket_path(run_dir)) as listener:
        runner = web.AppRunner(_application(status), access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
        try:
            await runner.setup()
            assert runner.server is not None  # noqa: S101  setup() made it
            loop = asyncio.get_running_loop()
            server = await loop.create_unix_server(runner.server, sock=listener, start_serving=False)
        except BaseException:
            listener.close()
            raise
        try:
            await server.start_serving()
            yield
        finally:
            server.close()
            await aio.finish(runner.cleanup())


@contextlib.contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    """A socket of this name for the block; whoever is given it closes it."""
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
            except BaseException:
                listener.close()
                raise
            stack.callback(_remove, path)
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


def _application(status: Callable[[], Status]) -> web.Application:
    async def answer(_request: web.Request) -> web.Response:
        return web.json_response(status().as_json())

    application = web.Application(middlewares=[_one_answer])
    application.router.add_get(STATUS_ROUTE, answer, allow_head=False)
    return application


@web.middleware
async def _one_answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer errors as JSON, and end the connection."""
    response: web.StreamResponse
    try:
        response = await handler(request)
    except web.HTTPException as refused:
        code = refused.reason.lower().replace(" ", "-")
        hint = f"there is: GET {STATUS_ROUTE}"
        response = _error(code, f"{request.method} {request.path}: {refused.reason}", hint, status=refused.status)
    except VmfleeceError as error:
        response = _error(error.code, error.message, error.hint)
    except Exception as error:  # noqa: BLE001  whoever asked is told, and the runs go on
        hint = "an error in vmfleece: report it"
        response = _error("bug", f"{request.method} {request.path}: {type(error).__name__}: {error}", hint)
    response.force_close()
    return response


def _error(code: str, message: str, hint: str, *, status: int = 500) -> web.Response:
    return web.json_response({"code": code, "message": message, "hint": hint}, status=status)
