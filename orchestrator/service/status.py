"""What is going on right now, as data: what `vmfleece status` shows and the control socket answers with.

Sizes are bytes; times are ISO 8601 with a zone. `as_json` and `from_json` are each other's inverse.
"""

from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.model import DiskProgress, GuestWrites


@dataclass(frozen=True, slots=True)
class StorageStatus:
    """One storage of fleecing images.

    `granted_bytes` is what all runs together may occupy, `stranded_bytes` the part of it that is kept for runs
    that are over but whose images a QEMU may still hold; `used_bytes` what the images of live runs really occupy,
    `peak_bytes` the most that was since vmfleece started. `free_bytes` and `floor_bytes` are its file system's;
    None if it cannot be asked. `lacks` names what the file system cannot do.
    """

    name: str
    path: str
    quota_bytes: int
    granted_bytes: int
    stranded_bytes: int
    used_bytes: int
    peak_bytes: int
    free_bytes: int | None
    floor_bytes: int | None
    runs: int
    max_runs: int | None
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run under way; the sizes are over all its disks.

    `recent_write_ms`: what the guest's writes took on average in each of the last seconds; None: there was none.
    `slowed_to_bytes_per_second`: what it copies at most, since they take too long; None: it is not slowed.
    """

    vm: str
    run: str
    job: str | None
    target: str
    phase: str
    started: str
    size_bytes: int
    copied_bytes: int
    fleecing_bytes: int
    grant_bytes: int
    disks: tuple[DiskProgress, ...] = ()
    guest_writes: GuestWrites | None = None
    recent_write_ms: tuple[float | None, ...] = ()
    slowed_to_bytes_per_second: int | None = None


@dataclass(frozen=True, slots=True)
class WaitingStatus:
    """One run that waits; `reasons` is everything that it waits for, in words.

    For its admission; or, if there is an `until`, to be tried again then: `started` is then that of the last try.
    """

    vm: str
    run: str
    job: str | None
    target: str
    priority: int
    started: str
    reasons: tuple[str, ...]
    until: str | None = None


@dataclass(frozen=True, slots=True)
class ConfigStatus:
    """The configuration in force, and since when.

    `refused`: everything for which its file did not come into force when it was last read again.
    """

    path: str
    since: str
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """All of it. `process` is the vmfleece that answers (its process id), None if none runs."""

    process: int | None
    started: str | None
    storages: tuple[StorageStatus, ...] = ()
    runs: tuple[RunStatus, ...] = ()
    queue: tuple[WaitingStatus, ...] = ()
    config: ConfigStatus | None = None

    def as_json(self) -> dict[str, Any]:
        """The status as a JSON document."""
        return asdict(self)

    @staticmethod
    def from_json(document: dict[str, Any]) -> "Status":
        """The status that a document describes."""
        config = document.get("config")  # a daemon from before may answer
        return Status(
            process=document["process"],
            started=document["started"],
            storages=tuple(StorageStatus(**{**one, "lacks": tuple(one["lacks"])}) for one in document["storages"]),
            runs=tuple(_run(one) for one in document["runs"]),
            queue=tuple(WaitingStatus(**{**one, "reasons": tuple(one["reasons"])}) for one in document["queue"]),
            config=ConfigStatus(**{**config, "refused": tuple(config["refused"])}) if config else None,
        )


def _run(one: dict[str, Any]) -> RunStatus:
    writes = one.get("guest_writes")  # a daemon from before may answer
    return RunStatus(
        **{
            **one,
            "disks": tuple(DiskProgress(**disk) for disk in one["disks"]),
            "guest_writes": GuestWrites(**writes) if writes else None,
            "recent_write_ms": tuple(one.get("recent_write_ms", ())),
        }
    )
