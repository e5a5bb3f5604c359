"""What runs are granted: given back only when nothing can use it any more, and asked for again in time."""

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from orchestrator import config
from orchestrator.admission import controller as controller_module
from orchestrator.admission import estimate
from orchestrator.admission.ledger.base import Grant, Owner
from orchestrator.admission.ledger.sqlite import SqliteLedger
from orchestrator.errors import HookError
from orchestrator.model import Fleecing, Outcome, RunOptions, Vm
from orchestrator.run import retry
from orchestrator.service import drivers, engine, offline
from orchestrator.service.api import unix
from orchestrator.service.engine import Engine
from orchestrator.storage.base import Space
from tests.component.fake_blocks import CLUSTER
from tests.component.fake_monitor import Trouble
from tests.component.fake_qemu import FakeQemu
from tests.component.http_server import http_server
from tests.component.world import MIB, OTHER_RUN, SOCKET, World, failed_with, pattern, settled

Make = Callable[..., World]
SIZE = 8 * MIB


@contextmanager
def logged() -> Iterator[list[MutableMapping[str, Any]]]:
    """What is logged in the block."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("info"))
    with capture_logs() as logs:
        yield logs


# --- what a run leaves behind keeps its grant ---


async def test_what_could_not_be_taken_out_stays_granted_until_it_is(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    world.qemu.during_copy = lambda _job: world.qemu.break_snapshot("vda")
    world.qemu.before = lambda asked: (  # which is asked for each time that it is tried
        asked.name == "query-block" and world.troubles.on("blockdev-del", Trouble.REFUSED)
    )
    result = await world.back_up(run=OTHER_RUN)
    assert result.outcome is Outcome.FAILED
    assert "could not undo: take everything out of QEMU" in result.warnings
    granted = world.controller.accounts.granted_bytes("local")
    assert granted == world.controller.accounts.stranded_bytes("local") == estimate.worst_case(SIZE)
    assert [owner.run for owner in world.controller.stranded()] == [OTHER_RUN]

    world.qemu.before = lambda _command: None
    world.qemu.during_copy = lambda _job: None
    world.troubles.when.clear()
    result = await world.back_up()
    assert result.error is None, result.error
    await world.assert_nothing_is_left(before)


async def test_a_vm_that_ended_holds_nothing(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    world.qemu.during_copy = lambda _job: world.qemu.kill()
    assert failed_with(await world.back_up()) in ("vm-gone", "vm-unreachable")
    assert world.controller.stranded() == []
    await world.assert_nothing_is_left(before)


async def test_a_vm_that_cannot_be_asked_may_hold_it_all(make: Make) -> None:
    world = make(disks={"vda": SIZE})

    def leave(_job: object) -> None:
        world.qemu.accepts = False
        world.qemu.cut()

    world.qemu.during_copy = leave
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("orchestrator.run.copy.RECONNECT_SECONDS", 0.05)
        patched.setattr("orchestrator.run.backup.UNDO_RECONNECT_SECONDS", 0.05)
        assert failed_with(await world.back_up()) == "vm-unreachable"
    assert world.controller.accounts.stranded_bytes("local") == estimate.worst_case(SIZE)


# --- growth ---


@pytest.mark.usefixtures("small_grants")
async def test_refused_growth_is_asked_for_again_as_soon_as_another_run_gives_something_back(
    make: Make, before: list[str]
) -> None:
    first = estimate.smallest_grant(SIZE)
    world = make(disks={"vda": SIZE}, quota=first + estimate.worst_case(SIZE) // 2)
    other = {"x": Grant("local", estimate.worst_case(SIZE) // 2)}
    refused, back = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with world.controller.admit(
            run="other000", vm="db01", target="main", priority=1, disks=other, on_wait=lambda _waiting: None
        ):
            await refused.wait()
        back.set()

    holding = asyncio.ensure_future(hold())
    await settled(lambda: bool(world.controller.accounts.leases))
    world.qemu.pace = 1
    written = 0

    def write(job: Any) -> None:
        # Past the first threshold; then the copy waits for what comes of that.
        nonlocal written
        if not back.is_set() and (written + 8) * CLUSTER < estimate.limit(first):
            written += 1
            world.qemu.guest_writes("vda", job.total - written * CLUSTER, b"new")
        elif not back.is_set():
            world.qemu.automatic = False

    world.qemu.during_copy = write
    with logged() as logs:

        def seen(event: str) -> bool:
            return any(line["event"] == event for line in logs)

        run = asyncio.ensure_future(world.back_up())
        await settled(lambda: seen("grant.refused"))
        assert seen("grant.refused")
        assert not seen("grant.extended")
        refused.set()
        await settled(lambda: seen("grant.extended"))
        assert seen("grant.extended")
        world.qemu.automatic = True
        for job in world.qemu.jobs.values():
            world.qemu._advance_soon(job)
        result = await run
    await holding
    assert result.error is None, result.error
    world.assert_copied(result.snapshot)
    await world.assert_nothing_is_left(before)


# --- giving way ---


class FilledByOthers:
    """A storage's `space` on whose file system others write."""

    def __init__(self) -> None:
        self.free_bytes = 1 << 40

    def __call__(self) -> Space:
        return Space(self.free_bytes, floor_bytes=1 << 30)


async def test_the_last_run_in_order_gives_way_before_the_file_system_is_full(
    make: Make, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_module, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(controller_module, "WORTH_BYTES", 1)
    world = make(disks={"vda": SIZE})
    space = FilledByOthers()
    monkeypatch.setattr(world.storages["local"], "space", space)
    urgent = Vm("db01", Path("/run/qemu/db01.qmp"), priority=90)
    world.host.qemus[urgent.qmp] = FakeQemu({"vda": pattern("second", SIZE)})
    for qemu in world.host.qemus.values():
        qemu.automatic = False
    async with world.controller.serving():
        low = asyncio.ensure_future(world.back_up(run="00000001"))
        high = asyncio.ensure_future(world.back_up(run="00000002", vm=urgent))
        await settled(lambda: all(qemu.jobs for qemu in world.host.qemus.values()))
        space.free_bytes = 1 << 29
        result = await low
        assert failed_with(result) == "storage-low"
        assert result.retryable
        assert result.error is not None
        assert "512.0 MiB free on its file system, less than its min_free (1.0 GiB)" in result.error.message
        assert not high.done()
        space.free_bytes = 1 << 40
        for qemu in world.host.qemus.values():
            qemu.automatic = True
            for job in qemu.jobs.values():
                qemu._advance_soon(job)
        assert (await high).error is None
    await world.assert_nothing_is_left(before)


# --- the engine ---

CONFIG = """
[daemon]
state_dir = "{folder}/state"
run_dir = "{folder}/run"
{daemon}
[storage.local]
path = "{folder}/fleecing"
quota = "{quota}"
min_free = "0"
first_grant = "{first_grant}"
[target.main]
path = "{folder}/backups"
[vm.web01]
qmp = "{socket}"
[job.nightly]
vms = ["web01"]
target = "main"
fleecing = "enabled=1,storage=local"
retries = {retries}
{more}
"""
OPTIONS = RunOptions("main", Fleecing(storage="local"))


@asynccontextmanager
async def opened(
    world: World,
    *,
    quota: str = "1GiB",
    first_grant: str = "10%",
    retries: int = 1,
    more: str = "",
    recover: bool = True,
    daemon: str = "",
    supervise: bool = False,
) -> AsyncIterator[Engine]:
    """The engine over the world's QEMU and target, with a state_dir of its own."""
    path = world.folder / "vmfleece.toml"
    path.write_text(
        CONFIG.format(
            folder=world.folder,
            quota=quota,
            socket=SOCKET,
            first_grant=first_grant,
            retries=retries,
            more=more,
            daemon=daemon,
        )
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(drivers, "targets", lambda _config: {"main": world.target})
        async with engine.opened(
            config.load(path), connect=world.host.connect, recover=recover, supervise=supervise
        ) as one:
            world.controller = one._controller
            yield one


async def left_by_a_dead_process(world: World, *, run: str = OTHER_RUN, storage: str = "local") -> Owner:
    """A grant in the ledger whose owner died."""
    (world.folder / "state").mkdir(exist_ok=True)
    ledger = SqliteLedger(world.folder / "state" / "ledger.sqlite")
    owner = Owner(socket.gethostname(), 1, run, "web01", str(SOCKET))
    assert await ledger.take(owner, {"vda": Grant(storage, 100 * MIB)}, {storage: 1 << 40})
    await ledger.close()
    return owner


async def held(world: World) -> int:
    ledger = SqliteLedger(world.folder / "state" / "ledger.sqlite")
    holdings = await ledger.holdings()
    await ledger.close()
    return sum(holding.granted_bytes for holding in holdings)


@pytest.mark.parametrize("gone", [True, False], ids=["QEMU is gone", "QEMU lives"])
async def test_what_a_dead_process_held_is_given_back_once_nothing_of_it_lives(make: Make, gone: bool) -> None:
    world = make(disks={"vda": SIZE})
    await left_by_a_dead_process(world)
    if gone:
        world.qemu.kill()
    with logged() as logs:
        async with opened(world) as one:
            await settled(lambda: not one._controller.stranded())
            assert one.status().storages[0].granted_bytes == 0
    assert [line["event"] for line in logs if line["event"].startswith("grant.")] == [
        "grant.stranded",
        "grant.recovered",
    ]
    assert await held(world) == 0


async def test_what_a_dead_process_held_is_kept_while_its_vm_cannot_be_asked(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "RECOVER_SECONDS", 0.02)
    world = make(disks={"vda": SIZE})
    await left_by_a_dead_process(world)
    world.qemu.accepts = False
    async with opened(world) as one:
        await asyncio.sleep(0.1)
        (storage,) = one.status().storages
        assert storage.stranded_bytes == storage.granted_bytes == 100 * MIB
        world.qemu.accepts = True
        await settled(lambda: not one._controller.stranded())
        assert one.status().storages[0].stranded_bytes == 0
    assert await held(world) == 0


async def test_without_a_vmfleece_status_says_what_dead_ones_hold(make: Make) -> None:
    world = make(disks={"vda": SIZE})
    await left_by_a_dead_process(world)
    async with opened(world, quota="1GiB"):
        pass
    await left_by_a_dead_process(world)
    status = await offline.status(config.load(world.folder / "vmfleece.toml"))
    assert status.process is None
    (storage,) = status.storages
    assert (storage.granted_bytes, storage.stranded_bytes) == (100 * MIB, 100 * MIB)


@pytest.mark.usefixtures("small_grants")
async def test_a_run_that_ran_full_is_queued_again_at_once_with_a_larger_first_grant(
    make: Make, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "MINUTE_SECONDS", 1000.0)  # it would hang
    world = make(disks={"vda": SIZE}, discard_source=False)  # its first grant is all it gets
    world.qemu.pace = 1

    def overwrite(job: Any) -> None:
        if job.position < 28:
            world.qemu.guest_writes("vda", job.total - (job.position + 1) * CLUSTER, b"new")

    world.qemu.during_copy = overwrite
    with logged() as logs:
        async with opened(world, first_grant="0", more='discard = "job"') as one:
            (result,) = await one.run_job("nightly")
    assert result.error is None, result.error
    (failed,) = [line for line in logs if line["event"] == "run.finished" and line["error"]]
    assert failed["error"]["code"] == "fleecing-full"
    (retrying,) = [line for line in logs if line["event"] == "run.retrying"]
    assert retrying["pause_seconds"] == 0
    assert result.disks[0].grant_bytes == 2 * failed["disks"][0]["grant_bytes"]
    await world.assert_nothing_is_left(before)


@pytest.mark.usefixtures("small_grants")
async def test_a_run_that_ran_full_of_the_whole_quota_waits_before_it_is_tried_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "MINUTE_SECONDS", 0.01)
    world = make(disks={"vda": SIZE}, discard_source=False)
    world.qemu.during_copy = lambda _job: world.qemu.guest_writes("vda", SIZE // 2, bytes(SIZE // 2))
    with logged() as logs:
        async with opened(world, quota="2MiB", first_grant="64MiB", retries=2) as one:
            (result,) = await one.run_job("nightly")
    assert failed_with(result) == "fleecing-full"
    pauses = [line["pause_seconds"] for line in logs if line["event"] == "run.retrying"]
    assert pauses == [0.01, 0.02]


@pytest.mark.usefixtures("small_grants")
async def test_past_runs_tell_how_much_is_granted_first(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    past = {"kind": "full", "outcome": "succeeded", "error": None}
    disk = {"disk": "vda", "fleecing_peak_bytes": 4 * MIB, "grant_bytes": 5 * MIB, "storage": "local"}
    world.past_results = [past | {"disks": [disk]}]
    world.qemu.automatic = False
    run = asyncio.ensure_future(world.back_up())
    await settled(lambda: bool(world.qemu.jobs))
    assert world.controller.accounts.granted_bytes("local") == 5 * MIB
    run.cancel()
    await asyncio.wait([run])
    await world.assert_nothing_is_left(before)


async def test_after_a_job_retention_is_applied_to_the_vms_that_succeeded(make: Make) -> None:
    world = make(disks={"vda": MIB})
    async with opened(world, retries=0, more='prune_backups = "keep-last=2"\nfull_every = 1') as one:
        for _ in range(4):
            (result,) = await one.run_job("nightly")
            assert result.error is None, result.error
        kept = [snapshot.id for snapshot in world.fake_target.listed]
        assert len(kept) == 2
        assert kept[-1] == result.snapshot
        world.qemu.target_error = "Input/output error"
        (result,) = await one.run_job("nightly")
        assert result.error is not None
    assert [snapshot.id for snapshot in world.fake_target.listed] == kept


@pytest.mark.parametrize("merges", [False, True])
async def test_after_a_job_a_chain_is_merged_if_that_is_configured(make: Make, merges: bool) -> None:
    world = make(disks={"vda": MIB})
    more = f'prune_backups = "keep-last=2"\nmerge_chains = {str(merges).lower()}'
    async with opened(world, more=more) as one:
        for _ in range(4):
            (result,) = await one.run_job("nightly")
            assert result.error is None, result.error
    parents = [[disk.parent for disk in snapshot.disks] for snapshot in world.fake_target.listed]
    assert len(parents) == (2 if merges else 4)
    assert parents[0] == [None]
    assert None not in parents[1]


async def test_status_tells_of_the_run_and_of_who_waits(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    grant = estimate.worst_case(SIZE)
    second = dataclasses.replace(world.vm, name="db01", qmp=Path("/run/qemu/db01.qmp"), priority=7)
    world.host.qemus[second.qmp] = FakeQemu({"vda": pattern("second", SIZE)})
    world.qemu.automatic = False
    async with opened(world, quota=str(grant + MIB)) as one:
        vms = {"web01": world.vm, "db01": second}
        one.config.vm.update(vms)
        assert one.status().runs == one.status().queue == ()
        first = asyncio.ensure_future(one.back_up("web01", OPTIONS, on_progress=lambda _progress: None))
        await settled(lambda: bool(world.qemu.jobs))
        other = asyncio.ensure_future(one.back_up("db01", OPTIONS, on_progress=lambda _progress: None))
        await settled(lambda: bool(one.status().queue))
        status = one.status()
        (run,) = status.runs
        assert (run.vm, run.phase, run.size_bytes, run.grant_bytes) == ("web01", "copying", SIZE, grant)
        (waiting,) = status.queue
        assert (waiting.vm, waiting.priority) == ("db01", 7)
        assert f"run {run.run} of web01 holds" in waiting.reasons[0]
        (storage,) = status.storages
        assert (storage.granted_bytes, storage.runs) == (grant, 1)
        assert storage.peak_bytes >= storage.used_bytes > 0
        assert unix.socket_path(world.folder / "run").is_socket()
        for job in world.qemu.jobs.values():
            world.qemu.automatic = True
            world.qemu._advance_soon(job)
        assert [(await one).error for one in (first, other)] == [None, None]
        assert one.status().runs == one.status().queue == ()
    await world.assert_nothing_is_left(before)


# --- a job's hook, and who is told ---

CALLS = """#!/bin/sh
echo "$@" >> "$0.calls"
[ "$1" != "{failing}" ]
"""
HOOK_AND_CHECK = """full_every = 1
hook = "{folder}/hook"
[notify.check]
driver = "healthchecks"
url_file = "{folder}/check.url"
"""


def with_hook(world: World, port: int, *, failing: str = "-") -> str:
    """Configuration, at the end of the job, of a hook that fails at a phase, and of a check."""
    hook, url = world.folder / "hook", world.folder / "check.url"
    hook.write_text(CALLS.format(failing=failing))
    hook.chmod(0o700)
    url.touch(mode=0o600)
    url.write_text(f"http://127.0.0.1:{port}/check")
    return HOOK_AND_CHECK.format(folder=world.folder)


def calls(world: World) -> list[str]:
    return (world.folder / "hook.calls").read_text().splitlines()


async def test_a_job_calls_its_hook_and_tells_its_check(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": MIB})
    async with http_server() as server, opened(world, retries=0, more=with_hook(world, server.port)) as one:
        (result,) = await one.run_job("nightly")
        assert result.error is None, result.error
        world.qemu.target_error = "Input/output error"
        await one.run_job("nightly")
    assert calls(world) == [
        *("job-init", "job-start", "backup-start snapshot web01"),
        *("backup-end snapshot web01", "log-end snapshot web01", "job-end"),
        *("job-init", "job-start", "backup-start snapshot web01"),
        *("backup-abort snapshot web01", "log-end snapshot web01", "job-end"),
    ]
    assert [path for path, _ in server.got] == ["/check/start", "/check", "/check/start", "/check/fail"]
    await world.assert_nothing_is_left(before)


async def test_a_hook_that_fails_at_the_start_stops_the_job(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": MIB})
    async with (
        http_server() as server,
        opened(world, more=with_hook(world, server.port, failing="job-start")) as one,
    ):
        with pytest.raises(HookError, match="exit code 1 when it was called as job-start"):
            await one.run_job("nightly")
        assert one.catalogue.results("web01") == []
        assert one.catalogue.unfinished("nightly") == {}
    assert calls(world) == ["job-init", "job-start", "job-abort"]
    assert [path for path, _ in server.got] == ["/check/start", "/check/fail"]
    await world.assert_nothing_is_left(before)


async def test_a_hook_that_fails_before_a_run_fails_that_run(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": MIB})
    async with (
        http_server() as server,
        opened(world, more=with_hook(world, server.port, failing="backup-start")) as one,
    ):
        (result,) = await one.run_job("nightly")
        assert failed_with(result) == "hook-failed"
        assert one.catalogue.results("web01")[-1]["error"]["code"] == "hook-failed"
    assert calls(world)[2:] == [
        *("backup-start snapshot web01", "backup-abort snapshot web01", "log-end snapshot web01", "job-end"),
    ]
    await world.assert_nothing_is_left(before)


async def test_a_job_that_is_cancelled_tells_its_hook(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    world.qemu.automatic = False
    async with http_server() as server, opened(world, more=with_hook(world, server.port)) as one:
        job = asyncio.ensure_future(one.run_job("nightly"))
        await settled(lambda: bool(world.qemu.jobs))
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
    assert calls(world)[3:] == ["backup-abort snapshot web01", "log-end snapshot web01", "job-abort"]
    await world.assert_nothing_is_left(before)
