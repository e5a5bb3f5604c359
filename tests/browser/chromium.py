"""Debian's Chromium, without a window."""

import contextlib
from collections.abc import AsyncIterator

from playwright.async_api import Browser, Playwright

PROGRAM = "/usr/bin/chromium"
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.asynccontextmanager
async def launched(playwright: Playwright) -> AsyncIterator[Browser]:
    """A browser for the block."""
    browser = await playwright.chromium.launch(executable_path=PROGRAM, args=[*ARGUMENTS], timeout=120_000)
    try:
        yield browser
    finally:
        await browser.close()
