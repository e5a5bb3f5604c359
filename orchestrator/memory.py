"""How the C library treats memory that was freed."""

import contextlib
import ctypes

from orchestrator.units import MIB

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
"""From malloc.h."""


def keep_freed() -> None:
    """Have freed memory kept for what is needed next, in a process that handles one chunk after the other.

    By itself glibc gives it back to the kernel, which clears each page of it anew: that took more than half of the
    processor time of a restore.
    """
    with contextlib.suppress(AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 256 * MIB)
