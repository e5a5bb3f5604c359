"""The program `restic`, for what only it can do: freeing what no snapshot needs any more, and checking everything.

Password and bucket keys reach it by file and environment, never by its command line. It works alone on a
repository, so it is refused while anybody else does. It leaves no cache behind. Cancelling lets it take its lock
away before it ends.
"""

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator import aio
from orchestrator.errors import TargetError, ToolError
from orchestrator.target.restic.errors import NoRepository, RepositoryLocked, WrongPassword

END_SECONDS = 30.0
"""How long it may take to remove its lock before it is killed."""
PROGRESS_FPS = "0.2"
_LAST_LINES = 8
_LONGEST_LINE_BYTES = 1 << 20

_MEANINGS: tuple[tuple[int, str, type[TargetError], str], ...] = (
    (10, "Is there a repository at the following location?", NoRepository, "make it, or check that it is mounted"),
    (11, "already locked", RepositoryLocked, "try again later; if nobody works on it any more: `restic unlock`"),
    (12, "wrong password or no key found", WrongPassword, "check the target's password file"),
)
"""Exit codes since 0.17; before, it exits with 1, and only its words tell these apart."""


async def prune(repository_name: str, password_file: Path, *, on_line: Callable[[str], None]) -> None:
    """Free what no snapshot needs; hours for a large repository. `on_line` is given each line that restic prints.

    Raises RepositoryLocked, WrongPassword, NoRepository, TargetError's code "restic-failed", ToolError's
    "tool-missing". Cancelled, it leaves a repository that is whole; the next one frees the rest.
    """
    await _run(["prune"], repository_name, password_file, on_line)


async def check(
    repository_name: str, password_file: Path, *, read_data: bool, on_line: Callable[[str], None]
) -> None:
    """Check that all is there that snapshots need; with `read_data`, that all of it is undamaged. As `prune`."""
    await _run(["check", "--read-data"] if read_data else ["check"], repository_name, password_file, on_line)


async def _run(
    arguments: Sequence[str], repository_name: str, password_file: Path, on_line: Callable[[str], None]
) -> None:
    process = await _started(arguments, repository_name, password_file)
    assert process.stdout is not None  # noqa: S101  they are pipes
    assert process.stderr is not None  # noqa: S101
    last: deque[str] = deque(maxlen=_LAST_LINES)

    def complained(line: str) -> None:
        last.append(line)
        on_line(line)

    try:
        await aio.all_or_first_error((_pass_on(process.stdout, on_line), _pass_on(process.stderr, complained)))
        returncode = await process.wait()
    finally:
        await aio.finish(_end(process))
    if returncode != 0:
        raise _failure(arguments[0], repository_name, returncode, "; ".join(last))


async def _started(
    arguments: Sequence[str], repository_name: str, password_file: Path
) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RESTIC_")}
    environment |= {
        "RESTIC_REPOSITORY": repository_name,
        "RESTIC_PASSWORD_FILE": str(password_file),
        "RESTIC_PROGRESS_FPS": PROGRESS_FPS,  # without it, none where there is no terminal
    }
    if region := os.environ.get("AWS_REGION"):
        environment["AWS_DEFAULT_REGION"] = region  # which is the only one that it knows
    try:
        return await aio.acquire(
            asyncio.create_subprocess_exec(
                *("restic", "--no-cache", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                limit=_LONGEST_LINE_BYTES,
                start_new_session=True,  # a terminal's Ctrl-C reaches it once, from us
            ),
            _end,
        )
    except FileNotFoundError as error:
        raise ToolError(
            "restic is not installed", hint="install it: apt-get install restic", code="tool-missing"
        ) from error


async def _pass_on(stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
    while line := await stream.readline():
        if text := line.decode(errors="replace").rstrip():
            on_line(text)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Have it end if it goes on: on SIGINT it removes its lock."""
    for number, patience_seconds in ((signal.SIGINT, END_SECONDS), (signal.SIGKILL, None)):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_seconds):
                await process.communicate()


def _failure(command: str, repository_name: str, returncode: int, words: str) -> TargetError:
    for code, text, error, hint in _MEANINGS:
        if returncode == code or (returncode == 1 and text in words):
            return error(f"restic {command} of {repository_name}: {words}", hint=hint)
    return TargetError(
        f"restic {command} of {repository_name} failed with exit code {returncode}: {words}",
        hint="restic's own words say why; its snapshots are as before, and it can be started again",
        code="restic-failed",
    )
