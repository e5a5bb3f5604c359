"""What holds for all tests: on which event loops they run, and that none of them leaves a task behind."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
ENTRY_POINT_LOOP = (
    "tests/qemu/",
    "tests/faults/",
    "tests/peer/",
    "tests/component/",
    "tests/browser/",
    *(f"tests/unit/test_{name}.py" for name in ("controller", "ledger", "merge", "restore", "target", "tools")),
)
"""What takes long runs only on the loop that the command runs on, ..."""
EVERY_LOOP = (
    "tests/component/test_monitor_contract.py",
    "tests/component/test_nbd",
    "tests/component/test_agent.py",
)
"""... but what speaks over sockets runs on all."""


def pytest_asyncio_loop_factories(
    config: pytest.Config,
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    where = item.path.relative_to(config.rootpath).as_posix()
    if where.startswith(ENTRY_POINT_LOOP) and not where.startswith(EVERY_LOOP):
        return {"uvloop": LOOPS["uvloop"]}
    return LOOPS


@pytest.fixture(autouse=True)
def _no_task_is_left(request: pytest.FixtureRequest) -> None:
    """Set up before, and so torn down after, every other fixture of an asynchronous test."""
    test = request.function
    if hasattr(test, "hypothesis"):
        test = test.hypothesis.inner_test
    if inspect.iscoroutinefunction(test):
        request.getfixturevalue(_all_tasks_end.__name__)


@pytest.fixture
async def _all_tasks_end() -> AsyncIterator[None]:
    yield
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"the test left tasks running: {left}"
