"""What dead runs have left, and what is done about it: decided from what is found, with a reason each. Pure.

Only what is provably ours and provably dead is touched: an object in a QEMU is ours if its run is in our
catalogue, and a run is dead if it is not under way in the process that owns state_dir, which is the one that asks.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.admission.ledger.base import Holding
from orchestrator.fleecing.names import run_of
from orchestrator.state import journal
from orchestrator.state.journal import Intent
from orchestrator.units import format_size


class Act(StrEnum):
    """What is done, in this order: a guest first."""

    CONTINUE = "continue"
    THAW = "thaw"
    TAKE_OUT = "take-out"
    SETTLE_BITMAPS = "settle-bitmaps"
    GIVE_BACK = "give-back"
    CLEAR_TARGET = "clear-target"
    NOTHING = "nothing"


class Reach(StrEnum):
    """Whether a VM's monitor answers; GONE: nobody listens there, so no QEMU of that VM lives."""

    ANSWERS = "answers"
    SILENT = "silent"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Vm:
    """What is in the QEMU behind a monitor: our objects, and targets whose bitmaps are not as their snapshots say.

    `problem` is why it does not answer.
    """

    name: str
    monitor: str
    reach: Reach
    objects: tuple[str, ...] = ()
    unsettled: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is found, but of VMs that are being backed up. `leftovers`: what dead writers left, by target."""

    vms: Sequence[Vm]
    intents: Sequence[Intent]
    holdings: Sequence[Holding]
    leftovers: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Repair:
    """One thing to do, or, with NOTHING, why something is left alone. `subject` is a run, or a target."""

    act: Act
    vm: str
    subject: str
    reason: str


def decide(evidence: Evidence, *, host: str, ours: Container[str], running: Container[str]) -> list[Repair]:
    """What to do, in the order in which it is done. `ours` are the runs that were ever ours, on this `host`."""
    repairs = [*of_guests(evidence.intents, running)]
    for vm in evidence.vms:
        repairs += _in_qemu(vm, ours, running)
    by_monitor = {vm.monitor: vm for vm in evidence.vms}
    for holding in evidence.holdings:
        if holding.owner.run not in running:
            repairs.append(_grant(holding, by_monitor.get(holding.owner.monitor), host))
    for target, left in evidence.leftovers.items():
        repairs += (Repair(Act.CLEAR_TARGET, "", target, f"its writer is dead: {one}") for one in left)
    order = list(Act)
    return sorted(repairs, key=lambda repair: order.index(repair.act))


def of_guests(intents: Iterable[Intent], running: Container[str]) -> Iterable[Repair]:
    """What is to be done to guests, in the order of the journal."""
    for intent in intents:
        if intent.run in running:
            continue
        if intent.act is journal.Act.PAUSE:
            yield Repair(Act.CONTINUE, intent.vm, intent.run, "its guest was paused, and is not known to go on")
        else:
            yield Repair(Act.THAW, intent.vm, intent.run, "its guest was frozen, and is not known to be thawed")


def _in_qemu(vm: Vm, ours: Container[str], running: Container[str]) -> Iterable[Repair]:
    counts: dict[str, int] = {}
    for name in vm.objects:
        counts[run_of(name)] = counts.get(run_of(name), 0) + 1
    for run, count in counts.items():
        objects = f"{count} objects in its QEMU"
        if run in running:
            continue
        if run in ours:
            yield Repair(Act.TAKE_OUT, vm.name, run, f"the run is over, and has {objects}")
        else:
            yield Repair(Act.NOTHING, vm.name, run, f"{objects} are another vmfleece's, or somebody else's")
    for target in vm.unsettled:
        yield Repair(Act.SETTLE_BITMAPS, vm.name, target, "bitmaps are not as the target's snapshots say")


def _grant(holding: Holding, vm: Vm | None, host: str) -> Repair:
    owner, size = holding.owner, format_size(holding.granted_bytes)
    if owner.host != host:
        why = f"{size} are granted to a run on host {owner.host}"
    elif vm is None:
        why = f"{size} are granted to it, and its VM is being backed up, which sees to it"
    elif vm.reach is Reach.SILENT:
        why = f"{size} are granted to it, and its VM does not answer: {vm.problem}"
    else:
        why = "no QEMU of its VM lives" if vm.reach is Reach.GONE else "nothing of it is in its QEMU then"
        return Repair(Act.GIVE_BACK, owner.vm, owner.run, f"{size} are granted to it, it is over, and {why}")
    return Repair(Act.NOTHING, owner.vm, owner.run, why)
