"""A job's hook: real programs, called as vzdump calls its hook scripts."""

import asyncio
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from orchestrator.config.settings import Hook, JobSettings, TargetDriver, TargetSettings
from orchestrator.errors import HookError
from orchestrator.model import ErrorReport, Fleecing, Kind, Outcome, RunOptions, RunResult
from orchestrator.service.hooks import LONGEST_LINE_BYTES, MOST_LINES, JobHook

PRINTS_ALL = """#!/bin/sh
{ echo "$@"; env | grep -E "^(VMTYPE|HOSTNAME|TARGET|STOREID|DUMPDIR|LOGFILE|VMFLEECE_)" | sort; } >> "$0.calls"
[ -z "$LOGFILE" ] || cat "$LOGFILE" > "$0.result"
"""


def job_hook(program: Path | None, *, timeout_seconds: float = 30.0) -> JobHook:
    hook = Hook(program, timeout_seconds) if program else None
    options = RunOptions("main", Fleecing(), job="nightly")
    job = JobSettings("nightly", ("web01",), options, None, 0.0, False, 0, hook=hook)
    return JobHook(job, TargetSettings("main", TargetDriver.IMAGES, "/srv/backup", Path("/srv/backup")))


def script(folder: Path, text: str, *, mode: int = 0o700) -> Path:
    path = folder / "hook"
    path.write_text(text)
    path.chmod(mode)
    return path


def result(error: ErrorReport | None = None) -> RunResult:
    outcome = Outcome.FAILED if error else Outcome.SUCCEEDED
    snapshot = None if error else "web01/20261122T023000Z"
    return RunResult(
        "web01", "0a1b2c3d", outcome, snapshot, Kind.FULL, "first", datetime.now(UTC), 1.0, None, (), (), error
    )


async def test_it_is_called_as_vzdump_calls_its_scripts(tmp_path: Path) -> None:
    hook = job_hook(script(tmp_path, PRINTS_ALL))
    await hook.job_started()
    await hook.run_started("web01", "0a1b2c3d")
    await hook.run_ended(result())
    await hook.job_ended(aborted=False)
    lines = (tmp_path / "hook.calls").read_text().splitlines()
    assert [line for line in lines if "=" not in line] == [
        "job-init",
        "job-start",
        "backup-start snapshot web01",
        "backup-end snapshot web01",
        "log-end snapshot web01",
        "job-end",
    ]
    told = lines[lines.index("backup-end snapshot web01") :][:9]
    logfile = next(line for line in told if line.startswith("LOGFILE="))
    assert told[1:] == [
        "DUMPDIR=/srv/backup",
        "HOSTNAME=web01",
        logfile,
        "STOREID=main",
        "TARGET=web01/20261122T023000Z",
        "VMFLEECE_CODE=",
        "VMFLEECE_JOB=nightly",
        "VMFLEECE_RUN=0a1b2c3d",
    ]
    assert lines[lines.index("job-init") :][:5] == [
        "job-init",
        "DUMPDIR=/srv/backup",
        "STOREID=main",
        "VMFLEECE_JOB=nightly",
        "VMTYPE=qemu",
    ]
    assert json.loads((tmp_path / "hook.result").read_text())["run"] == "0a1b2c3d"
    assert not Path(logfile.removeprefix("LOGFILE=")).exists()


async def test_what_failed_is_told_as_aborted(tmp_path: Path) -> None:
    hook = job_hook(script(tmp_path, PRINTS_ALL))
    await hook.run_ended(result(ErrorReport("target-full", "no space")))
    await hook.job_ended(aborted=True)
    calls = (tmp_path / "hook.calls").read_text()
    assert "backup-abort snapshot web01" in calls
    assert "VMFLEECE_CODE=target-full" in calls
    assert "job-abort" in calls


async def test_without_a_hook_nothing_is_called() -> None:
    hook = job_hook(None)
    await hook.job_started()
    await hook.run_started("web01", "0a1b2c3d")
    await hook.run_ended(result())
    await hook.job_ended(aborted=False)


async def test_a_failure_stops_what_has_not_begun_and_is_logged_elsewhere(tmp_path: Path) -> None:
    program = script(tmp_path, "#!/bin/sh\necho no tape\nexit 7\n")
    hook = job_hook(program)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("info"))
    with capture_logs() as logs:
        with pytest.raises(HookError, match=f"{program} ended with exit code 7 when it was called as job-init"):
            await hook.job_started()
        with pytest.raises(HookError, match="called as backup-start snapshot web01"):
            await hook.run_started("web01", "0a1b2c3d")
        await hook.run_ended(result())
        await hook.job_ended(aborted=False)
    assert [one["phase"] for one in logs if one["event"] == "hook.failed"] == ["backup-end", "log-end", "job-end"]
    assert {one["line"] for one in logs if one["event"] == "hook.said"} == {"no tape"}


async def test_one_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    program = script(tmp_path, '#!/bin/sh\nsleep 1000 &\necho $! > "$0.child"\nwait\n')
    with pytest.raises(HookError, match=r"did not end within 1 s"):
        await job_hook(program, timeout_seconds=1.0).job_started()
    await gone(int((tmp_path / "hook.child").read_text()))


async def test_what_it_leaves_in_the_background_does_not_hold_it_up(tmp_path: Path) -> None:
    program = script(tmp_path, '#!/bin/sh\nsleep 1000 &\necho $! > "$0.child"\n')
    await job_hook(program).job_started()
    await gone(int((tmp_path / "hook.child").read_text()))


async def test_cancelling_ends_it(tmp_path: Path) -> None:
    program = script(tmp_path, '#!/bin/sh\necho $$ > "$0.pid"\nexec sleep 1000\n')
    calling = asyncio.ensure_future(job_hook(program).job_started())
    while not (tmp_path / "hook.pid").exists() or not (tmp_path / "hook.pid").read_text():
        await asyncio.sleep(0.01)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await gone(int((tmp_path / "hook.pid").read_text()))


async def gone(pid: int) -> None:
    """Wait until a process has ended; it may be a zombie that nobody here can reap."""
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        await asyncio.sleep(0.01)


async def test_of_much_output_the_beginning_is_logged(tmp_path: Path) -> None:
    long = f"#!/bin/sh\nhead -c {10 * LONGEST_LINE_BYTES} /dev/zero | tr '\\0' x; echo; seq {2 * MOST_LINES}\n"
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("info"))
    with capture_logs() as logs:
        await job_hook(script(tmp_path, long)).run_started("web01", "0a1b2c3d")
    said = [one["line"] for one in logs if one["event"] == "hook.said"]
    assert len(said) <= MOST_LINES
    assert said[-1].isdigit()


@pytest.mark.parametrize(
    ("text", "mode", "problem"),
    [
        ("#!/bin/sh\n", 0o600, "is no file that can be executed"),
        ("#!/bin/sh\n", 0o722, "can be changed by others"),
        ("#!/bin/sh\n", 0o770, "can be changed by others"),
        ("#!/no/such/interpreter\n", 0o700, "cannot be started"),
    ],
)
async def test_what_cannot_be_called_safely_is_not(tmp_path: Path, text: str, mode: int, problem: str) -> None:
    with pytest.raises(HookError, match=problem):
        await job_hook(script(tmp_path, text, mode=mode)).job_started()


async def test_one_that_is_not_there_or_is_somebody_elses_is_not_called(tmp_path: Path) -> None:
    with pytest.raises(HookError, match="No such file"):
        await job_hook(tmp_path / "hook").job_started()
    with pytest.raises(HookError, match="is no file that can be executed"):
        await job_hook(tmp_path).job_started()
    if os.geteuid() == 0:
        program = script(tmp_path, "#!/bin/sh\n")
        os.chown(program, 65534, 65534)
        with pytest.raises(HookError, match="can be changed by others"):
            await job_hook(program).job_started()
