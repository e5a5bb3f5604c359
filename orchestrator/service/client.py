"""Asking a running vmfleece over its control socket."""

import asyncio
import pwd
from http import HTTPStatus
from pathlib import Path

import aiohttp
from pydantic import TypeAdapter, ValidationError

from orchestrator.errors import StateError
from orchestrator.service.api import STATUS_ROUTE, socket_path
from orchestrator.service.status import Status

DEADLINE_SECONDS = 5.0

_STATUS = TypeAdapter(Status)
_ERROR = TypeAdapter(dict[str, str])


async def status(run_dir: Path) -> Status | None:
    """What the vmfleece that serves run_dir says is going on; None if none does.

    Raises StateError: `api-forbidden` if we may not ask, `api-silent` if none came (in time),
    `api-wrong` if it made no sense, or the code that the server answered with.
    """
    path = socket_path(run_dir)
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            body = await _get(path, STATUS_ROUTE)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except PermissionError as error:
        raise StateError(
            f"may not open the control socket {path}: {error.strerror}",
            hint=f"only {_owner(path)} may ask: run this command as that user",
            code="api-forbidden",
        ) from error
    except (OSError, aiohttp.ClientConnectionError) as error:
        why = f"none within {DEADLINE_SECONDS:g} s" if isinstance(error, TimeoutError) else str(error)
        raise StateError(
            f"no answer on the control socket {path}: {why}",
            hint="the vmfleece that serves it hangs, or its host is overloaded: look at its log",
            code="api-silent",
        ) from error
    except aiohttp.ClientError as error:
        raise _wrong(path, str(error) or type(error).__name__) from error
    try:
        return _STATUS.validate_json(body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise _wrong(path, f"{place}: {first['msg']}" if place else first["msg"]) from error


async def _get(path: Path, route: str) -> bytes:
    """The answer's body. Raises OSError, aiohttp.ClientError, and StateError for an error answer.

    A server that hangs up before it answers is asked once more, by aiohttp: it was ending, or is starting anew.
    """
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
            session.get(f"http://vmfleece{route}", allow_redirects=False) as response,
        ):
            body = await response.read()
            if response.status != HTTPStatus.OK:
                raise _refused(path, body)
            return body
    except aiohttp.ClientConnectorError as error:
        raise error.os_error from error


def _refused(path: Path, body: bytes) -> StateError:
    try:
        error = _ERROR.validate_json(body, strict=True)
        return StateError(
            f"the vmfleece on {path} cannot answer: {error['message']}", hint=error["hint"], code=error["code"]
        )
    except (ValidationError, KeyError):
        return _wrong(path, "an error that is none of vmfleece's")


def _wrong(path: Path, why: str) -> StateError:
    one_line = " ".join(why.split())
    return StateError(
        f"the answer on the control socket {path} makes no sense: {one_line}",
        hint="is it vmfleece that serves it, and of the same version as this command? Restart the daemon",
        code="api-wrong",
    )


def _owner(path: Path) -> str:
    """Who may connect: the owner of the socket, or of the folder that hides it."""
    for one in (path, *path.parents):
        try:
            user = one.stat().st_uid
        except OSError:
            continue
        try:
            return pwd.getpwuid(user).pw_name
        except KeyError:
            return f"user {user}"
    return "root"
