"""Freeing the space of forgotten snapshots, at the turns that a target's `reclaim` names.

`restic prune` works alone on a repository: runs to it end first, and new ones wait. Where another host writes to
the same repository, or it cannot be reached, it is tried again for some hours.
"""

import asyncio
import contextlib
from collections.abc import Mapping

import structlog

from orchestrator import aio
from orchestrator.causes import Cause
from orchestrator.config import TargetSettings
from orchestrator.errors import VmfleeceError
from orchestrator.service import scheduler
from orchestrator.target.repository import upkeep

log = structlog.get_logger(__name__)

TRIES = 24
PAUSE_SECONDS = 10 * 60.0
WORTH_WAITING = (Cause.TARGET_BUSY, Cause.TARGET_GONE)


async def serve(seat: scheduler.Seat[TargetSettings], gates: Mapping[str, aio.SharedLock]) -> None:
    """Do it at each turn until cancelled. A target's gate is held by each run to it."""
    async with contextlib.aclosing(scheduler.turns(seat, lambda settings: settings.reclaim)) as taken:
        async for settings, _due in taken:
            await free_space(settings, gates[settings.name])


async def free_space(
    settings: TargetSettings, gate: aio.SharedLock, *, pause_seconds: float = PAUSE_SECONDS
) -> None:
    """Do it now, once nobody else works on the repository. What fails is logged; the next turn tries again."""
    for left in reversed(range(TRIES)):
        try:
            async with gate.alone():
                log.info("reclaim.started", target=settings.name)
                await upkeep.reclaim(settings, on_line=_progressed)
        except VmfleeceError as error:
            log.warning("reclaim.failed", target=settings.name, code=error.code, error=str(error))
            if not (error.cause in WORTH_WAITING and left):
                return
        else:
            log.info("reclaim.finished", target=settings.name)
            return
        await asyncio.sleep(pause_seconds)


def _progressed(line: str) -> None:
    log.debug("reclaim.said", line=line)
