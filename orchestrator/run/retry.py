"""Whether a backup that failed is tried again, and after how long. Pure.

By its cause (the table is in `causes`): where waiting can help, after a pause that doubles with each try that
failed, up to an hour; at once where its larger first grant is what it has to wait for. What was under
way when vmfleece itself ended is tried again at its next start, as often: a run that kills it each time comes to
an end.
"""

from collections.abc import Container, Mapping

from orchestrator.causes import FIRST_PAUSES, Cause

MINUTE_SECONDS = 60.0
LONGEST_MINUTES = 60


def pause_seconds(cause: Cause, *, tries: int, retries: int, may_be_granted_more: bool = False) -> float | None:
    """How long to wait after `tries` tries of which the last failed so; None: it is not tried again.

    `retries` as configured. `may_be_granted_more`: it ran full without holding all that its storages have.
    """
    if tries > retries or not cause.may_pass:
        return None
    if cause is Cause.FLEECING_FULL and may_be_granted_more:
        return 0.0
    return MINUTE_SECONDS * min(FIRST_PAUSES[cause] << (tries - 1), LONGEST_MINUTES)


def after_restart(unfinished: Mapping[str, int], *, vms: Container[str], retries: int) -> dict[str, int]:
    """The VMs that a job goes on with at a start, each with how often vmfleece was started amid its turn.

    `unfinished` are those that it was not done with, as the last start has left that; `vms` those it has today.
    """
    return {vm: restarts + 1 for vm, restarts in unfinished.items() if restarts < retries and vm in vms}
