"""The life of a block job, folded from events and from query-jobs. Pure.

Events are hints that something changed; query-jobs is the truth. A job of ours stays there, concluded, with its
error, until it is dismissed, also across a lost connection (docs/interop/live-block-operations, qapi/job.json).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.qemu.commands import PREFIX

EVENTS = ("JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_ERROR")


@dataclass(frozen=True, slots=True)
class JobState:
    """What is known of one job. `current_bytes` of `total_bytes` is progress, not a boundary."""

    id: str
    status: str = "undefined"
    error: str | None = None
    cancelled: bool = False
    current_bytes: int = 0
    total_bytes: int = 0

    @property
    def finished(self) -> bool:
        """Whether it copies no more, for whatever reason."""
        return self.status in ("concluded", "null")

    @property
    def succeeded(self) -> bool:
        """Whether it copied everything."""
        return self.finished and self.error is None and not self.cancelled


def after_event(state: JobState, name: str, data: Mapping[str, Any]) -> JobState:
    """The state after an event; events of other jobs change nothing."""
    if data.get("id", data.get("device")) != state.id:
        return state
    if name == "JOB_STATUS_CHANGE":
        return replace(state, status=data["status"])
    if name == "BLOCK_JOB_CANCELLED":
        return replace(state, cancelled=True)
    if name == "BLOCK_JOB_COMPLETED":
        return replace(
            state,
            error=data.get("error", state.error),
            current_bytes=data["offset"],
            total_bytes=data["len"],
        )
    # BLOCK_JOB_ERROR says that something failed; with what, BLOCK_JOB_COMPLETED and query-jobs say.
    return state


def from_query(state: JobState, reply: Iterable[Mapping[str, Any]]) -> JobState | None:
    """The state according to query-jobs; None if QEMU does not know the job (any more)."""
    for job in reply:
        if job["id"] == state.id:
            return replace(
                state,
                status=job["status"],
                error=job.get("error", state.error),
                current_bytes=job["current-progress"],
                total_bytes=job["total-progress"],
            )
    return None


def foreign(reply: Iterable[Mapping[str, Any]]) -> list[str]:
    """Somebody else's block jobs, in words, from query-block-jobs."""
    return [f"{job['type']} job {job['device']!r}" for job in reply if not is_ours(str(job["device"]))]


def is_ours(name: str) -> bool:
    """Whether a node, job or descriptor set is one of ours."""
    return name.startswith(PREFIX)
