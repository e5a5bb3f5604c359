"""When all objects are looked through for garbage: it keeps the loop from everything else."""

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator import aio, memory


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The generations of which garbage was looked for, one after the other."""
    monkeypatch.setattr(memory, "COLLECT_SECONDS", 0.01)
    monkeypatch.setattr(memory, "LOOK_SECONDS", 0.01)
    seen: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "stop":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def make_garbage() -> None:
    """Enough that lives for a while for Python to look through all there is, again and again."""
    for _ in range(30):
        kept: list[list[int]] = [[number] for number in range(50_000)]
        del kept


async def test_not_while_something_is_under_way(collections: list[int]) -> None:
    before, idle = gc.get_threshold(), False
    make_garbage()
    assert 2 in collections, "by itself, Python does it then"
    async with aio.background(memory.collect_when(lambda: idle)):
        await asyncio.sleep(0.01)
        collections.clear()
        make_garbage()
        await asyncio.sleep(0.1)
        assert collections
        assert 2 not in collections
        idle = True
        await asyncio.sleep(0.1)
        assert 2 in collections
    assert gc.get_threshold() == before


async def test_at_the_latest_after_some_time(collections: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LATEST_SECONDS", 0.05)
    async with aio.background(memory.collect_when(lambda: False)):
        collections.clear()
        async with asyncio.timeout(10):
            while 2 not in collections:
                await asyncio.sleep(0.01)
