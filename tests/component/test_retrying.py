"""Runs that failed and are tried again, or are not: what is seen of it meanwhile, and afterwards."""

import asyncio
import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from orchestrator.errors import StateError
from orchestrator.model import Phase, Progress, RunResult
from orchestrator.run import retry
from orchestrator.service.documents import RequestState
from orchestrator.service.status import Status
from tests.component.test_admission import OPTIONS, logged, opened
from tests.component.world import MIB, World, failed_with, settled

Make = Callable[..., World]
SIZE = MIB
pytestmark = pytest.mark.usefixtures("quick_images")


async def test_a_run_that_waits_to_be_tried_again_is_in_the_queue_and_its_cause_in_the_history(
    make: Make, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "MINUTE_SECONDS", 2.0)
    world = make(disks={"vda": SIZE})
    world.qemu.accepts = False
    with logged() as logs:
        async with opened(world, retries=2) as one:
            progress: list[Progress] = []
            job = asyncio.ensure_future(one.run_job("nightly", on_progress=progress.append))
            await settled(lambda: bool(one.status().queue))
            (waiting,) = one.status().queue
            (retrying,) = [line for line in logs if line["event"] == "run.retrying"]
            assert one.status().runs == ()
            assert (waiting.vm, waiting.job, waiting.target) == ("web01", "nightly", "main")
            (reason,) = waiting.reasons
            assert re.match(
                rf"its next try, in [0-2]s: run {retrying['run']} failed with vm-unreachable: VM web01", reason
            )
            assert waiting.until is not None
            assert datetime.fromisoformat(waiting.until) > datetime.fromisoformat(waiting.started)
            status = one.status()
            assert Status.from_json(json.loads(json.dumps(status.as_json()))) == status
            assert (progress[-1].run, progress[-1].phase) == (waiting.run, Phase.QUEUED)
            world.qemu.accepts = True
            (result,) = await job
            assert result.error is None, result.error
            assert result.run == waiting.run  # it can be found by the id that it waited under
            assert one.status().queue == ()
            history = one.catalogue.results("web01")
    failed, _ = [line for line in logs if line["event"] == "run.finished"]
    assert [one["run"] for one in history] == [retrying["run"], retrying["next_run"]]
    assert result.run == retrying["next_run"]
    assert (retrying["code"], retrying["cause"], retrying["pause_seconds"]) == ("vm-unreachable", "vm-gone", 2.0)
    assert failed["error"]["cause"] == "vm-gone"
    assert [one["error"] and one["error"]["cause"] for one in history] == ["vm-gone", None]
    await world.assert_nothing_is_left(before)


async def test_what_waiting_cannot_help_is_not_tried_again(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    for device in world.qemu.devices.values():
        device.removable = True
    with logged() as logs:
        async with opened(world, retries=10) as one:
            (result,) = await one.run_job("nightly")
    assert failed_with(result) == "no-disks"
    assert "run.retrying" not in {line["event"] for line in logs}
    await world.assert_nothing_is_left(before)


async def test_a_history_that_cannot_be_written_fails_the_run_before_it_begins(
    make: Make, before: list[str]
) -> None:
    world = make(disks={"vda": SIZE})
    async with opened(world, retries=0) as one:
        (world.folder / "state" / "catalogue.sqlite").write_bytes(b"no database")
        for suffix in ("-wal", "-shm"):
            (world.folder / "state" / f"catalogue.sqlite{suffix}").unlink(missing_ok=True)
        (result,) = await one.run_job("nightly")
    assert failed_with(result) == "state-unusable"
    assert world.qemu.executed == []
    await world.assert_nothing_is_left(before)


async def test_a_history_that_cannot_be_written_at_the_end_takes_nothing_from_the_run(make: Make) -> None:
    world = make(disks={"vda": SIZE})
    with logged() as logs:
        async with opened(world, retries=0) as one:

            def spoil(_job: Any) -> None:
                (world.folder / "state" / "catalogue.sqlite").write_bytes(b"no database")

            world.qemu.during_copy = spoil
            (result,) = await one.run_job("nightly")
    assert result.error is None
    assert [line["event"] for line in logs].count("catalogue.unusable") == 2  # the run, and the VM's turn
    assert [snapshot.id for snapshot in world.fake_target.listed] == [result.snapshot]


# --- the end of vmfleece ---


@pytest.mark.parametrize("stopping", [True, False])
async def test_the_next_start_goes_on_with_what_is_cancelled_because_vmfleece_ends_only(
    make: Make, before: list[str], stopping: bool
) -> None:
    world = make(disks={"vda": SIZE})
    world.qemu.automatic = False
    async with opened(world) as one:
        job = asyncio.ensure_future(one.run_job("nightly"))
        await settled(lambda: bool(world.qemu.jobs))
        assert one.catalogue.unfinished("nightly") == {"web01": 0}
        if stopping:
            one.stop()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert one.catalogue.unfinished("nightly") == ({"web01": 0} if stopping else {})
    await world.assert_nothing_is_left(before)


@pytest.mark.parametrize("stopping", [True, False])
async def test_a_job_whose_hook_has_not_let_it_begin_yet_is_gone_on_with_as_well(
    make: Make, stopping: bool
) -> None:
    world = make(disks={"vda": SIZE})
    hook = world.folder / "hook"
    hook.write_text('#!/bin/sh\n[ "$1" != job-start ] || { touch "$0.called"; sleep 600; }\n')
    hook.chmod(0o700)
    async with opened(world, more=f'hook = "{hook}"') as one:
        job = asyncio.ensure_future(one.run_job("nightly"))
        await settled(hook.with_name("hook.called").exists)
        if stopping:
            one.stop()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert one.catalogue.unfinished("nightly") == ({"web01": 0} if stopping else {})


async def test_stopping_ends_what_was_asked_for_and_lets_nothing_begin(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    world.qemu.automatic = False

    async def work(on_progress: Callable[[Progress], None]) -> list[RunResult]:
        return [await one.back_up("web01", OPTIONS, on_progress=on_progress)]

    async with opened(world) as one:
        await asyncio.sleep(0)  # it serves
        asked = one.requests.begin(work, vms=["web01"])
        await settled(lambda: bool(world.qemu.jobs))
        one.stop()
        await settled(lambda: one.requests.shown(asked.request).state is not RequestState.UNDER_WAY)
        await settled(lambda: not one.under_way())
        assert one.under_way() == []
        assert one.requests.shown(asked.request).state is RequestState.CANCELLED
        with pytest.raises(StateError) as refused:
            one.requests.begin(work, vms=["web01"])
        assert refused.value.code == "stopping"
        (result,) = one.catalogue.results("web01")
        assert result["outcome"] == "cancelled"
    await world.assert_nothing_is_left(before)
