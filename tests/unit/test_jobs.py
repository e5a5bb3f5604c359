"""A block job's life as QEMU tells it: sequences of events and replies, and what is made of them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.qemu.jobs import EVENTS, JobState, after_event, foreign, from_query, is_ours

JOB = "vmf-0a1b2c3d-0-copy"
SIZE = 1 << 30

Said = tuple[str, dict[str, Any]]


def status(*names: str, job: str = JOB) -> list[Said]:
    return [("JOB_STATUS_CHANGE", {"id": job, "status": name}) for name in names]


def ended(name: str, job: str = JOB, **more: Any) -> Said:
    return name, {"device": job, "type": "backup", "len": SIZE, "offset": SIZE, "speed": 0} | more


def failing(operation: str, action: str, job: str = JOB) -> Said:
    return "BLOCK_JOB_ERROR", {"device": job, "operation": operation, "action": action}


def after(*said: Said, state: JobState | None = None) -> JobState:
    state = state or JobState(JOB)
    for name, data in said:
        state = after_event(state, name, data)
    return state


SUCCESS = (
    *status("created", "running", "waiting", "pending"),
    ended("BLOCK_JOB_COMPLETED"),
    *status("concluded"),
)
FAILURE = (
    *status("created", "running"),
    failing("read", "report"),
    *status("aborting"),
    ended("BLOCK_JOB_COMPLETED", offset=4096, error="Permission denied"),
    *status("concluded"),
)
CANCEL = (
    *status("created", "running", "aborting"),
    ended("BLOCK_JOB_CANCELLED", offset=4096),
    *status("concluded"),
)


@pytest.mark.parametrize(
    ("said", "succeeded", "error", "current"),
    [(SUCCESS, True, None, SIZE), (FAILURE, False, "Permission denied", 4096), (CANCEL, False, None, 0)],
    ids=["success", "failure", "cancel"],
)
def test_a_life_is_folded(said: tuple[Said, ...], succeeded: bool, error: str | None, current: int) -> None:
    state = after(*said)
    assert (state.finished, state.succeeded, state.error) == (True, succeeded, error)
    assert state.current_bytes == current
    dismissed = after(*status("null"), state=state)
    assert (dismissed.finished, dismissed.succeeded) == (True, succeeded)


@pytest.mark.parametrize("said", [SUCCESS, FAILURE, CANCEL])
def test_only_the_end_is_the_end(said: tuple[Said, ...]) -> None:
    for length in range(len(said)):
        assert not after(*said[:length]).finished
        assert not after(*said[:length]).succeeded


def test_a_stopped_job_is_not_over() -> None:
    assert not after(*status("created", "running"), failing("write", "stop"), *status("paused")).finished


@given(
    st.sampled_from([SUCCESS, FAILURE, CANCEL]),
    st.sampled_from(["vmf-0a1b2c3d-1-copy", "drive-vda", "vmf-0a1b2c3d-0-cop"]),
    st.integers(0, 6),
)
def test_other_jobs_events_change_nothing(own: tuple[Said, ...], other: str, length: int) -> None:
    state = after(*own[:length])
    strange = (
        *status("concluded", "null", job=other),
        ended("BLOCK_JOB_COMPLETED", other, error="No space left"),
        ended("BLOCK_JOB_CANCELLED", other),
        failing("write", "stop", other),
    )
    assert {name for name, _ in strange} == set(EVENTS)
    assert after(*strange, state=state) == state


def entry(job: str, state: str = "running", **more: Any) -> dict[str, Any]:
    return {"id": job, "type": "backup", "status": state, "current-progress": 7, "total-progress": 9} | more


def test_a_reply_is_the_truth() -> None:
    heard = after(*status("running"))
    assert from_query(heard, [entry("other", "concluded", error="x"), entry(JOB)]) == JobState(
        JOB, "running", None, cancelled=False, current_bytes=7, total_bytes=9
    )
    concluded = from_query(heard, [entry(JOB, "concluded", error="No space left on device")])
    assert concluded is not None
    assert concluded.finished
    assert concluded.error == "No space left on device"
    assert not concluded.succeeded


def test_what_an_event_said_is_not_forgotten_by_a_reply_without_it() -> None:
    cancelled = from_query(after(*CANCEL), [entry(JOB, "concluded")])
    failed = from_query(after(*FAILURE), [entry(JOB, "concluded")])
    assert cancelled is not None
    assert failed is not None
    assert not cancelled.succeeded
    assert failed.error == "Permission denied"


def test_a_job_that_qemu_does_not_know_is_none() -> None:
    assert from_query(JobState(JOB), []) is None
    assert from_query(JobState(JOB), [entry(JOB + "2")]) is None


def test_somebody_elses_jobs_are_named() -> None:
    reply = [{"type": "backup", "device": JOB}, {"type": "mirror", "device": "drive-vda"}]
    assert foreign(reply) == ["mirror job 'drive-vda'"]
    assert foreign(reply[:1]) == foreign([]) == []


@pytest.mark.parametrize(
    ("name", "ours"), [("vmf-1-0-cbw", True), ("vmf", False), ("#block1", False), ("my-vmf-1", False)]
)
def test_our_names_are_known_by_their_prefix(name: str, ours: bool) -> None:
    assert is_ours(name) is ours
