"""Asking a running vmfleece over its control socket."""

import asyncio
import contextlib
import grp
import json
import pwd
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from pydantic import BaseModel, TypeAdapter, ValidationError

from orchestrator.errors import ConfigError, StateError, UnknownName, VmfleeceError
from orchestrator.service.api.routes import EVENTS, PREFIX
from orchestrator.service.api.unix import socket_path
from orchestrator.service.documents import Health
from orchestrator.service.status import Status
from orchestrator.target.restic.errors import NoRepository, RepositoryLocked, WrongPassword

DEADLINE_SECONDS = 5.0
STREAM_SECONDS = 60.0
"""A stream that says nothing for so long is dead: it has a heartbeat."""
LONGEST_EVENT_BYTES = 16 << 20

T = TypeVar("T")

_ERROR = TypeAdapter(dict[str, str])
_USAGE = (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND)
_OF_USAGE = (ConfigError.code, UnknownName.code)
_KINDS: dict[str, type[VmfleeceError]] = {
    **dict.fromkeys(("locked", "stopping", "state-unusable"), StateError),
    **{kind.code: kind for kind in (NoRepository, RepositoryLocked, WrongPassword)},
}
"""Those whose exit code is not that of all others."""


async def status(run_dir: Path) -> Status | None:
    """What the vmfleece that serves run_dir says is going on; None if none does.

    Raises what `ask` raises.
    """
    return await ask(run_dir, "/status", Status)


async def daemon_serves(run_dir: Path) -> bool:
    """Whether a daemon serves run_dir, not a command or nobody. Raises what `ask` raises."""
    health = await ask(run_dir, "/healthz", Health, prefix="")
    return health is not None and health.daemon


async def ask(
    run_dir: Path,
    route: str,
    kind: type[T],
    *,
    method: str = "GET",
    body: BaseModel | None = None,
    query: Mapping[str, str] | None = None,
    prefix: str = PREFIX,
    deadline_seconds: float | None = None,
) -> T | None:
    """The answer of the vmfleece that serves run_dir; None if none does.

    Raises StateError: `api-forbidden` if we may not ask, `api-silent` if no answer came (in time), `api-wrong` if
    it made no sense. Raises what the server answered with, by its code: ConfigError for what we asked wrongly,
    StateError for what concerns its state, VmfleeceError for all else.
    """
    path = socket_path(run_dir)
    seconds = DEADLINE_SECONDS if deadline_seconds is None else deadline_seconds
    try:
        async with asyncio.timeout(seconds):
            answer = await _exchange(path, f"{prefix}{route}", method=method, body=body, query=query or {})
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except (OSError, aiohttp.ClientError) as error:
        raise _failed(path, error, seconds) from error
    try:
        return TypeAdapter(kind).validate_json(answer, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise _wrong(path, f"{place}: {first['msg']}" if place else first["msg"]) from error


@contextlib.asynccontextmanager
async def following(run_dir: Path) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The events of the vmfleece that serves run_dir, from now on, for the block. They end when it does.

    Raises what `ask` raises, and StateError, code `api-silent`, if none serves.
    """
    path = socket_path(run_dir)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=STREAM_SECONDS)
    try:
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(DEADLINE_SECONDS):
                connector = aiohttp.UnixConnector(str(path))
                session = await stack.enter_async_context(
                    aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=LONGEST_EVENT_BYTES)
                )
                response = await stack.enter_async_context(session.get(f"http://vmfleece{EVENTS}"))
            if response.status != HTTPStatus.OK:
                raise _refused(path, response.status, await response.read())
            yield _events(response)
    except (OSError, aiohttp.ClientError) as error:
        raise _failed(path, error, DEADLINE_SECONDS) from error


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    with contextlib.suppress(aiohttp.ClientError, OSError):  # it has ended, or died: there is nothing more
        async for line in response.content:
            if line.startswith(b"data: "):
                with contextlib.suppress(ValueError):
                    event = json.loads(line.removeprefix(b"data: "))
                    yield event


async def _exchange(
    path: Path, route: str, *, method: str, body: BaseModel | None, query: Mapping[str, str]
) -> bytes:
    """The answer's body. Raises OSError, aiohttp.ClientError, and VmfleeceError for an error answer.

    A server that hangs up before it answers a question is asked once more, by aiohttp: it was ending, or is
    starting anew.
    """
    headers = {"Content-Type": "application/json"} if body is not None else {}
    data = body.model_dump_json(exclude_none=True).encode() if body is not None else None
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
            session.request(
                method,
                f"http://vmfleece{route}",
                params=query,
                data=data,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None),
            ) as response,
        ):
            answer = await response.read()
            if response.status not in (HTTPStatus.OK, HTTPStatus.ACCEPTED):
                raise _refused(path, response.status, answer)
            return answer
    except aiohttp.ClientConnectorError as error:
        raise error.os_error from error


def _failed(path: Path, error: OSError | aiohttp.ClientError, seconds: float) -> StateError:
    if isinstance(error, PermissionError):
        return StateError(
            f"may not open the control socket {path}: {error.strerror}",
            hint=f"only {_owners(path)} may ask: run this command as one of them",
            code="api-forbidden",
        )
    if isinstance(error, OSError | aiohttp.ClientConnectionError):
        why = f"none within {seconds:g} s" if isinstance(error, TimeoutError) else str(error)
        return StateError(
            f"no answer on the control socket {path}: {why}",
            hint="look at its log (journalctl -u vmfleece); end it if it hangs",
            code="api-silent",
        )
    return _wrong(path, str(error) or type(error).__name__)


def _refused(path: Path, status_code: int, body: bytes) -> VmfleeceError:
    try:
        error = _ERROR.validate_json(body, strict=True)
        code, message, hint = error["code"], error["message"], error["hint"]
    except (ValidationError, KeyError):
        return _wrong(path, "an error that is none of vmfleece's")
    return met(code, message, hint, usage=status_code in _USAGE)


def met(code: str, message: str, hint: str, *, usage: bool = False) -> VmfleeceError:
    """An error that the daemon met, with the exit code that it has where there is no daemon."""
    if usage or code in _OF_USAGE:
        error = ConfigError(message, hint=hint)
        error.code = code
        return error
    return _KINDS.get(code, VmfleeceError)(message, hint=hint, code=code)


def _wrong(path: Path, why: str) -> StateError:
    one_line = " ".join(why.split())
    return StateError(
        f"the answer on the control socket {path} makes no sense: {one_line}",
        hint="restart the daemon, so that it is of the same version as this command",
        code="api-wrong",
    )


def _owners(path: Path) -> str:
    """Who may connect: the owners of the socket, or of the folder that hides it."""
    for one in (path, *path.parents):
        try:
            found = one.stat()
        except OSError:
            continue
        try:
            user, group = pwd.getpwuid(found.st_uid).pw_name, grp.getgrgid(found.st_gid).gr_name
        except KeyError:
            return f"user {found.st_uid} and members of the group {found.st_gid}"
        return f"{user} and members of the group {group}"
    return "root"
