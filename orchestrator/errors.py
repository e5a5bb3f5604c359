"""Every error that vmfleece raises on purpose, drawn in one place.

    VmfleeceError
    ├── ConfigError          the configuration or the command line is wrong   exit 2
    │   └── UnknownName      there is no VM, job, target or run of that name
    ├── MonitorError         QEMU's monitor
    │   ├── ConnectFailed    no monitor answers at the socket
    │   │   └── NobodyThere  nobody listens: no QEMU of that socket lives
    │   ├── ConnectionLost   it was there; outcome of running commands unknown
    │   ├── CommandTimeout   no reply in time; outcome unknown
    │   └── CommandFailed    QEMU refused the command
    ├── AgentError           the guest agent: absent, silent, or it refused
    ├── RefusedError         the VM is in no state to be backed up now
    ├── AdmissionError       what is wanted can never be granted
    ├── StorageError         a storage of fleecing images
    ├── TargetError          a target of backups; a repository's: target/restic/errors.py
    ├── HookError            a job's hook stopped it, or failed
    ├── NotifyError          somebody could not be told of a job
    ├── ToolError            qemu-img, qemu-nbd or nbdcopy failed or is missing
    ├── FleecingError        the snapshot broke: image full, slow or broken
    ├── CopyError            the job that copies failed for another reason
    └── StateError           state_dir: locked or unreadable
        └── StateDamaged     a file in it is no database any more

A caller branches on the class or on `code`, never on the text. `message` says what was tried, on what,
with which numbers; `hint` says what the operator can do. Whether waiting can help is told by the code: `causes`.
"""

from collections.abc import Iterable
from typing import ClassVar

from orchestrator import causes
from orchestrator.causes import Cause

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_LOCKED = 11
EXIT_INTERRUPTED = 130


class VmfleeceError(Exception):
    """The root. `code` is stable and part of the interface; see docs/operations.md."""

    code: str = "failed"
    exit_code: ClassVar[int] = EXIT_FAILED

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    @property
    def cause(self) -> Cause:
        """What it comes from."""
        return causes.of(self.code)

    @property
    def retryable(self) -> bool:
        """Whether waiting can help."""
        return self.cause.may_pass

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(VmfleeceError):
    """The configuration or the command line is wrong; `problems` lists every one of them."""

    code = "config"
    exit_code = EXIT_USAGE

    def __init__(self, message: str, *, hint: str = "", problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = problems


class UnknownName(ConfigError):
    """Something is named that is not there; `known` are the names that are, `place` is where they stand.

    Where they are too many to be told, `hint` says who knows them.
    """

    code = "unknown-name"

    def __init__(self, what: str, name: str, known: Iterable[str] = (), *, place: str, hint: str = "") -> None:
        names = ", ".join(known)
        told = f"name one of: {names}" if names else f"there is no {what} there at all"
        super().__init__(f"no {what} {name!r} in {place}", hint=hint or told)


class MonitorError(VmfleeceError):
    """Talking to QEMU's monitor failed."""

    code = "monitor"


class ConnectFailed(MonitorError):
    """No monitor could be reached at the socket."""

    code = "vm-unreachable"


class NobodyThere(ConnectFailed):
    """Nobody listens at the socket: a QEMU that did, and all that it held, is gone."""


class ConnectionLost(MonitorError):
    """The connection ended; what the commands under way did is unknown."""

    code = "vm-gone"


class CommandTimeout(MonitorError):
    """QEMU did not answer in time; what the command did is unknown."""

    code = "vm-silent"


class CommandFailed(MonitorError):
    """QEMU refused a command. `command` is its name, `description` QEMU's own words."""

    code = "qemu-refused"

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command = command
        self.description = description


class AgentError(VmfleeceError):
    """The guest agent is not there, did not answer, or refused."""

    code = "agent-refused"


class RefusedError(VmfleeceError):
    """The VM, or somebody else's work on it, does not allow a backup now."""

    code = "refused"


class AdmissionError(VmfleeceError):
    """The run can never get the space it needs with this configuration."""

    code = "quota-too-small"


class StorageError(VmfleeceError):
    """A storage cannot hold fleecing images."""

    code = "storage"


class TargetError(VmfleeceError):
    """A target cannot take or give back a snapshot."""

    code = "target"


class ToolError(VmfleeceError):
    """One of QEMU's or libnbd's tools failed or is not installed."""

    code = "tool-failed"


class NbdError(VmfleeceError):
    """An NBD server refused something, went away, or sent nonsense."""

    code = "nbd"


class FleecingError(VmfleeceError):
    """The snapshot broke: its fleecing image was full, slow or broken. The guest went on."""

    code = "fleecing-broken"


class CopyError(VmfleeceError):
    """A disk's copy ended with an error that is not the snapshot's."""

    code = "copy-failed"


class HookError(VmfleeceError):
    """A job's hook cannot be called, failed, or took too long."""

    code = "hook-failed"


class NotifyError(VmfleeceError):
    """Somebody could not be told how a job ended."""

    code = "notify-failed"


class StateError(VmfleeceError):
    """state_dir is locked by another vmfleece, or cannot be read."""

    code = "locked"
    exit_code = EXIT_LOCKED


class StateDamaged(StateError):
    """What is in a file of state_dir is not what was written there."""

    code = "state-unusable"
