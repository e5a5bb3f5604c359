"""The daemon's connections to VMs: kept, lent to runs, regained, and none of them in another one's way."""

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from orchestrator import config
from orchestrator.errors import ConnectFailed, NobodyThere
from orchestrator.model import RunResult
from orchestrator.qemu import commands, qmp
from orchestrator.service import drivers, engine, supervisor
from orchestrator.service.engine import Engine
from orchestrator.state.journal import Act, Journal
from tests.component.fake_qemu import FakeQemu
from tests.component.rigs import real
from tests.component.test_admission import OPTIONS
from tests.component.test_failing import leave
from tests.component.world import MIB, OTHER_RUN, SOCKET, World, failed_with, pattern, settled

Make = Callable[..., World]
Lines = list[MutableMapping[str, Any]]
pytestmark = pytest.mark.usefixtures("quick_images")

OTHER = Path("/run/qemu/db01.qmp")
CONFIG = """
[daemon]
state_dir = "{folder}/state"
run_dir = "{folder}/run"
[storage.local]
path = "{folder}/fleecing"
quota = "1GiB"
min_free = "0"
[target.main]
path = "{folder}/backups"
"""
VM = """
[vm.{name}]
qmp = "{path}"
"""


@pytest.fixture
def world(make: Make) -> World:
    return make(disks={"vda": MIB})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(supervisor, "SETTLE_SECONDS", 0.02)


@pytest.fixture
def lines(_quiet_logs: None) -> Iterator[Lines]:
    captured = LogCapture()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, captured],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
    )
    yield captured.entries
    assert [line for line in captured.entries if line["event"].endswith(".bug")] == []


def said(lines: Lines, *events: str) -> list[str]:
    return [line["event"] for line in lines if line["event"] in events]


@asynccontextmanager
async def supervised(world: World, *others: str) -> AsyncIterator[Engine]:
    """The daemon's engine over the world's QEMU, web01, and `others`, whose sockets are as db01's."""
    path = world.folder / "vmfleece.toml"
    vms = {"web01": SOCKET} | {name: OTHER.with_stem(name) for name in others}
    path.write_text(
        CONFIG.format(folder=world.folder) + "".join(VM.format(name=name, path=at) for name, at in vms.items())
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(drivers, "targets", lambda _config: {"main": world.target})
        async with engine.opened(config.load(path), connect=world.host.connect, supervise=True) as one:
            world.controller = one._controller
            yield one


async def backed_up(one: Engine, vm: str = "web01") -> RunResult:
    async with asyncio.timeout(10):
        return await one.back_up(vm, OPTIONS, on_progress=lambda _progress: None)


def paused_by_a_dead_run(world: World, vm: str, qemu: FakeQemu, *, path: Path, process: str = "") -> Journal:
    """A guest as a process leaves it that dies between `stop` and `cont`."""
    qemu.status = "paused"
    (world.folder / "state").mkdir(exist_ok=True)
    journal = Journal(world.folder / "state")
    journal.intend(Act.PAUSE, vm=vm, run=OTHER_RUN, subject=f"{process or id(qemu)} {path}")
    return journal


# --- lending ---


async def test_a_run_borrows_the_connection_and_gives_it_back(
    world: World, before: list[str], lines: Lines
) -> None:
    async with supervised(world) as one:
        for _ in range(2):
            result = await backed_up(one)
            assert result.error is None, result.error
        await settled(lambda: bool(said(lines, "vm.connected")))
        assert len(world.qemu.monitors) == 1
    assert world.host.connects["web01"] == 1
    assert world.qemu.monitors == []
    await world.assert_nothing_is_left(before)


async def test_a_vm_that_is_wanted_is_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 1000.0)
    qemu = world.host.qemus.pop(SOCKET)
    async with supervised(world) as one:
        await settled(lambda: world.host.connects["web01"] > 0)
        result = await backed_up(one)
        assert failed_with(result) == "vm-unreachable"
        assert said(lines, "vm.lost", "vm.unreachable") == []  # a VM that does not run is nothing special
        world.host.qemus[SOCKET] = qemu
        result = await backed_up(one)
        assert result.error is None, result.error


async def test_who_does_not_wait_any_more_leaves_nothing(world: World) -> None:
    world.qemu.silent = True
    async with supervised(world) as one:
        waiting = asyncio.ensure_future(backed_up(one))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait([waiting])
        world.qemu.speak()
        result = await backed_up(one)
        assert result.error is None, result.error


async def test_pauses_grow_up_to_a_limit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_SECONDS", 60.0)
    pauses: list[float] = []

    async def wait(_self: object, seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 10:
            await asyncio.Event().wait()

    monkeypatch.setattr(supervisor.Supervisor, "_wait", wait)
    world.host.qemus.clear()
    async with supervised(world):
        await settled(lambda: len(pauses) == 10)
    assert pauses == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]


async def test_an_error_is_told_to_all_that_wait(world: World) -> None:
    world.host.qemus.clear()
    async with supervised(world) as one:

        async def borrow() -> None:
            async with one._reach(SOCKET, vm="web01"):
                pass

        told = await asyncio.gather(*(borrow() for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in told] == [NobodyThere] * 3
        world.host.qemus[SOCKET] = world.qemu
        world.qemu.accepts = False
        told = await asyncio.gather(*(borrow() for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in told] == [ConnectFailed] * 3


# --- connections that are lost ---


async def test_a_lost_connection_is_regained_and_what_is_left_is_put_right(
    world: World, lines: Lines, before: list[str]
) -> None:
    async with supervised(world) as one:
        result = await backed_up(one)
        assert result.error is None
        one.catalogue.begin(OTHER_RUN, "web01", None, datetime.now(UTC))
        leave(world, OTHER_RUN)
        world.qemu.cut()
        await settled(lambda: not world.qemu.ours())
        assert world.qemu.ours() == []
        await settled(lambda: len(said(lines, "vm.connected")) == 2)
    told = [line["restarted"] for line in lines if line["event"] == "vm.connected"]
    assert told == [False, False]
    await world.assert_nothing_is_left(before)


async def test_a_qemu_that_ends_and_is_started_anew_is_told_once_each(world: World, lines: Lines) -> None:
    async with supervised(world) as one:
        await settled(lambda: bool(said(lines, "vm.connected")))
        world.qemu.kill()
        await settled(lambda: bool(said(lines, "vm.lost")))
        tries = world.host.connects["web01"]
        await settled(lambda: world.host.connects["web01"] > tries + 3)
        world.host.qemus[SOCKET] = FakeQemu(world.first)
        await settled(lambda: len(said(lines, "vm.connected")) == 2)
        result = await backed_up(one)
        assert result.error is None
    assert said(lines, "vm.connected", "vm.lost", "vm.unreachable") == ["vm.connected", "vm.lost", "vm.connected"]
    assert [line["restarted"] for line in lines if line["event"] == "vm.connected"] == [False, True]
    assert {line["vm"] for line in lines if line["event"].startswith("vm.")} == {"web01"}


async def test_a_run_does_not_go_on_with_the_process_that_took_its_qemu_s_place(world: World) -> None:
    anew = FakeQemu(world.first)

    def replace(_job: object) -> None:
        world.qemu.kill()
        world.host.qemus[SOCKET] = anew

    world.qemu.during_copy = replace
    async with supervised(world) as one:
        result = await backed_up(one)
        assert failed_with(result) == "vm-gone"
        assert result.retryable
        assert anew.ours() == []
        await world.assert_nothing_is_listed()
        result = await backed_up(one)
        assert result.error is None, result.error


async def test_who_still_holds_an_ended_qemu_s_monitor_keeps_nobody_from_the_next_one(world: World) -> None:
    """Such as a run that waits for its admission."""
    async with supervised(world) as one, one._reach(SOCKET, vm="web01") as first:
        world.qemu.kill()
        world.host.qemus[SOCKET] = FakeQemu(world.first)
        async with asyncio.timeout(5), one._reach(SOCKET, vm="web01") as second:
            assert (await second.execute(commands.QUERY_STATUS))["running"]
            with pytest.raises(NobodyThere):
                await first.reconnect(deadline_seconds=1)
            assert second.connected


async def test_a_monitor_that_somebody_else_holds_is_told_once(world: World, lines: Lines) -> None:
    world.qemu.accepts = False
    async with supervised(world):
        await settled(lambda: world.host.connects["web01"] > 4)
        world.qemu.accepts = True
        await settled(lambda: bool(said(lines, "vm.connected")))
    assert said(lines, "vm.unreachable", "vm.lost", "vm.connected") == ["vm.unreachable", "vm.connected"]


# --- guests ---


async def test_a_paused_guest_goes_on_whoever_else_is_silent(world: World, lines: Lines) -> None:
    silent = [FakeQemu({"vda": pattern(f"db0{number}", MIB)}) for number in (1, 2)]
    for number, qemu in enumerate(silent, 1):
        path = OTHER.with_stem(f"db0{number}")
        world.host.qemus[path] = qemu
        paused_by_a_dead_run(world, f"db0{number}", qemu, path=path)
        qemu.silent = True
    journal = paused_by_a_dead_run(world, "web01", world.qemu, path=SOCKET)
    started = time.monotonic()
    async with supervised(world, "db01", "db02") as one:
        await settled(lambda: world.qemu.running)
        took = time.monotonic() - started
        result = await backed_up(one)
        assert result.error is None, result.error
        assert {intent.vm for intent in journal.open()} == {"db01", "db02"}
        for qemu in silent:
            assert qemu.status == "paused"
            qemu.speak()
        await settled(lambda: all(qemu.running for qemu in silent) and not journal.open())
        assert [intent.vm for intent in journal.open()] == []
    print(f"continued {took * 1000:.0f} ms after the start")  # noqa: T201
    assert took < 5  # it takes a silent one's deadline, 10 s, if it is waited for
    assert len(said(lines, "guest.continued")) == 3


@pytest.mark.parametrize("status", ["prelaunch", "postmigrate", "shutdown", "io-error"])
async def test_a_guest_that_does_not_run_for_another_reason_is_left_alone(world: World, status: str) -> None:
    journal = paused_by_a_dead_run(world, "web01", world.qemu, path=SOCKET)
    world.qemu.status = status
    async with supervised(world):
        await settled(lambda: not journal.open())
    assert journal.open() == []
    assert world.qemu.status == status


async def test_a_guest_that_somebody_paused_in_a_later_process_is_left_alone(world: World) -> None:
    journal = paused_by_a_dead_run(world, "web01", world.qemu, path=SOCKET, process="another")
    async with supervised(world):
        await settled(lambda: not journal.open())
    assert journal.open() == []
    assert world.qemu.status == "paused"


async def test_a_paused_guest_of_a_vm_that_is_not_configured_any_more_goes_on(world: World) -> None:
    qemu = world.host.qemus[OTHER] = FakeQemu({"vda": pattern("db01", MIB)})
    journal = paused_by_a_dead_run(world, "db01", qemu, path=OTHER)
    async with supervised(world):
        await settled(lambda: not journal.open())
    assert qemu.running


# --- news ---


async def test_what_happens_to_a_vm_is_told(world: World, lines: Lines) -> None:
    async with supervised(world):
        await settled(lambda: bool(said(lines, "vm.connected")))
        world.qemu.status = "paused"
        world.qemu.emit("STOP")
        await settled(lambda: bool(said(lines, "vm.state")))
        for _ in range(1000):  # a guest may do that
            world.qemu.emit("RESET", guest=True, reason="guest-reset")
        world.qemu.emit("DEVICE_DELETED", path="/machine/peripheral/vdb/virtio-backend")
        world.qemu.emit("DEVICE_DELETED", device="vdb", path="/machine/peripheral/vdb")
        await settled(lambda: len(said(lines, "vm.news")) == 2)
    (state,) = (line for line in lines if line["event"] == "vm.state")
    assert (state["vm"], state["status"], state["was"]) == ("web01", "paused", "running")
    news = [(line["name"], line["times"]) for line in lines if line["event"] == "vm.news"]
    assert news == [("RESET", 1000), ("DEVICE_DELETED", 1)]


async def test_a_run_s_own_pauses_are_no_news(make: Make, lines: Lines) -> None:
    world = make(disks={"vda": MIB}, discard_source=False)
    async with supervised(world) as one:
        result = await backed_up(one)
        assert result.error is None
        assert result.pause_ms is not None
        await asyncio.sleep(10 * supervisor.SETTLE_SECONDS)
    assert said(lines, "vm.state", "vm.news") == []


# --- over real sockets ---

EVENTS = 40


async def reactions(one: Engine, path: Path) -> list[float]:
    """How long it takes from asking a QEMU for an event until who waits for it goes on, in seconds."""
    took = []
    async with one._reach(path, vm="web01") as monitor:
        with monitor.subscribe("RESUME") as events:
            for _ in range(EVENTS):
                await monitor.execute(commands.STOP)
                asked = time.monotonic()
                _, event = await asyncio.gather(monitor.execute(commands.CONT), events.next())
                took.append(time.monotonic() - asked)
                assert event.name == "RESUME"
                await asyncio.sleep(0.005)
    return took


async def test_a_qemu_that_stands_still_delays_nobody_else(world: World) -> None:
    """One stands still before it is connected, one after; runs wait for both."""
    with tempfile.TemporaryDirectory(prefix="vmf") as name:
        folder = Path(name)
        async with contextlib.AsyncExitStack() as stack:
            rigs = {}
            for vm in ("web01", "db01", "db02"):
                (folder / vm).mkdir()
                rigs[vm] = await stack.enter_async_context(real(folder / vm))
            path = world.folder / "vmfleece.toml"
            vms = "".join(VM.format(name=vm, path=rig.path) for vm, rig in rigs.items())
            path.write_text(CONFIG.format(folder=world.folder) + vms)
            rigs["db02"].hold()
            async with engine.opened(config.load(path), connect=qmp.connect, supervise=True) as one:
                alone = await reactions(one, rigs["web01"].path)
                async with one._reach(rigs["db01"].path, vm="db01"):
                    rigs["db01"].hold()
                waiting = [asyncio.ensure_future(backed_up(one, vm)) for vm in ("db01", "db02")]
                beside = await reactions(one, rigs["web01"].path)
                assert not any(run.done() for run in waiting)
                for run in waiting:
                    run.cancel()
                for vm in ("db01", "db02"):
                    rigs[vm].go_on()
                await asyncio.wait(waiting)
    for what, took in (("alone", alone), ("beside two that stand still", beside)):
        print(f"{what}: {statistics.median(took) * 1000:.1f} ms, at most {max(took) * 1000:.1f} ms")  # noqa: T201
    assert statistics.median(beside) < 5 * statistics.median(alone) + 0.05  # the slowest ones are the machine's
