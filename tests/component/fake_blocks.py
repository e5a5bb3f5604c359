"""The data of the fake QEMU: disks with content, nodes, filters, block jobs. Nothing here knows QMP.

Content is kept by cluster, as far as it was written; a filter copies old clusters before the guest overwrites
them, into a fleecing image that its grant limits, or into the backup target itself.
"""

import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import Any

CLUSTER = 64 * 1024
EMPTY_IMAGE_CLUSTERS = 5
"""Header, refcount table, refcount block, L1 and L2 table of a small qcow2 image."""
QCOW2_MAGIC = b"QFI\xfb"


@dataclass
class Bitmap:
    """A dirty bitmap. It is kept by clusters, whatever its granularity."""

    granularity: int = CLUSTER
    recording: bool = True
    persistent: bool = False
    inconsistent: bool = False
    busy: bool = False
    dirty: set[int] = field(default_factory=set)


@dataclass
class Node:
    """A block node. `children` are names by role (`file`, `target`); only what its driver has is used."""

    name: str
    driver: str
    options: dict[str, Any]
    children: dict[str, str] = field(default_factory=dict)
    threshold: int = 0
    high_water: int = 0
    # a guest's disk
    content: bytearray | None = None
    image: str = ""
    read_only: bool = False
    bitmaps: dict[str, Bitmap] = field(default_factory=dict)
    # a file that was passed as a descriptor
    descriptor: int | None = None
    # a qcow2 image of ours: what was written into it, by cluster
    store: dict[int, bytes] = field(default_factory=dict)
    size: int = 0
    # copy-before-write
    saved: set[int] = field(default_factory=set)
    released: set[int] = field(default_factory=set)
    broken: bool = False
    used: bool = False
    access: set[int] | None = None
    """The clusters that it copies and that can be read through it; None: all."""

    @property
    def image_bytes(self) -> int:
        return (EMPTY_IMAGE_CLUSTERS + len(self.store)) * CLUSTER


@dataclass
class Device:
    """A guest's block device. `own_node` is the one that it is to be on when nobody backs it up."""

    id: str
    own_node: str
    node: str
    removable: bool = False
    writes: int = 0
    write_ns: int = 0

    @property
    def path(self) -> str:
        return f"/machine/peripheral/{self.id}"

    @property
    def qdev(self) -> str:
        return f"{self.path}/virtio-backend"


@dataclass
class Job:
    """A block job, as far as query-jobs and query-block-jobs tell of it. `first` is where its window begins.

    `nodes` are those that it was given, be they windows of its `source` and `target`.
    """

    id: str
    source: str
    target: str
    total: int
    type: str = "backup"
    first: int = 0
    nodes: tuple[str, ...] = ()
    discards: bool = False
    on_target_error: str = "report"
    status: str = "created"
    io_status: str = "ok"
    error: str | None = None
    cancelling: bool = False
    pausing: bool = False
    position: int = 0
    speed: int = 0
    changed: list[int] | None = None
    """The clusters that it copies; None: all."""

    @property
    def over(self) -> bool:
        return self.status in ("concluded", "null")

    @property
    def current(self) -> int:
        return min(self.total, self.position * CLUSTER)


@dataclass
class Fdset:
    """Descriptors that were passed, and what for."""

    opaque: str
    descriptor: int


def clusters(offset: int, length: int) -> range:
    """The clusters that a piece of a disk touches."""
    return range(offset // CLUSTER, -(-(offset + length) // CLUSTER))


def write_out(descriptor: int, node: Node) -> None:
    """Write what a target node holds into its file, as QEMU's caches are written at a flush."""
    if "backing" in node.options:  # an incremental image
        for at, data in node.store.items():
            os.pwrite(descriptor, data, at * CLUSTER)
        return
    content = bytearray(node.size)
    for at, data in node.store.items():
        content[at * CLUSTER : at * CLUSTER + len(data)] = data
    if os.pread(descriptor, 4, 0) != QCOW2_MAGIC:
        os.pwrite(descriptor, content, 0)
        return
    with tempfile.NamedTemporaryFile() as raw:
        raw.write(content)
        raw.flush()
        argv = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", raw.name, f"/dev/fd/{descriptor}"]
        subprocess.run(argv, check=True, pass_fds=(descriptor,))
