"""qemu-nbd: an image for all who speak NBD. Nothing of it is left at the block's end, however that comes."""

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote

from orchestrator import aio
from orchestrator.errors import ToolError
from orchestrator.qemu import tools

READERS = 16
START_SECONDS = 30.0
_GREETING = b"NBDMAGIC"
_ACTIVATED = 'exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; exec setpriv --pdeathsig KILL "$@"'
"""Starts a program with a listening socket, as systemd does: who connects waits until it is ready.

It does not outlive this process, even if that is killed.
"""
_NOT_FOUND = 127


def uri(path: Path, export: str) -> str:
    """How tools name an export of an NBD server at a unix socket."""
    return f"nbd+unix:///{quote(export, safe='')}?socket={quote(str(path))}"


@contextlib.asynccontextmanager
async def served(image: Path, *, at: Path, export: str) -> AsyncIterator[str]:
    """Serve a qcow2 image to be read for the block, at a new socket that is its owner's alone; gives its URI.

    It can be connected to. Raises ToolError.
    """
    options = ["--read-only", "--persistent", f"--shared={READERS}", "--format=qcow2", f"--export-name={export}"]
    with tempfile.TemporaryFile() as words, _listening(at) as listening:
        process = await aio.acquire(
            asyncio.create_subprocess_exec(
                *("sh", "-c", _ACTIVATED, "sh", "qemu-nbd", *options, str(image)),
                stdin=listening.fileno(),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=words.fileno(),  # nobody reads a pipe while it serves
                start_new_session=True,  # Ctrl-C at a terminal is for us
            ),
            tools.end,
        )
        try:
            listening.close()  # who connects learns it if qemu-nbd ends
            if not await _greets(at):
                await aio.finish(tools.end(process))
                if process.returncode == _NOT_FOUND:
                    raise tools.missing("qemu-nbd")
                words.seek(0)
                said = words.read().decode(errors="replace").strip()
                raise ToolError(
                    f"cannot serve {image}: {said}",
                    hint="`qemu-img info` says whether the image, and what it builds on, can be read",
                )
            yield uri(at, export)
        finally:
            await aio.finish(tools.end(process))


@contextlib.contextmanager
def _listening(at: Path) -> Iterator[socket.socket]:
    """A socket that listens at a path, which is gone after the block."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        try:
            listening.bind(str(at))
        except OSError as error:
            raise ToolError(
                f"no NBD server can listen at {at}: {error}", hint="see that $TMPDIR, or /tmp, may be written to"
            ) from error
        try:
            at.chmod(0o600)
            listening.listen(READERS)
            yield listening
        finally:
            at.unlink(missing_ok=True)


async def _greets(at: Path) -> bool:
    """Whether the server at a socket speaks NBD. False: it has ended."""
    try:
        async with asyncio.timeout(START_SECONDS):
            reader, writer = await asyncio.open_unix_connection(at)
            try:
                return await reader.readexactly(len(_GREETING)) == _GREETING
            finally:
                writer.close()
    except (OSError, asyncio.IncompleteReadError, TimeoutError):
        return False
