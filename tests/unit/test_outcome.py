"""What a run came to, as results, records and progress."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from structlog.testing import capture_logs

from orchestrator import __version__
from orchestrator.fleecing.names import DiskNames
from orchestrator.model import (
    Disk,
    DiskProgress,
    DiskResult,
    ErrorReport,
    Fleecing,
    Kind,
    Outcome,
    Phase,
    Progress,
    RunOptions,
    RunResult,
)
from orchestrator.run.outcome import DiskRun, Facts, log_result
from orchestrator.run.particulars import Particulars
from orchestrator.run.plan import DiskPlan
from orchestrator.target.base import Snapshot
from orchestrator.target.extra_files import ExtraFile

STARTED = datetime(2026, 11, 22, 2, 30, tzinfo=UTC)
OPTIONS = RunOptions("main", Fleecing(), job="nightly")
FAILURE = ErrorReport("copy-failed", "it broke", "mend it")
CANCELLATION = ErrorReport("cancelled", "the run was cancelled")


def facts(**known: Any) -> Facts:
    disk = Disk("vda", "n", "/machine/peripheral/vda", 4096, "qcow2", "/vda.qcow2")
    run = DiskRun(
        DiskPlan(disk, Kind.FULL, "why", "local", 1000),
        DiskNames("0a1b2c3d", 0),
        grant_bytes=2000,
        copied_bytes=1024,
        fleecing_peak_bytes=512,
    )
    return Facts(disks=[run], **known)


def committed() -> Snapshot:
    return Snapshot("web01/20261122T023000Z", "main", "web01", STARTED, "full", (), {})


def result(known: Facts, error: ErrorReport | None = None) -> RunResult:
    return known.result("web01", "0a1b2c3d", started=STARTED, duration_seconds=1.23456, error=error)


@pytest.mark.parametrize(
    ("warnings", "error", "outcome"),
    [
        ([], None, Outcome.SUCCEEDED),
        (["could not undo: x"], None, Outcome.WARNING),
        ([], FAILURE, Outcome.FAILED),
        (["w"], FAILURE, Outcome.FAILED),
        ([], CANCELLATION, Outcome.CANCELLED),
    ],
)
def test_outcomes(warnings: list[str], error: ErrorReport | None, outcome: Outcome) -> None:
    ended = result(facts(warnings=warnings, snapshot=committed()), error)
    assert ended.outcome is outcome
    # What is listed is named, also by a run that was cancelled, or failed, after that.
    assert ended.snapshot == "web01/20261122T023000Z"
    assert result(facts(warnings=warnings), error).snapshot is None
    assert ended.warnings == tuple(warnings)
    assert ended.error == error
    assert ended.retryable is (error is FAILURE)


def test_a_result_is_data() -> None:
    ended = result(facts(pause_ms=1.98765, snapshot=committed()))
    assert ended.disks == (DiskResult("vda", 4096, 1024, 512, "local", 2000),)
    document = json.loads(json.dumps(ended.as_json()))
    assert document["started"] == "2026-11-22T02:30:00+00:00"
    assert (document["duration_seconds"], document["pause_ms"]) == (1.235, 1.988)
    assert document["outcome"] == "succeeded"
    assert document["error"] is None
    assert document["disks"][0]["fleecing_peak_bytes"] == 512


def test_a_run_that_failed_early_has_no_disks_and_no_pause() -> None:
    ended = result(Facts(), FAILURE)
    assert (ended.disks, ended.pause_ms, ended.snapshot) == ((), None, None)


def test_progress_shows_what_each_disk_has() -> None:
    assert facts().progress("web01", "0a1b2c3d", Phase.COPYING) == Progress(
        "web01",
        "0a1b2c3d",
        Phase.COPYING,
        (DiskProgress("vda", 4096, 1024, 0, 2000, strip="#" * 16 + ">" + "." * 47),),
    )


def test_a_snapshot_keeps_how_it_was_made() -> None:
    known = facts(pause_ms=2.0)
    known.particulars = Particulars("10.0.2", {"vda": "virtio-blk-pci"})
    known.files = [ExtraFile("/web01/OVMF_VARS.fd", 0o600, b"four")]
    details = json.loads(json.dumps(known.details("0a1b2c3d", OPTIONS)))
    assert details == {
        "run": "0a1b2c3d",
        "job": "nightly",
        "kind": "full",
        "consistency": "pause",
        "frozen_file_systems": 0,
        "pause_ms": 2.0,
        "vmfleece": __version__,
        "qemu": "10.0.2",
        "extra_files": [{"path": "/web01/OVMF_VARS.fd", "size_bytes": 4}],
        "disks": [
            {
                "disk": "vda",
                "kind": "full",
                "reason": "why",
                "source": "/vda.qcow2",
                "source_driver": "qcow2",
                "device": "virtio-blk-pci",
                "storage": "local",
                "fleecing_peak_bytes": 512,
            }
        ],
    }


@pytest.mark.parametrize(("error", "level"), [(None, "info"), (FAILURE, "error"), (CANCELLATION, "error")])
def test_one_closing_line_holds_everything(error: ErrorReport | None, level: str) -> None:
    ended = result(facts(snapshot=committed()), error)
    with capture_logs() as lines:
        log_result(ended, job="nightly", target="main")
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("run.finished", level)
    assert (line["job"], line["target"]) == ("nightly", "main")
    document = ended.as_json() | {"log_level": level}
    for key in line.keys() - {"event", "job", "target"}:
        wanted = document[key]
        assert line[key] == (list(wanted) if isinstance(wanted, tuple) else wanted), key
    # vm and run are bound to the task; `started` is the line's own time minus the duration.
    assert document.keys() - line.keys() == {"vm", "run", "started"}
