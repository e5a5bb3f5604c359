"""What QEMUs can do, asked for once a build.

QEMU's schema is 300 KB of JSON. Had each of a thousand runs that begin together asked for it, the loop would have
stood still for a quarter of a second again and again (decoding it, and the garbage collection that this causes),
and the answers would have been a gigabyte.
"""

import asyncio
import json

from orchestrator.qemu import capabilities, commands
from orchestrator.qemu.capabilities import Capabilities
from orchestrator.qemu.monitor import Monitor


class Builds:
    """The builds seen so far. What a build can do never changes: its version and package name it."""

    def __init__(self) -> None:
        self._known: dict[str, Capabilities] = {}
        self._turn = asyncio.Lock()

    async def capabilities(self, monitor: Monitor) -> Capabilities:
        """What the QEMU behind a monitor can do. Raises MonitorError."""
        # Asked before it has the turn: one that does not answer holds up nobody else.
        build = json.dumps(await monitor.execute(commands.QUERY_VERSION), sort_keys=True)
        if build not in self._known:
            async with self._turn:
                if build not in self._known:
                    schema = await monitor.execute(commands.QUERY_SCHEMA)
                    self._known[build] = capabilities.from_schema(schema)
        return self._known[build]
