"""Putting the copy-before-write filters in, and taking everything of ours out again.

    guest device ── gate ── copy-before-write ── disk node
                                 │ target
                                 └── fleecing image, or the backup target itself
    snapshot-access ── copy-before-write

A wrong order kills the guest, and so can stopping it. QEMU 10 loses an interrupt in about one of fifty `stop`s
of a guest that writes through an iothread, and that disk then hangs for ever. So the guest is not stopped: each
device is first put on a gate, a node that passes everything on, and one `blockdev-reopen` of all gates puts all
filters in: QEMU holds the I/O of all disks while it exchanges them, which makes one point in time.

QEMU before 9.1 aborts if filters go in or out while the guest runs, and does not lose interrupts: there the
device is put on the filter itself, between `stop` and `cont`.

In both ways a job is dismissed before its nodes go, and the snapshot-access node goes before the device gets
its own node back.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from orchestrator.errors import CommandFailed, MonitorError
from orchestrator.fleecing import sink
from orchestrator.fleecing.names import CBW, DISMANTLING, FLEECING, GATE, DiskNames, role_of
from orchestrator.fleecing.pauser import Pauser
from orchestrator.model import Disk
from orchestrator.qemu import commands, inventory, jobs
from orchestrator.qemu.commands import Command
from orchestrator.qemu.monitor import Monitor, raise_first
from orchestrator.target.base import Sink

log = structlog.get_logger(__name__)

JOB_END_SECONDS = 60.0
REQUERY_SECONDS = 1.0
TRIES = 3
CHANGED = "changed"
"""On a snapshot-access node: the bitmap of what its job is to copy."""


@dataclass(frozen=True, slots=True)
class Filter:
    """One disk's filter: what it is called, the node that takes the old data, and the disk's bitmaps.

    `new_bitmap` records from this moment on; `old_bitmap`, if only what is dirty in it is copied, until it.
    `granule_bytes` is how exactly they say what changed.
    """

    disk: Disk
    names: DiskNames
    old_data: str
    new_bitmap: str
    granule_bytes: int
    old_bitmap: str | None = None


async def take_snapshot(monitor: Monitor, filters: Sequence[Filter], *, cbw_timeout_seconds: int) -> float:
    """Make one point in time over all disks of a guest on QEMU 9.1 or later.

    Returns for how many milliseconds, at most, the guest's I/O was held. Raises MonitorError. Undone by
    `dismantle`; cancellation may leave it done.
    """
    raise_first(await monitor.pipeline(preparation(filters, cbw_timeout_seconds=cbw_timeout_seconds)))
    started = time.perf_counter()
    await monitor.execute(
        commands.reopen(*(commands.gate_node(one.names.gate, file=one.names.cbw) for one in filters))
    )
    held_seconds = time.perf_counter() - started
    ended = [commands.transaction(actions)] if (actions := _ended_bitmaps(filters)) else []
    raise_first(await monitor.pipeline([*ended, *_views(filters)]))
    return held_seconds * 1000


async def take_snapshot_paused(
    pauser: Pauser, filters: Sequence[Filter], *, cbw_timeout_seconds: int
) -> float | None:
    """Make one point in time over all disks while the guest is paused, for QEMU before 9.1.

    Returns for how many milliseconds it was paused; None if it was not running before.
    Raises MonitorError. Undone by `dismantle`; cancellation may leave it done.
    """
    replies, paused_ms = await pauser.run(insertion(filters, cbw_timeout_seconds=cbw_timeout_seconds))
    raise_first(replies)
    return paused_ms


def preparation(filters: Sequence[Filter], *, cbw_timeout_seconds: int) -> list[Command]:
    """What is sent before all filters go in at once: gates under the devices, filters not in use yet. Pure."""
    gates = [commands.blockdev_add(commands.gate_node(one.names.gate, file=one.disk.node)) for one in filters]
    drives = [commands.set_drive(one.disk.device_path, one.names.gate) for one in filters]
    # What is dirty now lacks what the guest still writes until the filters are in: they copy everything.
    copying_all = [replace(one, old_bitmap=None) for one in filters]
    begun = commands.transaction(_begun_bitmaps(filters))
    return [begun, *gates, *drives, *_filters(copying_all, cbw_timeout_seconds)]


def insertion(filters: Sequence[Filter], *, cbw_timeout_seconds: int) -> list[Command]:
    """What is sent between `stop` and `cont`, in order. Pure."""
    drives = [commands.set_drive(one.disk.device_path, one.names.cbw) for one in filters]
    rotated = commands.transaction([*_begun_bitmaps(filters), *_ended_bitmaps(filters)])
    return [rotated, *_filters(filters, cbw_timeout_seconds), *drives, *_views(filters)]


def _begun_bitmaps(filters: Sequence[Filter]) -> list[dict[str, Any]]:
    return [
        commands.add_bitmap(
            one.disk.node, one.new_bitmap, granule_bytes=one.granule_bytes, persistent=one.disk.keeps_bitmaps
        )
        for one in filters
    ]


def _ended_bitmaps(filters: Sequence[Filter]) -> list[dict[str, Any]]:
    return [
        commands.change_bitmap("disable", one.disk.node, one.old_bitmap)
        for one in filters
        if one.old_bitmap is not None
    ]


def _filters(filters: Sequence[Filter], cbw_timeout_seconds: int) -> list[Command]:
    return [
        commands.blockdev_add(
            commands.cbw_node(
                one.names.cbw,
                file=one.disk.node,
                target=one.old_data,
                timeout_seconds=cbw_timeout_seconds,
                bitmap=one.old_bitmap,
            )
        )
        for one in filters
    ]


def _views(filters: Sequence[Filter]) -> list[Command]:
    """The nodes to read the point in time from, each with a bitmap of what is to be read, if that is not all."""
    views = [
        commands.blockdev_add(commands.snapshot_access_node(one.names.snapshot, cbw=one.names.cbw))
        for one in filters
    ]
    for one in filters:
        if one.old_bitmap is not None:
            node, changed = one.names.snapshot, {"node": one.disk.node, "name": one.old_bitmap}
            added = commands.add_bitmap(node, CHANGED, granule_bytes=one.granule_bytes, disabled=True)
            views.append(commands.transaction([added, commands.merge_bitmaps(node, CHANGED, [changed])]))
    return views


async def release(
    monitor: Monitor, names: DiskNames, into: Sink, pauser: Pauser | None, *, incremental: bool
) -> None:
    """Take out a disk that was copied, and make sure that QEMU has written all of its copy.

    Raises TargetError if QEMU could not write all of it: deleting a node alone would hide that.
    """
    await end_jobs(monitor, names.prefix)
    await _take_out(monitor, names.prefix, pauser, roles=FLEECING)
    await sink.write_out(monitor, names, into, incremental=incremental)
    await _take_out(monitor, names.prefix, pauser, roles=DISMANTLING)


async def dismantle(monitor: Monitor, prefix: str, pauser: Pauser | None) -> None:
    """Take out everything whose name begins with `prefix`, however much of it is there.

    `pauser` is for QEMU before 9.1, which must be paused for it.

    It asks QEMU what there is, so it may be called at any time and again. Raises MonitorError if something
    could not be taken out.
    """
    await end_jobs(monitor, prefix)
    await _take_out(monitor, prefix, pauser, roles=DISMANTLING)


async def _take_out(monitor: Monitor, prefix: str, pauser: Pauser | None, *, roles: Sequence[str]) -> None:
    """Take out nodes of these roles; again where others changed something between the question and the act.

    A device may be unplugged right then, or somebody else's job end, whose filter is below ours.
    """
    for _ in range(TRIES):
        refused = await _try_to_take_out(monitor, prefix, pauser, roles=roles)
        if not refused:
            return
    raise MonitorError(
        f"could not take everything of vmfleece out of QEMU: {'; '.join(refused)}",
        hint="nothing: the guest goes on, and the next backup of this VM tries again",
        code="leftovers",
    )


async def _try_to_take_out(
    monitor: Monitor, prefix: str, pauser: Pauser | None, *, roles: Sequence[str]
) -> list[str]:
    """What QEMU refused, in words."""
    exports = await monitor.execute(commands.QUERY_EXPORTS)
    if any(one["id"].startswith(prefix) for one in exports):
        await monitor.execute(commands.NBD_SERVER_STOP)
    taking_out = removal(
        prefix,
        roles=roles,
        nodes=await monitor.execute(commands.QUERY_NODES),
        block=await monitor.execute(commands.QUERY_BLOCK),
        graph=await monitor.execute(commands.QUERY_GRAPH),
    )
    replies: list[Any] = []
    if taking_out and pauser is not None:
        replies, _ = await pauser.run(taking_out, unentered=True)
    elif taking_out:
        replies = await monitor.pipeline(taking_out)
    for fdset in await monitor.execute(commands.QUERY_FDSETS):
        if any(fd.get("opaque", "").startswith(prefix) for fd in fdset["fds"]):
            replies += await monitor.pipeline([commands.remove_fd(fdset["fdset-id"])])
    return [str(reply) for reply in replies if isinstance(reply, CommandFailed)]


def removal(
    prefix: str,
    *,
    roles: Sequence[str],
    nodes: Sequence[dict[str, Any]],
    block: Sequence[dict[str, Any]],
    graph: dict[str, Any],
) -> list[Command]:
    """The commands that take out our nodes, in the order that QEMU survives. Pure."""
    names = [node["node-name"] for node in nodes]
    ours = [name for name in names if name.startswith(prefix) and role_of(name) in roles]
    below = nodes_below(graph)
    found: list[Command] = []
    for node in sorted(ours, key=lambda node: DISMANTLING.index(role_of(node))):
        if role_of(node) in (GATE, CBW):
            own = below[node]
            if role_of(own) == CBW and own.startswith(prefix):
                own = below[own]
                found.append(commands.reopen(commands.gate_node(node, file=own)))
            found += [commands.set_drive(path, own) for path in _devices_on(node, block)]
        found.append(commands.blockdev_del(node))
    return found


def nodes_below(graph: dict[str, Any]) -> dict[str, str]:
    """The `file` child of each node, by name, from x-debug-query-block-graph.

    It is QEMU's only answer to what is below a filter, and is truer than any memory of ours.
    """
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    return {names[edge["parent"]]: names[edge["child"]] for edge in graph["edges"] if edge["name"] == "file"}


def _devices_on(node: str, block: Sequence[dict[str, Any]]) -> list[str]:
    return [disk.device_path for disk in inventory.disks(block) if disk.node == node]


async def end_jobs(monitor: Monitor, prefix: str) -> None:
    """Cancel and dismiss our jobs, and wait until they are gone. Raises MonitorError if one does not end."""
    with monitor.subscribe(*jobs.EVENTS) as events:
        try:
            async with asyncio.timeout(JOB_END_SECONDS):
                while running := await _cancel_and_dismiss(monitor, prefix):
                    try:
                        async with asyncio.timeout(REQUERY_SECONDS):
                            await events.next()
                    except TimeoutError:
                        log.debug("job.ending", jobs=running)
        except TimeoutError as error:
            raise MonitorError(
                f"block jobs did not end within {JOB_END_SECONDS:g} s of being cancelled",
                hint="see why the backup's target does not answer; the guest goes on meanwhile",
                code="job-stuck",
            ) from error


async def _cancel_and_dismiss(monitor: Monitor, prefix: str) -> list[str]:
    """One step towards no jobs of ours; returns those that are still there."""
    left = [
        job
        for job in await monitor.execute(commands.QUERY_JOBS)
        if job["id"].startswith(prefix) and job["status"] != "null"
    ]
    await monitor.pipeline(
        [
            commands.dismiss_job(job["id"]) if job["status"] == "concluded" else commands.cancel_job(job["id"])
            for job in left
        ]
    ) if left else None
    return [job["id"] for job in left]
