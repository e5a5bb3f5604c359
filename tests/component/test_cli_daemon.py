"""Commands that have the daemon do it: what they print, and what Ctrl-C does. A fake QEMU, real processes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import structlog

from orchestrator.cli.main import main
from orchestrator.errors import TargetError
from orchestrator.service.engine import Engine
from orchestrator.state.catalogue import Catalogue
from orchestrator.target.restic.errors import NoRepository, RepositoryLocked, WrongPassword
from tests.component.test_admission import opened
from tests.component.test_cli import ROOT, Done, command
from tests.component.test_prune import content_of
from tests.component.world import MIB, World, make_world

SOON_SECONDS = 30.0
RETENTION = """
[job.kept]
vms = ["web01"]
target = "main"
prune_backups = "keep-last=1"
"""
pytestmark = pytest.mark.usefixtures("quick_images")


@dataclass
class Service:
    """A daemon in a thread of its own, over a fake QEMU."""

    world: World
    engine: Engine
    loop: asyncio.AbstractEventLoop

    @property
    def config(self) -> Path:
        return self.world.folder / "vmfleece.toml"

    def until(self, is_so: Callable[[], bool]) -> None:
        give_up = time.monotonic() + SOON_SECONDS
        while not is_so():
            assert time.monotonic() < give_up
            time.sleep(0.02)

    def copying(self) -> bool:
        return any(run.phase == "copying" for run in self.engine.status().runs)

    def go_on(self) -> None:
        """Have copies that were held up go on."""

        def advance() -> None:
            self.world.qemu.automatic = True
            for job in self.world.qemu.jobs.values():
                self.world.qemu._advance_soon(job)

        self.loop.call_soon_threadsafe(advance)


@pytest.fixture
def service() -> Iterator[Service]:
    ready, ended = threading.Event(), threading.Event()
    found: list[Service] = []
    with tempfile.TemporaryDirectory(prefix="vmf") as folder:  # a socket's path must be short
        world = make_world(Path(folder), disks={"vda": 4 * MIB})

        async def serve() -> None:
            async with opened(world, supervise=True, retries=0, more=RETENTION) as engine:
                found.append(Service(world, engine, asyncio.get_running_loop()))
                ready.set()
                await asyncio.to_thread(ended.wait)

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        try:
            assert ready.wait(SOON_SECONDS)
            yield found[0]
        finally:
            ended.set()
            thread.join()


Run = Callable[..., Done]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], service: Service) -> Iterator[Run]:
    """Call the command in this process."""

    def called(*arguments: str) -> Done:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--config", str(service.config)])
        output = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(arguments, ended.value.code, output.out, output.err)

    umask = os.umask(0o022)
    yield called
    os.umask(umask)
    structlog.reset_defaults()


def document(done: Done) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_backup_is_made_by_the_daemon_and_looks_as_one_without(run: Run, service: Service) -> None:
    done = run("backup", "web*", "--fleecing", "enabled=1,storage=local")
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert "web01: snapshotting" in said
    assert [line for line in said if line.startswith("web01: succeeded: web01/")]
    (result,) = document(run("backup", "web01", "--fleecing", "enabled=1,storage=local", "--json"))["runs"]
    assert (result["vm"], result["outcome"], result["kind"]) == ("web01", "succeeded", "incremental")
    results = service.engine.catalogue.results("web01")
    assert result == results[-1]  # what a backup without a daemon prints


def test_what_the_daemon_refuses_is_refused_as_without_one(run: Run) -> None:
    done = run("job", "run", "weekly", "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (2, "unknown-name")
    assert run("backup", "web01", "--consistency", "freeze").returncode == 2
    done = run("vm", "show", "web02", "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (2, "unknown-name")


def test_a_failed_backup_has_its_exit_code(run: Run, service: Service) -> None:
    service.world.qemu.kill()
    done = run("backup", "web01", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["runs"][0]["error"]["code"] in {"vm-unreachable", "vm-gone"}
    done = run("job", "run", "nightly")
    assert (done.returncode, done.stdout.splitlines()[-1].startswith("web01: failed after")) == (1, True)


def test_a_detached_backup_goes_on_and_is_shown_and_cancelled(run: Run, service: Service) -> None:
    service.world.qemu.automatic = False
    begun = document(run("backup", "web01", "--detach", "--json"))
    (one,) = begun["runs"]
    service.until(service.copying)
    assert f"of web01, since {'2'}" in run("run", "show", one["run"]).stdout
    (listed,) = document(run("run", "list", "--state", "copying", "--json"))["runs"]
    assert (listed["run"], listed["vm"]) == (one["run"], "web01")
    second = document(run("backup", "web01", "--detach", "--json"))["runs"][0]
    assert "waits for another run of this VM" in run("run", "show", second["run"]).stdout
    assert document(run("run", "cancel", second["run"], "--json"))["state"] == "cancelled"
    done = run("run", "cancel", one["run"])
    assert (done.returncode, done.stdout.splitlines()[0].endswith(": cancelled")) == (0, True)
    again = run("run", "cancel", one["run"], "--json")
    assert (again.returncode, json.loads(again.stdout)["error"]["code"]) == (1, "run-over")
    assert run("run", "show", "0badcafe").returncode == 2
    table = run("run", "list").stdout
    assert [line.split()[0] for line in table.splitlines()[1:]] == [second["run"], one["run"]]


def test_other_commands_ask_the_daemon_which_holds_the_monitors(run: Run) -> None:
    assert document(run("vm", "list", "--json"))["vms"][0]["reachable"] is True
    shown = document(run("vm", "show", "web01", "--json"))
    assert (shown["status"], shown["disks"][0]["backup"]) == ("running", "full")
    assert document(run("cleanup", "--json")) == {"dry_run": False, "repairs": []}
    assert document(run("cleanup", "--dry-run", "--json"))["dry_run"] is True
    assert document(run("job", "list", "--json"))["jobs"][0]["job"] == "nightly"
    assert document(run("status", "--json"))["process"] == os.getpid()


def test_what_is_in_force_is_listed_whatever_the_file_says_by_now(run: Run, service: Service) -> None:
    before = document(run("job", "list", "--json"))
    text = service.config.read_text().replace("[job.nightly]", "[job.weekly]")
    service.config.write_text(text + '[target.other]\npath = "/srv/other"\n')
    assert document(run("job", "list", "--json")) == before
    targets = json.loads(run("target", "list", "--json").stdout)["targets"]
    assert [one["target"] for one in targets] == ["main"]


def fates(rows: list[dict[str, Any]]) -> list[tuple[str, bool, bool]]:
    return [(row["fate"], row["removed"], row["merged"]) for row in rows]


def test_retention_is_applied_by_the_daemon_and_looks_as_without_one(run: Run, service: Service) -> None:
    for _ in range(3):
        document(run("backup", "web01", "--full", "--json"))
    listed = service.world.fake_target.listed
    first, second, third = (one.id for one in listed)
    dry = document(run("prune", "--dry-run", "--json"))
    assert fates(dry["snapshots"]) == [("remove", False, False)] * 2 + [("keep", False, False)]
    assert dry["reclaimed"] == []
    assert [one.id for one in listed] == [first, second, third]
    done = run("prune", "--target", "main", "--vm", "web01")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "1 kept, 2 removed, 8.0 MiB freed"
    assert [one.id for one in listed] == [third]
    assert document(run("prune", "--json"))["snapshots"][0]["snapshot"] == third
    refused = run("prune", "--vm", "web02", "--json")
    assert (refused.returncode, json.loads(refused.stdout)["error"]["code"]) == (2, "unknown-name")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NoRepository("none there", hint="mount it"), 10),
        (RepositoryLocked("somebody", hint="wait"), 11),
        (WrongPassword("no key", hint="another"), 12),
        (TargetError("a server", hint="see", code="target-unreachable"), 1),
    ],
)
def test_what_the_daemon_fails_of_has_the_exit_code_that_it_has_without_one(
    run: Run, service: Service, error: TargetError, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_vm: str | None = None) -> NoReturn:
        raise error

    monkeypatch.setattr(service.world.target, "snapshots", refuse)
    done = run("prune", "--json")
    told = {"code": error.code, "message": error.message, "hint": error.hint}
    assert (done.returncode, json.loads(done.stdout)) == (code, {"error": told})
    assert done.stderr.startswith(f"vmfleece: {error.message}\n  why: ")
    assert done.stderr.endswith(f"  do:  {error.hint}\n")


def test_a_merge_by_the_daemon_shows_how_far_it_is(
    run: Run, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.cli.work.LINE_SECONDS", 0)
    for kind in ("full", "incremental"):
        assert document(run("backup", "web01", "--json"))["runs"][0]["kind"] == kind
    second = service.world.fake_target.listed[1].id
    said = run("prune", "--merge").stdout.splitlines()
    assert f"{second}: merging: 50% (1 B of 2 B)" in said
    assert said[-1].startswith("1 kept, 1 of them merged, 1 removed, ")
    assert [one.parents for one in service.world.fake_target.listed] == [()]


@pytest.mark.parametrize("number", [signal.SIGINT, None])
def test_retention_of_a_vm_that_is_backed_up_waits_and_can_be_ended(
    run: Run, service: Service, number: signal.Signals | None
) -> None:
    for _ in range(2):
        document(run("backup", "web01", "--full", "--json"))
    listed = service.world.fake_target.listed
    service.world.qemu.automatic = False
    document(run("backup", "web01", "--full", "--detach", "--json"))
    service.until(service.copying)
    with start(service, "prune") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "web01: waits for the end of its backup\n"
        assert len(listed) == 2
        if number is not None:
            process.send_signal(number)
        else:
            service.go_on()
        _, complaints = process.communicate(timeout=SOON_SECONDS)
    assert process.returncode == (130 if number is not None else 0), complaints
    service.go_on()
    service.until(lambda: not service.engine.status().runs)
    assert len(listed) == (3 if number is not None else 1)


def test_what_works_on_a_target_only_does_so_beside_a_run_of_the_daemon(run: Run, service: Service) -> None:
    for _ in range(2):
        document(run("backup", "web01", "--full", "--json"))
    service.world.qemu.automatic = False
    (begun,) = document(run("backup", "web01", "--full", "--detach", "--json"))["runs"]
    service.until(service.copying)
    first, second = (one["id"] for one in document(run("snapshot", "list", "--json"))["snapshots"])
    assert document(run("snapshot", "show", "web01@latest", "--json"))["id"] == second
    assert document(run("snapshot", "protect", second, "--json"))["protected"] is True
    assert document(run("snapshot", "forget", first, "--json"))["forgotten"][0]["error"] is None
    service.go_on()
    service.until(lambda: not service.engine.status().runs)
    assert document(run("run", "show", begun["run"], "--json"))["state"] in {"succeeded", "warning"}
    assert document(run("snapshot", "list", "--json"))["snapshots"][0]["id"] == second


def test_what_reads_a_target_does_so_in_a_process_of_its_own_beside_a_run(service: Service, run: Run) -> None:
    """Of the folder on the disk, of which the daemon here knows nothing: it is not asked."""
    folder = service.world.folder
    # In a process where images are not the quick ones of this module.
    make = "import asyncio, pathlib, sys; from tests.component.test_prune import real_chain\n"
    make += "print(asyncio.run(real_chain(pathlib.Path(sys.argv[1]), 2))[-1].id)"
    argv = [sys.executable, "-c", make, folder / "backups"]
    newest = subprocess.run(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout.strip()
    service.world.qemu.automatic = False
    document(run("backup", "web01", "--full", "--detach", "--json"))
    service.until(service.copying)
    for arguments in (["verify"], ["restore", "web01@latest", "--disk", "vda", "--to", str(folder / "vda.raw")]):
        with start(service, *arguments) as process:
            said, complaints = process.communicate(timeout=SOON_SECONDS)
        assert (process.returncode, complaints) == (0, "")
        assert newest in said
    assert (folder / "vda.raw").read_bytes() == content_of(2)
    assert service.copying()
    service.go_on()
    service.until(lambda: not service.engine.status().runs)


def start(service: Service, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*arguments, "--config", service.config),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("arguments", [("backup", "web01"), ("job", "run", "nightly")])
def test_ctrl_c_ends_the_run_in_the_daemon_and_waits_for_it(
    service: Service, number: signal.Signals, arguments: tuple[str, ...]
) -> None:
    service.world.qemu.automatic = False
    with start(service, *arguments) as process:
        service.until(service.copying)
        process.send_signal(number)
        _, complaints = process.communicate(timeout=SOON_SECONDS)
    assert process.returncode == 130
    assert complaints.endswith("vmfleece: interrupted; everything was put back\n")
    assert service.engine.status().runs == ()
    assert service.world.qemu.ours() == []
    (entry,) = service.engine.catalogue.entries(limit=10)
    assert entry.outcome == "cancelled"


def test_a_follower_that_is_killed_leaves_the_run_to_the_daemon(service: Service) -> None:
    service.world.qemu.automatic = False
    with start(service, "backup", "web01") as process:
        service.until(service.copying)
        process.kill()
        process.communicate()
    service.go_on()
    service.until(lambda: service.engine.catalogue.entries(limit=1)[0].outcome is not None)
    (entry,) = service.engine.catalogue.entries(limit=10)
    assert entry.outcome in {"succeeded", "warning"}


def test_history_can_be_read_without_a_daemon(tmp_path: Path, run: Run, service: Service) -> None:
    made = document(run("backup", "web01", "--json"))["runs"][0]
    text = service.config.read_text().replace(f"{service.world.folder}/run", f"{tmp_path}/nobody")
    elsewhere = tmp_path / "vmfleece.toml"
    elsewhere.write_text(text)
    done = subprocess.run(
        command("run", "show", made["run"], "--json", "--config", elsewhere),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    shown = json.loads(done.stdout)
    assert (shown["state"], shown["result"]["snapshot"]) == (made["outcome"], made["snapshot"])
    assert Catalogue.path(service.world.folder / "state").exists()
