"""Being told to stop, once and again, with a QEMU that hangs: on real processes. What is left is put right."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import config
from orchestrator.errors import EXIT_FAILED, EXIT_INTERRUPTED

ROOT = Path(__file__).parents[2]
DISK_BYTES = 8 << 20
WITHIN_SECONDS = 30
NEVER = "2040-01-01"
"""When nobody waits for a job any more."""
CONFIG = """\
[daemon]
state_dir = "{0}/state"
run_dir = "{0}/run"
stop_timeout = "{stop_timeout}"
[storage.local]
path = "{0}/fleecing"
quota = "64MiB"
min_free = 0
[target.main]
path = "{0}/backup"
[vm.web01]
qmp = "{0}/web01.qmp"
[job.often]
schedule = "{schedule}"
retries = {retries}
vms = ["web01"]
target = "main"
fleecing = "enabled=1,storage=local"
bwlimit = "{bwlimit}"
"""


class Bench:
    """A QEMU with a disk and without a guest, and vmfleece."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.check_call(["truncate", "-s", str(DISK_BYTES), folder / "vda.raw"])
        (folder / "fleecing").mkdir()
        argv = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "64", "-nodefaults", "-display", "none"]
        argv += ["-blockdev", f"driver=file,node-name=vda,filename={folder}/vda.raw"]
        argv += ["-device", "virtio-blk-pci,drive=vda,id=vda"]
        for name in ("web01", "bed"):
            argv += ["-qmp", f"unix:{folder}/{name}.qmp,server=on,wait=off"]
        self.qemu = subprocess.Popen(argv)
        until((folder / "bed.qmp").exists)
        self.configure(bwlimit="1")

    def configure(
        self, *, stop_timeout: str = "60s", bwlimit: str = "0", schedule: str = "*:*:0/2", retries: int = 0
    ) -> None:
        text = CONFIG.format(
            self.folder, stop_timeout=stop_timeout, bwlimit=bwlimit, schedule=schedule, retries=retries
        )
        (self.folder / "vmfleece.toml").write_text(text)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        argv = [sys.executable, "-m", "orchestrator", *arguments, "--config", f"{self.folder}/vmfleece.toml"]
        return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ask(self, command: str) -> Any:
        """Ask QEMU over a monitor of our own."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.folder / "bed.qmp"))
            with connection.makefile("rw") as stream:
                for name in ("qmp_capabilities", command):
                    stream.write(json.dumps({"execute": name}) + "\n")
                stream.flush()
                replies = (json.loads(line) for line in stream)
                return [next(reply for reply in replies if "return" in reply)["return"] for _ in range(2)][1]

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
        """A vmfleece that does not outlive the block."""
        with self.start(*arguments) as process:
            try:
                yield process
            finally:
                process.kill()

    @contextlib.contextmanager
    def copying(self, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
        """As `running`, with a run that copies, slowly."""
        of_dead_runs = self.jobs()
        with self.running(*arguments) as process:
            until(lambda: process.poll() is not None or self.jobs() - of_dead_runs)
            assert process.poll() is None, process.communicate()
            yield process

    def jobs(self) -> set[str]:
        """Those that copy."""
        return {job["id"] for job in self.ask("query-jobs") if job["status"] == "running"}

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """QEMU does not answer, for the block."""
        self.qemu.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.qemu.send_signal(signal.SIGCONT)

    def assert_something_is_left(self) -> None:
        assert self.ask("query-jobs")
        assert list((self.folder / "backup").rglob("*.partial"))

    def assert_the_next_one_puts_it_right(self) -> None:
        with self.start("backup", "web01", "--json") as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
        nodes = [node["node-name"] for node in self.ask("query-named-block-nodes")]
        assert not [node for node in nodes if node.startswith("vmf-")]
        assert self.ask("query-jobs") == self.ask("query-fdsets") == []
        assert self.ask("query-status")["status"] == "running"
        assert not list((self.folder / "backup").rglob("*.partial"))
        assert not list((self.folder / "fleecing").iterdir())


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_SECONDS
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.qemu.kill()
    made.qemu.wait()
    shutil.rmtree(tmp_path)


def events(said: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.splitlines()]


def test_a_backup_that_cannot_put_back_says_so_and_ends_when_it_is_told_again(bench: Bench) -> None:
    with bench.copying("backup", "web01", "--bwlimit", "1") as process, bench.hanging():
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)  # at once: it is not told again
        assert process.stderr is not None
        waiting = process.stderr.readline()
        assert waiting == "vmfleece: putting everything back; interrupt again to end at once\n"
        time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WITHIN_SECONDS)
    assert process.returncode == EXIT_INTERRUPTED
    assert err.startswith("vmfleece: ended at once; ")
    bench.assert_something_is_left()
    bench.assert_the_next_one_puts_it_right()


def test_a_daemon_that_is_told_again_ends_at_once(bench: Bench) -> None:
    with bench.copying("daemon") as process, bench.hanging():
        process.send_signal(signal.SIGTERM)
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=WITHIN_SECONDS)
    assert process.returncode == EXIT_INTERRUPTED
    last = events(err)[-1]
    assert (last["event"], last["why"]) == ("daemon.aborted", "told again")
    assert [run["vm"] for run in last["runs"]] == ["web01"]
    bench.assert_something_is_left()
    bench.assert_the_next_one_puts_it_right()


def test_a_daemon_leaves_runs_that_do_not_end_in_time_and_names_them(bench: Bench) -> None:
    bench.configure(stop_timeout="1s", bwlimit="1")
    with bench.copying("daemon") as process, bench.hanging():
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=WITHIN_SECONDS)
    assert process.returncode == EXIT_FAILED
    lines = events(err)
    (started,) = [line for line in lines if line["event"] == "run.started"]
    (stopping,) = [line for line in lines if line["event"] == "daemon.stopping"]
    assert stopping["timeout_seconds"] == 1
    assert lines[-1]["event"] == "daemon.aborted"
    assert lines[-1]["why"] == "not ended within 1s (daemon.stop_timeout)"
    assert lines[-1]["runs"] == [{"vm": "web01", "run": started["run"], "phase": "cleaning"}]
    bench.assert_something_is_left()
    bench.assert_the_next_one_puts_it_right()


def told(process: "subprocess.Popen[str]", event: str) -> list[dict[str, Any]]:
    """What a process that goes on has logged, until it logs this."""
    lines: list[dict[str, Any]] = []
    assert process.stderr is not None
    while not lines or lines[-1]["event"] != event:
        lines.append(json.loads(process.stderr.readline()))
    return lines


def ended(lines: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """How runs ended, and with which code."""
    runs = [line for line in lines if line["event"] == "run.finished"]
    return [(line["outcome"], line["error"] and line["error"]["code"]) for line in runs]


def interrupted(lines: list[dict[str, Any]]) -> list[tuple[list[str], list[str]]]:
    return [(line["vms"], line["given_up"]) for line in lines if line["event"] == "job.interrupted"]


def test_a_job_that_was_killed_or_stopped_goes_on_when_the_daemon_starts(bench: Bench) -> None:
    bench.configure(bwlimit="1", schedule=NEVER, retries=2)
    with bench.copying("job", "run", "often") as process:
        process.kill()
    with bench.copying("daemon") as process:
        process.terminate()
        lines = events(process.communicate(timeout=WITHIN_SECONDS)[1])
    assert process.returncode == 0
    assert interrupted(lines) == [(["web01"], [])]
    assert ended(lines) == [("failed", "vmfleece-gone"), ("cancelled", "cancelled")]
    assert not bench.ask("query-jobs")
    bench.configure(schedule=NEVER, retries=2)
    with bench.running("daemon") as process:
        lines = told(process, "job.finished")
    assert interrupted(lines) == [(["web01"], [])]
    assert ended(lines) == [("succeeded", None)]
    with bench.running("daemon") as process:
        assert interrupted(told(process, "job.scheduled")) == []
    bench.assert_the_next_one_puts_it_right()


def test_a_job_that_is_killed_each_time_comes_to_an_end(bench: Bench) -> None:
    bench.configure(bwlimit="1", schedule=NEVER, retries=1)
    for command in (["job", "run", "often"], ["daemon"]):
        with bench.copying(*command) as process:
            process.kill()
    with bench.running("daemon") as process:
        lines = told(process, "job.scheduled")
    assert interrupted(lines) == [([], ["web01"])]
    assert ended(lines) == [("failed", "vmfleece-gone")]
    assert "run.started" not in {line["event"] for line in lines}
    bench.assert_the_next_one_puts_it_right()


def test_systemd_waits_for_longer_than_the_daemon_takes(tmp_path: Path) -> None:
    unit = (ROOT / "systemd" / "vmfleece.service").read_text()
    patience = re.search(r"^TimeoutStopSec=(\d+)s$", unit, re.MULTILINE)
    assert patience is not None
    (tmp_path / "vmfleece.toml").write_text("")
    assert config.load(tmp_path / "vmfleece.toml").daemon.stop_timeout_seconds < int(patience[1])
