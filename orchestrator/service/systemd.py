"""Telling systemd how the service is: ready, alive, stopping. Source: sd_notify(3)."""

import asyncio
import contextlib
import os
import socket


def notify(**states: str) -> None:
    """Send states such as READY="1" or STATUS="2 runs". Does nothing where systemd does not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    message = "\n".join(f"{name}={value}" for name, value in states.items())
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address.replace("@", "\0", 1))
        sender.send(message.encode())


async def watchdog() -> None:
    """Say twice per WATCHDOG_USEC that the loop goes round. Runs until cancelled."""
    interval_seconds = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    while interval_seconds > 0:
        notify(WATCHDOG="1")
        await asyncio.sleep(interval_seconds)
