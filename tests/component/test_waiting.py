"""Runs that wait for each other's space and slots: nobody holds anything meanwhile, and nobody waits for ever."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.admission import estimate
from orchestrator.admission.controller import Controller
from orchestrator.admission.ledger.memory import MemoryLedger
from orchestrator.model import Phase, Vm
from tests.component.fake_qemu import FakeQemu
from tests.component.world import MIB, World, make_world, pattern, settled

Make = Callable[..., World]
SIZE = MIB
GRANT = estimate.worst_case(SIZE)
SECOND = Vm("db01", Path("/run/qemu/db01.qmp"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Two VMs, and space for the fleecing image of one of them."""
    made = make_world(tmp_path, disks={"vda": SIZE}, quota=GRANT + MIB)
    made.host.qemus[SECOND.qmp] = FakeQemu({"vda": pattern("second", SIZE)})
    return made


async def waiting(world: World) -> None:
    await settled(lambda: bool(world.controller.waiting()))
    assert list(world.controller.waiting()) == ["00000002"]


async def test_two_runs_take_turns_where_space_is_for_one(world: World, before: list[str]) -> None:
    quota = world.storages["local"].quota_bytes
    held: list[int] = []
    for qemu in world.host.qemus.values():
        qemu.before = lambda _command: held.append(world.controller.accounts.granted_bytes("local"))
    world.qemu.automatic = False
    first = asyncio.ensure_future(world.back_up(run="00000001"))
    await settled(lambda: bool(world.qemu.jobs))
    second = asyncio.ensure_future(world.back_up(run="00000002", vm=SECOND))
    await waiting(world)
    assert "storage local" in str(world.controller.waiting()["00000002"])
    told = [one for one in world.progress if one.run == "00000002"]
    assert {one.phase for one in told} == {Phase.QUEUED}
    assert told[-1].waits_for == str(world.controller.waiting()["00000002"])
    assert world.host.qemus[SECOND.qmp].ours() == []
    go_on(world.qemu)
    results = await asyncio.gather(first, second)
    assert [result.error for result in results] == [None, None]
    assert max(held) <= quota
    await world.assert_nothing_is_left(before)


def go_on(qemu: FakeQemu) -> None:
    qemu.automatic = True
    for job in qemu.jobs.values():
        qemu._advance_soon(job)


async def test_cancelling_a_run_that_waits_holds_nothing(world: World, before: list[str]) -> None:
    world.qemu.automatic = False
    first = asyncio.ensure_future(world.back_up(run="00000001"))
    await settled(lambda: bool(world.qemu.jobs))
    second = asyncio.ensure_future(world.back_up(run="00000002", vm=SECOND))
    await waiting(world)
    held = world.controller.accounts.granted_bytes("local")
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert world.controller.waiting() == {}
    assert world.controller.accounts.granted_bytes("local") == held
    assert world.host.qemus[SECOND.qmp].ours() == []
    go_on(world.qemu)
    assert (await first).error is None
    await world.assert_nothing_is_left(before)


async def test_a_run_that_fails_lets_the_next_one_in(world: World, before: list[str]) -> None:
    world.qemu.automatic = False
    first = asyncio.ensure_future(world.back_up(run="00000001"))
    await settled(lambda: bool(world.qemu.jobs))
    second = asyncio.ensure_future(world.back_up(run="00000002", vm=SECOND))
    await waiting(world)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await second).error is None
    await world.assert_nothing_is_left(before)


async def test_a_run_whose_vm_changes_while_it_waits_is_planned_anew(world: World, before: list[str]) -> None:
    world.qemu.automatic = False
    first = asyncio.ensure_future(world.back_up(run="00000001"))
    await settled(lambda: bool(world.qemu.jobs))
    second = asyncio.ensure_future(world.back_up(run="00000002", vm=SECOND))
    await waiting(world)
    world.host.qemus[SECOND.qmp].add_disk("vdb", pattern("vdb", SIZE // 2))
    go_on(world.qemu)
    results = await asyncio.gather(first, second)
    assert [result.error for result in results] == [None, None]
    assert [disk.disk for disk in results[1].disks] == ["vda", "vdb"]
    await world.assert_nothing_is_left(before)


async def test_a_vm_that_goes_away_while_its_run_waits(world: World, before: list[str]) -> None:
    world.qemu.automatic = False
    first = asyncio.ensure_future(world.back_up(run="00000001"))
    await settled(lambda: bool(world.qemu.jobs))
    second = asyncio.ensure_future(world.back_up(run="00000002", vm=SECOND))
    await waiting(world)
    world.host.qemus[SECOND.qmp].kill()
    go_on(world.qemu)
    results = await asyncio.gather(first, second)
    assert results[0].error is None
    assert results[1].error is not None
    assert results[1].error.code in ("vm-unreachable", "vm-gone")
    await world.assert_nothing_is_left(before)


async def test_many_runs_all_end_within_the_quota(tmp_path: Path, before: list[str]) -> None:
    world = make_world(tmp_path, disks={"vda": SIZE}, quota=2 * GRANT + MIB)
    vms = [Vm(f"vm{number}", Path(f"/run/qemu/vm{number}.qmp"), priority=number % 3) for number in range(8)]
    for vm in vms:
        world.host.qemus[vm.qmp] = FakeQemu({"vda": pattern(vm.name, SIZE)})
    world.controller = Controller(world.storages, MemoryLedger(), max_runs=3, target_max_runs={"main": 3})
    over = []
    for qemu in world.host.qemus.values():
        qemu.pace = 1
        qemu.before = lambda _command: over.append(world.controller.accounts.granted_bytes("local"))
    results = await asyncio.gather(*(world.back_up(run=f"{n:08x}", vm=vm) for n, vm in enumerate(vms)))
    assert [result.error for result in results] == [None] * len(vms)
    assert GRANT < max(over) <= 2 * GRANT + MIB
    assert all(qemu.ours() == [] and qemu.deaths == [] for qemu in world.host.qemus.values())
    await world.assert_nothing_is_left(before)
