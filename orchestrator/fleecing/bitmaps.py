"""Dirty bitmaps: which parts of a disk changed since a snapshot. Pure.

On each disk there is one a target, `vmfleece:<target>:<snapshot>`, which records since that snapshot. For the next
snapshot another one is added before the point in time, and the old one is disabled after it. Both record what is
written in between, so a write is in the snapshot, in the new bitmap, or in both, and never in neither.

What becomes of the two is decided by what the target lists and by nothing else, so it may be decided at any time:
if the new snapshot is listed, the old bitmap goes; if it is not, the new one is merged into the old one, which
records again. That is a superset of what changed, never less.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.qemu import commands

PREFIX = "vmfleece:"


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One of our bitmaps on a disk. `dirty_bytes` is what changed, in whole granules.

    `inconsistent`: QEMU ended without writing it back, so it says nothing. `busy`: somebody is using it.
    """

    name: str
    target: str
    snapshot: str
    granularity_bytes: int
    dirty_bytes: int
    recording: bool
    persistent: bool
    busy: bool
    inconsistent: bool


@dataclass(frozen=True, slots=True)
class Settlement:
    """What to do with a disk's bitmaps of one target. `base` is the one to go on from; None: `reason` says why.

    `actions` are of one transaction, in order.
    """

    base: Bitmap | None
    reason: str
    actions: tuple[Mapping[str, Any], ...]


def name_of(target: str, snapshot: str) -> str:
    """What the bitmap that records since a snapshot is called."""
    return f"{PREFIX}{target}:{snapshot}"


def of_node(described: Iterable[Mapping[str, Any]]) -> list[Bitmap]:
    """Our bitmaps among those that QEMU describes of a node (BlockDirtyInfo in qapi/block-core.json)."""
    return [
        Bitmap(
            name=one["name"],
            target=target,
            snapshot=snapshot,
            granularity_bytes=one["granularity"],
            dirty_bytes=one["count"],
            recording=one["recording"],
            persistent=one["persistent"],
            busy=one["busy"],
            inconsistent=one.get("inconsistent", False),
        )
        for one in described
        if (name := one.get("name", "")).startswith(PREFIX)
        for target, _, snapshot in [name.removeprefix(PREFIX).partition(":")]
    ]


def settle(node: str, bitmaps: Sequence[Bitmap], target: str, listed: Sequence[str]) -> Settlement:
    """What a disk's bitmaps are good for, given the snapshots that their target lists, oldest first."""
    ours = [one for one in bitmaps if one.target == target]
    since = {one.snapshot: one for one in ours}
    base = next((since[snapshot] for snapshot in reversed(listed) if snapshot in since), None)
    # They belong to snapshots that never came to be, or were removed: more than what changed, never less.
    further = [one for one in ours if one.snapshot not in listed]
    stale = [one for one in ours if one is not base and one not in further]
    if base is None:
        why = "the snapshot that its bitmap records since is gone" if ours else "there is no bitmap of its changes"
        return Settlement(None, why, _removals(node, ours))
    together = [base, *further]
    if any(one.inconsistent for one in together):
        return Settlement(
            None, "its bitmap is inconsistent: QEMU was not shut down cleanly", _removals(node, ours)
        )
    if any(one.busy for one in together):
        return Settlement(None, "its bitmap is in use by somebody else", _removals(node, stale))
    if not any(one.recording for one in together):
        return Settlement(None, "its bitmap was disabled by somebody else", _removals(node, ours))
    actions: list[Mapping[str, Any]] = []
    if not base.recording:
        actions.append(commands.change_bitmap("enable", node, base.name))
    if further:
        actions.append(commands.merge_bitmaps(node, base.name, [one.name for one in further]))
    return Settlement(base, "", (*actions, *_removals(node, [*further, *stale])))


def _removals(node: str, bitmaps: Iterable[Bitmap]) -> tuple[Mapping[str, Any], ...]:
    return tuple(commands.change_bitmap("remove", node, one.name) for one in bitmaps if not one.busy)
