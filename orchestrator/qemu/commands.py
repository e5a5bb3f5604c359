"""QMP commands as data: what is sent, in which shape. Pure.

Sources: QEMU's qapi/block-core.json, qapi/misc.json, qapi/qom.json, qapi/job.json. Every command that a run uses
is built here, so that a reader sees all that we ever ask of a QEMU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PREFIX = "vmf-"
"""All our nodes, jobs and descriptor sets are named so; nothing else in QEMU is ever touched."""

CLUSTER_BYTES = 64 * 1024
"""Of copy-before-write, and of every image that we make."""
IN_FLIGHT = {"max-workers": 4, "max-chunk": 2 * CLUSTER_BYTES}
"""A job's requests in flight: no slower than QEMU's default of 64 of up to 1 MiB, and paused much sooner.

A grant can be extended only once they have landed: to a target that takes 1 MB/s, in half a second.
"""
IN_FLIGHT_BY_CLUSTER = {"max-workers": 8, "max-chunk": CLUSTER_BYTES}
"""The same for QEMU before 8.0, whose snapshot-access must not be asked for more than one cluster at a time.

If the first one of several was copied before a write and the next one was not, it reads all of them from the disk,
where the first one is new by now (util/hbitmap.c, hbitmap_status): a wrong backup that nobody is told of.
"""


def chunks_in_flight(chunk_bytes: int, *, whole: bool) -> dict[str, int]:
    """A job's requests to a sink that keeps chunks; `whole`: none is ever written in parts (QEMU 9.2 or later).

    Four at a time are nearly as fast as sixteen, and land sooner.
    """
    return {"max-workers": 4, "max-chunk": chunk_bytes, **({"min-cluster-size": chunk_bytes} if whole else {})}


@dataclass(frozen=True, slots=True)
class Command:
    """One QMP command. `arguments` must be JSON."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def blockdev_add(options: Mapping[str, Any]) -> Command:
    return Command("blockdev-add", dict(options))


def blockdev_del(node: str) -> Command:
    return Command("blockdev-del", {"node-name": node})


def set_drive(device_path: str, node: str) -> Command:
    """Put a guest device on another node while it runs (hw/core/qdev-properties-system.c, set_drive_helper)."""
    return Command("qom-set", {"path": device_path, "property": "drive", "value": node})


def get_type(path: str) -> Command:
    """What an object of QEMU's is, such as `virtio-blk-pci`."""
    return Command("qom-get", {"path": path, "property": "type"})


def file_node(name: str, fdset: int, *, direct: bool = False) -> dict[str, Any]:
    """A file that was passed as a descriptor; `direct`: past the host's cache.

    QEMU never flushes it, which would hold up the guest. Fleecing data needs no flush, it dies with QEMU; a
    target's file is flushed by us once QEMU has closed it.
    """
    return {
        "driver": "file",
        "node-name": name,
        "filename": f"/dev/fdset/{fdset}",
        "discard": "unmap",
        "cache": {"no-flush": True, "direct": direct},
    }


def grant_node(name: str, *, file: str, size_bytes: int) -> dict[str, Any]:
    """The limit that QEMU itself enforces: a write beyond `size_bytes` fails with ENOSPC (block/raw-format.c)."""
    return {
        "driver": "raw",
        "node-name": name,
        "file": file,
        "size": size_bytes,
        "discard": "unmap",
    }


def image_node(name: str, *, file: str, discards: bool = True) -> dict[str, Any]:
    """A qcow2 image that gives back what is discarded, if it `discards`, and ignores discarding else."""
    return {"driver": "qcow2", "node-name": name, "file": file, "discard": "unmap" if discards else "ignore"}


def target_node(name: str, *, file: str, incremental: bool) -> dict[str, Any]:
    """A qcow2 image that is written once, mostly in order: small caches, so that closing it has little to write.

    QEMU writes them out in its main loop, and a guest without iothreads waits for that (docs/qcow2-cache).
    The backing file of an incremental one is not opened: only whole clusters are written.
    """
    options = image_node(name, file=file) | {"l2-cache-size": 512 * 1024, "refcount-cache-size": 256 * 1024}
    return options | {"backing": None} if incremental else options


def nbd_node(name: str, *, fd: str, export: str) -> dict[str, Any]:
    """An export of the NBD server at the other end of a connected socket that was lent by the name `fd`."""
    return {"driver": "nbd", "node-name": name, "server": {"type": "fd", "str": fd}, "export": export}


def gate_node(name: str, *, file: str) -> dict[str, Any]:
    """A node that passes everything on, and whose `file` can be exchanged under a running guest."""
    return {"driver": "raw", "node-name": name, "file": file}


def cbw_node(
    name: str, *, file: str, target: str, timeout_seconds: int, bitmap: str | None = None
) -> dict[str, Any]:
    """The filter that copies old data to `target` before a guest write (block/copy-before-write.c).

    With a `bitmap` of `file`, as it is when the filter is made, only what is dirty there is copied, and readable.

    break-snapshot: when that copy fails or takes too long, the backup breaks and the guest goes on. The default,
    break-guest-write, would give the guest an I/O error.
    """
    options: dict[str, Any] = {
        "driver": "copy-before-write",
        "node-name": name,
        "file": file,
        "target": target,
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": timeout_seconds,
    }
    if bitmap is not None:
        options["bitmap"] = {"node": file, "name": bitmap}
    return options


def snapshot_access_node(name: str, *, cbw: str) -> dict[str, Any]:
    """The read-only view of the point in time; discarding a range of it moves the boundary."""
    return {"driver": "snapshot-access", "node-name": name, "file": cbw, "discard": "unmap"}


def window_node(name: str, *, file: str, offset_bytes: int, size_bytes: int) -> dict[str, Any]:
    """A part of another node as a node of its own (block/raw-format.c)."""
    return {"driver": "raw", "node-name": name, "file": file, "offset": offset_bytes, "size": size_bytes}


def discard(node: str, *, offset_bytes: int, size_bytes: int) -> Command:
    """Discard a part of a node. QEMU does not say whether that went well (block/monitor/block-hmp-cmds.c)."""
    return _qemu_io(node, f"discard -q {offset_bytes} {size_bytes}")


def flush(node: str) -> Command:
    """Write out what a format driver caches. QEMU does not say whether that went well."""
    return _qemu_io(node, "flush")


def _qemu_io(node: str, act: str) -> Command:
    return Command("human-monitor-command", {"command-line": f'qemu-io {node} "{act}"'})


def backup_job(
    job: str,
    *,
    device: str,
    target: str,
    speed_bytes_per_second: int,
    discard_source: bool,
    compress: bool,
    requests: Mapping[str, int] = IN_FLIGHT,
    bitmap: str | None = None,
) -> dict[str, Any]:
    """A block job that copies a point in time: all of it, or what is dirty in a `bitmap` of `device`.

    It stays in query-jobs until it is dismissed. `requests`: how large and how many at a time (`x-perf`).

    A full target stops it (event BLOCK_JOB_ERROR, action `stop`); any other error ends it.
    """
    arguments: dict[str, Any] = {
        "job-id": job,
        "device": device,
        "target": target,
        "sync": "full",
        "auto-dismiss": False,
        "on-target-error": "enospc",
        "speed": speed_bytes_per_second,
        "x-perf": dict(requests),
    }
    if bitmap is not None:
        arguments |= {"sync": "bitmap", "bitmap": bitmap, "bitmap-mode": "never"}
    if discard_source:
        arguments["discard-source"] = True
    if compress:
        arguments["compress"] = True
    return arguments


def transaction(actions: Sequence[Mapping[str, Any]]) -> Command:
    """All of it or nothing, with the I/O of the nodes held meanwhile."""
    return Command("transaction", {"actions": [dict(action) for action in actions]})


def add_bitmap(node: str, name: str, *, granule_bytes: int, **options: Any) -> dict[str, Any]:
    """A step of a transaction: a bitmap that records from now on, or is `disabled`; kept if `persistent`."""
    data = {"node": node, "name": name, "granularity": granule_bytes, **options}
    return {"type": "block-dirty-bitmap-add", "data": data}


def merge_bitmaps(node: str, name: str, others: Sequence[Any]) -> dict[str, Any]:
    """A transaction's step: what is dirty in others, of this or another node (`{node, name}`), is so here, too."""
    return {"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": name, "bitmaps": list(others)}}


def change_bitmap(verb: str, node: str, name: str) -> dict[str, Any]:
    """A step of a transaction: `enable`, `disable` or `remove` a bitmap."""
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, "name": name}}


def start_backups(backup_jobs: Sequence[Mapping[str, Any]]) -> Command:
    """Start several jobs at once, or none: starting one while another one copies would wait for its writes."""
    return transaction([{"type": "blockdev-backup", "data": dict(job)} for job in backup_jobs])


def pause_job(job: str) -> Command:
    return Command("job-pause", {"id": job})


def resume_job(job: str) -> Command:
    return Command("job-resume", {"id": job})


def cancel_job(job: str) -> Command:
    return Command("job-cancel", {"id": job})


def dismiss_job(job: str) -> Command:
    return Command("job-dismiss", {"id": job})


def set_speed(job: str, speed_bytes_per_second: int) -> Command:
    return Command("block-job-set-speed", {"device": job, "speed": speed_bytes_per_second})


def write_threshold(node: str, threshold_bytes: int) -> Command:
    """BLOCK_WRITE_THRESHOLD once a write ends beyond it; fires once, then has to be set again."""
    return Command("block-set-write-threshold", {"node-name": node, "write-threshold": threshold_bytes})


def reopen(*nodes: Mapping[str, Any]) -> Command:
    """Change the options of nodes, all or none; I/O of all of them is held meanwhile (block.c)."""
    return Command("blockdev-reopen", {"options": [dict(options) for options in nodes]})


def add_fd(*, opaque: str) -> Command:
    """Take the descriptor that was sent on the same connection into a new set."""
    return Command("add-fd", {"opaque": opaque})


def remove_fd(fdset: int) -> Command:
    return Command("remove-fd", {"fdset-id": fdset})


def get_fd(name: str) -> Command:
    """Keep the descriptor that was sent on the same connection until a command takes it by this name."""
    return Command("getfd", {"fdname": name})


def close_fd(name: str) -> Command:
    return Command("closefd", {"fdname": name})


def nbd_server_start(fd: str) -> Command:
    """Serve exports on a listening socket that was lent by this name. QEMU has one such server."""
    return Command("nbd-server-start", {"addr": {"type": "fd", "data": {"str": fd}}})


def export(name: str, *, node: str, bitmap: str) -> Command:
    """Serve a node, so that it can be discarded, with one of its bitmaps."""
    options = {"type": "nbd", "id": name, "name": name, "node-name": node, "writable": True, "bitmaps": [bitmap]}
    return Command("block-export-add", options)


STOP = Command("stop")
CONT = Command("cont")
QUERY_STATUS = Command("query-status")
QUERY_JOBS = Command("query-jobs")
QUERY_BLOCK_JOBS = Command("query-block-jobs")
QUERY_BLOCK = Command("query-block")
QUERY_NODES = Command("query-named-block-nodes", {"flat": True})
QUERY_DEVICE_STATS = Command("query-blockstats")
QUERY_NODE_STATS = Command("query-blockstats", {"query-nodes": True})
QUERY_GRAPH = Command("x-debug-query-block-graph")
QUERY_EXPORTS = Command("query-block-exports")
NBD_SERVER_STOP = Command("nbd-server-stop")
QUERY_FDSETS = Command("query-fdsets")
QUERY_MIGRATE = Command("query-migrate")
QUERY_SCHEMA = Command("query-qmp-schema")
QUERY_VERSION = Command("query-version")
