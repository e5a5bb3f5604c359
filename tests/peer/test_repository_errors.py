"""What commands that need no VM say of a repository that is damaged, locked, or cannot be written."""

import asyncio
import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.target.base import Snapshot
from orchestrator.target.repository.target import RepositoryTarget
from orchestrator.target.restic import lock_file
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.lock_file import LockFile
from orchestrator.target.restic.repository import Repository
from orchestrator.units import MIB
from tests.component.test_file_systems import mounted
from tests.component.test_target_contract import FILES, PASSWORD, fill, filled
from tests.guest.restics import CHEAP
from tests.peer.test_target_commands import Done, Run, run
from tests.unit.test_target import DETAILS, content, disk

SIZE = 5 * MIB
CONFIG = """\
[daemon]
state_dir = "{0}/state"
run_dir = "{0}/run"
[target.main]
driver = "restic"
path = "{1}"
password_file = "{0}/password"
"""

__all__ = ["run"]  # a fixture


@dataclass(frozen=True)
class Host:
    """A configuration, and a repository with one snapshot."""

    folder: Path
    repository: Path
    snapshot: Snapshot
    called: Run

    @property
    def out(self) -> Path:
        return self.folder / "out.raw"

    def files(self, kind: str) -> list[Path]:
        """The smallest first."""
        found = [path for path in (self.repository / kind).rglob("*") if path.is_file()]
        return sorted(found, key=lambda path: path.stat().st_size)

    def run(self, *arguments: str, code: int = 0) -> Done:
        done = self.called(*arguments, "--config", str(self.folder / "vmfleece.toml"), code=code)
        assert "Traceback" not in done.stderr
        assert PASSWORD not in done.stdout + done.stderr
        return done

    def restore(self, code: int = 0) -> Done:
        done = self.run("restore", "web01@latest", "--disk", "vda", "--to", str(self.out), "--json", code=code)
        if code == 0:
            assert self.out.read_bytes() == content(SIZE, 0)
            self.out.unlink()
        assert not self.out.exists()
        return done


@pytest.fixture
def host(tmp_path: Path, run: Run) -> Host:
    return made(tmp_path, tmp_path / "repository", run)


def made(folder: Path, repository: Path, run: Run) -> Host:
    (folder / "vmfleece.toml").write_text(CONFIG.format(folder, repository))
    write_password(folder, PASSWORD)

    async def fill_it() -> Snapshot:
        await Repository.create(DirectoryBackend(repository), PASSWORD, cost=CHEAP)
        draft = await filled(RepositoryTarget("main", str(repository), lambda: PASSWORD), disk(size_bytes=SIZE))
        return await draft.commit(DETAILS, FILES)

    return Host(folder, repository, asyncio.run(fill_it()), run)


def write_password(folder: Path, password: str) -> None:
    path = folder / "password"
    path.touch(mode=0o600)
    path.write_text(password + "\n")


def error(done: Done) -> dict[str, str]:
    found = json.loads(done.stdout)["error"]
    assert set(found) == {"code", "message", "hint"}
    assert found["message"] in done.stderr
    return dict(found)


COMMANDS = [
    ("snapshot", "list"),
    ("snapshot", "show", "web01@latest"),
    ("restore", "web01@latest", "--disk", "vda", "--to", "/nowhere/out"),
    ("export", "web01@latest"),
    ("verify", "web01@latest"),
    ("target", "show", "main"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_what_cannot_be_opened_has_a_code_of_its_own(host: Host, command: tuple[str, ...]) -> None:
    write_password(host.folder, "staple")
    assert error(host.run(*command, "--json", code=12))["code"] == "wrong-password"
    host.repository.rename(host.folder / "moved")
    refused = error(host.run(*command, "--json", code=10))
    assert (refused["code"], str(host.repository) in refused["message"]) == ("no-repository", True)


def test_while_somebody_works_on_it_alone_it_is_listed_but_not_read(host: Host) -> None:
    repository = asyncio.run(Repository.open(DirectoryBackend(host.repository), PASSWORD))
    alone = lock_file.seal(LockFile(datetime.now(UTC), True, "elsewhere", "root", 4711), repository._key)
    path = host.repository / "locks" / hashlib.sha256(alone).hexdigest()
    path.write_bytes(alone)
    assert host.snapshot.id in host.run("snapshot", "list").stdout
    assert "4711" in host.run("target", "show", "main").stdout
    refusals = [
        error(host.restore(code=11)),
        error(host.run("export", "web01@latest", "--json", code=11)),
        error(host.run("snapshot", "protect", "web01@latest", "--json", code=11)),
    ]
    for refused in refusals:
        assert refused["code"] == "repository-locked"
        assert "4711" in refused["message"]
    (row,) = json.loads(host.run("verify", "--json", code=1).stdout)["verified"]
    assert row["error"]["code"] == "repository-locked"
    path.unlink()
    host.restore()


def flip(path: Path) -> None:
    stored = bytearray(path.read_bytes())
    stored[len(stored) // 2] ^= 1
    replace(path, bytes(stored))


def replace(path: Path, stored: bytes) -> None:
    path.unlink()
    path.write_bytes(stored)


def cut_off(path: Path) -> None:
    replace(path, path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a byte of a pack": ("data", flip),
    "a pack that is cut off": ("data", cut_off),
    "a pack that is missing": ("data", Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pack_is_named_and_everything_else_is_done(host: Host, damage: str) -> None:
    kind, harm = DAMAGES[damage]
    path = host.files(kind)[-1]
    harm(path)
    assert host.snapshot.id in host.run("snapshot", "list").stdout
    host.run("target", "show", "main")
    refused = error(host.restore(code=1))
    assert (refused["code"], path.name in refused["message"]) == ("content-wrong", True)
    assert refused["hint"]
    done = host.run("verify", "--json", code=1)
    (row,) = json.loads(done.stdout)["verified"]
    assert row["error"] is None
    assert all(path.name in problem for problem in row["problems"])
    assert path.name in done.stderr
    host.run("snapshot", "forget", host.snapshot.id)


def test_without_its_index_nothing_can_be_read_and_that_is_said(host: Host) -> None:
    (index,) = host.files("index")
    stored = index.read_bytes()
    index.unlink()
    assert host.snapshot.id in host.run("snapshot", "list").stdout
    refused = error(host.restore(code=1))
    assert refused["code"] == "content-wrong"
    assert host.snapshot.id in refused["message"]
    assert "no index file says where it is" in refused["message"]
    replaced = host.repository / "index" / index.name
    replaced.write_bytes(stored[:-1])
    for refused in (error(host.restore(code=1)), error(host.run("export", "web01@latest", "--json", code=1))):
        assert (refused["code"], index.name in refused["message"]) == ("repository-damaged", True)
    replaced.unlink()
    replaced.write_bytes(stored)
    host.restore()


def test_a_damaged_snapshot_hides_no_other_and_is_named(host: Host) -> None:
    (path,) = host.files("snapshots")
    stored = path.read_bytes()
    flip(path)
    done = host.run("snapshot", "list", "--json")
    assert json.loads(done.stdout)["snapshots"] == []
    assert path.name in done.stderr
    (damaged,) = json.loads(host.run("target", "show", "main", "--json").stdout)["damaged"]
    assert path.name in damaged
    assert error(host.restore(code=1))["code"] == "no-snapshot"
    replace(path, stored)
    host.restore()


@pytest.mark.parametrize("kind", ["config", "keys"])
def test_what_it_cannot_be_opened_without_is_named(host: Host, kind: str) -> None:
    path = host.repository / "config" if kind == "config" else host.files(kind)[0]
    flip(path)
    for command in (("snapshot", "list"), ("target", "show", "main")):
        refused = error(host.run(*command, "--json", code=1))
        assert (refused["code"], path.name in refused["message"]) == ("repository-damaged", True)


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """A mount that nobody, root neither, writes to."""
    if os.geteuid() != 0:
        pytest.fail("needs root: mounts a folder")
    subprocess.check_call(["mount", "--bind", path, path])
    try:
        subprocess.check_call(["mount", "-o", "remount,bind,ro", path])
        yield
    finally:
        subprocess.check_call(["umount", path])


def assert_readable(host: Host, why: str) -> None:
    assert host.snapshot.id in host.run("snapshot", "list").stdout
    host.run("target", "show", "main")
    warned = host.restore().stderr
    assert "repository.unlocked" in warned
    assert why in warned
    assert "fine" in host.run("verify", "web01@latest").stdout


def test_a_read_only_repository_is_read_with_a_warning(host: Host) -> None:
    with read_only(host.repository):
        assert_readable(host, "Read-only file system")
        for command in (("snapshot", "protect", host.snapshot.id), ("snapshot", "forget", host.snapshot.id)):
            assert "Read-only file system" in host.run(*command, code=1).stderr
    host.restore()
    assert host.files("locks") == []


def test_a_full_repository_is_read_with_a_warning(tmp_path: Path, run: Run) -> None:
    with mounted(tmp_path, "tmpfs", 16) as folder:
        host = made(tmp_path, folder / "repository", run)
        fill(folder / "junk")
        assert_readable(host, "No space left on device")
        host.run("snapshot", "forget", host.snapshot.id)
