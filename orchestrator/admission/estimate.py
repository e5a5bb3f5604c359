"""How much space a fleecing image may need, gets first, and gets next. Pure; all sizes are bytes.

Two sizes belong to an image, and both are whole clusters. Its *length* is the file's: QEMU keeps it below the
*limit* that it was told. Its *grant* is what it may occupy, the file system's own metadata included, so the limit
stays a little below the grant.

Growth: once a quarter of its limit is reached, an image is looked at whenever a headroom's worth was written, and
when only a headroom is left. The headroom is what a guest may write between QEMU's event and the new limit,
however suddenly it starts; of a guest known to be fast it is so much more. As long as the quota gives what is
wanted, an image never runs full

- if, from a first grant of FIRST_LEAST on, it fills by less than 191 MiB during any one reaction, idle or not
  before: 2 GB/s for 0.1 s, 400 MB/s for 0.5 s;
- if its speed at most doubles every second, from up to 50 MiB/s, and reactions take up to 0.3 s;
- if its speed is constant, and fills less than half of the first grant during a reaction of less than 2 s.

A reaction takes as long as the target takes for the half MiB that a job has in flight (`commands.IN_FLIGHT`), and
some milliseconds: 0.1 s at 5 MB/s, 0.5 s at 1 MB/s. One that hangs is a reaction that does not end.

And one that never fills faster than 37 MiB/s is given no limit of more than 448 MiB above what it holds.

Source of the worst case: QEMU's docs/interop/qcow2, with 64 KiB clusters and 16-bit refcounts; a test holds it
against `qemu-img measure`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.qemu.commands import CLUSTER_BYTES
from orchestrator.units import MIB, Share

L2_ENTRIES = CLUSTER_BYTES // 8
REFCOUNTS_PER_BLOCK = CLUSTER_BYTES // 2

OVERHEAD = 256
"""One byte in so many of a grant is for the file system's metadata, such as extent trees. Divides clusters."""
FIRST_LEAST = 256 * MIB
USEFUL_LEAST = MIB
"""Below this an image holds so few clusters that it breaks before it can be extended."""

HEADROOM_LEAST = 192 * MIB
REACT_SECONDS = 2
STEP_LEAST = 256 * MIB
STEP_SECONDS = 10
SHORTEST_SECONDS = 0.01
"""Two looks that are closer together tell nothing about a speed."""


@dataclass(frozen=True, slots=True)
class Need:
    """What is known of a disk before its image's first grant.

    `expected_bytes` is what its history says (see `history`); without one it gets `share` of the disk, or so
    many bytes.
    """

    size_bytes: int
    share: Share | int
    expected_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Fill:
    """An image as it was last looked at: how far it was written, when, and how fast it fills.

    `seconds` are those of any clock that never goes back; the image is empty at the first look. `high_bytes` is
    at least the threshold that was crossed: QEMU reports that before it counts the write (block/io.c).
    """

    seconds: float
    high_bytes: int = 0
    rate_bytes_per_second: float = 0.0

    def seen(self, seconds: float, high_bytes: int) -> "Fill":
        """The image at this look. A guest that pauses is taken for half as fast as before, not for slow."""
        high_bytes = max(high_bytes, self.high_bytes)
        elapsed_seconds = max(seconds - self.seconds, SHORTEST_SECONDS)
        observed = (high_bytes - self.high_bytes) / elapsed_seconds
        return Fill(max(seconds, self.seconds), high_bytes, max(observed, self.rate_bytes_per_second / 2))


EMPTY = Fill(0.0)


def worst_length(disk_bytes: int) -> int:
    """The longest that a qcow2 image of a disk can become: every cluster written, with all its metadata."""
    return _image_bytes(disk_bytes, data_clusters=_ceil(disk_bytes, CLUSTER_BYTES))


def worst_case(disk_bytes: int) -> int:
    """The grant that an image of a disk cannot outgrow."""
    return grant_for(worst_length(disk_bytes))


def smallest_grant(disk_bytes: int) -> int:
    """The least that is worth granting: the empty image and a little old data."""
    useful = _image_bytes(disk_bytes, data_clusters=0) + USEFUL_LEAST
    return grant_for(min(useful, worst_length(disk_bytes)))


def limit(grant_bytes: int) -> int:
    """What QEMU is told of a grant: the length that the image may reach. Nothing for less than two clusters."""
    return whole(grant_bytes - _ceil(grant_bytes, OVERHEAD))


def grant_for(length_bytes: int) -> int:
    """The smallest grant whose limit is a length, or just above it."""
    return _ceil(_ceil(length_bytes, CLUSTER_BYTES) * OVERHEAD, OVERHEAD - 1) * CLUSTER_BYTES


def whole(size_bytes: int) -> int:
    """The whole clusters in a size: a limit is a node's size, and QEMU takes none that splits a sector."""
    return size_bytes // CLUSTER_BYTES * CLUSTER_BYTES


def first_grants(disks: Mapping[str, Need], quota_bytes: int) -> dict[str, int] | None:
    """The first grant of each disk of one run on one storage.

    Each gets what its history says, else its share, but no more than the worst case, and no less than
    FIRST_LEAST: a guest that wrote little every night may write at full speed tonight, and a smaller image is
    full before it is extended. Together they fit the quota, however small it is, in proportion to what each
    wanted beyond the smallest; None if even the smallest ones do not fit.
    """
    wanted = {disk: _first_grant(need) for disk, need in disks.items()}
    if sum(wanted.values()) <= quota_bytes:
        return wanted
    least = {disk: smallest_grant(need.size_bytes) for disk, need in disks.items()}
    spare = quota_bytes - sum(least.values())
    if spare < 0:
        return None
    more = {disk: wanted[disk] - least[disk] for disk in disks}
    return {disk: whole(least[disk] + spare * more[disk] // sum(more.values())) for disk in disks}


def least_first_grants(disks: Mapping[str, Need]) -> int:
    """What the first grants of one run on one storage add up to at least, where there is room for them."""
    return sum(
        min(worst_case(need.size_bytes), max(whole(FIRST_LEAST), smallest_grant(need.size_bytes)))
        for need in disks.values()
    )


def next_grant(grant_bytes: int, fill: Fill, *, disk_bytes: int) -> int:
    """What a grant should become, seen how full the image is; the same grant while that leaves enough.

    It then lasts for STEP_SECONDS and a reaction at the observed rate, but no single burst more than triples it.
    """
    limit_bytes, rate = limit(grant_bytes), fill.rate_bytes_per_second
    least = HEADROOM_LEAST + STEP_LEAST
    if limit_bytes - fill.high_bytes >= max(least, 2 * _headroom(fill)):
        return grant_bytes
    more = max(least, min(int((REACT_SECONDS + STEP_SECONDS) * rate), 2 * limit_bytes))
    return max(grant_bytes, min(grant_for(fill.high_bytes + more), worst_case(disk_bytes)))


def threshold(grant_bytes: int, fill: Fill = EMPTY) -> int:
    """The length at which to look at the image again: above what it has reached, below its limit.

    That is when another headroom's worth was written, so that the rate is never much older, or earlier, while a
    headroom is left; but not before a quarter of the limit. Where that is reached already, since growth was
    refused or the guest is very fast: half-way from there to the end.
    """
    limit_bytes = limit(grant_bytes)
    headroom = _headroom(fill)
    early = max(limit_bytes // 4, min(fill.high_bytes + headroom, limit_bytes - headroom))
    return early if early > fill.high_bytes else (fill.high_bytes + limit_bytes) // 2


def _headroom(fill: Fill) -> int:
    return max(HEADROOM_LEAST, int(REACT_SECONDS * fill.rate_bytes_per_second))


def _first_grant(need: Need) -> int:
    share = need.share.of(need.size_bytes) if isinstance(need.share, Share) else need.share
    wanted = share if need.expected_bytes is None else need.expected_bytes
    least = smallest_grant(need.size_bytes)
    return min(worst_case(need.size_bytes), max(whole(max(wanted, FIRST_LEAST)), least))


def _image_bytes(disk_bytes: int, *, data_clusters: int) -> int:
    header = 1
    l2_tables = _ceil(_ceil(disk_bytes, CLUSTER_BYTES), L2_ENTRIES)
    l1_clusters = max(1, _ceil(l2_tables * 8, CLUSTER_BYTES))
    fixed = header + l1_clusters + (l2_tables if data_clusters else 0) + data_clusters
    return (fixed + _refcount_clusters(fixed)) * CLUSTER_BYTES


def _refcount_clusters(counted: int) -> int:
    """Clusters of refcount table and blocks that count `counted` clusters and themselves."""
    refcounts = 0
    while True:
        blocks = _ceil(counted + refcounts, REFCOUNTS_PER_BLOCK)
        table = _ceil(blocks * 8, CLUSTER_BYTES)
        if blocks + table == refcounts:
            return refcounts
        refcounts = blocks + table


def _ceil(value: int, step: int) -> int:
    return -(-value // step)
