"""Having the daemon do something, and staying with it until it is over, on the client's side.

Events say how far it is; that it is over is asked for, since events may be lost. Whoever is cancelled meanwhile
has the daemon end what it has begun, and waits until that has put everything back.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from orchestrator import aio
from orchestrator.errors import StateError, VmfleeceError
from orchestrator.model import Progress
from orchestrator.service import client
from orchestrator.service.documents import Request, RequestState
from orchestrator.service.feed import PROGRESS

POLL_SECONDS = 0.5
GONE_SECONDS = 10.0
"""How long a daemon may not answer before it is given up: it may be overloaded, never for that long."""

OnProgress = Callable[[Progress], None]

_PROGRESS = TypeAdapter(Progress)


async def carried_out(run_dir: Path, route: str, body: BaseModel | None, on_progress: OnProgress) -> Request:
    """Have it done, and wait for the end. Raises what `client.ask` raises, and StateError if the daemon ends.

    Cancellation ends it first.
    """
    async with client.following(run_dir) as events:
        begun = await aio.acquire(begin(run_dir, route, body), partial(_ended, run_dir))
        try:
            async for event in events:
                if event.get("request") == begun.request:
                    if event["event"] == PROGRESS:
                        _tell(event, on_progress)
                    if event["event"] == "request.finished":
                        break
            return await _over(run_dir, begun)
        except asyncio.CancelledError:
            await aio.finish(_ended(run_dir, begun))
            raise


async def begin(run_dir: Path, route: str, body: BaseModel | None) -> Request:
    """Have it begun. Raises what `client.ask` raises, and StateError if no daemon serves any more."""
    begun = await client.ask(run_dir, route, Request, method="POST", body=body)
    if begun is None:
        raise _gone()
    return begun


async def _over(run_dir: Path, begun: Request) -> Request:
    """What has become of it, once it is over. Raises StateError if that cannot be found out any more."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + GONE_SECONDS
    while True:
        try:
            found = await client.ask(run_dir, f"/requests/{begun.request}", Request)
        except VmfleeceError as error:
            if error.code == "unknown-name":  # it was started anew
                raise _gone() from error
            if loop.time() > give_up:
                raise
        else:
            if found is None:
                raise _gone()
            if found.state is not RequestState.UNDER_WAY:
                return found
            give_up = loop.time() + GONE_SECONDS
        await asyncio.sleep(POLL_SECONDS)


async def _ended(run_dir: Path, begun: Request) -> None:
    """Have it end, and wait until it has. A daemon that is gone has nothing under way."""
    try:
        await client.ask(run_dir, f"/requests/{begun.request}/cancel", Request, method="POST")
        await _over(run_dir, begun)
    except VmfleeceError:
        return


def _tell(event: dict[str, Any], on_progress: OnProgress) -> None:
    try:
        on_progress(_PROGRESS.validate_python(event))
    except ValidationError:
        return  # of another version: what counts is the end


def _gone() -> StateError:
    return StateError(
        "the daemon has ended before this was over",
        hint="what was under way is put right when it starts again: `vmfleece run list`",
        code="daemon-gone",
    )
