"""Fixtures of the component tests: a VM in a fake QEMU, and clocks that do not keep tests waiting."""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import structlog

from orchestrator import aio
from orchestrator.admission import estimate
from orchestrator.fleecing import boundary, grant, graph, pauser, quiet
from orchestrator.qemu import tools
from orchestrator.run import copy
from tests.component import logs
from tests.component.fake_blocks import CLUSTER
from tests.component.world import World, make_world, open_descriptors


def _only_bugs(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if event["event"] != "run.bug":
        raise structlog.DropEvent
    return event


@pytest.fixture(autouse=True)
def _quiet_logs() -> Iterator[None]:
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger("error"),
        processors=[_only_bugs, structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()],
    )
    yield
    structlog.configure(**before)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked again after a while is asked soon; deadlines that tests wait for are near."""
    monkeypatch.setattr(copy, "PROGRESS_SECONDS", 0.02)
    monkeypatch.setattr(grant, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(graph, "REQUERY_SECONDS", 0.02)
    monkeypatch.setattr(quiet, "REQUERY_SECONDS", 0.02)
    monkeypatch.setattr(pauser, "PAUSE_EVENT_SECONDS", 0.1)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., World]:
    """Make a VM, by `make_world`'s arguments."""
    return partial(make_world, tmp_path)


@pytest.fixture
async def before() -> list[str]:
    """The descriptors open before the test, with those that a loop opens for its first child process."""
    await aio.run_process(["true"])
    return open_descriptors()


@pytest.fixture
def quick_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fleecing images without qemu-img: the fake QEMU looks into none, and sweeps make hundreds."""

    async def create_qcow2(descriptor: int, size_bytes: int, *, options: str = "") -> None:  # noqa: ARG001
        await asyncio.sleep(0)

    async def allocated(descriptor: int) -> list[tuple[int, int]]:  # noqa: ARG001
        await asyncio.sleep(0)
        return []

    monkeypatch.setattr(tools, "create_qcow2", create_qcow2)
    monkeypatch.setattr(tools, "allocated", allocated)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows for small disks: of two clusters."""
    monkeypatch.setattr(boundary, "WINDOW_BYTES", 2 * CLUSTER)


@pytest.fixture
def small_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grants that start small and grow in small steps, as those of large disks do."""
    monkeypatch.setattr(estimate, "FIRST_LEAST", 0)
    monkeypatch.setattr(estimate, "STEP_LEAST", 256 * 1024)
    monkeypatch.setattr(estimate, "HEADROOM_LEAST", 256 * 1024)


@pytest.fixture
def events_are_told() -> Iterator[None]:
    with logs.told():
        yield
