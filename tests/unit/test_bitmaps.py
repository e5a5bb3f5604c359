"""What bitmaps are good for, and that whatever happened, what they say is never too little."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.fleecing import bitmaps
from orchestrator.fleecing.bitmaps import Bitmap, name_of, of_node, settle

TARGET, NODE = "main", "node"


def bitmap(snapshot: str, **changes: Any) -> Bitmap:
    made = Bitmap(name_of(TARGET, snapshot), TARGET, snapshot, 65536, 0, True, True, False, False)
    return replace(made, **changes)


def words(actions: tuple[Mapping[str, Any], ...]) -> list[str]:
    found = []
    for action in actions:
        data = action["data"]
        others = [name.rpartition(":")[2] for name in data.get("bitmaps", ())]
        name = data.get("name", data.get("target")).rpartition(":")[2]
        found.append(" ".join([action["type"].rpartition("-")[2], name, *others]))
    return found


@pytest.mark.parametrize(
    ("there", "listed", "base", "reason", "actions"),
    [
        ([], ["s1"], None, "there is no bitmap of its changes", []),
        ([bitmap("s1")], ["s1"], "s1", "", []),
        ([bitmap("s1", recording=False), bitmap("s2")], ["s1", "s2"], "s2", "", ["remove s1"]),
        (
            [bitmap("s1", recording=False), bitmap("s2")],
            ["s1"],
            "s1",
            "",
            ["enable s1", "merge s1 s2", "remove s2"],
        ),
        ([bitmap("s1"), bitmap("s2")], ["s1"], "s1", "", ["merge s1 s2", "remove s2"]),
        ([bitmap("s1")], [], None, "the snapshot that its bitmap records since is gone", ["remove s1"]),
        (
            [bitmap("s1", inconsistent=True)],
            ["s1"],
            None,
            "its bitmap is inconsistent: QEMU was not shut down cleanly",
            ["remove s1"],
        ),
        (
            [bitmap("s1", recording=False), bitmap("s2", inconsistent=True)],
            ["s1"],
            None,
            "its bitmap is inconsistent: QEMU was not shut down cleanly",
            ["remove s1", "remove s2"],
        ),
        ([bitmap("s1", busy=True)], ["s1"], None, "its bitmap is in use by somebody else", []),
        (
            [bitmap("s1", recording=False)],
            ["s1"],
            None,
            "its bitmap was disabled by somebody else",
            ["remove s1"],
        ),
        ([bitmap("s1"), bitmap("x", target="other")], ["s1"], "s1", "", []),
    ],
)
def test_settling(
    there: list[Bitmap], listed: list[str], base: str | None, reason: str, actions: list[str]
) -> None:
    settlement = settle(NODE, there, TARGET, listed)
    assert (settlement.base.snapshot if settlement.base else None) == base
    assert settlement.reason == reason
    assert words(settlement.actions) == actions


def test_only_ours_are_read_and_all_of_their_names() -> None:
    described = {"granularity": 65536, "count": 1, "recording": True, "persistent": True, "busy": False}
    found = of_node(
        [
            described | {"name": "vmfleece:main:web01/20261122T023000Z"},
            described | {"name": "libvirt-checkpoint"},
            described,
        ]
    )
    assert [(one.target, one.snapshot) for one in found] == [("main", "web01/20261122T023000Z")]


@dataclass
class Disk:
    """A disk with its bitmaps as QEMU keeps them, and what really changed since each snapshot."""

    there: dict[str, tuple[bool, set[int]]] = field(default_factory=dict)
    truth: dict[str, set[int]] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)
    inconsistent: bool = False

    def write(self, at: int) -> None:
        for recording, dirty in self.there.values():
            if recording:
                dirty.add(at)
        for changed in self.truth.values():
            changed.add(at)

    def described(self) -> list[Bitmap]:
        return [
            bitmap(name, recording=recording, inconsistent=self.inconsistent)
            for name, (recording, _) in self.there.items()
        ]

    def act(self, actions: tuple[Mapping[str, Any], ...]) -> None:
        for action in actions:
            verb, data = action["type"].rpartition("-")[2], action["data"]
            name = data.get("name", data.get("target")).rpartition(":")[2]
            if verb == "remove":
                del self.there[name]
            elif verb == "enable":
                self.there[name] = (True, self.there[name][1])
            else:
                for other in data["bitmaps"]:
                    self.there[name][1].update(self.there[other.rpartition(":")[2]][1])


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 9)),
        st.tuples(st.just("run"), st.integers(0, 5)),
        st.tuples(st.just("prune"), st.integers(0, 3)),
        st.tuples(st.just("stop"), st.booleans()),
    ),
    max_size=30,
)


@given(STEPS, st.lists(st.integers(0, 9), max_size=60))
def test_what_is_to_be_copied_is_never_too_little(steps: list[tuple[str, Any]], writes: list[int]) -> None:
    """Runs that stop anywhere, writes in between, snapshots that are removed, VMs that stop or are killed."""
    disk, pending = Disk(), list(writes)

    def guest() -> None:
        if pending:
            disk.write(pending.pop())

    for number, (step, how) in enumerate(steps):
        match step:
            case "write":
                disk.write(how)
            case "run":
                run(disk, f"s{number}", stops_at=how, guest=guest)
            case "prune" if disk.listed:
                disk.listed.pop(how % len(disk.listed))
            case "stop":
                disk.inconsistent = disk.inconsistent or (how and bool(disk.there))


def run(disk: Disk, snapshot: str, *, stops_at: int, guest: Any) -> None:
    """The order of a run on a guest that is not paused; it dies at a step, or is done."""
    settlement = settle(NODE, disk.described(), TARGET, disk.listed)
    disk.act(settlement.actions)
    disk.inconsistent = False if not disk.there else disk.inconsistent
    if stops_at == 0:
        return
    guest()
    disk.there[snapshot] = (True, set())
    guest()
    if stops_at == 1:
        return
    changed = set(disk.truth.get(settlement.base.snapshot, ())) if settlement.base else set()
    disk.truth[snapshot] = set()  # the point in time
    guest()
    if settlement.base is not None:
        name = settlement.base.snapshot
        disk.there[name] = (False, disk.there[name][1])
        assert disk.there[name][1] >= changed, "the snapshot would lack what changed"
    guest()
    if stops_at <= 3:
        return
    disk.listed.append(snapshot)
    guest()
    if stops_at == 4:
        return
    disk.act(settle(NODE, disk.described(), TARGET, disk.listed).actions)


def test_a_bitmap_is_named_after_its_target_and_snapshot() -> None:
    assert bitmaps.name_of("main", "web01/20261122T023000Z") == "vmfleece:main:web01/20261122T023000Z"
