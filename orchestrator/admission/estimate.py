"""How much space a fleecing image may need, gets first, and gets next. Pure; all sizes are bytes.

Source of the worst case: QEMU's docs/interop/qcow2, with 64 KiB clusters and 16-bit refcounts; a test holds it
against `qemu-img measure`.
"""

from collections.abc import Mapping

CLUSTER = 64 * 1024
L2_ENTRIES = CLUSTER // 8
REFCOUNTS_PER_BLOCK = CLUSTER // 2
MIB = 1024 * 1024

FIRST_SHARE = 10
"""The first grant is a tenth of the disk: what guests overwrite during one backup is mostly far less."""
FIRST_LEAST = 256 * MIB
STEP_LEAST = 256 * MIB
THRESHOLD_PART = 4
"""A guest that writes 300 MB/s fills three quarters of the least grant in 0.6 s; extending it takes less."""
USEFUL_LEAST = MIB
"""Below this an image holds so few clusters that it breaks before it can be extended."""


def worst_case(disk_bytes: int) -> int:
    """The largest that a qcow2 image of a disk can become: every cluster written, with all its metadata."""
    return _image_bytes(disk_bytes, data_clusters=_ceil(disk_bytes, CLUSTER))


def smallest_grant(disk_bytes: int) -> int:
    """The least that is worth granting: the empty image and a little old data."""
    return min(worst_case(disk_bytes), _image_bytes(disk_bytes, data_clusters=0) + USEFUL_LEAST)


def first_grants(disks: Mapping[str, int], quota_bytes: int) -> dict[str, int] | None:
    """The first grant of each disk of one run on one storage, given each disk's size.

    Together they fit the quota, however small it is; None if even the smallest ones do not.
    """
    wanted = {disk: _first_grant(size) for disk, size in disks.items()}
    if sum(wanted.values()) <= quota_bytes:
        return wanted
    least = {disk: smallest_grant(size) for disk, size in disks.items()}
    spare = quota_bytes - sum(least.values())
    if spare < 0:
        return None
    more = {disk: wanted[disk] - least[disk] for disk in disks}
    return {disk: whole(least[disk] + spare * more[disk] // sum(more.values())) for disk in disks}


def next_grant(grant_bytes: int, disk_bytes: int) -> int:
    """What a grant that is filling up should become: twice as much, so that no guest outruns the growth."""
    return min(worst_case(disk_bytes), grant_bytes + max(grant_bytes, STEP_LEAST))


def whole(size_bytes: int) -> int:
    """The whole clusters in a size: a grant is a node's size, and QEMU takes none that splits a sector."""
    return size_bytes // CLUSTER * CLUSTER


def threshold(grant_bytes: int, *, crossed_bytes: int = 0) -> int:
    """The fill level at which to ask for more: a quarter, since a guest keeps writing while we ask.

    After a refusal that level is crossed already: ask again half-way from there to the end.
    """
    early = grant_bytes // THRESHOLD_PART
    return early if early > crossed_bytes else (crossed_bytes + grant_bytes) // 2


def _first_grant(disk_bytes: int) -> int:
    share = max(disk_bytes // FIRST_SHARE, FIRST_LEAST)
    return min(worst_case(disk_bytes), max(whole(share), smallest_grant(disk_bytes)))


def _image_bytes(disk_bytes: int, *, data_clusters: int) -> int:
    header = 1
    l2_tables = _ceil(_ceil(disk_bytes, CLUSTER), L2_ENTRIES)
    l1_clusters = max(1, _ceil(l2_tables * 8, CLUSTER))
    fixed = header + l1_clusters + (l2_tables if data_clusters else 0) + data_clusters
    return (fixed + _refcount_clusters(fixed)) * CLUSTER


def _refcount_clusters(counted: int) -> int:
    """Clusters of refcount table and blocks that count `counted` clusters and themselves."""
    refcounts = 0
    while True:
        blocks = _ceil(counted + refcounts, REFCOUNTS_PER_BLOCK)
        table = _ceil(blocks * 8, CLUSTER)
        if blocks + table == refcounts:
            return refcounts
        refcounts = blocks + table


def _ceil(value: int, step: int) -> int:
    return -(-value // step)
