"""How the C library treats memory that was freed, and when Python looks for what nobody uses any more."""

import asyncio
import contextlib
import ctypes
import gc
from collections.abc import Callable

from orchestrator.units import MIB

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
"""From malloc.h."""
COLLECT_SECONDS = 600.0
LATEST_SECONDS = 3600.0
LOOK_SECONDS = 1.0
NEVER = 2**31 - 1


def keep_freed() -> None:
    """Have freed memory kept for what is needed next, in a process that handles one chunk after the other.

    By itself glibc gives it back to the kernel, which clears each page of it anew: that took more than half of the
    processor time of a restore.
    """
    with contextlib.suppress(AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 256 * MIB)


async def collect_when(idle: Callable[[], bool]) -> None:
    """Have all objects looked through for garbage when that delays nobody. Runs until cancelled.

    With a thousand VMs the loop stands still for a quarter of a second meanwhile, and by itself Python does it
    while many runs begin. What most garbage is, objects that were made a moment ago, is still found at once.
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], NEVER)
    try:
        while True:
            await asyncio.sleep(COLLECT_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LATEST_SECONDS):
                    while not idle():
                        await asyncio.sleep(LOOK_SECONDS)
            gc.collect()
    finally:
        gc.set_threshold(*before)
