"""The commands against a real QEMU that has disks but no guest: what they print, and what they leave."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SIZES = {"vda": 8 << 20, "efi0": 528 << 10}


@dataclass
class Bench:
    """A VM, a configuration, and the command."""

    folder: Path
    monitor: Path

    def command(self, *arguments: str | Path) -> list[str]:
        return [
            sys.executable,
            "-m",
            "orchestrator",
            *map(str, arguments),
            "--config",
            f"{self.folder}/vmfleece.toml",
        ]

    def run(self, *arguments: str | Path, code: int = 0) -> str:
        done = subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            umask=0o022,
        )
        assert done.returncode == code, done.stderr
        return done.stdout

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code))

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ask(self, command: str) -> Any:
        """Ask QEMU over a monitor of our own."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.monitor))
            with connection.makefile("rw") as stream:
                for name in ("qmp_capabilities", command):
                    stream.write(json.dumps({"execute": name}) + "\n")
                stream.flush()
                replies = (json.loads(line) for line in stream)
                return [next(reply for reply in replies if "return" in reply)["return"] for _ in range(2)][1]

    def assert_nothing_is_left(self) -> None:
        """Nothing of ours in QEMU, disks on their own nodes, the VM running, nothing half on the target."""
        nodes = [node["node-name"] for node in self.ask("query-named-block-nodes")]
        assert not [node for node in nodes if node.startswith("vmf-")]
        assert {one["inserted"]["node-name"] for one in self.ask("query-block")} == set(SIZES)
        assert self.ask("query-jobs") == self.ask("query-fdsets") == []
        assert self.ask("query-status")["status"] == "running"
        assert not list((self.folder / "backup").rglob("*.partial"))
        assert not list((self.folder / "fleecing").iterdir())


CONFIG = """\
[daemon]
state_dir = "{0}/state"
run_dir = "{0}/run"
[storage.local]
path = "{0}/fleecing"
quota = "64MiB"
min_free = 0
[target.main]
path = "{0}/backup"
[vm.web01]
qmp = "{0}/web01.qmp"
[vm.gone]
qmp = "{0}/gone.qmp"
"""


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a running QEMU that has disks, firmware that finds nothing to boot, and two monitors."""
    folder = tmp_path_factory.mktemp("vm")
    argv = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "64", "-nodefaults", "-display", "none"]
    for name, size in SIZES.items():
        raw = folder / f"{name}.raw"
        raw.write_bytes(os.urandom(size))
        subprocess.check_call(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, folder / f"{name}.qcow2"])
        file = f"driver=qcow2,node-name={name},file.driver=file,file.filename={folder}/{name}.qcow2"
        argv += ["-blockdev", file, "-device", f"virtio-blk-pci,drive={name},id={name}"]
    for name in ("web01", "bed"):
        argv += ["-qmp", f"unix:{folder}/{name}.qmp,server=on,wait=off"]
    with subprocess.Popen(argv) as qemu:
        try:
            until = time.monotonic() + 20
            while not (folder / "bed.qmp").exists():
                assert time.monotonic() < until
                assert qemu.poll() is None
                time.sleep(0.02)
            yield folder
        finally:
            qemu.kill()


@pytest.fixture
def bench(vm: Path) -> Iterator[Bench]:
    made = Bench(vm, vm / "bed.qmp")
    (vm / "vmfleece.toml").write_text(CONFIG.format(vm))
    (vm / "fleecing").mkdir(exist_ok=True)
    yield made
    for name in ("backup", "state"):
        shutil.rmtree(vm / name, ignore_errors=True)


def test_a_backup_says_what_it_did_and_comes_back_privately(bench: Bench, tmp_path: Path) -> None:
    (run,) = bench.json("backup", "web01")["runs"]
    assert run.keys() >= {
        "vm",
        "run",
        "outcome",
        "snapshot",
        "kind",
        "reason",
        "duration_seconds",
        "pause_ms",
        "error",
    }
    assert (run["vm"], run["outcome"], run["kind"], run["error"]) == ("web01", "succeeded", "full", None)
    assert [(one["disk"], one["size_bytes"], one["copied_bytes"]) for one in run["disks"]] == [
        (name, size, size) for name, size in SIZES.items()
    ]
    assert {one["storage"] for one in run["disks"]} == {"local"}
    assert all(0 < one["fleecing_peak_bytes"] < 64 << 20 for one in run["disks"])
    bench.assert_nothing_is_left()

    (snapshot,) = bench.json("snapshot", "list")["snapshots"]
    assert snapshot["id"] == run["snapshot"]
    assert bench.json("snapshot", "show", "web01@latest") == snapshot
    assert snapshot["id"] in bench.run("snapshot", "list")
    shown = bench.run("snapshot", "show", "web01@latest")
    for disk in snapshot["disks"]:
        assert disk["sha256"] in shown

    restored = bench.json("restore", "web01@latest", "--all", "--to", tmp_path)["restored"]
    assert [Path(one["path"]).name for one in restored] == ["vda.raw", "efi0.raw"]
    for name in SIZES:
        path = tmp_path / f"{name}.raw"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_bytes() == (bench.folder / f"{name}.raw").read_bytes()
    assert "SHA-256 checked" in bench.run("restore", "web01@latest", "--disk", "vda", "--to", tmp_path / "again")


def test_some_failed(bench: Bench) -> None:
    reached, gone = bench.json("backup", "*", "--fleecing", "enabled=0", code=3)["runs"]
    assert (reached["outcome"], gone["error"]["code"]) == ("succeeded", "vm-unreachable")
    assert [one["storage"] for one in reached["disks"]] == [None, None]
    bench.assert_nothing_is_left()


def test_looking_at_a_vm_says_what_a_backup_would_do(bench: Bench) -> None:
    shown = bench.json("vm", "show", "web01")
    assert (shown["vm"], shown["status"], shown["error"]) == ("web01", "running", None)
    assert [(one["disk"], one["backup"], one["storage"]) for one in shown["disks"]] == [
        (name, "full", "local") for name in SIZES
    ]
    reached, gone = bench.json("vm", "list", code=1)["vms"]
    assert (reached["reachable"], gone["reachable"]) == (True, False)
    assert "running" in bench.run("vm", "show", "web01")
    assert not (bench.folder / "state").exists()  # looking changes nothing
    bench.assert_nothing_is_left()


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_a_reader_that_has_seen_enough_leaves_nothing_behind(bench: Bench, lines: int) -> None:
    with bench.start("backup", "web01") as process:
        assert process.stdout is not None
        for _ in range(lines):
            assert process.stdout.readline().startswith("web01: ")
        process.stdout.close()
        process.wait(60)
    bench.assert_nothing_is_left()
    bench.run("backup", "web01")


def copying(bench: Bench) -> "subprocess.Popen[str]":
    """A backup that is copying, slowly."""
    process = bench.start("backup", "web01", "--bwlimit", "1")
    until = time.monotonic() + 20
    while {job["status"] for job in bench.ask("query-jobs")} != {"running"}:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_backup_puts_everything_back(bench: Bench, number: signal.Signals) -> None:
    with copying(bench) as process:
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "vmfleece: interrupted; everything was put back\n"
    assert bench.json("snapshot", "list")["snapshots"] == []
    bench.assert_nothing_is_left()


def test_what_a_killed_backup_left_is_taken_out_by_the_next(bench: Bench) -> None:
    with copying(bench) as process:
        process.kill()
    assert bench.ask("query-jobs")
    assert bench.json("snapshot", "list")["snapshots"] == []
    (run,) = bench.json("backup", "web01")["runs"]
    assert run["outcome"] == "succeeded"
    assert [one["id"] for one in bench.json("snapshot", "list")["snapshots"]] == [run["snapshot"]]
    bench.assert_nothing_is_left()
