"""Metrics: documented as they are told, and used by alert rules and the dashboard as they are called."""

import asyncio
import json
import re
import shutil
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator import config
from orchestrator.model import DiskResult, ErrorReport, GuestWrites, Kind, Outcome, RunResult
from orchestrator.service import metrics
from orchestrator.service.metrics import Metrics
from orchestrator.service.status import RunStatus, Status, StorageStatus, WaitingStatus
from orchestrator.state.catalogue import Catalogue

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"vmfleece_[a-z_]+")
WHEN = datetime(2026, 11, 22, 2, 30, tzinfo=UTC)
CONFIG = """\
[daemon]
state_dir = "{0}/state"
metrics_file = "{0}/vmfleece.prom"
[storage.local]
path = "{0}/fleecing"
quota = "1GiB"
[target.main]
path = "{0}/backup"
[vm.web01]
qmp = "{0}/web01.qmp"
[vm.new]
qmp = "{0}/new.qmp"
[job.nightly]
schedule = "02:30 UTC"
randomized_delay = "15min"
vms = ["*"]
target = "main"
"""
STATUS = Status(
    process=1,
    started="2026-11-23T02:30:00+00:00",
    storages=(StorageStatus("local", "/f", 100, 50, 10, 20, 30, None, None, 1, None),),
    runs=(
        RunStatus(
            *("web01", "b46bcf3e", None, "main", "copying", "2026-11-23T02:30:01+00:00", 9, 8, 7, 6),
            guest_writes=GuestWrites(7, 3.0, 8.0, None, 1.0),
            recent_write_ms=(8.0, None, 2.0),
        ),
        RunStatus(
            *("db01", "b46bcf3f", None, "main", "copying", "2026-11-23T02:30:01+00:00", 9, 8, 7, 6),
            recent_write_ms=(8.0, None),
        ),
    ),
    queue=(
        WaitingStatus("db01", "5e22b9f4", "j", "main", 50, "2020-11-23T02:30:02+00:00", ("one",)),
        WaitingStatus("db02", "5e22b9f5", "j", "main", 50, "2020-11-23T02:30:02+00:00", ("two",), "2036-01-01"),
    ),
)


def result(
    vm: str = "web01", *, error: str | None = None, run: str = "b46bcf3e", started: datetime = WHEN
) -> RunResult:
    return RunResult(
        vm=vm,
        run=run,
        outcome=Outcome.FAILED if error else Outcome.SUCCEEDED,
        snapshot=None if error else f"{vm}/20261122T023000Z",
        kind=Kind.FULL,
        reason="",
        started=started,
        duration_seconds=12.5,
        pause_ms=4.0,
        disks=(DiskResult("vda", 1000, 700, 30, "local"), DiskResult("vdb", 500, 50, 3, "local")),
        error=ErrorReport(error, "it did not work") if error else None,
        stored_bytes=None if error else 321,
        guest_writes=None if error else GuestWrites(9, 2.5, 40.0, None, 0.5),
    )


@pytest.fixture
def told(tmp_path: Path) -> Metrics:
    (tmp_path / "vmfleece.toml").write_text(CONFIG.format(tmp_path))
    loaded = config.load(tmp_path / "vmfleece.toml")
    return Metrics(lambda: loaded, lambda: STATUS)


def values(told: Metrics) -> dict[str, float]:
    """By name and labels, as PromQL writes them."""
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(told.text().decode())
        for sample in family.samples
    }


def exist(told: Metrics) -> dict[str, str]:
    """Every metric that there is, with its type, as it is written in a query."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in text_string_to_metric_families(told.text().decode())
    }


def test_a_run_is_told_with_its_vm_and_job(told: Metrics) -> None:
    told.ended(result(), job="nightly", target="main")
    found = values(told)
    of_vm = "backup_job=nightly vm=web01"
    assert found[f"vmfleece_last_success_timestamp_seconds {of_vm}"] == WHEN.timestamp()
    due = datetime(2026, 11, 23, 2, 45, tzinfo=UTC)
    assert found[f"vmfleece_backup_due_timestamp_seconds {of_vm}"] == due.timestamp()
    last = {
        name: found[f"vmfleece_last_run_{name} {of_vm}"]
        for name in ("success", "duration_seconds", "size_bytes", "copied_bytes", "stored_bytes")
    }
    assert last == {
        "success": 1,
        "duration_seconds": 12.5,
        "size_bytes": 1500,
        "copied_bytes": 750,
        "stored_bytes": 321,
    }
    assert found[f"vmfleece_last_run_fleecing_peak_bytes {of_vm}"] == 33
    assert found[f"vmfleece_last_run_pause_seconds {of_vm}"] == 0.004
    assert found[f"vmfleece_last_run_guest_write_mean_seconds {of_vm}"] == 0.0025
    assert found[f"vmfleece_last_run_guest_write_worst_seconds {of_vm}"] == 0.04
    assert found["vmfleece_runs_total backup_job=nightly outcome=succeeded"] == 1
    assert found["vmfleece_copied_bytes_total target=main"] == 750
    assert found["vmfleece_guest_pause_seconds_bucket le=0.002"] == 0
    assert found["vmfleece_guest_pause_seconds_bucket le=0.005"] == 1
    assert found["vmfleece_guest_pause_seconds_count"] == 1
    assert found["vmfleece_last_success_timestamp_seconds backup_job=nightly vm=new"] == 0
    assert "vmfleece_last_run_success backup_job=nightly vm=new" not in found


def test_a_failure_leaves_the_last_success_as_it_was(told: Metrics) -> None:
    told.ended(result(), job="nightly", target="main")
    told.ended(result(error="target-full", started=datetime.now(UTC)), job="nightly", target="main")
    found = values(told)
    assert found["vmfleece_last_success_timestamp_seconds backup_job=nightly vm=web01"] == WHEN.timestamp()
    assert found["vmfleece_last_run_success backup_job=nightly vm=web01"] == 0
    assert found["vmfleece_run_failures_total code=target-full"] == 1


def test_what_is_not_configured_any_more_is_not_told(told: Metrics) -> None:
    told.ended(result("gone"), job="nightly", target="main")
    told.ended(result("gone"), job=None, target="main")
    told.ended(result(), job="weekly", target="main")
    told.ended(result(), job=None, target="main")
    of_vms = {name for name in values(told) if name.startswith("vmfleece_last_run_success")}
    assert of_vms == {"vmfleece_last_run_success backup_job= vm=web01"}


def test_the_past_is_taken_from_the_catalogue(told: Metrics, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    catalogue = Catalogue(tmp_path / "state")
    later = datetime(2026, 11, 23, 2, 30, tzinfo=UTC)
    for one in (result(run="00000001"), result(run="00000002", error="vm-gone", started=later)):
        catalogue.begin(one.run, one.vm, "nightly", one.started)
        catalogue.finish(one)
    catalogue.begin("00000003", "web01", "nightly", later)  # under way
    told.remember(catalogue)
    found = values(told)
    assert found["vmfleece_last_success_timestamp_seconds backup_job=nightly vm=web01"] == WHEN.timestamp()
    assert found["vmfleece_last_run_timestamp_seconds backup_job=nightly vm=web01"] == later.timestamp()
    assert found["vmfleece_last_run_success backup_job=nightly vm=web01"] == 0
    assert "vmfleece_last_run_guest_write_mean_seconds backup_job=nightly vm=web01" not in found  # it failed
    assert not [name for name in found if name.startswith("vmfleece_runs_total")]


def test_storages_and_queue_are_as_the_status_says(told: Metrics) -> None:
    found = values(told)
    assert found["vmfleece_storage_quota_bytes storage=local"] == 100
    assert found["vmfleece_storage_granted_bytes storage=local"] == 50
    assert "vmfleece_storage_free_bytes storage=local" not in found  # it could not be asked
    assert (found["vmfleece_queue_length"], found["vmfleece_retries_waiting"]) == (1, 1)
    assert found["vmfleece_queue_oldest_wait_seconds"] > 86400
    assert found["vmfleece_runs_under_way phase=copying"] == 2
    writes = {name: value for name, value in found.items() if name.startswith("vmfleece_guest_write_latency")}
    assert writes == {"vmfleece_guest_write_latency_seconds vm=web01": 0.002}


async def test_the_loops_lag_is_seen(told: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LAG_SECONDS", 0.01)
    serving = asyncio.create_task(told.serve())
    await asyncio.sleep(0.05)
    time.sleep(0.3)  # noqa: ASYNC251  it is to be held up
    await asyncio.sleep(0.05)
    serving.cancel()
    await asyncio.wait([serving])
    assert values(told)["vmfleece_event_loop_lag_seconds"] > 0.2


async def test_the_file_is_written_at_once_and_for_others_to_read(
    told: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "LAG_SECONDS", 0.01)
    serving = asyncio.create_task(told.serve())
    file = tmp_path / "vmfleece.prom"
    while not file.exists():
        await asyncio.sleep(0.01)
    assert file.stat().st_mode & 0o777 == 0o644
    assert b"vmfleece_start_time_seconds" in file.read_bytes()
    serving.cancel()
    await asyncio.wait([serving])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


async def test_a_file_that_cannot_be_written_ends_nothing(
    told: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "LAG_SECONDS", 0.01)
    monkeypatch.setattr(metrics, "FILE_SECONDS", 0.0)
    (tmp_path / "vmfleece.prom").mkdir()
    serving = asyncio.create_task(told.serve())
    await asyncio.sleep(0.1)
    assert not serving.done()
    (tmp_path / "vmfleece.prom").rmdir()
    while not (tmp_path / "vmfleece.prom").exists():
        await asyncio.sleep(0.01)
    serving.cancel()
    await asyncio.wait([serving])


# --- documented, and used ---


def documented() -> dict[str, str]:
    text = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `(vmfleece_\w+)` \| (\w+) \| [^|]+ \| [^|]+ \|$", text, re.MULTILINE)
    assert len(rows) == len(dict(rows))
    return dict(rows)


def test_every_metric_is_documented_and_every_documented_one_exists(told: Metrics) -> None:
    assert documented() == exist(told)


def used_in(text: str) -> set[str]:
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in NAME.findall(text)}


def test_alert_rules_and_dashboard_use_only_what_there_is(told: Metrics) -> None:
    rules = (ROOT / "config/alerts.rules.yml").read_text()
    expressions = "\n".join(re.findall(r"expr: (.+)", rules))
    assert used_in(expressions) <= exist(told).keys()
    dashboard = json.loads((ROOT / "config/grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert queries
    assert all(used_in(query) for query in queries)
    assert used_in("\n".join(queries)) <= exist(told).keys()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_alert_rules_fire_when_they_shall(tmp_path: Path) -> None:
    assert shutil.which("promtool"), "promtool is missing: sh tests/guest/install.sh"
    rules = ROOT / "config/alerts.rules.yml"
    tests = (ROOT / "tests/unit/alerts.test.yml").read_text()
    (tmp_path / "alerts.test.yml").write_text(tests.replace("RULES", str(rules)))
    for arguments in (["check", "rules", rules], ["test", "rules", tmp_path / "alerts.test.yml"]):
        done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    tested = set(re.findall(r"alertname: (\w+)", tests))
    assert tested == set(re.findall(r"alert: (\w+)", rules.read_text()))
