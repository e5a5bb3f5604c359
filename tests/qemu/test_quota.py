"""One guest that overwrites more than its fleecing image may hold: growth, its end, and the next try.

The guest overwrites a disk of 1 GiB at full speed, over and over, while its backup is slow.
"""

import argparse
import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from structlog.typing import EventDict

from benchmarks import slow_target
from orchestrator import config
from orchestrator.admission import estimate
from orchestrator.cli import backup as command
from orchestrator.errors import EXIT_FAILED
from orchestrator.model import Outcome, Phase, Progress
from orchestrator.run import retry
from orchestrator.service import client
from tests.guest import images
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.host import FLEECED, SLOWLY, VM, Host, assert_succeeded
from tests.qemu.under_way import TICK_SECONDS, hurry, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

DISK = DiskSpec("vda", 1024 * MIB, format="raw", iothread=True)
WRITE = 64 * 1024
ALL_WRITES = DISK.size_bytes // WRITE
TARGET_BYTES_PER_SECOND = 5_000_000
HOLDER = "idle"
JOB = f"""
[job.one]
vms = ["{VM}"]
target = "main"
fleecing = "enabled=1,storage=local"
bwlimit = "{SLOWLY // 1024}"
retries = 1
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(memory: Path) -> AsyncIterator[GuestVm]:
    """It goes over its disk from the start to the end, again and again."""
    folder = memory / "large"
    folder.mkdir()
    limits = slow_target.qemu_arguments(TARGET_BYTES_PER_SECOND, disks=1)
    guest = GuestVm(folder, [DISK], Workload("random", block_bytes=WRITE, sweep=True), extra_args=limits)
    await asyncio.to_thread(images.fill, guest.image_path("vda"), DISK.size_bytes)
    async with guest:
        await guest.wait_ready()
        await guest.pause()
        yield guest
    shutil.rmtree(folder)


@pytest_asyncio.fixture(loop_scope="module")
async def vm(guest: GuestVm) -> AsyncIterator[GuestVm]:
    """The guest, which writes only while a test needs it."""
    await guest.resume()
    yield guest
    await guest.pause()


@pytest_asyncio.fixture(loop_scope="module")
async def holder(folder: Path) -> AsyncIterator[GuestVm]:
    """A VM that only holds space while it is backed up: its large disks are empty, and it never runs."""
    disks = [DiskSpec(name, 1024 * MIB) for name in ("vda", "vdb", "vdc")]
    async with GuestVm(folder / "vm", disks, initially_paused=True) as idle:
        yield idle


async def limit_target(vm: GuestVm, bytes_per_second: int) -> None:
    """Set what the slow target takes; 0: anything."""
    limits = {"bps-write": bytes_per_second, "bps-write-max": bytes_per_second}
    path = f"/objects/{slow_target.group(0)}"
    await vm.execute("qom-set", {"path": path, "property": "limits", "value": limits})


def digest(raw: Path) -> str:
    with raw.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_event(lines: list[EventDict], event: str) -> list[EventDict]:
    return [line for line in lines if line["event"] == event]


async def first_grants(host: Host, task: asyncio.Task[int]) -> list[int]:
    """What each run is granted at first, as somebody sees it who asks for the status again and again."""
    granted: dict[str, int] = {}
    while not task.done():
        status = await client.status(host.folder / "run")
        for run in status.runs if status else ():
            if run.grant_bytes:
                granted.setdefault(run.run, run.grant_bytes)
        await asyncio.wait([task], timeout=TICK_SECONDS)
    return list(granted.values())


async def test_an_image_grows_as_fast_as_the_guest_writes(
    vm: GuestVm, folder: Path, log_lines: list[EventDict]
) -> None:
    """Each extension comes long before the image is full, although the job that copies must be held for it."""
    host = Host(folder, vm, quota="8GiB", connect=slow_target.connect)
    await vm.pause()
    async with host.backing_up(FLEECED) as under_way:
        await under_way.copying()
        moment = await asyncio.to_thread(digest, vm.image_path("vda"))
        await vm.resume()
        await vm.wait_writes(ALL_WRITES, deadline_seconds=90)
        await limit_target(vm, 0)
    await limit_target(vm, TARGET_BYTES_PER_SECOND)
    assert_succeeded(under_way.result)
    (disk,) = under_way.result.disks
    assert disk.fleecing_peak_bytes > DISK.size_bytes * 3 // 4
    await host.assert_as_before()

    extended = of_event(log_lines, "grant.extended")
    assert of_event(log_lines, "grant.refused") == []
    grants = [estimate.FIRST_LEAST, *(line["grant_bytes"] for line in extended)]
    assert len(grants) > 2
    assert grants == sorted(grants)
    assert grants[-1] == estimate.worst_case(DISK.size_bytes)
    for line, outgrown in zip(extended, grants, strict=False):
        assert line["high_bytes"] < estimate.limit(outgrown) - estimate.HEADROOM_LEAST // 4
        assert line["rate_bytes_per_second"] > 0

    await vm.pause()  # for the sake of time
    restored = await host.restored()
    assert await asyncio.to_thread(digest, restored["vda"]) == moment
    await vm.resume()


async def test_a_quota_that_is_too_small_for_the_guest_fails_each_try(
    vm: GuestVm,
    folder: Path,
    log_lines: list[EventDict],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(retry, "MINUTE_SECONDS", 0.1)
    host = Host(folder, vm, quota="320MiB", more=JOB)
    arguments = argparse.Namespace(job="one", json=True, detach=False)
    job = asyncio.create_task(command.run_job(config.load(host.config), arguments))
    granted = await first_grants(host, job)
    assert job.result() == EXIT_FAILED
    assert granted == [256 * MIB, 320 * MIB]
    await host.assert_as_before()

    (run,) = json.loads(capsys.readouterr().out)["runs"]
    first, last = of_event(log_lines, "run.finished")
    assert last["run"] == run["run"] != first["run"]
    for line in (first, last):
        assert line["outcome"] == Outcome.FAILED
        assert line["error"]["code"] == "fleecing-full"
        assert "disk-vda" in line["error"]["message"]
        assert "of 320.0 MiB granted" in line["error"]["message"]
        assert "storage.local" in line["error"]["hint"]
        (disk,) = line["disks"]
        assert 300 * MIB < disk["fleecing_peak_bytes"] <= disk["grant_bytes"] == 320 * MIB
    (retrying,) = of_event(log_lines, "run.retrying")
    assert (retrying["run"], retrying["code"]) == (first["run"], "fleecing-full")
    assert retrying["pause_seconds"] > 0  # it had all there is: at once it would fare no better
    assert await host.snapshots() == []


async def test_a_run_that_was_refused_growth_is_granted_more_at_first_in_its_next_try(
    vm: GuestVm, holder: GuestVm, folder: Path, log_lines: list[EventDict]
) -> None:
    """Another run holds most of the quota; the next try waits for that, and then has enough."""
    quota_mib = estimate.worst_case(DISK.size_bytes) // MIB + 1
    host = Host(folder, vm, others={HOLDER: holder}, quota=f"{quota_mib}MiB", more=JOB)
    progress: list[Progress] = []
    async with host.opened() as opened, host.backing_up(name=HOLDER, on=opened, bwlimit=SLOWLY) as holding:
        await holding.copying()
        async with asyncio.TaskGroup() as group:
            job = group.create_task(opened.run_job("one", on_progress=progress.append))
            await until(lambda: progress[-1:] != [] and progress[-1].waits_for != "", "the second try")
            (failed,) = of_event(log_lines, "run.finished")
            (waiting,) = opened.status().queue
            assert "wanted" in waiting.reasons[0]
            assert f"of {HOLDER} holds 768.0 MiB" in waiting.reasons[0]
            assert opened.status().storages[0].granted_bytes == 768 * MIB
            await vm.assert_healthy()
            await holding.hurry()
            assert_succeeded(holding.result)
            await until(lambda: progress[-1].phase is Phase.COPYING, "copying")
            await hurry(vm, job)
        (result,) = job.result()
    assert_succeeded(result)
    assert failed["error"]["code"] == "fleecing-full"
    (retrying,) = of_event(log_lines, "run.retrying")
    assert retrying["pause_seconds"] == 0  # its place in the queue is what it waits for
    granted: dict[str, int] = {}
    for one in progress:
        if one.disks and one.disks[0].grant_bytes:
            granted.setdefault(one.run, one.disks[0].grant_bytes)
    first, second = granted.values()
    (disk,) = failed["disks"]
    assert first == 256 * MIB < disk["grant_bytes"]
    assert second >= 2 * disk["grant_bytes"]
    assert len(await host.snapshots()) == 2
    await host.assert_as_before()
