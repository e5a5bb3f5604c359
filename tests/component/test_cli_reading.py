"""`vmfleece export`, `verify` and `restore` as they are called, with images on a target and no guest."""

import asyncio
import contextlib
import json
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.target.base import Snapshot
from orchestrator.target.images.target import ImagesTarget
from tests.component.test_cli import CONFIG, ROOT, Done
from tests.unit.test_target import CLUSTER, changed_chain
from tests.unit.test_target import snapshot as make_snapshot

MIB = 1 << 20
SIZE = 2 * MIB


@pytest.fixture
def points(tmp_path: Path) -> list[tuple[Snapshot, bytes]]:
    """A full snapshot and one that builds on it, and one of another VM that is damaged."""

    async def fill() -> list[tuple[Snapshot, bytes]]:
        target = ImagesTarget("main", tmp_path / "backup")
        await target.prepare()
        chain = await changed_chain(target, SIZE, [{3: b"\1" * CLUSTER}])
        other = await make_snapshot(target, vm="db01")
        image = tmp_path / "backup" / other.id / "vda.qcow2"
        image.write_bytes(image.read_bytes().replace(b"\x5a" * 4096, b"\x5b" * 4096, 1))
        return chain

    return asyncio.run(fill())


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "vmfleece.toml"
    path.write_text(CONFIG.format(tmp_path))
    return path


def run(config: Path, *arguments: str | Path) -> Done:
    argv = [sys.executable, "-m", "orchestrator", *map(str, arguments), "--config", str(config)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@contextlib.contextmanager
def exporting(config: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    argv = [sys.executable, "-m", "orchestrator", "export", *arguments, "--config", str(config)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_disk_is_exported_until_a_signal(
    config: Path, tmp_path: Path, points: list[tuple[Snapshot, bytes]], number: signal.Signals
) -> None:
    (tmp_path / "run").mkdir()
    with exporting(config, "web01@latest") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("vda: nbd+unix:///vda?socket=")
        uri = line.removeprefix("vda: ").strip()
        assert process.stdout.readline().startswith(f"for example: qemu-img convert -f raw -O qcow2 '{uri}' ")
        (folder,) = (tmp_path / "run").iterdir()
        (socket,) = folder.iterdir()
        assert [stat.filemode(path.stat().st_mode) for path in (folder, socket)] == ["drwx------", "srw-------"]
        subprocess.check_call(["nbdcopy", uri, tmp_path / "out.raw"])
        assert (tmp_path / "out.raw").read_bytes() == points[-1][1]
        (server,) = children(process.pid)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")
    assert list((tmp_path / "run").iterdir()) == []
    assert not Path("/proc", server).exists()


def test_an_export_where_run_dir_is_not(
    config: Path, tmp_path: Path, points: list[tuple[Snapshot, bytes]]
) -> None:
    with exporting(config, points[0][0].id, "--disk", "vda", "--json") as process:
        assert process.stdout is not None
        text = "".join(iter(process.stdout.readline, "}\n")) + "}"
        document = json.loads(text)
        assert document["snapshot"] == points[0][0].id
        (one,) = document["exports"]
        assert one["disk"] == "vda"
        subprocess.check_call(["nbdcopy", one["uri"], tmp_path / "out.raw"])
        assert (tmp_path / "out.raw").read_bytes() == points[0][1]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert not (tmp_path / "run").exists()


def test_what_is_exported_is_not_removed_until_vmfleece_is_killed(
    config: Path, points: list[tuple[Snapshot, bytes]]
) -> None:
    with exporting(config, points[-1][0].id) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (server,) = children(process.pid)
        done = run(config, "snapshot", "forget", points[-1][0].id)
        assert done.returncode == 1
        assert "is needed by a backup, a restore" in done.stderr
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while Path("/proc", server).exists():
        assert time.monotonic() < deadline, "qemu-nbd outlives it"
        time.sleep(0.01)


@pytest.mark.usefixtures("points")
def test_what_is_not_there_is_not_exported(config: Path) -> None:
    for arguments, message in (
        (["web01@latest", "--disk", "vdz"], "has no disk 'vdz'"),
        (["web09@latest"], "no snapshot 'web09@latest'"),
        (["0123abcd"], "no snapshot '0123abcd'"),
    ):
        done = run(config, "export", *arguments)
        assert done.returncode == 1
        assert message in done.stderr


def test_snapshots_are_verified(config: Path, points: list[tuple[Snapshot, bytes]]) -> None:
    fine, damaged = points[-1][0], "db01/20261122T023000Z"
    done = run(config, "verify", "--json")
    assert done.returncode == 3
    rows = {row["snapshot"]: row for row in json.loads(done.stdout)["verified"]}
    assert set(rows) == {point.id for point, _ in points} | {damaged}
    assert all(row["checked_bytes"] == row["total_bytes"] > 0 for row in rows.values())
    assert rows[fine.id]["problems"] == []
    (problem,) = rows[damaged]["problems"]
    assert problem.startswith(f"the image of disk vda in snapshot {damaged} is damaged: SHA-256 ")
    assert f"{damaged}: {problem}" in done.stderr

    done = run(config, "verify", fine.id, "--sample", "50%", "--json")
    assert done.returncode == 0
    (row,) = json.loads(done.stdout)["verified"]
    assert 0 < row["checked_bytes"] < row["total_bytes"]

    done = run(config, "verify", "--vm", "db01")
    assert done.returncode == 1
    assert "1 damaged" in done.stdout
    assert run(config, "verify", "--vm", "web01").returncode == 0


@pytest.mark.parametrize("given", ["0%", "101%", "10", "nan%", "x%", "-5%"])
def test_a_sample_that_is_no_share(config: Path, given: str) -> None:
    done = run(config, "verify", f"--sample={given}")
    assert done.returncode == 2
    assert f"{given!r} is no share above 0% up to 100%" in done.stderr


def test_a_disk_is_restored(config: Path, tmp_path: Path, points: list[tuple[Snapshot, bytes]]) -> None:
    (tmp_path / "out").mkdir()
    done = run(config, "restore", "web01@latest", "--all", "--to", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "vda.raw").read_bytes() == points[-1][1]
    assert "SHA-256 checked" in done.stdout


def test_a_target_that_cannot_be_listed_hides_no_other(
    config: Path, tmp_path: Path, points: list[tuple[Snapshot, bytes]]
) -> None:
    gone = f'\n[target.gone]\ndriver = "restic"\npath = "{tmp_path}/gone"\npassword_file = "{tmp_path}/password"\n'
    config.write_text(config.read_text() + gone)
    (tmp_path / "password").touch(mode=0o600)
    (tmp_path / "password").write_text("secret")
    full, content = points[0]
    done = run(config, "snapshot", "list", "--json")
    assert done.returncode == 3
    assert full.id in [one["id"] for one in json.loads(done.stdout)["snapshots"]]
    assert f"there is no repository at {tmp_path}/gone" in done.stderr
    assert run(config, "verify", "--vm", "web01").returncode == 3
    done = run(config, "restore", full.id, "--disk", "vda", "--to", tmp_path / "vda.raw")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "vda.raw").read_bytes() == content
    done = run(config, "snapshot", "list", "--target", "gone")
    assert done.returncode == 10
    assert done.stderr.splitlines()[0] == f"vmfleece: there is no repository at {tmp_path}/gone"
