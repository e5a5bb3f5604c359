"""Grants that fill up: extended as long as there is quota, and never beyond it."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.admission import estimate
from orchestrator.fleecing.names import DiskNames
from orchestrator.model import Discard
from tests.component.fake_blocks import CLUSTER, Job
from tests.component.fake_monitor import Trouble
from tests.component.world import MIB, RUN, World, failed_with

Make = Callable[..., World]
SIZE = 8 * MIB
FIRST = estimate.smallest_grant(SIZE)
pytestmark = pytest.mark.usefixtures("small_grants")


def overwriting(world: World, *, every: int, disk: str = "vda") -> Callable[[Job], None]:
    """A guest that overwrites its disk from the end, a cluster each so many clusters that are copied."""
    written = 0

    def write(job: Job) -> None:
        nonlocal written
        assert world.controller.accounts.granted_bytes("local") <= world.storages["local"].quota_bytes
        if job.position % every == 0 and job.position < job.total // CLUSTER - written:
            written += 1
            world.qemu.guest_writes(disk, job.total - written * CLUSTER, b"new")

    return write


def limit_of(world: World, disk: int = 0) -> int:
    return int(world.qemu.nodes[DiskNames(RUN, disk).grant].options["size"])


def limits(world: World) -> list[int]:
    """The limits that an image was given, first to last."""
    found = []
    for command in world.qemu.executed:
        options = [command.arguments] if command.name == "blockdev-add" else command.arguments.get("options", [])
        found += [one["size"] for one in options if one["node-name"] == DiskNames(RUN, 0).grant]
    return found


async def test_a_grant_grows_as_it_fills(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    world.qemu.pace = 1
    world.qemu.during_copy = overwriting(world, every=2)
    result = await world.back_up()
    assert result.error is None, result.error
    world.assert_copied(result.snapshot)
    sizes = limits(world)
    assert sizes[0] == estimate.limit(FIRST)
    assert len(sizes) >= 3
    assert sizes == sorted(set(sizes))
    assert FIRST < result.disks[0].fleecing_peak_bytes <= sizes[-1] <= estimate.worst_case(SIZE)
    await world.assert_nothing_is_left(before)


async def test_a_grant_grows_up_to_the_quota_and_no_further(make: Make, before: list[str]) -> None:
    quota = 2 * FIRST - CLUSTER
    world = make(disks={"vda": SIZE}, quota=quota)
    world.qemu.pace = 1
    world.qemu.during_copy = overwriting(world, every=2)
    result = await world.back_up()
    assert failed_with(result) == "fleecing-full"
    assert result.retryable
    assert max(limits(world)) == estimate.limit(quota)
    assert result.error is not None
    for part in ("disk vda", "storage local", "no more to give", f"of {quota / MIB:.1f} MiB granted"):
        assert part in result.error.message
    assert "storage.local.quota" in result.error.hint
    await world.assert_nothing_is_left(before)
    await world.assert_nothing_is_listed()


async def test_a_grant_that_cannot_grow_at_all(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE}, quota=FIRST)
    world.qemu.pace = 1
    world.qemu.during_copy = overwriting(world, every=2)
    assert failed_with(await world.back_up()) == "fleecing-full"
    assert set(limits(world)) == {estimate.limit(FIRST)}
    await world.assert_nothing_is_left(before)


async def test_a_grant_gets_what_a_finished_disk_gave_back(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE, "vdb": MIB}, quota=FIRST + estimate.smallest_grant(MIB))
    world.qemu.pace = 1
    small = DiskNames(RUN, 1).job
    write = overwriting(world, every=12)

    def only_then(job: Job) -> None:
        if small not in world.qemu.jobs and job.id != small:
            write(job)

    world.qemu.during_copy = only_then
    result = await world.back_up()
    assert result.error is None, result.error
    world.assert_copied(result.snapshot)
    await world.assert_nothing_is_left(before)


async def test_a_guest_that_outruns_the_growth(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    world.qemu.during_copy = lambda _job: world.qemu.guest_writes("vda", SIZE // 2, bytes(SIZE // 2))
    result = await world.back_up()
    assert failed_with(result) == "fleecing-full"
    assert result.error is not None
    assert "could not be extended in time" in result.error.message
    await world.assert_nothing_is_left(before)


async def test_a_threshold_that_was_reported_while_nobody_listened(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    world.qemu.pace = 1
    halves = estimate.threshold(FIRST) // CLUSTER

    def once(job: Job) -> None:
        if job.position == 10:
            world.qemu.cut()
            world.qemu.guest_writes("vda", SIZE - halves * CLUSTER, bytes(halves * CLUSTER))
        elif job.position == 11:
            assert limit_of(world) == estimate.limit(FIRST)
            world.qemu.automatic = False  # until the grant was extended

    def go_on(command: object) -> None:
        if getattr(command, "name", "") == "block-set-write-threshold" and not world.qemu.automatic:
            world.qemu.automatic = True
            for job in world.qemu.jobs.values():
                world.qemu._advance_soon(job)

    world.qemu.during_copy = once
    world.qemu.before = go_on
    result = await world.back_up()
    assert result.error is None, result.error
    world.assert_copied(result.snapshot)
    assert len(limits(world)) == 2
    await world.assert_nothing_is_left(before)


async def test_a_threshold_that_was_crossed_before_the_copy_began(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    halves = estimate.threshold(FIRST) // CLUSTER
    world.qemu.before = lambda command: (
        command.name == "transaction" and world.qemu.guest_writes("vda", 0, bytes(halves * CLUSTER))
    )
    world.qemu.pace = 1
    result = await world.back_up()
    assert result.error is None, result.error
    world.assert_copied(result.snapshot)
    assert len(limits(world)) >= 2
    await world.assert_nothing_is_left(before)


async def test_an_extension_that_qemu_refuses_is_given_back(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    world.qemu.pace = 1
    is_grant = DiskNames(RUN, 0).grant
    world.troubles.on(
        "blockdev-reopen",
        Trouble.REFUSED,
        also=lambda command: command.arguments["options"][0]["node-name"] == is_grant,
    )
    held = []
    write = overwriting(world, every=4)

    def watch(job: Job) -> None:
        write(job)
        held.append(estimate.limit(world.controller.accounts.granted_bytes("local")) - limit_of(world))

    world.qemu.during_copy = watch
    result = await world.back_up()
    assert result.error is None, result.error
    world.assert_copied(result.snapshot)
    assert held[-1] == 0
    await world.assert_nothing_is_left(before)


async def test_on_a_qemu_that_cannot_grow_the_first_grant_is_all(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE}, discard_source=False)
    world.options = replace(world.options, discard=Discard.JOB)  # windows would give space back
    world.qemu.pace = 1
    world.qemu.during_copy = overwriting(world, every=2)
    result = await world.back_up()
    assert failed_with(result) == "fleecing-full"
    assert limits(world) == [estimate.limit(FIRST)]
    await world.assert_nothing_is_left(before)


async def test_what_the_guest_overwrites_after_it_was_copied_costs_nothing(make: Make, before: list[str]) -> None:
    world = make(disks={"vda": SIZE})
    world.qemu.pace = 1

    def behind(job: Job) -> None:
        if job.position:
            world.qemu.guest_writes("vda", 0, bytes(job.position * CLUSTER))

    world.qemu.during_copy = behind
    result = await world.back_up()
    assert result.error is None, result.error
    world.assert_copied(result.snapshot)
    assert limits(world) == [estimate.limit(FIRST)]
    await world.assert_nothing_is_left(before)
