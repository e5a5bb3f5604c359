import json
from pathlib import Path

import pytest

from orchestrator.cli import config as command
from orchestrator.errors import ConfigError
from tests.unit.test_config import GOOD


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / ("long-" * 30)
    folder.mkdir()
    path = folder / "[bold].toml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.toml"
    path.write_text(GOOD.replace('"main"', '"mian"') + "retries = 99\n")
    return path


def test_check(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.check(good, as_json=False) == 0
    assert capsys.readouterr().out == f"{good}: fine: 1 storage, 1 target, 2 VMs, 1 job\n"
    assert command.check(good, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "problems": []}


def test_check_of_a_file_with_problems(bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="2 problems in"):
        command.check(bad, as_json=False)
    assert capsys.readouterr().out == ""
    assert command.check(bad, as_json=True) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["problems"] == [
        f"{bad}:16: job.nightly.target: there is no target 'mian'; targets: main",
        f"{bad}:17: job.nightly.retries: 99 is not allowed; allowed: at most 10",
    ]


def test_check_of_a_file_that_is_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.check(tmp_path / "absent", as_json=True) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem.startswith(f"cannot read {tmp_path}/absent: No such file")


def test_show_breaks_no_line_and_reads_no_markup(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.show(good, as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.partition(" = ")[0]: line.split("  # ") for line in lines}
    assert all(" = " in line and "  # " in line for line in lines)
    assert rows["storage.local.quota"][0].rstrip() == 'storage.local.quota = "10GiB"'
    assert rows["storage.local.quota"][1] == f"{good}:3"
    assert rows["job.nightly.schedule"][0].rstrip() == "job.nightly.schedule = (not set)"
    assert rows["job.nightly.repeat_missed"][0].rstrip() == "job.nightly.repeat_missed = false"
    assert rows["job.nightly.vms"][0].rstrip() == 'job.nightly.vms = ["web*"]'
    assert rows["daemon.max_runs"][1] == "default"


def test_show_writes_tables_as_toml(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good.write_text(GOOD + 'fleecing = {enabled = true, storage = "local"}\n')
    assert command.show(good, as_json=False) == 0
    line = 'job.nightly.fleecing = {enabled = true, storage = "local"}'
    assert any(each.startswith(line) for each in capsys.readouterr().out.splitlines())


def test_show_as_data(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.show(good, as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)["settings"]
    assert {"key": "daemon.max_runs", "value": 4, "origin": "default"} in rows
    assert {"key": "target.main.path", "value": "/backup", "origin": f"{good}:6"} in rows


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.schema() == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False
