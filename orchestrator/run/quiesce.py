"""Freezing a guest's file systems around its snapshot, and never leaving them frozen.

The journal knows of it before the agent does, so whoever starts after we died thaws first (`recover`); and while
we live nothing is frozen for longer than `FROZEN_SECONDS`. A guest that cannot be frozen is backed up all the
same: the run ends with a warning, and the snapshot is only as consistent as after a power cut.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from orchestrator import aio
from orchestrator.errors import AgentError
from orchestrator.qemu import agent
from orchestrator.qemu.agent import GuestAgent
from orchestrator.state.journal import Act, Intent, Journal, Promise

log = structlog.get_logger(__name__)

FROZEN_SECONDS = 10.0
"""How long a guest is frozen at most. A snapshot takes milliseconds; a database waits meanwhile."""


@dataclass(slots=True)
class Freeze:
    """How it went: `file_systems` were frozen from before the block to after it, if there is no `problem`.

    `unthawed` is why they may still be, after the block; "" if they are not.
    """

    file_systems: int = 0
    problem: str = ""
    unthawed: str = ""


@contextlib.asynccontextmanager
async def frozen(path: Path, journal: Journal, *, vm: str, run: str) -> AsyncIterator[Freeze]:
    """Freeze for the block, by the agent at `path`. What the agent does wrong is in the result; raises StateError.

    However the block ends, the guest is thawed; if the agent does not say so, the journal keeps it for `recover`.
    """
    freeze = Freeze()
    async with contextlib.AsyncExitStack() as connection:
        try:
            guest = await connection.enter_async_context(agent.connected(path, vm=vm))
        except AgentError as error:
            freeze.problem = str(error)
            yield freeze
            return
        intent = await Promise(journal, Act.FREEZE, vm, run, str(path)).enter()
        try:
            try:
                freeze.file_systems = await guest.freeze()
                log.info("guest.frozen", file_systems=freeze.file_systems)
            except AgentError as error:
                freeze.problem = str(error)
            async with aio.background(_thaw_in_time(guest, freeze)):
                yield freeze
        finally:
            freeze.unthawed = await aio.finish(_thaw(guest, intent, journal))


async def _thaw_in_time(guest: GuestAgent, freeze: Freeze) -> None:
    await asyncio.sleep(FROZEN_SECONDS)
    freeze.problem = freeze.problem or f"it was thawed after {FROZEN_SECONDS:g} s, before the snapshot was made"
    with contextlib.suppress(AgentError):  # it is thawed again at the end
        await aio.finish(guest.thaw())


async def _thaw(guest: GuestAgent, intent: Intent, journal: Journal) -> str:
    """Thaw it, and forget that it was frozen only if the agent says that it is thawed; else return why not."""
    try:
        await guest.thaw()
    except AgentError as error:
        log.warning("guest.unthawed", error=str(error))
        return str(error)
    log.info("guest.thawed")
    await journal.in_thread(journal.settled, intent)
    return ""


async def recover(intent: Intent, journal: Journal) -> None:
    """Thaw what a dead run left frozen; may be called again until the agent has said so.

    What an agent that nobody serves any more had frozen is forgotten. Raises AgentError, StateError.
    """
    try:
        async with agent.connected(Path(intent.subject), vm=intent.vm) as guest:
            await guest.thaw()
    except AgentError as error:
        if error.code != agent.ABSENT:  # else the guest that was frozen is gone, too
            log.warning("guest.unthawed", error=str(error))
            raise
    else:
        log.info("guest.thawed")
    await journal.in_thread(journal.settled, intent)
