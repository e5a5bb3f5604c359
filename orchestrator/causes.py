"""What each error code comes from, whether waiting can help, and what to do: the one table of them. Pure.

docs/operations.md has the same table; a test holds it, and every code in the code base, against this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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

_TABLE: Mapping[Cause, tuple[tuple[str, str, str], ...]] = {
    Cause.FLEECING_FULL: (
        (
            "fleecing-full",
            "the fleecing image reached its grant, which could not grow (in time)",
            (
                "nothing, if the next try succeeds: it is granted twice as much at first; else raise `quota`, "
                "or back up when the guest writes less"
            ),
        ),
    ),
    Cause.COPY_TIMEOUT: (
        (
            "copy-timeout",
            "old data could not be saved within `cbw_timeout`, or not at all",
            "look for I/O errors on the storage; without fleecing: use fleecing",
        ),
        (
            "fleecing-broken",
            "the snapshot broke, and QEMU does not say why",
            "look for I/O errors on the storage in the host's log",
        ),
    ),
    Cause.COPY_FAILED: (
        (
            "copy-failed",
            "the block job ended before its time: somebody cancelled it, or QEMU could not go on",
            "back up again; QEMU's own log may say more",
        ),
        (
            "job-stuck leftovers",
            "something of ours could not be taken out of QEMU; the guest goes on",
            "nothing: the next backup, and the daemon every minute, try again",
        ),
        (
            "parent-unusable",
            (
                "a disk cannot be built on what the last snapshot has of it; mostly only the reason why it "
                "was copied whole"
            ),
            "nothing, if the next try succeeds",
        ),
        (
            "snapshot-exists",
            "somebody else's run has made a snapshot of that name",
            "if two VMs, on two hosts say, are called alike: rename one",
        ),
        (
            "tool-failed",
            "one of QEMU's or libnbd's tools failed; the message has its words",
            "see that the files that it names are there and can be read, and that there is room",
        ),
    ),
    Cause.STORAGE_FULL: (
        (
            "storage-full",
            "the storage's file system is full: others write there as well",
            "free some space there; then raise `min_free`, or lower `quota`",
        ),
        (
            "storage-low",
            ("others filled the storage's file system below `min_free`; this run came last in order and gave way"),
            "free some space there, or lower `quota`",
        ),
    ),
    Cause.STATE_UNUSABLE: (
        (
            "state-unusable",
            "`state_dir` or `run_dir` cannot be written, or a file in it is damaged",
            ("see whether its file system is full; the message says what a damaged file may be moved away for"),
        ),
    ),
    Cause.TARGET_FULL: (
        (
            "target-full",
            "there is no space on the target, or no quota",
            "free some there: `vmfleece prune`, and of a repository `vmfleece target reclaim`",
        ),
    ),
    Cause.TARGET_GONE: (
        (
            "file-exists file-missing",
            "somebody else removes or restores files in the repository, or its server shows an old state",
            "find out who; then `vmfleece target check`",
        ),
        (
            "lock-lost",
            "our lock on the repository was removed, or could not be renewed in time; nothing is listed",
            "do not use `restic unlock --remove-all` while backups run; back up again",
        ),
        (
            "mover-died",
            "the process that writes to the repository was killed, for want of memory perhaps",
            "look into the host's log; back up again",
        ),
        (
            "nbd",
            (
                "an NBD server refused something or went away: its QEMU or vmfleece process ended, or its "
                "disk has an error"
            ),
            "see what ended in the log before this; try again",
        ),
        (
            "no-repository",
            "nothing is there that could be opened: not mounted, or never made",
            "mount it; or make it: `vmfleece target init`",
        ),
        (
            "target",
            "the target cannot do what was asked for",
            "as the message says; `vmfleece target show` tells what is there",
        ),
        (
            "target-unreachable",
            "the target's server or disk did not answer, or not in time",
            "check the network, the server and the mount",
        ),
        (
            "target-unwritable target-write-failed",
            "the target's file system or server does not take what is written to it",
            "check path, mount, permissions, and the host's log",
        ),
    ),
    Cause.TARGET_BUSY: (
        (
            "repository-locked",
            "somebody works alone on the repository, or died while doing so",
            "let it end; `restic unlock` if it is dead",
        ),
    ),
    Cause.VM_GONE: (
        (
            "vm-gone",
            "QEMU ended, was restarted, or the connection was lost for good",
            "back up again when the VM runs",
        ),
        (
            "vm-silent",
            "QEMU hangs, is stopped, or the host is overloaded",
            "look at the host; back up again when QEMU answers",
        ),
        (
            "vm-unreachable",
            "no monitor is at the socket, or another client holds it",
            "start the VM with a monitor of its own for vmfleece",
        ),
    ),
    Cause.VM_BUSY: (
        (
            "disks-changed",
            "disks must stay as they are between the plan and the snapshot, a matter of seconds",
            "nothing, if the next try succeeds",
        ),
        (
            "foreign-filter foreign-job",
            "somebody else's backup, mirror or commit is at work on the VM",
            "let it end",
        ),
        (
            "foreign-run",
            "another vmfleece, with another `state_dir`, is backing this VM up",
            "let it end; give a VM to one vmfleece only",
        ),
        (
            "refused",
            "the VM cannot be backed up now",
            "try again when what the message says has passed",
        ),
        (
            "vm-migrating",
            "what the VM writes on the other host cannot be seen from here",
            "back it up there, or here when it is back",
        ),
        (
            "vm-state",
            "it is migrating, or in a state in which its disks are not its own",
            "try again when it runs on this host",
        ),
    ),
    Cause.VMFLEECE_GONE: (
        (
            "vmfleece-gone",
            (
                "vmfleece was killed while the run was under way, or the host lost its power; entered at the "
                "next start"
            ),
            "nothing, if the next try succeeds; else look why it was killed",
        ),
    ),
    Cause.CANCELLED: (
        (
            "cancelled",
            "somebody cancelled the run, or vmfleece was told to stop",
            "back up again if that was not meant",
        ),
    ),
    Cause.CONFIGURATION: (
        (
            "config",
            "what the configuration or the command line says cannot be done",
            "as the message says, for each problem; `vmfleece config check` finds them all",
        ),
        (
            "disk-name",
            "the disk's id would be a file's name on the target, and cannot be one",
            "give the device another `id`",
        ),
        (
            "fleecing-needed",
            "a repository is written, never read back, while a backup runs: old data must go elsewhere",
            "leave `enabled=0` out, and configure a storage",
        ),
        (
            "hook-failed",
            "the job's hook failed, took too long, or cannot be called safely, so the job does not go on",
            "what it printed is in the log (`hook.said`); mend it, or remove `job.NAME.hook`",
        ),
        (
            "no-disks",
            "all disks are excluded, read-only, empty or CD-ROMs",
            "check `exclude_disks`; `vmfleece vm show` says why each disk is left out",
        ),
        (
            "no-storage",
            "no storage is named for fleecing, and none holds the disk's own image",
            'name a storage, or use `fleecing_policy = "prefer"`',
        ),
        (
            "password-file",
            "the password's file is missing, empty, or others can read it",
            "mend the file as the message says",
        ),
        (
            "qemu-too-old",
            "QEMU before 7.1 would give the guest I/O errors if a backup failed",
            "restart the VM with a newer QEMU",
        ),
        (
            "quota-too-small",
            "the smallest useful fleecing images exceed the quota, so waiting would never end",
            "raise `quota`",
        ),
        (
            "repository-version",
            "vmfleece reads and writes version 2 of restic's format only",
            "upgrade it with `restic migrate upgrade_repo_v2`, or give the target another place",
        ),
        (
            "storage",
            "the storage's folder is not usable, or its file system lacks something",
            "use a folder on ext4, XFS, btrfs, ZFS or tmpfs that vmfleece may write to",
        ),
        (
            "target-keys",
            "vmfleece finds no usable keys for the object storage in its environment",
            "set them where vmfleece runs: for the daemon, in the unit's environment",
        ),
        (
            "target-place",
            "a repository is a folder, or a bucket with a prefix",
            'set `path`, or `url = "s3://BUCKET/PREFIX"`',
        ),
        (
            "tool-missing",
            "`qemu-img`, `qemu-nbd`, `nbdcopy` or `restic` is not in PATH",
            "install `qemu-utils`, `libnbd-bin`, `restic`",
        ),
        (
            "wrong-password",
            "it is another repository's password, or the key was removed",
            "check `password_file`",
        ),
    ),
    Cause.DAMAGED: (
        (
            "content-wrong",
            "what is on the target, or what a snapshot there builds on, is not what was backed up",
            "restore a snapshot that does not build on it; check the target's disks",
        ),
        (
            "manifest-misplaced",
            "the snapshot's folder was renamed or copied",
            "move it back to its own place",
        ),
        (
            "manifest-unreadable",
            "the file is damaged, or was changed by hand",
            "restore another snapshot, or its disks with `qemu-img`",
        ),
        (
            "manifest-version",
            "a newer vmfleece wrote the snapshot",
            "use that one, or a newer one",
        ),
        (
            "repository-damaged",
            "something that was written to the repository is not as it was written",
            "what to do when it is damaged",
        ),
    ),
    Cause.BUG: (
        (
            "bug failed monitor",
            "nobody has foreseen it: a mistake in vmfleece",
            "report it with the log",
        ),
        (
            "qemu-refused",
            "QEMU would not do what vmfleece asked of it; the message has its words",
            "report it with the log, and QEMU's version",
        ),
    ),
    Cause.OTHER: (
        (
            "agent-absent",
            (
                "the guest was not frozen, so its snapshot is as after a power cut: nobody listens at the "
                "agent's socket"
            ),
            "check `vm.NAME.agent`; the VM needs a virtio-serial port for the guest agent",
        ),
        (
            "agent-gone agent-silent",
            "the guest was not frozen, so its snapshot is as after a power cut: its agent does not answer",
            "start `qemu-guest-agent` in the guest, and let nobody else use its socket",
        ),
        (
            "agent-refused",
            "the guest was not frozen, so its snapshot is as after a power cut: its agent would not",
            "look into the guest's log; its agent must be allowed to freeze file systems",
        ),
        (
            "api-forbidden",
            "this user may not open the socket",
            "run it as the user that the message names",
        ),
        (
            "api-silent",
            "the vmfleece that serves the socket hangs, is stopped, or its host is overloaded",
            "look at its log: `journalctl -u vmfleece`",
        ),
        (
            "api-wrong",
            "another program serves the socket, or a vmfleece of another version",
            "restart the daemon after an upgrade",
        ),
        (
            "daemon-gone",
            "the daemon ended while this command waited for what it had it do",
            "`vmfleece run list`, once it runs again",
        ),
        (
            "folder-exists repository-exists",
            "`target init` makes only what is not there",
            "check the path; what is there can be backed up to as it is",
        ),
        (
            "forbidden",
            "the process belongs to none of those who may use the control socket",
            "run it as root, as the user that vmfleece runs as, or as a member of the socket's group",
        ),
        (
            "host-unknown",
            "the request names a host that this service does not know as itself, as foreign web pages do",
            "use its address, or add the name to `daemon.hosts`",
        ),
        (
            "job-under-way",
            "a job has one turn at a time",
            "wait until it has ended: `vmfleece status`",
        ),
        (
            "key-in-use",
            ("it is the last key, or the one that vmfleece uses: without it the repository would be closed to it"),
            "add another one first: `vmfleece target key add`",
        ),
        (
            "listen-unusable",
            "somebody else listens there, or the address is none of this host's",
            "set `daemon.listen` to another address or port",
        ),
        (
            "locked",
            "one vmfleece works with a `state_dir` at a time",
            "wait until that one has ended; while the daemon runs, have it do the work",
        ),
        (
            "needed",
            "images of other snapshots build on it, or it is being restored, merged or built on right now",
            "remove those first, or wait",
        ),
        (
            "no-disk",
            "the snapshot was made without a disk of that name",
            "`vmfleece snapshot show` lists its disks",
        ),
        (
            "no-folder",
            "nothing was backed up there yet, or it is not mounted",
            "mount it; or let the first backup make it",
        ),
        (
            "no-key",
            "a key is named by its first digits, which must be those of one key only",
            "`vmfleece target key list`",
        ),
        (
            "no-repository-target",
            "only a repository has keys, and work for restic",
            "name a repository: `vmfleece target list`",
        ),
        (
            "no-snapshot",
            "it was never there, or is not any more; a backup that wanted to build on it starts anew",
            "`vmfleece snapshot list`",
        ),
        (
            "notify-failed",
            "the notifier's address is wrong, or there is no way to it",
            "check the address in its `url_file`, and the network",
        ),
        (
            "origin-foreign",
            "somebody else's web page asked, through somebody's browser",
            "nothing: it was refused",
        ),
        (
            "protected",
            "somebody has protected it: neither retention nor a command removes it",
            "`vmfleece snapshot protect SNAPSHOT --off`",
        ),
        (
            "read-only",
            "by TCP everything can be read, and nothing changed without a token",
            "use the control socket, or set `daemon.token_file`",
        ),
        (
            "restic-failed",
            "restic refused, or found damage; the message has its last words",
            "do as they say; `restic check` says more",
        ),
        (
            "restore-path",
            "vmfleece overwrites no file, and a block device only with `--force`",
            "give another `--to`, as the message says",
        ),
        (
            "run-dir-in-use",
            "one vmfleece serves a `run_dir` at a time",
            "end the other one, or set `daemon.run_dir`",
        ),
        (
            "run-over",
            "only a run under way can be cancelled",
            "`vmfleece run show RUN` says what it came to",
        ),
        (
            "stopping",
            "the daemon is starting or ending, and begins nothing",
            "ask again once it runs",
        ),
        (
            "token-file",
            "the token's file is missing, empty, or others can read it",
            "mend the file as the message says",
        ),
        (
            "too-many-followers",
            "50 clients follow the events already",
            "end one of them",
        ),
        (
            "unauthorized",
            "what changes something by TCP needs the token",
            "send `Authorization: Bearer TOKEN` (the API)",
        ),
        (
            "unknown-name",
            "names must be as in the configuration that is in force, ids as they were told",
            "look it up: `vmfleece vm list`, `job list`, `target list`, `run list`",
        ),
    ),
}
"""Codes that come from one thing, what that is, and what to do where the error itself says nothing better."""


@dataclass(frozen=True, slots=True)
class Code:
    """An error code: its cause; why such an error comes about, beside its message; what an operator can do."""

    cause: Cause
    why: str
    remedy: str


CODES: Mapping[str, Code] = {
    code: Code(cause, why, remedy)
    for cause, rows in _TABLE.items()
    for codes, why, remedy in rows
    for code in codes.split()
}


def explained(code: str) -> Code:
    """What is known of a code; one that nobody has entered is a mistake of ours."""
    return CODES.get(code, CODES["bug"])


def of(code: str) -> Cause:
    """The cause of an error."""
    return explained(code).cause
