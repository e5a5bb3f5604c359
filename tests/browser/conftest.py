"""A browser, and pages in it that must not complain."""

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from playwright.async_api import ConsoleMessage, Page, Response, async_playwright

from orchestrator.qemu import tools
from tests.browser.chromium import launched

Visit = Callable[..., AbstractAsyncContextManager["Visited"]]


class Visited:
    """A page, what it has fetched, and what its console says."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.responses: list[Response] = []
        self.complaints: list[str] = []
        page.on("response", self._response)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._console)

    def _response(self, response: Response) -> None:
        self.responses.append(response)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    async def until(self, script: str, argument: Any = None) -> None:
        """Wait until a JavaScript function of `argument` is true."""
        await self.page.wait_for_function(script, arg=argument, polling=50)

    async def live(self) -> None:
        await self.page.wait_for_selector("#connection[data-state=live]")


@pytest.fixture
async def visit() -> AsyncIterator[Visit]:
    """Visit an address: `port`, and how the browser is."""
    async with async_playwright() as playwright, launched(playwright) as browser:

        @contextlib.asynccontextmanager
        async def visited(
            port: int, *, scheme: str = "light", width: int = 1280, quiet: bool = True
        ) -> AsyncIterator[Visited]:
            context = await browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
            context.set_default_timeout(60_000)
            one = Visited(await context.new_page())
            await one.page.goto(f"http://127.0.0.1:{port}/")
            yield one
            await context.close()
            assert not quiet or one.complaints == []

        yield visited


@pytest.fixture(autouse=True)
def _no_qemu_img(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake QEMU looks into no fleecing image."""

    async def create_qcow2(descriptor: int, size_bytes: int, *, options: str = "") -> None:
        pass

    async def allocated(descriptor: int) -> list[tuple[int, int]]:  # noqa: ARG001
        return []

    monkeypatch.setattr(tools, "create_qcow2", create_qcow2)
    monkeypatch.setattr(tools, "allocated", allocated)
