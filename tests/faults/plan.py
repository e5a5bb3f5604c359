"""What happens when: a plan of faults, the same for the same seed. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.model import Phase


class Kind(StrEnum):
    """What is done to whom."""

    DAEMON = "daemon killed"
    MOVER = "mover killed"
    QEMU = "QEMU killed"
    STOP = "QEMU stopped for a while"
    CUT = "monitor cut"
    STORAGE_FULL = "storage's file system full"
    TARGET_FULL = "target's file system full"
    TARGET_ERRORS = "target's disk returns errors"
    TARGET_HANGS = "target's disk hangs"
    TARGET_SLOW = "target's disk is slow"
    IMAGE_ERRORS = "fleecing image returns errors"
    STATE = "daemon killed, journal damaged"


class When(StrEnum):
    """What a fault waits for."""

    RUN = "run"  # so much of a run's usual duration
    STARTING = "starting"  # so much of a start of the daemon
    PHASE = "phase"  # a phase begins
    COMMAND = "command"  # the n-th command that changes something passes to QEMU
    PAUSE = "pause"  # the n-th of those that are sent while the guest stands still, on a QEMU where it does


class Damage(StrEnum):
    """What becomes of a file of SQLite's."""

    GARBAGE = "garbage at its end"
    OVERWRITTEN = "garbage in its last page"
    TRUNCATED = "half of it lost"
    EMPTY = "all of it lost"
    LOG = "garbage in its write-ahead log"


@dataclass(frozen=True, slots=True)
class Moment:
    """When it happens. `fraction`: of a usual run or start. `number`, `after`: of a command, or only after it."""

    when: When
    fraction: float = 0.0
    phase: Phase = Phase.COPYING
    number: int = 0
    after: bool = False

    def __str__(self) -> str:
        match self.when:
            case When.RUN | When.STARTING:
                return f"{self.when} at {self.fraction:.0%}"
            case When.PHASE:
                return f"{self.phase}"
            case When.COMMAND | When.PAUSE:
                of_pause = " of a pause" if self.when is When.PAUSE else ""
                return f"{'after' if self.after else 'before'} command {self.number}{of_pause}"


@dataclass(frozen=True, slots=True)
class Fault:
    """One of them, and how closely is looked at what comes of it.

    `vm`: its number. `at_once`: nobody waits for a backup first: the last fault's wounds are still open.
    `alone`: first a daemon without work puts right what the last one left. `exactly`: the backups before it are
    compared with copies of the disks, byte for byte.
    """

    kind: Kind
    moment: Moment
    vm: int = 0
    at_once: bool = False
    alone: bool = False
    exactly: bool = False
    damage: Damage = Damage.GARBAGE

    def __str__(self) -> str:
        damage = f" ({self.damage})" if self.kind is Kind.STATE else ""
        words = {"at once": self.at_once, "alone": self.alone, "exactly": self.exactly}
        notes = "".join(f", {word}" for word, so in words.items() if so)
        return f"{self.kind}{damage}, VM {self.vm}, {self.moment}{notes}"


PHASES = (Phase.PREPARING, Phase.SNAPSHOTTING, Phase.COPYING, Phase.COMMITTING, Phase.CLEANING)
COMMANDS, OF_A_PAUSE = 60, 10
"""A run of two disks sends so many, about, and so many of them to a guest that stands still."""
OTHERS_EACH = 4
"""Kills of the daemon for each other fault."""


def kinds(*, repository: bool) -> Sequence[Kind]:
    """The faults that a target can be hit by."""
    return [kind for kind in Kind if repository or kind is not Kind.MOVER]


def make(seed: int, *, kills: int, repository: bool) -> list[Fault]:
    """So many kills of the daemon, and the other faults between them, each as often as any other."""
    rng = random.Random(seed)  # noqa: S311  (a plan, no secret)
    others = [kind for kind in kinds(repository=repository) if kind is not Kind.DAEMON]
    bag: list[Kind] = []
    faults = []
    for number in range(kills):
        faults.append(one(rng, Kind.DAEMON))
        if number % OTHERS_EACH == OTHERS_EACH - 1:
            bag = bag or rng.sample(others, len(others))
            faults.append(one(rng, bag.pop()))
    return faults


def one(rng: random.Random, kind: Kind) -> Fault:
    """A fault of this kind."""
    whens = {
        Kind.DAEMON: [When.RUN, When.RUN, When.PHASE, When.COMMAND, When.COMMAND, When.PAUSE, When.STARTING],
        Kind.QEMU: [When.RUN, When.PHASE, When.COMMAND],
        Kind.CUT: [When.RUN, When.COMMAND],
        Kind.STATE: [When.RUN, When.COMMAND],
        Kind.MOVER: [When.PHASE],
    }.get(kind, [When.PHASE])
    when = rng.choice(whens)
    moment = Moment(
        when,
        fraction=rng.uniform(0, 1.15),
        phase=rng.choice([Phase.COPYING, Phase.COMMITTING] if kind is Kind.MOVER else PHASES),
        number=rng.randint(1, OF_A_PAUSE if when is When.PAUSE else COMMANDS),
        after=rng.random() < 0.5,
    )
    killed = kind is Kind.DAEMON
    return Fault(
        kind,
        moment,
        # What a file system does is done to the first VM's.
        vm=rng.randint(0, 1) if kind in {Kind.DAEMON, Kind.QEMU, Kind.STOP, Kind.CUT, Kind.STATE} else 0,
        at_once=killed and (when is When.STARTING or rng.random() < 0.2),
        alone=rng.random() < 0.2,
        exactly=rng.random() < 0.2,
        damage=rng.choice(list(Damage)),
    )
