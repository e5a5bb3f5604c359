"""What a run decides before it does anything: each refusal with its code, each choice with its reason."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.admission import estimate
from orchestrator.errors import AdmissionError, FleecingError, RefusedError, VmfleeceError
from orchestrator.model import Disk, Fleecing, FleecingPolicy, Kind, RunOptions
from orchestrator.qemu.capabilities import Capabilities
from orchestrator.qemu.commands import CLUSTER_BYTES
from orchestrator.run.plan import Past, Plan, Room, Situation, check_situation, choose_disks, plan
from orchestrator.units import GIB, MIB, Share

CAPABLE = Capabilities(break_snapshot=True, snapshot_access=True, discard_source=True, job_cluster_size=True)
REQUIRE = Fleecing()
PREFER = Fleecing(policy=FleecingPolicy.PREFER)


def disk(name: str = "vda", **changes: Any) -> Disk:
    made = Disk(name, f"node-{name}", f"/machine/peripheral/{name}", 10 * GIB, "qcow2", f"/images/{name}.qcow2")
    return replace(made, **changes)


def situation(status: str = "running", jobs: tuple[dict[str, Any], ...] = (), migration: str = "") -> Situation:
    running = {"status": status, "running": status == "running"}
    return Situation(running, jobs, {"status": migration} if migration else {})


@pytest.mark.parametrize(
    ("now", "disks", "capabilities", "code", "said"),
    [
        (situation(), [], replace(CAPABLE, break_snapshot=False), "qemu-too-old", "on-cbw-error"),
        (situation(), [], replace(CAPABLE, snapshot_access=False), "qemu-too-old", "QEMU 7.1"),
        (
            situation(jobs=({"type": "mirror", "device": "drive-vda"},)),
            [],
            CAPABLE,
            "foreign-job",
            "mirror job 'drive-vda'",
        ),
        (situation(migration="setup"), [], CAPABLE, "vm-state", "migration setup"),
        (situation(migration="active"), [], CAPABLE, "vm-state", "migration active"),
        (situation(migration="postcopy-active"), [], CAPABLE, "vm-state", "migration postcopy-active"),
        (situation("inmigrate"), [], CAPABLE, "vm-state", "inmigrate"),
        (situation("postmigrate"), [], CAPABLE, "vm-state", "postmigrate"),
        (situation("shutdown"), [], CAPABLE, "vm-state", "shutdown"),
        (
            situation(),
            [disk(), disk("vdb", node_driver="mirror_top", node="#block9")],
            CAPABLE,
            "foreign-filter",
            "disk vdb is under somebody else's mirror_top filter (#block9)",
        ),
        (situation(), [disk(node_driver="copy-before-write")], CAPABLE, "foreign-filter", "copy-before-write"),
    ],
)
def test_a_vm_is_refused(
    now: Situation, disks: list[Disk], capabilities: Capabilities, code: str, said: str
) -> None:
    with pytest.raises(RefusedError) as refused:
        check_situation("web01", now, disks, capabilities)
    assert refused.value.code == code
    assert refused.value.retryable is (code != "qemu-too-old")
    assert said in str(refused.value)
    assert "web01" in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize(
    "now",
    [
        situation(),
        situation("paused"),
        situation("prelaunch"),
        situation("io-error"),
        situation(migration="completed"),
        situation(migration="failed"),
        situation(migration="none"),
        situation(jobs=({"type": "backup", "device": "vmf-0a1b2c3d-0-copy"},)),
    ],
)
def test_a_vm_is_not_refused(now: Situation) -> None:
    check_situation("web01", now, [disk()], replace(CAPABLE, discard_source=False))


def test_disks_are_skipped_for_a_reason_each() -> None:
    chosen, skipped = choose_disks(
        "web01",
        [
            disk("vda"),
            disk("scratch0"),
            disk("cd0", removable=True, empty=True),
            disk("cd1", removable=True, read_only=True),
            disk("ro0", read_only=True),
            disk("vdb"),
        ],
        ["scratch0", "absent"],
    )
    assert [one.id for one in chosen] == ["vda", "vdb"]
    assert skipped == {
        "scratch0": "excluded by the configuration",
        "cd0": "no medium in it",
        "cd1": "removable",
        "ro0": "read-only",
    }


@pytest.mark.parametrize(
    ("disks", "said"),
    [
        ([], "no disk at all"),
        ([disk("vda"), disk("cd0", empty=True)], "vda (excluded by the configuration), cd0 (no medium in it)"),
    ],
)
def test_a_vm_without_a_disk_is_refused(disks: list[Disk], said: str) -> None:
    with pytest.raises(RefusedError, match="no disk to back up") as refused:
        choose_disks("web01", disks, ["vda"])
    assert refused.value.code == "no-disks"
    assert refused.value.message.endswith(said)


# --- fleecing ---


def planned(
    fleecing: Fleecing,
    disks: tuple[Disk, ...] = (disk("vda"), disk("vdb")),
    *,
    nearest: str | None = "near",
    expected: dict[str, int] | None = None,
    past: Past | None = None,
    **quotas: int,
) -> Plan:
    return plan(
        "web01",
        disks,
        {"cd0": "no medium in it"},
        options=RunOptions("main", fleecing),
        past=past or NOTHING,
        nearest={one.id: nearest for one in disks},
        room=room(quotas or {"near": 100 * GIB, "other": 100 * GIB}, expected or {}),
    )


NOTHING = Past((), {}, granule_bytes=CLUSTER_BYTES, reads_sinks=True)


def room(quotas: dict[str, int], expected: dict[str, int]) -> Room:
    shares: dict[str, Share | int] = {name: Share(10.0) for name in quotas} | {"other": 2 * GIB}
    return Room(quotas, dict.fromkeys(quotas, 1 << 50), shares, dict.fromkeys(Kind, expected))


def places(made: Plan) -> list[str | None]:
    return [one.storage for one in made.disks]


@pytest.mark.parametrize("fleecing", [Fleecing(enabled=False), Fleecing(policy=FleecingPolicy.PREFER)])
def test_a_target_that_qemu_cannot_read_needs_fleecing(fleecing: Fleecing) -> None:
    unreadable = replace(NOTHING, reads_sinks=False)
    with pytest.raises(VmfleeceError) as refused:
        planned(fleecing, nearest=None, past=unreadable)
    assert refused.value.code == ("no-storage" if fleecing.enabled else "fleecing-needed")
    assert places(planned(fleecing, nearest=None)) == [None, None]


def test_the_named_storage_comes_before_the_nearest() -> None:
    assert places(planned(REQUIRE)) == ["near", "near"]
    assert places(planned(Fleecing(storage="other"))) == ["other", "other"]
    assert places(planned(Fleecing(storage="other"), nearest=None)) == ["other", "other"]


def test_disks_on_two_storages_share_each_quota_apart() -> None:
    disks = (disk("vda"), disk("vdb"), disk("vdc"))
    made = plan(
        "web01",
        disks,
        {},
        options=RunOptions("main", REQUIRE),
        past=NOTHING,
        nearest={"vda": "a", "vdb": "b", "vdc": "a"},
        room=room({"a": GIB, "b": 100 * GIB}, {}),
    )
    assert places(made) == ["a", "b", "a"]
    first, second, third = (one.grant_bytes for one in made.disks)
    assert second == GIB
    assert first == third
    assert GIB - MIB < first + third <= GIB


def test_first_grants_come_from_history_or_else_from_the_storage() -> None:
    made = planned(REQUIRE, expected={"vdb": 3 * GIB})
    assert [one.grant_bytes for one in made.disks] == [GIB, 3 * GIB]
    made = planned(Fleecing(storage="other"), expected={"vdb": 3 * GIB})
    assert [one.grant_bytes for one in made.disks] == [2 * GIB, 3 * GIB]


@pytest.mark.parametrize(
    ("attainable", "granted"),
    [(100 * GIB, 30 * GIB), (20 * GIB, 20 * GIB * 15 // 16), (GIB, GIB * 15 // 16), (0, 2 * estimate.FIRST_LEAST)],
    ids=["plenty", "less than wanted", "little", "nothing now, but others may free some"],
)
def test_no_more_is_wanted_than_the_file_system_could_ever_give(attainable: int, granted: int) -> None:
    """It would wait for ever, and others behind it; so it would if others wrote a little more meanwhile."""
    disks = (disk("vda", size_bytes=100 * GIB), disk("vdb", size_bytes=100 * GIB))
    limited = replace(
        room({"near": 200 * GIB}, {"vda": 10 * GIB, "vdb": 20 * GIB}), attainable={"near": attainable}
    )
    nearest = dict.fromkeys(("vda", "vdb"), "near")
    options = RunOptions("main", REQUIRE)
    made = plan("web01", disks, {}, options=options, past=NOTHING, nearest=nearest, room=limited)
    assert granted - MIB < sum(one.grant_bytes for one in made.disks) <= granted
    anew = plan("web01", disks, {}, options=options, past=NOTHING, nearest=nearest, room=limited)
    assert anew.is_like(made)
    assert not planned(REQUIRE).is_like(made)


@pytest.mark.parametrize("policy", list(FleecingPolicy))
def test_without_fleecing_nothing_is_granted(policy: FleecingPolicy) -> None:
    made = planned(Fleecing(enabled=False, policy=policy), nearest=None)
    assert [(one.disk.id, one.storage, one.grant_bytes) for one in made.disks] == [
        ("vda", None, 0),
        ("vdb", None, 0),
    ]
    assert made.warnings == ()
    assert made.skipped == {"cd0": "no medium in it"}


def test_each_disk_says_why_it_is_full() -> None:
    for made in (planned(REQUIRE), planned(Fleecing(enabled=False))):
        assert all(one.kind is Kind.FULL and one.reason for one in made.disks)
        assert made.skipped == {"cd0": "no medium in it"}


def test_no_storage_holds_the_image() -> None:
    with pytest.raises(FleecingError) as failed:
        planned(REQUIRE, (disk("vda", image=None),), nearest=None, near=GIB, other=GIB)
    assert failed.value.code == "no-storage"
    assert "disk vda (QEMU names no local file by its full path)" in failed.value.message
    assert "near, other" in failed.value.hint
    with pytest.raises(FleecingError, match=r"/images/vda\.qcow2"):
        planned(REQUIRE, nearest=None)


def test_the_quota_is_too_small_for_even_the_smallest_images() -> None:
    disks = (disk("vda", size_bytes=1024 * GIB), disk("vdb", size_bytes=1024 * GIB))
    least = 2 * estimate.smallest_grant(1024 * GIB)
    assert places(planned(REQUIRE, disks, near=least)) == ["near", "near"]
    with pytest.raises(AdmissionError) as failed:
        planned(REQUIRE, disks, near=least - MIB)
    assert failed.value.code == "quota-too-small"
    assert not failed.value.retryable
    assert "storage near has a quota of 1.6 MiB" in failed.value.message
    assert "vda, vdb need at least 2.6 MiB" in failed.value.message
    assert failed.value.hint == "raise storage.near.quota"


@pytest.mark.parametrize(
    ("nearest", "quotas", "said"),
    [(None, {"near": GIB}, "no storage holds the image"), ("near", {"near": MIB}, "quota of 1.0 MiB")],
)
def test_prefer_backs_up_without_and_says_so(nearest: str | None, quotas: dict[str, int], said: str) -> None:
    made = planned(PREFER, nearest=nearest, **quotas)
    assert places(made) == [None, None]
    (warning,) = made.warnings
    assert warning.startswith("backed up without fleecing: ")
    assert said in warning
    assert made.skipped == {"cd0": "no medium in it"}


def test_prefer_fleeces_where_it_can_without_a_word() -> None:
    assert planned(PREFER) == planned(REQUIRE)
