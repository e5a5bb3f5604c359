"""What is done about what dead runs have left: only what is provably ours and dead, each with its reason."""

from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as some

from orchestrator.admission.ledger.base import Grant, Holding, Owner
from orchestrator.run.reconcile import Act, Evidence, Reach, Repair, Vm, decide
from orchestrator.state import journal
from orchestrator.state.journal import Intent
from orchestrator.units import MIB

HOST = "here"
DEAD, LIVE, THEIRS = "dddddddd", "11111111", "ffffffff"


def vm(name: str = "web01", reach: Reach = Reach.ANSWERS, **more: Any) -> Vm:
    return Vm(name, f"/run/{name}.qmp", reach, **more)


def holding(run: str = DEAD, vm: str = "web01", host: str = HOST) -> Holding:
    return Holding(Owner(host, 7, run, vm, f"/run/{vm}.qmp"), {"vda": Grant("local", 100 * MIB)}, 0.0)


def intent(run: str = DEAD, vm: str = "web01", act: journal.Act = journal.Act.FREEZE) -> Intent:
    return Intent(1, act, vm, run, f"/run/{vm}.qga")


def decided(
    *vms: Vm,
    intents: tuple[Intent, ...] = (),
    holdings: tuple[Holding, ...] = (),
    leftovers: Mapping[str, list[str]] | None = None,
) -> list[Repair]:
    evidence = Evidence(vms, intents, holdings, leftovers or {})
    return decide(evidence, host=HOST, ours={DEAD, LIVE}, running={LIVE})


def acts(repairs: list[Repair]) -> list[tuple[Act, str]]:
    return [(one.act, one.subject) for one in repairs]


def test_a_host_where_nothing_is_left() -> None:
    assert decided(vm(), vm("db01", Reach.GONE), vm("db02", Reach.SILENT)) == []


def test_a_guest_comes_first() -> None:
    repairs = decided(
        vm(objects=(f"vmf-{DEAD}-0-cbw", f"vmf-{DEAD}-0-img"), unsettled=("main",)),
        intents=(intent(), intent(act=journal.Act.PAUSE)),
        holdings=(holding(),),
        leftovers={"main": ["/backup/web01/20261122T023000Z.partial"]},
    )
    assert acts(repairs) == [
        (Act.CONTINUE, DEAD),
        (Act.THAW, DEAD),
        (Act.TAKE_OUT, DEAD),
        (Act.SETTLE_BITMAPS, "main"),
        (Act.GIVE_BACK, DEAD),
        (Act.CLEAR_TARGET, "main"),
    ]
    assert repairs[2].reason == "the run is over, and has 2 objects in its QEMU"
    assert repairs[4].reason == "100.0 MiB are granted to it, it is over, and nothing of it is in its QEMU then"
    assert repairs[5].reason == "its writer is dead: /backup/web01/20261122T023000Z.partial"


def test_what_lives_is_not_touched() -> None:
    assert (
        decided(
            vm(objects=(f"vmf-{LIVE}-0-cbw",)),
            intents=(intent(LIVE), intent(LIVE, act=journal.Act.PAUSE)),
            holdings=(holding(LIVE),),
        )
        == []
    )


def test_a_strangers_objects_are_told_and_left() -> None:
    (repair,) = decided(vm(objects=(f"vmf-{THEIRS}-0-cbw", f"vmf-{THEIRS}-1-cbw")))
    assert repair == Repair(
        Act.NOTHING, "web01", THEIRS, "2 objects in its QEMU are another vmfleece's, or somebody else's"
    )


def test_grants_stay_while_an_image_may_be_held() -> None:
    silent = vm(reach=Reach.SILENT, problem="no reply")
    for repairs, why in (
        (decided(silent, holdings=(holding(),)), "its VM does not answer: no reply"),
        (decided(holdings=(holding(),)), "its VM is being backed up, which sees to it"),
        (decided(vm(), holdings=(holding(host="there"),)), "granted to a run on host there"),
    ):
        assert acts(repairs) == [(Act.NOTHING, DEAD)]
        assert why in repairs[0].reason
    (repair,) = decided(vm(reach=Reach.GONE), holdings=(holding(),))
    assert repair.act is Act.GIVE_BACK
    assert "no QEMU of its VM lives" in repair.reason


RUNS = some.sampled_from([DEAD, LIVE, THEIRS, "eeeeeeee"])
NAMES = some.sampled_from(["web01", "db01"])
VMS = some.builds(
    vm,
    NAMES,
    some.sampled_from(Reach),
    objects=some.lists(RUNS.map(lambda run: f"vmf-{run}-0-cbw"), max_size=4).map(tuple),
)


HOLDINGS = some.builds(holding, RUNS, NAMES, some.sampled_from([HOST, "there"]))


@given(some.lists(VMS, max_size=3), some.lists(HOLDINGS))
def test_whatever_is_found_only_what_is_ours_and_dead_is_touched(vms: list[Vm], holdings: list[Holding]) -> None:
    repairs = decided(*vms, holdings=tuple(holdings), intents=(intent(LIVE), intent(DEAD)))
    for one in repairs:
        assert one.reason
        if one.act is Act.TAKE_OUT:
            assert one.subject == DEAD
        if one.act in (Act.GIVE_BACK, Act.THAW):
            assert one.subject != LIVE
        if one.act is Act.GIVE_BACK:
            (host,) = {found.owner.host for found in holdings if found.owner.run == one.subject} & {HOST}
            assert host == HOST
    order = list(Act)
    assert [order.index(one.act) for one in repairs] == sorted(order.index(one.act) for one in repairs)
