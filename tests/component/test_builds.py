"""What QEMUs can do: asked for once a build, whoever asks, and whatever befalls who asks first."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from orchestrator.errors import ConnectionLost
from orchestrator.qemu.builds import Builds
from orchestrator.qemu.commands import Command
from tests.component.fake_monitor import FakeMonitor, Trouble, Troubles
from tests.component.fake_qemu import FakeQemu


class Vms:
    """Some QEMUs, each with its monitor, and what they are asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def start(self, package: str, *, discard_source: bool = True) -> tuple[FakeQemu, FakeMonitor, Troubles]:
        asked = self.asked

        class Qemu(FakeQemu):
            def carry_out(self, command: Command, monitor: Any) -> Any:
                asked[command.name] += 1
                return super().carry_out(command, monitor)

            def _query_version(self, _arguments: Any) -> Any:
                return {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": package}

        qemu, troubles = Qemu({"vda": b""}, discard_source=discard_source), Troubles()
        monitor = FakeMonitor(qemu, vm="web01", troubles=troubles)
        monitor.open()
        return qemu, monitor, troubles


@pytest.fixture
def vms() -> Vms:
    return Vms()


async def test_many_that_ask_together_ask_a_build_once(vms: Vms) -> None:
    builds, monitors = Builds(), [vms.start("debian")[1] for _ in range(20)]
    found = await asyncio.gather(*(builds.capabilities(monitor) for monitor in monitors))
    assert len(set(found)) == 1
    assert vms.asked == {"query-version": 20, "query-qmp-schema": 1}


async def test_another_build_is_asked_by_itself(vms: Vms) -> None:
    builds = Builds()
    assert (await builds.capabilities(vms.start("new")[1])).discard_source
    assert not (await builds.capabilities(vms.start("old", discard_source=False)[1])).discard_source
    assert (await builds.capabilities(vms.start("new")[1])).discard_source
    assert vms.asked["query-qmp-schema"] == 2


async def test_one_that_is_lost_while_it_is_asked_leaves_it_to_the_next(vms: Vms) -> None:
    builds, (_, lost, troubles), (_, other, _) = Builds(), vms.start("debian"), vms.start("debian")
    troubles.on("query-qmp-schema", Trouble.LOST_BEFORE)
    first, second = await asyncio.gather(
        builds.capabilities(lost), builds.capabilities(other), return_exceptions=True
    )
    assert isinstance(first, ConnectionLost)
    assert not isinstance(second, BaseException)
    assert second.discard_source


async def test_one_that_does_not_answer_holds_up_nobody(vms: Vms) -> None:
    builds, (silent, hanging, _), (_, other, _) = Builds(), vms.start("debian"), vms.start("debian")
    silent.silent = True
    waits = asyncio.ensure_future(builds.capabilities(hanging))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        assert (await builds.capabilities(other)).snapshot_access
    waits.cancel()
    await asyncio.wait([waits])
