"""A configuration that comes into force while runs are under way: over a fake QEMU, and by a real daemon."""

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from orchestrator import config
from orchestrator.config import Config
from orchestrator.errors import ConfigError, StateError
from orchestrator.model import Outcome, RunResult
from orchestrator.service import drivers, engine
from orchestrator.service.engine import Engine
from tests.component.http import free_port, over_socket, over_tcp
from tests.component.test_admission import CONFIG, OPTIONS
from tests.component.test_stopping import WITHIN_SECONDS, Bench, until
from tests.component.test_stopping import bench as bench  # noqa: PLC0414  a fixture
from tests.component.world import MIB, SOCKET, World, settled

Make = Callable[..., World]
SCHEDULED = 'schedule = "2040-01-01"'
RENAMED = [("[vm.web01]", "[vm.web02]"), ('vms = ["web01"]', 'vms = ["web02"]')]


@pytest.fixture
def world(make: Make, quick_images: None) -> World:  # noqa: ARG001
    made = make(disks={"vda": 4 * MIB})
    made.qemu.automatic = False  # copies go on when a test says so
    return made


def write(world: World, text: str = "", *, replace: Sequence[tuple[str, str]] = (), **values: str) -> Path:
    """The world's configuration with other values, more text, or other text."""
    chosen = {"quota": "1GiB", "first_grant": "64MiB", "retries": "0", "daemon": ""} | values
    filled = CONFIG.format(folder=world.folder, socket=SOCKET, more=SCHEDULED + "\n" + text, **chosen)
    for before, after in replace:
        assert before in filled
        filled = filled.replace(before, after)
    path = world.folder / "vmfleece.toml"
    path.write_text(filled)
    return path


def written(world: World, text: str = "", *, replace: Sequence[tuple[str, str]] = (), **values: str) -> Config:
    return config.load(write(world, text, replace=replace, **values))


def go_on(world: World) -> None:
    """Have copies go on, to their ends."""
    world.qemu.automatic = True
    for job in world.qemu.jobs.values():
        world.qemu._advance_soon(job)


@contextlib.asynccontextmanager
async def daemon(world: World, monkeypatch: pytest.MonkeyPatch, **values: str) -> AsyncIterator[Engine]:
    monkeypatch.setattr(drivers, "targets", lambda config: dict.fromkeys(config.target, world.target))
    async with engine.opened(written(world, **values), connect=world.host.connect, supervise=True) as one:
        world.controller = one._controller
        yield one


@contextlib.asynccontextmanager
async def copying(world: World, one: Engine, vm: str = "web01") -> AsyncIterator["asyncio.Task[RunResult]"]:
    """A run that copies in the block, and is over at its end."""
    task = asyncio.create_task(one.back_up(vm, OPTIONS, on_progress=lambda _progress: None))
    try:
        await settled(lambda: task.done() or bool([run for run in one.status().runs if run.phase == "copying"]))
        assert not task.done(), task
        yield task
    finally:
        go_on(world)
        async with asyncio.timeout(20):
            await task


async def test_a_vm_that_is_removed_finishes_its_run_and_is_let_go_then(
    world: World, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with daemon(world, monkeypatch) as one:
        async with copying(world, one) as run:
            change = await one.reload(written(world, replace=RENAMED))
            assert (change.added, change.removed, change.changed) == (
                ("vm.web02",),
                ("vm.web01",),
                ("job.nightly",),
            )
            assert [live.vm for live in one.status().runs] == ["web01"]
            assert len(world.qemu.monitors) == 1  # web02 is the same QEMU: it waits for the connection
        result = run.result()
        assert (result.vm, result.outcome) == ("web01", Outcome.SUCCEEDED)
        result = await one.back_up("web02", OPTIONS, on_progress=lambda _progress: None)
        assert result.outcome is Outcome.SUCCEEDED
        assert list(one.config.vm) == ["web02"]
        assert len(world.qemu.monitors) == 1
    assert world.qemu.monitors == []
    await world.assert_nothing_is_left(before)


async def test_a_quota_that_shrinks_takes_nothing_away_and_nothing_new_is_granted_until_it_fits(
    world: World, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with daemon(world, monkeypatch) as one:
        async with copying(world, one) as run:
            (granted,) = [storage.granted_bytes for storage in one.status().storages]
            assert granted > 2 * MIB
            await one.reload(written(world, quota="2MiB"))
            (storage,) = one.status().storages
            assert (storage.granted_bytes, storage.quota_bytes) == (granted, 2 * MIB)
            (lease,) = one._controller.accounts.leases.values()
            (disk,) = lease.grants
            assert await one._controller.grow(lease, disk, 2 * granted) == granted
            waits: list[Any] = []

            async def ask() -> None:
                grant = type(lease.grants[disk])("local", MIB)
                async with one._controller.admit(
                    run="00000001", vm="db01", target="main", priority=50, disks={"a": grant}, on_wait=waits.append
                ):
                    assert one.status().storages[0].granted_bytes <= 2 * MIB

            other = asyncio.create_task(ask())
            await settled(lambda: bool(waits))
            assert "1.0 MiB wanted" in str(waits[0])
            assert not other.done()
        await other
        assert run.result().outcome is Outcome.SUCCEEDED
    await world.assert_nothing_is_left(before)


async def test_a_run_that_waits_for_more_than_there_is_by_now_asks_for_less(
    world: World, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with daemon(world, monkeypatch, daemon="max_runs = 1") as one:
        async with one._controller.admit(
            run="00000001", vm="db01", target="main", priority=50, disks={}, on_wait=lambda _waiting: None
        ):
            run = asyncio.create_task(one.back_up("web01", OPTIONS, on_progress=lambda _progress: None))
            await settled(lambda: bool(one._controller.waiting()))
            with capture_logs() as lines:
                await one.reload(written(world, quota="2MiB", daemon="max_runs = 1"))
                await settled(lambda: "run.replanned" in [line["event"] for line in lines])
            assert not run.done()
        go_on(world)
        result = await run
        assert result.outcome is Outcome.SUCCEEDED
        assert sum(disk.grant_bytes for disk in result.disks) <= 2 * MIB
    await world.assert_nothing_is_left(before)


async def test_a_storage_that_is_removed_is_there_until_its_grants_are_back(
    world: World, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, new = world.folder / "vmfleece.toml", f'[storage.new]\npath = "{world.folder}/new"\nquota = "1GiB"\n'
    async with daemon(world, monkeypatch) as one:
        async with copying(world, one) as run:
            text = write(world, replace=[("storage=local", "storage=new")]).read_text()
            head, rest = text.split("[storage.local]")
            path.write_text(head + new + rest[rest.index("[target.main]") :])
            change = await one.reload(config.load(path))
            assert (change.added, change.removed) == (("storage.new",), ("storage.local",))
            found = {storage.name: storage.granted_bytes for storage in one.status().storages}
            assert found["local"] > found["new"] == 0
        assert run.result().outcome is Outcome.SUCCEEDED
        assert [storage.name for storage in one.status().storages] == ["new"]
    await world.assert_nothing_is_left(before)


async def test_what_cannot_be_changed_is_refused_and_all_stays_as_it_was(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with daemon(world, monkeypatch) as one:
        in_force = one.in_force.now
        async with copying(world, one):
            moved = [('fleecing"', 'elsewhere"')]
            with pytest.raises(ConfigError) as refused:
                await one.reload(written(world, quota="2MiB", replace=moved))
            assert [problem.split(":")[0] for problem in refused.value.problems] == ["storage.local.path"]
            with pytest.raises(ConfigError) as refused:
                await one.reload(written(world, quota="2MiB", replace=[('state"', 'elsewhere"')]))
            assert [problem.split(":")[0] for problem in refused.value.problems] == ["daemon.state_dir"]
            with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
                listen = f'listen = "127.0.0.1:{taken.getsockname()[1]}"'
                with pytest.raises(StateError) as unusable:
                    await one.reload(written(world, quota="2MiB", daemon=listen))
            assert unusable.value.code == "listen-unusable"
            assert one.in_force.now is in_force
            assert one.status().storages[0].quota_bytes == 1 << 30
        await one.reload(written(world, replace=moved))  # once no run is under way
        assert one.status().storages[0].path == f"{world.folder}/elsewhere"


async def test_the_api_listens_where_the_configuration_says(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = free_port(), free_port()
    async with daemon(world, monkeypatch) as one:
        for port in (first, second, second):
            await one.reload(written(world, daemon=f'listen = "127.0.0.1:{port}"'))
            async with over_tcp(port) as call:
                assert (await call.get("/api/v1/status"))["config"]["refused"] == []
        for port in (first, second):
            if port == second:
                await one.reload(written(world))
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)


async def test_many_reloads_disturb_no_run(
    world: World, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time something else is there, or has another value; the run that is under way sees none of it."""
    async with daemon(world, monkeypatch) as one:
        async with copying(world, one) as run:
            for number in range(30):
                text = f'[vm.db{number % 3}]\nqmp = "/run/qemu/db{number % 3}.qmp"' if number % 2 else ""
                loaded = written(world, text, quota=f"{number + 1}GiB", daemon=f"max_runs = {number % 4 + 1}")
                assert await one.reload(loaded)
                assert not await one.reload(loaded)
                assert set(one.config.vm) == {"web01"} | ({f"db{number % 3}"} if text else set())
        assert run.result().outcome is Outcome.SUCCEEDED
        assert world.host.connects["web01"] == 1
        assert not one.in_force.busy
    await world.assert_nothing_is_left(before)


# --- a real daemon, and SIGHUP ---


async def asked(path: Path) -> Any:
    async with over_socket(path) as call:
        return await call.get("/api/v1/status")


class Systemd:
    """What the service tells systemd."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(WITHIN_SECONDS)

    def close(self) -> None:
        self._socket.close()

    def until(self, state: str) -> list[str]:
        told: list[str] = []
        while state not in told:
            told += self._socket.recv(4096).decode().splitlines()
        return told


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    made = Systemd(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", str(made.path))
    yield made
    made.close()


def logged(process: Any, event: str) -> dict[str, Any]:
    while True:
        line: dict[str, Any] = json.loads(process.stderr.readline())
        if line["event"] == event:
            return line


def test_a_daemon_reads_its_configuration_again_on_sighup(bench: Bench, systemd: Systemd) -> None:
    """Unchanged, as after `restic unlock`, many times; refused; and with its VM renamed amid a run."""
    bench.configure(bwlimit="512KiB")
    path = bench.folder / "vmfleece.toml"
    good = path.read_text()
    with bench.copying("daemon") as process:
        copies = bench.jobs()
        systemd.until("READY=1")
        for _ in range(20):
            process.send_signal(signal.SIGHUP)
            told = systemd.until("READY=1")
            assert "RELOADING=1" in told
            assert [line for line in told if line.startswith("MONOTONIC_USEC=")]
            line = logged(process, "config.reloaded")
            assert line["added"] == line["changed"] == line["removed"] == []
        path.write_text(good.replace("64MiB", "much").replace('target = "main"', 'target = "mian"'))
        process.send_signal(signal.SIGHUP)
        line = logged(process, "config.refused")
        assert [f"{path}:" in problem for problem in line["problems"]] == [True, True]
        (shown,) = [told for told in systemd.until("READY=1") if told.startswith("STATUS=2 problems in ")]
        assert "the old one stays in force; web01" in shown
        status = asyncio.run(asked(bench.folder / "run/api.sock"))
        assert status["config"]["refused"] == line["problems"]
        path.write_text(good.replace('/state"', '/elsewhere"'))
        process.send_signal(signal.SIGHUP)
        assert logged(process, "config.refused")["code"] == "config"
        systemd.until("READY=1")
        with bench.running("status") as shown_to_people:
            assert "was refused when it was read again" in shown_to_people.communicate(timeout=WITHIN_SECONDS)[0]
        assert bench.jobs() == copies
        renamed = good.replace("[vm.web01]", "[vm.web02]").replace('vms = ["web01"]', 'vms = ["web02"]')
        path.write_text(renamed.replace("512KiB", "0"))
        process.send_signal(signal.SIGHUP)
        line = logged(process, "config.reloaded")
        assert (line["added"], line["removed"]) == (["vm.web02"], ["vm.web01"])
        ended = [logged(process, "run.finished") for _ in range(2)]
        assert [(one["vm"], one["outcome"]) for one in ended] == [("web01", "succeeded"), ("web02", "succeeded")]
        process.terminate()
        process.communicate(timeout=WITHIN_SECONDS)
    assert process.returncode == 0
    until(lambda: not bench.jobs())
