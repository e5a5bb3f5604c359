"""Why a copy failed: QEMU says "Permission denied" to nearly everything."""

from dataclasses import replace

import pytest

from orchestrator.admission import estimate
from orchestrator.errors import CopyError, FleecingError, TargetError, VmfleeceError
from orchestrator.qemu.jobs import JobState
from orchestrator.run.copy import Ended
from orchestrator.run.diagnosis import Circumstances, diagnose
from orchestrator.units import GIB, MIB

LIMIT = estimate.limit(100 * MIB)
CALM = Circumstances(
    disk="vda",
    storage="local",
    high_water_bytes=10 * MIB,
    grant_bytes=100 * MIB,
    growth_refused=False,
    growable=True,
    storage_free_bytes=GIB,
    cbw_timeout_seconds=7,
)
FULL = replace(CALM, high_water_bytes=99 * MIB)
DENIED = "Permission denied"


def ended(operation: str | None, error: str | None = DENIED, *, stopped: bool = False) -> Ended:
    return Ended(JobState("vmf-1-0-copy", "concluded", error), operation, stopped)


@pytest.mark.parametrize(
    ("how", "at", "kind", "code", "said"),
    [
        pytest.param(
            ended("write", None, stopped=True),
            CALM,
            TargetError,
            "target-full",
            ("target is full",),
            id="target full",
        ),
        pytest.param(
            ended("write", None, stopped=True), FULL, TargetError, "target-full", (), id="that comes first"
        ),
        pytest.param(
            ended("write", "Input/output error"),
            FULL,
            TargetError,
            "target-write-failed",
            ("Input/output error",),
            id="target broken",
        ),
        pytest.param(ended(None), FULL, CopyError, "copy-failed", (DENIED,), id="nothing read or written"),
        pytest.param(ended(None, None), CALM, CopyError, "copy-failed", ("cancelled",), id="cancelled by others"),
        pytest.param(
            ended("read"),
            replace(CALM, storage=None, high_water_bytes=0, grant_bytes=0, storage_free_bytes=0),
            FleecingError,
            "copy-timeout",
            ("within 7 s", DENIED, "back up with fleecing"),
            id="slow target, no fleecing",
        ),
        pytest.param(
            ended("read"),
            FULL,
            FleecingError,
            "fleecing-full",
            ("storage local", "99.0 MiB of 100.0 MiB", "could not be extended in time", "storage.local.quota"),
            id="outran its growth",
        ),
        pytest.param(
            ended("read"),
            replace(FULL, growth_refused=True),
            FleecingError,
            "fleecing-full",
            ("no more to give",),
            id="quota used up",
        ),
        pytest.param(
            ended("read"),
            replace(FULL, growable=False),
            FleecingError,
            "fleecing-full",
            ("this QEMU (before 9.1) cannot extend it",),
            id="cannot grow",
        ),
        pytest.param(
            ended("read"),
            replace(CALM, high_water_bytes=LIMIT - 2 * MIB),
            FleecingError,
            "fleecing-full",
            (),
            id="the copy that did not fit is not in it",
        ),
        pytest.param(
            ended("read"),
            replace(CALM, high_water_bytes=LIMIT - 2 * MIB - 1),
            FleecingError,
            "copy-timeout",
            (),
            id="room for one more copy",
        ),
        pytest.param(
            ended("read"),
            replace(CALM, high_water_bytes=0, grant_bytes=MIB),
            FleecingError,
            "copy-timeout",
            (),
            id="a small grant is not full from the start",
        ),
        pytest.param(
            ended("read"),
            replace(CALM, storage_free_bytes=MIB),
            FleecingError,
            "storage-full",
            ("file system of storage local is full (1.0 MiB free)",),
            id="others filled the file system",
        ),
        pytest.param(
            ended("read"),
            CALM,
            FleecingError,
            "copy-timeout",
            ("storage local took longer than 7 s", "I/O error", DENIED),
            id="slow or broken",
        ),
    ],
)
def test_the_cause_is_named(
    how: Ended, at: Circumstances, kind: type[VmfleeceError], code: str, said: tuple[str, ...]
) -> None:
    error = diagnose(how, at)
    assert type(error) is kind
    assert error.code == code
    assert "disk vda" in error.message
    assert error.retryable
    for text in said:
        assert text in str(error)
