"""What each error code comes from, and whether waiting can help: the one table of them. Pure.

docs/operations.md explains each code; a test holds it, and every code in the code base, against this table.
"""

from collections.abc import Mapping
from enum import StrEnum


class Cause(StrEnum):
    """Why a backup ended, as far as it matters for trying again. OTHER: codes that never end a backup."""

    FLEECING_FULL = "fleecing-full"
    COPY_TIMEOUT = "copy-timeout"
    COPY_FAILED = "copy-failed"
    STORAGE_FULL = "storage-full"
    STATE_UNUSABLE = "state-unusable"
    TARGET_FULL = "target-full"
    TARGET_GONE = "target-gone"
    TARGET_BUSY = "target-busy"
    VM_GONE = "vm-gone"
    VM_BUSY = "vm-busy"
    VMFLEECE_GONE = "vmfleece-gone"
    CANCELLED = "cancelled"
    CONFIGURATION = "configuration"
    DAMAGED = "damaged"
    BUG = "bug"
    OTHER = "other"

    @property
    def may_pass(self) -> bool:
        """Whether waiting can help."""
        return self in FIRST_PAUSES


FIRST_PAUSES: Mapping[Cause, int] = {
    Cause.FLEECING_FULL: 1,
    Cause.COPY_TIMEOUT: 5,
    Cause.COPY_FAILED: 1,
    Cause.STORAGE_FULL: 5,
    Cause.STATE_UNUSABLE: 5,
    Cause.TARGET_FULL: 15,
    Cause.TARGET_GONE: 2,
    Cause.TARGET_BUSY: 5,
    Cause.VM_GONE: 1,
    Cause.VM_BUSY: 5,
    Cause.VMFLEECE_GONE: 0,
}
"""How long is waited before the first new try, in minutes; a cause that is not here does not pass by waiting."""

_CODES: Mapping[Cause, tuple[str, ...]] = {
    Cause.FLEECING_FULL: ("fleecing-full",),
    Cause.COPY_TIMEOUT: ("copy-timeout", "fleecing-broken"),
    Cause.COPY_FAILED: (
        "copy-failed",
        "job-stuck",
        "leftovers",
        "parent-unusable",
        "snapshot-exists",
        "tool-failed",
    ),
    Cause.STORAGE_FULL: ("storage-full", "storage-low"),
    Cause.STATE_UNUSABLE: ("state-unusable",),
    Cause.TARGET_FULL: ("target-full",),
    Cause.TARGET_GONE: (
        "file-exists",
        "file-missing",
        "lock-lost",
        "mover-died",
        "nbd",
        "no-repository",
        "target",
        "target-unreachable",
        "target-unwritable",
        "target-write-failed",
    ),
    Cause.TARGET_BUSY: ("repository-locked",),
    Cause.VM_GONE: ("vm-gone", "vm-silent", "vm-unreachable"),
    Cause.VM_BUSY: (
        "disks-changed",
        "foreign-filter",
        "foreign-job",
        "foreign-run",
        "refused",
        "vm-migrating",
        "vm-state",
    ),
    Cause.VMFLEECE_GONE: ("vmfleece-gone",),
    Cause.CANCELLED: ("cancelled",),
    Cause.CONFIGURATION: (
        "config",
        "disk-name",
        "fleecing-needed",
        "hook-failed",
        "no-disks",
        "no-storage",
        "password-file",
        "qemu-too-old",
        "quota-too-small",
        "storage",
        "target-keys",
        "target-place",
        "tool-missing",
        "wrong-password",
    ),
    Cause.DAMAGED: (
        "content-wrong",
        "manifest-misplaced",
        "manifest-unreadable",
        "manifest-version",
        "repository-damaged",
    ),
    Cause.BUG: ("bug", "failed", "monitor", "qemu-refused"),
    Cause.OTHER: (
        "agent-absent",
        "agent-gone",
        "agent-refused",
        "agent-silent",
        "api-forbidden",
        "api-silent",
        "api-wrong",
        "daemon-gone",
        "folder-exists",
        "forbidden",
        "host-unknown",
        "job-under-way",
        "key-in-use",
        "listen-unusable",
        "locked",
        "needed",
        "no-disk",
        "no-folder",
        "no-key",
        "no-repository-target",
        "no-snapshot",
        "origin-foreign",
        "notify-failed",
        "protected",
        "read-only",
        "repository-exists",
        "restic-failed",
        "restore-path",
        "run-dir-in-use",
        "run-over",
        "stopping",
        "token-file",
        "too-many-followers",
        "unauthorized",
        "unknown-name",
    ),
}

CODES: Mapping[str, Cause] = {code: cause for cause, codes in _CODES.items() for code in codes}


def of(code: str) -> Cause:
    """The cause of an error; a code that nobody has entered is a mistake of ours."""
    return CODES.get(code, Cause.BUG)
