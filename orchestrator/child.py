"""Child processes, started without holding up the loop.

uvloop forks for each of them, and the kernel then copies our tables of memory: with 300 MiB everything stands
still for 20 ms, with 1 GiB for 60, in which no grant is extended. `subprocess` starts them by vfork, which takes
0.2 ms however much memory we have. So it does that here, and the loop learns of their end and reads what they say.
"""

import asyncio
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

DEVNULL, PIPE, STDOUT = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
LIMIT_BYTES = 1 << 16
"""The longest line that is read from a pipe."""


class Child:
    """A process that `start` has started. `stdout` and `stderr` are None unless they are pipes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._ended = asyncio.Event()
        self._descriptor = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._descriptor, self._end)
        self.pid = process.pid
        self.stdout: asyncio.StreamReader | None = None
        self.stderr: asyncio.StreamReader | None = None

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait for its end; its exit code. Cancellation leaves it running."""
        await self._ended.wait()
        return int(self._process.returncode)

    async def communicate(self) -> tuple[bytes, bytes]:
        """Read all that it says until its pipes are closed, and wait for its end."""
        said = await asyncio.gather(*(_all(pipe) for pipe in (self.stdout, self.stderr)))
        await self.wait()
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once, unless it has ended. It is to be waited for all the same."""
        self._process.kill()

    async def connect(self, limit_bytes: int) -> None:
        """Have the loop read its pipes."""
        self.stdout = await _connected(self._process.stdout, limit_bytes)
        self.stderr = await _connected(self._process.stderr, limit_bytes)

    def _end(self) -> None:
        if self._process.poll() is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._ended.set()


async def start(
    argv: Sequence[str],
    *,
    stdin: int = DEVNULL,
    stdout: int,
    stderr: int,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    limit_bytes: int = LIMIT_BYTES,
    start_new_session: bool = False,
) -> Child:
    """Start a program. Raises OSError, FileNotFoundError where there is none.

    Whoever starts it ends it: cancelled after it was started, with `aio.acquire`.
    """
    process = subprocess.Popen(  # noqa: S603, ASYNC220  see the module
        argv,
        bufsize=0,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=tuple(pass_fds),
        env=env,
        start_new_session=start_new_session,
    )
    try:
        child = Child(process)
    except OSError:  # no descriptor is left
        with process:
            process.kill()
        raise
    await child.connect(limit_bytes)
    return child


async def _connected(pipe: IO[bytes] | None, limit_bytes: int) -> asyncio.StreamReader | None:
    if pipe is None:
        return None
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit_bytes)
    await loop.connect_read_pipe(lambda: _Reading(reader), pipe)
    return reader


class _Reading(asyncio.StreamReaderProtocol):
    """Of a pipe, which is of no more use once its other end is closed."""

    def eof_received(self) -> bool:
        super().eof_received()
        return False


async def _all(pipe: asyncio.StreamReader | None) -> bytes:
    return b"" if pipe is None else await pipe.read()
