"""`vmfleece target` as a user runs it, with the restic of Debian 12, and that of Debian 13."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from moto.server import ThreadedMotoServer

from orchestrator.cli.main import main
from orchestrator.target.base import Snapshot, SnapshotDisk
from orchestrator.target.repository import listing
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.snapshot import ResticSnapshot
from orchestrator.target.restic.tree import FileContent
from orchestrator.units import MIB
from tests.faults.daemon import command_line, descendants
from tests.guest.restics import CHEAP, RESTICS, Restic

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
PASSWORD, OTHER = "correct-horse", "battery-staple"
CONFIG = """\
[daemon]
state_dir = "{0}/state"

[storage.local]
path = "{0}/fleecing"
quota = "1GiB"

[target.main]
driver = "restic"
path = "{0}/repository"
password_file = "{0}/password"

[target.files]
path = "{0}/files"

[vm.web01]
qmp = "{0}/web01.qmp"

[job.nightly]
vms = ["*"]
target = "main"
prune_backups = "keep-last=1"
"""
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def environment(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in which `restic` is that version, and which would lead it astray if it were passed on as it is."""
    program = shutil.which(RESTICS[version])
    assert program
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "restic").symlink_to(program)
    (tmp_path / "vmfleece.toml").write_text(CONFIG.format(tmp_path))
    write_password(tmp_path / "password", PASSWORD)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("VMFLEECE_CONFIG", str(tmp_path / "vmfleece.toml"))
    monkeypatch.setenv("RESTIC_PASSWORD", "wrong")
    monkeypatch.setenv("NO_COLOR", "1")


def write_password(path: Path, password: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(f"{password}\n")
    return path


@contextmanager
def started(*command: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that is killed at the end of the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def checked(done: Done, code: int) -> Done:
    """It ended as it should, and said no secret."""
    assert done.returncode == code, f"{done.args}: {done.returncode}: {done.stdout}{done.stderr}"
    for secret in (PASSWORD, OTHER):
        assert secret not in done.stdout + done.stderr
    return done


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Call the command in this process, which takes less long."""

    def called(*arguments: str, code: int = 0) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        output = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return checked(Done(arguments, ended.value.code, output.out, output.err), code)

    umask = os.umask(0o022)
    yield called
    os.umask(umask)
    structlog.reset_defaults()


@pytest.fixture
def restic(version: str, tmp_path: Path) -> Restic:
    """The repository of the target main, made."""
    asyncio.run(Repository.create(DirectoryBackend(tmp_path / "repository"), PASSWORD, cost=CHEAP))
    return Restic(tmp_path / "repository", PASSWORD, version)


def error(done: Done) -> dict[str, str]:
    found = json.loads(done.stdout)["error"]
    assert set(found) == {"code", "message", "hint"}
    return dict(found)


def test_a_repository_is_made_once(run: Run, version: str, tmp_path: Path) -> None:
    made = run("target", "init", "main", "--json")
    document = json.loads(made.stdout)
    assert document | {"id": ""} == {
        "target": "main",
        "driver": "restic",
        "place": f"{tmp_path}/repository",
        "id": "",
        "password_file": f"{tmp_path}/password",
    }
    restic = Restic(tmp_path / "repository", PASSWORD, version)
    assert json.loads(restic.run("cat", "config"))["id"] == document["id"]
    restic.check()
    again = run("target", "init", "main", "--json", code=1)
    assert error(again)["code"] == "repository-exists"
    assert json.loads(restic.run("cat", "config"))["id"] == document["id"]
    assert len(list((restic.repository / "keys").iterdir())) == 1


def test_who_makes_one_is_told_where_its_password_is(run: Run, tmp_path: Path) -> None:
    said = run("target", "init", "main").stdout
    assert f"its password is in {tmp_path}/password: nobody can recover a lost password" in said


def test_without_a_usable_password_nothing_is_made(run: Run, tmp_path: Path) -> None:
    (tmp_path / "password").chmod(0o604)
    assert error(run("target", "init", "main", "--json", code=1))["code"] == "password-file"
    (tmp_path / "password").unlink()
    refused = run("target", "init", "main", code=1)
    assert "openssl rand" in refused.stderr
    assert not (tmp_path / "repository").exists()


def test_only_init_makes_anything(run: Run, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    for action in ("show", "check", "reclaim"):
        refused = run("target", action, "main", "--json", code=10)
        assert error(refused)["code"] == "no-repository"
        assert str(tmp_path / "repository") in refused.stderr
    run("target", "key", "list", "main", code=10)
    run("target", "list", code=1)
    run("target", "show", "files", code=1)
    assert set(tmp_path.rglob("*")) == before


def test_a_folder_of_images(run: Run, tmp_path: Path) -> None:
    made = json.loads(run("target", "init", "files", "--json").stdout)
    assert made == {"target": "files", "driver": "images", "place": f"{tmp_path}/files"}
    assert (tmp_path / "files").stat().st_mode & 0o777 == 0o700
    assert error(run("target", "init", "files", "--json", code=1))["code"] == "folder-exists"
    assert json.loads(run("target", "show", "files", "--json").stdout) == made | {"snapshots": 0}
    write_password(tmp_path / "new", OTHER)
    for command in (
        ("check", "files"),
        ("reclaim", "files"),
        ("key", "list", "files"),
        ("key", "remove", "files", "0"),
        ("key", "add", "files", "--new-password-file", f"{tmp_path}/new"),
    ):
        refused = error(run("target", *command, "--json", code=1))
        assert refused["code"] == "no-repository-target"
        assert "has no keys, and nothing for restic: it is a folder of qcow2 files" in refused["message"]


def test_a_target_that_is_not_configured(run: Run) -> None:
    assert "name one of: main, files" in run("target", "show", "mian", code=2).stderr


def test_all_targets_are_listed_with_what_is_wrong(run: Run, restic: Restic, tmp_path: Path) -> None:
    rows = json.loads(run("target", "list", "--json", code=3).stdout)["targets"]
    assert rows[0] == {
        "target": "main",
        "driver": "restic",
        "place": str(restic.repository),
        "snapshots": 0,
        "error": None,
    }
    assert (rows[1]["target"], rows[1]["snapshots"], rows[1]["error"]["code"]) == ("files", None, "no-folder")
    write_password(tmp_path / "password", OTHER)
    rows = json.loads(run("target", "list", "--json", code=1).stdout)["targets"]
    assert rows[0]["error"]["code"] == "wrong-password"
    listed = run("target", "list", code=1)
    assert "wrong-password" in listed.stdout
    assert "none of the repository's 1 keys opens" in listed.stderr


def test_what_is_in_a_repository(run: Run, restic: Restic, tmp_path: Path) -> None:
    (tmp_path / "some").write_bytes(os.urandom(1 << 20))
    restic.run("backup", str(tmp_path / "some"))
    document = json.loads(run("target", "show", "main", "--json").stdout)
    assert document["id"] == json.loads(restic.run("cat", "config"))["id"]
    packs = [path.stat().st_size for path in (restic.repository / "data").rglob("*") if path.is_file()]
    assert (document["packs"], document["packs_bytes"]) == (len(packs), sum(packs))
    assert (document["format_version"], document["snapshots"], document["all_snapshots"]) == (2, 0, 1)
    assert (document["locks"], document["damaged"]) == ([], [])
    assert [key["current"] for key in document["keys"]] == [True]
    said = run("target", "show", "main").stdout
    assert "snapshots  0 of VMs, 1 in all" in said
    assert f"packs      {len(packs)}, 1.0 MiB" in said


def test_keys(run: Run, restic: Restic, tmp_path: Path) -> None:
    new = write_password(tmp_path / "new", OTHER)
    added = json.loads(run("target", "key", "add", "main", "--new-password-file", str(new), "--json").stdout)[
        "key"
    ]
    assert Restic(restic.repository, OTHER, restic.version).snapshots() == []
    keys = json.loads(run("target", "key", "list", "main", "--json").stdout)["keys"]
    in_use = next(key["id"] for key in keys if key["current"])
    assert {key["id"] for key in keys} == {path.name for path in (restic.repository / "keys").iterdir()}
    assert {key["id"] for key in keys} == {added, in_use}
    assert in_use in run("target", "key", "list", "main").stdout

    refused = error(run("target", "key", "remove", "main", in_use, "--json", code=1))
    assert refused["code"] == "key-in-use"
    for wanted in ("", "g", in_use + "0"):
        assert error(run("target", "key", "remove", "main", wanted, "--json", code=1))["code"] == "no-key"
    assert len(list((restic.repository / "keys").iterdir())) == 2
    unambiguous = added[: next(n for n in range(1, 65) if added[:n] != in_use[:n])]
    run("target", "key", "remove", "main", unambiguous)
    assert [path.name for path in (restic.repository / "keys").iterdir()] == [in_use]
    assert error(run("target", "key", "remove", "main", in_use, "--json", code=1))["code"] == "key-in-use"
    assert restic.snapshots() == []


def test_a_password_that_others_can_read_is_not_added(run: Run, restic: Restic, tmp_path: Path) -> None:
    new = write_password(tmp_path / "new", OTHER)
    new.chmod(0o644)
    refused = run("target", "key", "add", "main", "--new-password-file", str(new), "--json", code=1)
    assert error(refused)["code"] == "password-file"
    assert len(list((restic.repository / "keys").iterdir())) == 1


def test_restic_checks(run: Run, restic: Restic, tmp_path: Path) -> None:
    (tmp_path / "some").write_bytes(os.urandom(1 << 20))
    restic.run("backup", str(tmp_path / "some"))
    assert "no errors were found" in run("target", "check", "main").stdout
    assert json.loads(run("target", "check", "main", "--read-data", "--json").stdout) == {
        "target": "main",
        "error": None,
    }
    pack = max((restic.repository / "data").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    pack.chmod(0o600)
    with pack.open("r+b") as file:
        file.seek(1000)
        file.write(bytes(16))
    run("target", "check", "main")
    found = run("target", "check", "main", "--read-data", "--json", code=1)
    assert error(found)["code"] == "restic-failed"
    assert pack.name[:8] in found.stderr


@pytest.mark.parametrize("command", [("target", "reclaim", "main"), ("prune", "--reclaim")])
def test_restic_reclaims(run: Run, restic: Restic, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "some").write_bytes(os.urandom(1 << 20))
    restic.run("backup", str(tmp_path / "some"))
    (snapshot,) = restic.snapshots()
    restic.run("forget", snapshot["id"])
    assert json.loads(run("target", "show", "main", "--json").stdout)["packs_bytes"] > 1 << 20
    said = run(*command)
    assert "done" in said.stdout.splitlines()
    assert json.loads(run("target", "show", "main", "--json").stdout)["packs_bytes"] == 0
    restic.check()


async def take(folder: Path, day: int) -> None:
    """A snapshot of a VM, as a run of that day would have made it."""
    when = datetime(2026, 11, day, 2, 30, tzinfo=UTC)
    repository = await Repository.open(DirectoryBackend(folder), PASSWORD)
    async with repository.lock() as lock:
        await repository.load_index()
        writer = repository.writer(lock)
        chunk, _ = writer.add_chunk(memoryview(os.urandom(MIB)))
        tree = await writer.write_file_tree({"vda.raw": FileContent(MIB, [chunk])}, b"{}", when)
        disk = SnapshotDisk("vda", MIB, None, MIB)
        taken = Snapshot(f"web01/{when:%Y%m%dT%H%M%SZ}", "main", "web01", when, "full", (disk,), {})
        note, tags = listing.note(taken), listing.tags(taken)
        await writer.commit(ResticSnapshot(when, tree, "web01", (listing.path("web01"),), tags, note=note))


def test_a_removed_snapshots_space_is_free_once_it_was_reclaimed(run: Run, restic: Restic) -> None:
    for day in (20, 21, 22):
        asyncio.run(take(restic.repository, day))
    not_free = "a repository's space is free after `vmfleece target reclaim`: main"
    for arguments, summary in (
        (("--dry-run",), ["1 kept, 2 would be removed, 0 B would be freed", not_free]),
        ((), ["1 kept, 2 removed, 0 B freed", not_free]),
        ((), ["1 kept, 0 removed, 0 B freed"]),
    ):
        said = run("prune", *arguments).stdout.splitlines()
        assert said[said.index(summary[0]) :] == summary
    assert "snapshots  1 of VMs, 1 in all" in run("target", "show", "main").stdout
    assert json.loads(run("target", "show", "main", "--json").stdout)["packs_bytes"] > 3 * MIB
    assert "done" in run("prune", "--reclaim").stdout.splitlines()
    assert MIB < json.loads(run("target", "show", "main", "--json").stdout)["packs_bytes"] < 2 * MIB
    restic.check()


@pytest.mark.usefixtures("restic")
def test_pruning_says_which_repositories_were_reclaimed(run: Run) -> None:
    document = {"dry_run": False, "snapshots": [], "reclaimed": [{"target": "main", "error": None}]}
    assert json.loads(run("prune", "--reclaim", "--json").stdout) == document
    assert json.loads(run("prune", "--json").stdout) == document | {"reclaimed": []}
    run("prune", "--reclaim", "--dry-run", code=2)


def test_a_bucket(run: Run, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "vmfleece.toml"
    place = f"s3://commands-{version}/some/prefix"
    config.write_text(config.read_text().replace(f'path = "{tmp_path}/repository"', f'url = "{place}"'))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    assert error(run("target", "init", "main", "--json", code=1))["code"] == "target-keys"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", OTHER)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        request = urllib.request.Request(f"{url}/commands-{version}", method="PUT")  # noqa: S310  our own server
        urllib.request.urlopen(request, timeout=30).close()  # noqa: S310
        assert error(run("target", "show", "main", "--json", code=10))["code"] == "no-repository"
        assert json.loads(run("target", "init", "main", "--json").stdout)["place"] == place
        assert json.loads(run("target", "show", "main", "--json").stdout)["packs"] == 0
        assert "no errors were found" in run("target", "check", "main", "--read-data").stdout
        assert "done" in run("target", "reclaim", "main").stdout.splitlines()
    finally:
        server.stop()


def test_a_wrong_password(run: Run, restic: Restic, tmp_path: Path) -> None:
    write_password(tmp_path / "password", OTHER)
    for command in (("show",), ("check",), ("reclaim",), ("key", "list")):
        assert error(run("target", *command, "main", "--json", code=12))["code"] == "wrong-password"
    assert not list((restic.repository / "locks").iterdir())


HOLDS_A_LOCK = """\
import asyncio, sys
from pathlib import Path
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.repository import Repository

async def hold():
    repository = await Repository.open(DirectoryBackend(Path(sys.argv[1])), sys.argv[2])
    async with repository.lock():
        print("held", flush=True)
        await asyncio.sleep(600)

asyncio.run(hold())
"""


def test_while_we_work_on_it_restic_does_not(run: Run, restic: Restic) -> None:
    with started(sys.executable, "-c", HOLDS_A_LOCK, str(restic.repository), PASSWORD) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        for action in ("check", "reclaim"):
            refused = error(run("target", action, "main", "--json", code=11))
            assert refused["code"] == "repository-locked"
            assert f"PID {holder.pid}" in refused["message"]
        (lock,) = json.loads(run("target", "show", "main", "--json").stdout)["locks"]
        assert lock.startswith(f"a lock of process {holder.pid} of ")
        (row,) = json.loads(run("prune", "--reclaim", "--json", code=1).stdout)["reclaimed"]
        assert (row["target"], row["error"]["code"]) == ("main", "repository-locked")
    assert len(list((restic.repository / "locks").iterdir())) == 1
    run("target", "reclaim", "main")
    assert not list((restic.repository / "locks").iterdir()), "a dead process of this host holds none"


def held_up(restic: Restic, tmp_path: Path) -> Path:
    """Whoever reads a pack waits until somebody opens it to write: it is a pipe, which is returned."""
    (tmp_path / "some").write_bytes(os.urandom(1 << 20))
    restic.run("backup", str(tmp_path / "some"))
    pack = next(path for path in (restic.repository / "data").rglob("*") if path.is_file())
    pack.unlink()
    os.mkfifo(pack)
    return pack


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_it_leaves_no_restic_and_no_lock(
    restic: Restic, tmp_path: Path, number: signal.Signals
) -> None:
    pack = held_up(restic, tmp_path)
    command = (sys.executable, "-m", "orchestrator", "target", "check", "main", "--read-data")
    with started(*command) as process:
        wait_for(lambda: list((restic.repository / "locks").iterdir()))
        time.sleep(0.5)
        seen = {pid: command_line(pid) for pid in (process.pid, *descendants(process.pid))}
        assert any("restic --no-cache check" in line for line in seen.values()), seen
        for line in seen.values():
            assert PASSWORD not in line
        process.send_signal(number)
        time.sleep(0.5)
        with suppress(OSError):  # restic 0.14 has ended by now, 0.18 ends what it is at
            os.close(os.open(pack, os.O_WRONLY | os.O_NONBLOCK))
        output, errors = process.communicate(timeout=60)
        checked(Done(process.args, process.returncode, output, errors), 130)
        assert not any(map(command_line, seen)), "all of them have ended"
        assert not list((restic.repository / "locks").iterdir())


@pytest.mark.usefixtures("restic")
def test_without_restic(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for command in ("check", "reclaim"):
        refused = error(run("target", command, "main", "--json", code=1))
        assert (refused["code"], refused["hint"]) == ("tool-missing", "install it: apt-get install restic")
