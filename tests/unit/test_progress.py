"""What a run says to people of its guest: while it goes on, and when it is over."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from orchestrator.cli.progress import Display, result_lines
from orchestrator.model import DiskProgress, ErrorReport, GuestWrites, Kind, Outcome, Phase, Progress, RunResult

RESULT = RunResult(
    vm="web01",
    run="0a1b2c3d",
    outcome=Outcome.SUCCEEDED,
    snapshot="web01/20261123T043515Z",
    kind=Kind.FULL,
    reason="",
    started=datetime(2026, 11, 23, 4, 35, 15, tzinfo=UTC),
    duration_seconds=17.7,
    pause_ms=6.8,
    disks=(),
    guest_writes=GuestWrites(900, 0.44, 3.1, None, 0.39),
)
FAILED = {"outcome": Outcome.FAILED, "snapshot": None, "error": ErrorReport("vm-gone", "its QEMU has ended")}


@pytest.mark.parametrize(
    ("changes", "guest"),
    [
        ({}, ", guest held 6.8 ms, guest writes 0.4 ms (0.4 ms before)"),
        ({"slowed_seconds": 0.0}, ", guest held 6.8 ms, guest writes 0.4 ms (0.4 ms before)"),
        ({"slowed_seconds": 14.2, "pause_ms": None}, ", guest writes 0.4 ms (0.4 ms before), slowed for 14 s"),
        ({"guest_writes": GuestWrites(5, 21.0, 21.0, None, None)}, ", guest held 6.8 ms, guest writes 21.0 ms"),
        ({"guest_writes": GuestWrites(0, None, None, None, 0.4)}, ", guest held 6.8 ms"),
        ({"guest_writes": None, "pause_ms": None}, ""),
    ],
)
def test_the_end_says_what_the_backup_cost_the_guest(changes: dict[str, object], guest: str) -> None:
    (line,) = result_lines(replace(RESULT, **changes))
    assert line == f"web01: succeeded: web01/20261123T043515Z, full, 0 B in 17.7 s{guest}"
    (line,) = result_lines(replace(RESULT, **(changes | FAILED)))
    assert line == f"web01: failed after 17.7 s{guest}"


@pytest.mark.parametrize(("limit", "end"), [(None, ""), (1 << 20, ", slowed for the guest")])
def test_a_line_says_that_a_run_is_slowed(capsys: pytest.CaptureFixture[str], limit: int | None, end: str) -> None:
    disk = DiskProgress("vda", 4096, 1024, 0, 0)
    with Display() as display:
        display.update(Progress("web01", "0a1b2c3d", Phase.COPYING, (disk,), slowed_to_bytes_per_second=limit))
    assert capsys.readouterr().out == f"web01: 25% (1.0 KiB of 4.0 KiB) in 0s{end}\n"
