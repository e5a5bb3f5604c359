"""How our objects in QEMU are called: `vmf-<run>-<number of the disk>-<role>`. Pure.

QEMU allows 31 characters for a node's name, so a disk is named by its number in the run.
"""

from dataclasses import dataclass

from orchestrator.qemu.commands import PREFIX

SNAPSHOT, GATE, CBW, IMAGE, GRANT, FILE = "snap", "gate", "cbw", "img", "grant", "file"
TARGET, TARGET_FILE = "target", "tfile"
SOURCE_WINDOW, TARGET_WINDOW = "wfrom", "wto"
FLEECING = (SOURCE_WINDOW, SNAPSHOT, GATE, CBW, IMAGE, GRANT, FILE)
DISMANTLING = (*FLEECING, TARGET_WINDOW, TARGET, TARGET_FILE)
"""The order in which nodes can be deleted: parents first."""


@dataclass(frozen=True, slots=True)
class DiskNames:
    """The names of one disk's objects in one run."""

    run: str
    number: int

    @property
    def prefix(self) -> str:
        return f"{PREFIX}{self.run}-{self.number}-"

    @property
    def snapshot(self) -> str:
        return self.prefix + SNAPSHOT

    @property
    def gate(self) -> str:
        return self.prefix + GATE

    @property
    def cbw(self) -> str:
        return self.prefix + CBW

    @property
    def image(self) -> str:
        return self.prefix + IMAGE

    @property
    def grant(self) -> str:
        return self.prefix + GRANT

    @property
    def file(self) -> str:
        return self.prefix + FILE

    @property
    def target(self) -> str:
        return self.prefix + TARGET

    @property
    def target_file(self) -> str:
        return self.prefix + TARGET_FILE

    @property
    def source_window(self) -> str:
        return self.prefix + SOURCE_WINDOW

    @property
    def target_window(self) -> str:
        return self.prefix + TARGET_WINDOW

    @property
    def export(self) -> str:
        """Its snapshot-access node, over NBD."""
        return self.prefix + "nbd"

    @property
    def server(self) -> str:
        """What is lent to QEMU for serving it."""
        return self.prefix + "listen"

    @property
    def connection(self) -> str:
        """The connection to the target's NBD server, lent to QEMU."""
        return self.prefix + "conn"

    @property
    def job(self) -> str:
        return self.prefix + "copy"

    def window_job(self, number: int) -> str:
        """The job that copies one window."""
        return f"{self.job}-{number}"


def run_prefix(run: str) -> str:
    """What the names of all objects of a run begin with."""
    return f"{PREFIX}{run}-"


def run_of(name: str) -> str:
    """The run that an object of ours belongs to, by its name."""
    return name.removeprefix(PREFIX).partition("-")[0]


def role_of(node: str) -> str:
    """What a node of ours is for."""
    return node.rpartition("-")[2]
