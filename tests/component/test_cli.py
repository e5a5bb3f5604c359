"""The command as it is called: messages and exit codes, without any guest."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from orchestrator import __version__
from orchestrator.cli.main import main
from orchestrator.state import lock

ROOT = Path(__file__).parents[2]
Done = subprocess.CompletedProcess[str]

CONFIG = """\
[daemon]
state_dir = "{0}/state"
run_dir = "{0}/run"

[storage.local]
path = "{0}/fleecing"
quota = "1GiB"
min_free = 0

[target.main]
path = "{0}/backup"

[vm.web01]
qmp = "{0}/web01.qmp"

[vm.db01]
qmp = "{0}/db01.qmp"
priority = 80

[job.nightly]
vms = ["*"]
target = "main"
schedule = "02:30 UTC"
retries = 0

[job.manual]
vms = ["web01"]
target = "main"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "vmfleece.toml"
    path.write_text(CONFIG.format(tmp_path))
    return path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *map(str, arguments)]


Run = Callable[..., Done]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Call the command in this process: a child of its own takes a hundred times longer."""

    def called(*arguments: str | Path) -> Done:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        output = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(arguments, ended.value.code, output.out, output.err)

    umask = os.umask(0o022)
    yield called
    os.umask(umask)
    structlog.reset_defaults()


def replaced(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new, 1))


def assert_said(done: Done, code: int, *texts: str) -> None:
    """The exit code, and a message of our own: no traceback, and one that names what is wrong."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("vmfleece")
    for text in texts:
        assert text in done.stderr


# --- what is asked for is not there, or malformed ---


def test_version() -> None:
    done = subprocess.run(command("--version"), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"vmfleece {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["backup", "web02"], ("no VM 'web02'", "name one of: web01, db01")),
        (["backup", "web01", "x*"], ("no VM 'x*'",)),
        (["backup", "web01", "--target", "mian"], ("no target 'mian'", "name one of: main")),
        (["backup", "web01", "--fleecing", "storage"], ("'storage' is no property", "enabled=1,storage=NAME")),
        (["backup", "web01", "--fleecing", "enabled=2"], ("enabled is '2'",)),
        (["backup", "web01", "--fleecing", "enabled=1,storage=ssd"], ("no storage 'ssd'", "name one of: local")),
        (["backup", "web01", "--bwlimit", "fast"], ("bwlimit fast", "50MiB")),
        (["backup", "web01", "--bwlimit", "-1"], ("bwlimit -1",)),
        (["backup", "web01", "--consistency", "freeze"], ("needs a guest agent", "there is none of web01")),
        (["backup", "web01", "--detach"], ("--detach needs the daemon",)),
        (["job", "run", "weekly"], ("no job 'weekly'", "name one of: nightly, manual")),
        (["vm", "show", "web02"], ("no VM 'web02'", "name one of: web01, db01")),
        (["snapshot", "list", "--target", "mian"], ("no target 'mian'",)),
        (["snapshot", "show", "web01@latest", "--target", "mian"], ("no target 'mian'",)),
        (["restore", "web01@latest", "--disk", "vda", "--to", "x", "--target", "mian"], ("no target 'mian'",)),
    ],
)
def test_usage(run: Run, config: Path, arguments: list[str], said: tuple[str, ...]) -> None:
    assert_said(run(*arguments, "--config", config), 2, *said)
    assert not (config.parent / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["snapshot", "show", "web01@latest"], "no-snapshot"),
        (["snapshot", "show", "web01/20261122T023000Z"], "no-snapshot"),
        (["restore", "web01@latest", "--disk", "vda", "--to", "/dev/null"], "no-snapshot"),
        (["vm", "show", "web01"], "vm-unreachable"),
    ],
)
def test_errors_are_data_too(run: Run, config: Path, arguments: list[str], code: str) -> None:
    done = run(*arguments, "--json", "--config", config)
    assert_said(done, 1)
    error = json.loads(done.stdout)["error"]
    assert error["code"] == code
    assert error["hint"]
    assert error["message"] in done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["backup"], ["restore", "x", "--to", "y"], ["frobnicate"], ["snapshot"], ["vm", "show"]]
)
def test_arguments_that_are_missing(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: vmfleece")


# --- the configuration ---


def test_a_configuration_that_is_missing_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_said(
        run("vm", "list", "--config", tmp_path / "absent"), 2, f"cannot read {tmp_path}/absent", "--config"
    )
    monkeypatch.setenv("VMFLEECE_CONFIG", str(tmp_path / "other"))
    assert_said(run("vm", "list"), 2, f"cannot read {tmp_path}/other")


@pytest.mark.parametrize("arguments", [["config", "check"], ["backup", "web01"], ["daemon"], ["snapshot", "list"]])
def test_every_problem_is_listed_whatever_was_asked(run: Run, config: Path, arguments: list[str]) -> None:
    replaced(config, '"1GiB"', '"1MiB"')
    replaced(config, "/db01.qmp", "/web01.qmp")
    replaced(config, 'target = "main"', 'target = "mian"')
    replaced(config, '"02:30 UTC"', '"25:00"')
    assert_said(
        run(*arguments, "--config", config),
        2,
        f"4 problems in {config}",
        f"{config}:7: storage.local.quota: 1.0 MiB is too small",
        f"{config}:17: vm.db01.qmp: ",
        "is the socket of vm.web01.qmp too",
        f"{config}:22: job.nightly.target: there is no target 'mian'",
        f"{config}:23: job.nightly.schedule: '25:00' is no calendar expression",
    )
    assert not (config.parent / "state").exists()


def test_a_target_must_be_named_where_there_are_two(run: Run, config: Path, tmp_path: Path) -> None:
    with config.open("a") as file:
        file.write(f'[target.other]\npath = "{tmp_path}/other"\n')
    assert_said(run("backup", "web01", "--config", config), 2, "which target? Name one", "main, other")


# --- VMs that cannot be reached, and state that cannot be had ---


@pytest.mark.parametrize("arguments", [["backup", "web01", "db01"], ["job", "run", "nightly"]])
def test_vms_that_cannot_be_reached_fail_each_by_itself(run: Run, config: Path, arguments: list[str]) -> None:
    done = run(*arguments, "--json", "--config", config)
    assert done.returncode == 1
    runs = json.loads(done.stdout)["runs"]
    assert [one["vm"] for one in runs] == ["web01", "db01"]
    for one in runs:
        assert (one["outcome"], one["error"]["code"], one["snapshot"]) == ("failed", "vm-unreachable", None)
        assert one["disks"] == []
        assert f"{one['vm']}.qmp: No such file" in one["error"]["message"]
    assert not list((config.parent / "backup").iterdir())


def test_an_unreachable_vm_is_said_in_words_and_on_the_right_stream(run: Run, config: Path) -> None:
    done = run("backup", "web01", "--config", config)
    assert_said(
        done,
        1,
        f"vmfleece: VM web01: cannot connect to {config.parent}/web01.qmp: No such file",
        "see that the VM runs",
    )
    assert done.stdout.startswith("web01: failed after ")


def test_vm_list_shows_what_cannot_be_reached(run: Run, config: Path) -> None:
    done = run("vm", "list", "--json", "--config", config)
    assert done.returncode == 1
    for vm in json.loads(done.stdout)["vms"]:
        assert not vm["reachable"]
        assert vm["error"]["code"] == "vm-unreachable"
    done = run("vm", "list", "--config", config)
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["web01", "unreachable"],
        ["db01", "unreachable"],
    ]
    assert_said(done, 1, "web01.qmp", "db01.qmp")


def test_a_target_that_cannot_be_written_is_named(run: Run, config: Path, tmp_path: Path) -> None:
    (tmp_path / "backup").touch()
    done = run("backup", "web01", "--json", "--config", config)
    (one,) = json.loads(done.stdout)["runs"]
    assert done.returncode == 1
    assert one["error"]["code"] == "target-unwritable"
    assert f"{tmp_path}/backup" in one["error"]["message"]


def test_a_state_dir_that_another_process_owns(run: Run, config: Path, tmp_path: Path) -> None:
    with lock.owned(tmp_path / "state"):
        for arguments in (["backup", "web01"], ["job", "run", "manual"], ["daemon"]):
            assert_said(
                run(*arguments, "--config", config), 11, f"process {os.getpid()}, since ", f"{tmp_path}/state"
            )
        assert run("job", "list", "--config", config).returncode == 0  # looking needs no lock
        assert run("snapshot", "list", "--config", config).returncode == 0


def test_a_catalogue_that_is_damaged(run: Run, config: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "catalogue.sqlite").write_text("no database" * 100)
    assert_said(run("backup", "web01", "--config", config), 11, "catalogue.sqlite", "moved away")


# --- what is listed ---


def test_jobs_are_listed_with_their_next_due_time(run: Run, config: Path) -> None:
    done = run("job", "list", "--json", "--config", config)
    assert (done.returncode, done.stderr) == (0, "")
    nightly, manual = json.loads(done.stdout)["jobs"]
    assert (nightly["job"], nightly["schedule"], nightly["vms"]) == ("nightly", "02:30 UTC", ["web01", "db01"])
    assert "T02:30:00" in nightly["next_due"]
    assert (manual["schedule"], manual["next_due"]) == (None, None)
    assert "nightly" in run("job", "list", "--config", config).stdout


def test_no_snapshot_is_an_empty_list(run: Run, config: Path) -> None:
    done = run("snapshot", "list", "--json", "--config", config)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"snapshots": []})


# --- signals and pipes ---


@pytest.fixture
def mute(tmp_path: Path) -> Iterator[socket.socket]:
    """A monitor that accepts connections and says nothing, as if somebody else were connected."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "web01.qmp"))
        listener.listen()
        listener.settimeout(30)
        yield listener


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_backup_ends_in_order(
    config: Path, tmp_path: Path, mute: socket.socket, number: signal.Signals
) -> None:
    with subprocess.Popen(
        command("backup", "web01", "--config", config),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        connection, _ = mute.accept()
        with connection:
            process.send_signal(number)
            _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "vmfleece: interrupted; everything was put back\n"
    assert list((tmp_path / "backup").iterdir()) == []
    with lock.owned(tmp_path / "state"):
        pass


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "schema"],
        ["config", "show"],
        ["job", "list"],
        ["snapshot", "list", "--json"],
        ["backup", "web01"],
    ],
)
def test_a_reader_that_has_seen_enough_is_no_error_of_ours(config: Path, arguments: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            command(*arguments, "--config", config),
            cwd=ROOT,
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        os.close(write_end)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# --- the daemon ---


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Callable[[], dict[str, str]]]:
    """A socket such as systemd gives a service; the call waits for the next message."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(tmp_path / "notify"))
        bound.settimeout(30)
        yield lambda: dict(line.split("=", 1) for line in bound.recv(4096).decode().splitlines())


@contextlib.contextmanager
def daemon(config: Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        command("daemon", "--config", config),
        cwd=ROOT,
        env=os.environ | {"NOTIFY_SOCKET": str(config.parent / "notify")} | environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def events(process: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    assert process.stderr is not None
    return [json.loads(line) for line in process.stderr.read().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_is_ready_and_stops_when_told(
    config: Path, systemd: Callable[[], dict[str, str]], number: signal.Signals
) -> None:
    with daemon(config) as process:
        ready = systemd()
        assert ready["READY"] == "1"
        assert "no run under way" in ready["STATUS"]
        process.send_signal(number)
        assert systemd()["STOPPING"] == "1"
        assert process.wait(30) == 0
        names = [event["event"] for event in events(process)]
    assert names[-2:] == ["daemon.stopping", "daemon.stopped"]
    assert "daemon.ready" in names


@pytest.mark.parametrize("schedule", ["", 'schedule = "02:30 UTC"\n'])
def test_a_daemon_without_a_scheduled_job_serves_and_says_so(
    run: Run, config: Path, systemd: Callable[[], dict[str, str]], schedule: str
) -> None:
    replaced(config, 'schedule = "02:30 UTC"\n', schedule)
    with daemon(config) as process:
        assert systemd()["STATUS"].startswith(f"{int(bool(schedule))} jobs with a schedule")
        done = run("job", "run", "nightly", "--json", "--config", config)
        assert done.returncode == 1
        assert {one["error"]["code"] for one in json.loads(done.stdout)["runs"]} == {"vm-unreachable"}
        process.terminate()
        assert process.wait(30) == 0
        lines = events(process)
    (ready,) = [line for line in lines if line["event"] == "daemon.ready"]
    assert ready["scheduled"] == int(bool(schedule))
    unscheduled = [(line["level"], line["path"]) for line in lines if line["event"] == "jobs.unscheduled"]
    assert unscheduled == ([] if schedule else [("warning", str(config))])


def test_a_daemon_feeds_the_watchdog(config: Path, systemd: Callable[[], dict[str, str]]) -> None:
    with daemon(config, WATCHDOG_USEC="200000") as process:
        fed, began = 0, time.monotonic()
        while fed < 3:
            fed += systemd().get("WATCHDOG") == "1"
        assert time.monotonic() - began < 30
        process.terminate()
        assert process.wait(30) == 0


def test_there_is_one_daemon_a_state_dir_also_after_a_kill(
    run: Run, config: Path, systemd: Callable[[], dict[str, str]]
) -> None:
    with daemon(config) as first:
        systemd()
        assert_said(run("daemon", "--config", config), 11, f"process {first.pid}, since ")
        assert_said(run("backup", "web01", "--config", config), 1, "web01.qmp: No such file")  # the daemon tried
        first.kill()
        first.wait()
        with daemon(config) as second:
            assert systemd()["READY"] == "1"
            second.terminate()
            assert second.wait(30) == 0


ASKS_FOR_ITS_LIMIT = """
import asyncio, resource
from orchestrator.cli.running import run_async

async def limit():
    tool = await asyncio.create_subprocess_exec("sh", "-c", "ulimit -n")
    return await tool.wait()

raise SystemExit(run_async(limit()))
"""


@pytest.mark.parametrize(("hard", "wanted"), [(4096, 4096), (100_000, 65536)])
def test_tools_may_open_all_images_of_a_long_chain(hard: int, wanted: int) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        hard = wanted = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    done = subprocess.run(
        [sys.executable, "-c", ASKS_FOR_ITS_LIMIT],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)),
    )
    assert int(done.stdout) == wanted
