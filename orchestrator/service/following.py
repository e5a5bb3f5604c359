"""Having the daemon do something, and staying with it until it is over, on the client's side.

Events say how far it is; that it is over is asked for, since events may be lost. Whoever is cancelled meanwhile
has the daemon end what it has begun, and waits until that has put everything back.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from orchestrator import aio
from orchestrator.errors import StateError, VmfleeceError
from orchestrator.model import MergeProgress, Progress
from orchestrator.service import client
from orchestrator.service.documents import Request, RequestState
from orchestrator.service.feed import MERGING, PROGRESS

POLL_SECONDS = 0.5
GONE_SECONDS = 10.0
"""How long a daemon may not answer before it is given up: it may be overloaded, never for that long."""

OnEvent = Callable[[Mapping[str, Any]], None]

_PROGRESS = TypeAdapter(Progress)
_MERGING = TypeAdapter(MergeProgress)


async def carried_out(run_dir: Path, route: str, body: BaseModel | None, on_event: OnEvent) -> Request:
    """Have it done, and wait for the end; `on_event` is told what happens meanwhile, as far as it is of this.

    Raises what `client.ask` raises, what it failed of, and StateError if the daemon ends. Cancelling ends it.
    """
    async with client.following(run_dir) as events:
        begun = await aio.acquire(begin(run_dir, route, body), partial(_ended, run_dir))
        try:
            async for event in events:
                if event.get("request") == begun.request:
                    on_event(event)
                    if event["event"] == "request.finished":
                        break
            return _done(await _over(run_dir, begun))
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


def _done(request: Request) -> Request:
    if request.error is not None:
        hint = request.error.hint or "somebody else has cancelled it, or the daemon was told to stop"
        raise client.met(request.error.code, request.error.message, hint)
    return request


def telling(
    *,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
    on_merge: Callable[[MergeProgress], None] = lambda _progress: None,
) -> OnEvent:
    """What takes events, and tells of them how far runs and merges are."""

    def take(event: Mapping[str, Any]) -> None:
        with contextlib.suppress(ValidationError):  # of another version: what counts is the end
            if event["event"] == PROGRESS:
                on_progress(_PROGRESS.validate_python(event))
            if event["event"] == MERGING:
                on_merge(_MERGING.validate_python(event))

    return take


def _gone() -> StateError:
    return StateError(
        "the daemon has ended before this was over",
        hint="start it again, which puts right what was under way; then `vmfleece run list`",
        code="daemon-gone",
    )
