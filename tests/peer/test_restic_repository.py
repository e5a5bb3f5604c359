"""What we write, read by restic itself; what restic writes and changes, read by us.

With the restic of Debian 12, and that of Debian 13.
"""

import asyncio
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from orchestrator.target.restic import lock_file
from orchestrator.target.restic.backend.base import File, Kind
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.backend.objects import s3
from orchestrator.target.restic.crypto import Cost
from orchestrator.target.restic.errors import RepositoryLocked, WrongPassword
from orchestrator.target.restic.lock import Lock
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.snapshot import ResticSnapshot, Summary
from orchestrator.target.restic.tree import FileContent
from orchestrator.target.restic.writer import CHUNK_BYTES
from orchestrator.units import MIB
from tests.guest.restics import CHEAP, RESTICS

pytestmark = pytest.mark.timeout(600)

ENVIRONMENT = os.environ | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
LOCKED_EXIT = {"0.14": 1, "0.18": 11}
PASSWORD = "correct horse"
NOON = datetime(2026, 11, 22, 12, 0, 0, 123456, UTC)
NOTE = {"run": "1", "disks": {"vda": {"kind": "full"}}}
"""What restic itself takes at least."""


@dataclass(frozen=True)
class Restic:
    version: str
    repository: Path | str
    password: str = PASSWORD

    @property
    def folder(self) -> Path:
        return Path(self.repository)

    def run(self, *arguments: str, code: int = 0, cwd: Path | None = None, **environment: str) -> bytes:
        """The command's output. It must exit with `code`."""
        environment = ENVIRONMENT | {"RESTIC_PASSWORD": self.password} | environment
        command = [RESTICS[self.version], "--no-cache", "--repo", str(self.repository), *arguments]
        done = subprocess.run(command, capture_output=True, env=environment, cwd=cwd, timeout=300, check=False)
        assert done.returncode == code, f"{' '.join(arguments)}: {done.returncode}: {done.stderr.decode()}"
        return done.stdout + (done.stderr if code else b"")

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        environment = ENVIRONMENT | {"RESTIC_PASSWORD": self.password}
        command = [RESTICS[self.version], "--no-cache", "--repo", str(self.repository), *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def check(self) -> None:
        """The whole repository is good, and there is nothing to hint at."""
        said = self.run("check", "--read-data").decode()
        assert "no errors were found" in said
        assert "not referenced" not in said
        assert "hint" not in said.lower()


@pytest.fixture
def restic(version: str, tmp_path: Path) -> Restic:
    return Restic(version, tmp_path / "repository")


@pytest.fixture
def backend(restic: Restic) -> DirectoryBackend:
    return DirectoryBackend(restic.folder)


@pytest.fixture
async def repository(backend: DirectoryBackend) -> Repository:
    return await Repository.create(backend, PASSWORD, cost=CHEAP)


def disk(seed: int, size: int = 30 * MIB + 12345) -> bytes:
    """Random, zero and textual parts."""
    source = random.Random(seed)  # noqa: S311  not for secrets
    parts = [source.randbytes(9 * MIB), bytes(9 * MIB), b"the quick brown fox %d " % seed * (MIB // 4)]
    return b"".join(parts).ljust(size, b"\0")[:size]


async def backup(repository: Repository, disks: dict[str, bytes], number: int = 0, **more: Any) -> ResticSnapshot:
    async with repository.lock() as lock:
        await repository.load_index()
        return await write(repository, lock, disks, number, **more)


async def write(
    repository: Repository, lock: Lock, disks: dict[str, bytes], number: int = 0, **more: Any
) -> ResticSnapshot:
    writer = repository.writer(lock, pack_bytes=16 * MIB)
    files = {}
    for name, content in disks.items():
        starts = range(0, len(content), CHUNK_BYTES)
        ids = [writer.add_chunk(memoryview(content)[at : at + CHUNK_BYTES])[0] for at in starts]
        files[f"{name}.raw"] = FileContent(len(content), ids)
    when = NOON + timedelta(days=number)
    tree = await writer.write_file_tree(files, b'{"vm": "web01"}', when)
    new = writer.written
    summary = Summary(
        when, when, len(files), 0, new.data_blobs, new.tree_blobs, new.added_bytes, new.added_packed_bytes,
        len(files), sum(map(len, disks.values())),
    )  # fmt: skip
    made = ResticSnapshot(
        when, tree, "web01", ("/web01",), ("run-1",), summary=summary.document(), note=NOTE, **more
    )
    return await writer.commit(made)


async def content_of(repository: Repository, made: ResticSnapshot, name: str = "vda.raw") -> bytes:
    return b"".join(repository.read_file((await repository.files(made))[name]))


async def reopened(restic: Restic) -> Repository:
    opened = await Repository.open(DirectoryBackend(restic.folder), restic.password)
    await opened.load_index()
    return opened


def hexadecimal(made: ResticSnapshot) -> str:
    assert made.identity is not None
    return made.identity.hex()


async def test_restic_finds_nothing_wrong_and_gives_back_every_byte(
    restic: Restic, repository: Repository, tmp_path: Path
) -> None:
    disks = {"vda": disk(1), "vdb": disk(2, 5 * MIB), "empty": b""}
    made = await backup(repository, disks)
    restic.check()
    (listed,) = restic.json("snapshots")
    assert (listed["id"], listed["hostname"], listed["paths"]) == (hexadecimal(made), "web01", ["/web01"])
    assert (listed["tags"], listed["time"], listed["username"]) == (
        ["run-1"],
        "2026-11-22T12:00:00.123456Z",
        "root",
    )
    said = restic.run("ls", "--long", "latest").decode().splitlines()
    names = {line.split()[-1]: line.split()[3] for line in said if line.startswith("-rw-------")}
    assert {name: int(size) for name, size in names.items()} == {
        "/vda.raw": len(disks["vda"]), "/vdb.raw": 5 * MIB, "/empty.raw": 0, "/vm.json": 15,
    }  # fmt: skip
    for name, content in disks.items():
        assert restic.run("dump", "latest", f"/{name}.raw") == content
    restic.run("restore", "latest", "--target", str(tmp_path / "restored"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "restored").iterdir()} == {
        "vm.json": b'{"vm": "web01"}',
        **{f"{name}.raw": content for name, content in disks.items()},
    }
    stats = restic.json("stats", "--mode", "raw-data", "latest")
    assert stats["total_size"] < 17 * MIB


async def test_incrementals_and_what_prune_leaves(restic: Restic, repository: Repository) -> None:
    first = bytearray(disk(1))
    parent = await backup(repository, {"vda": bytes(first)})
    second = first.copy()
    second[5 * MIB : 6 * MIB] = b"changed " * (MIB // 8)
    made = await backup(repository, {"vda": bytes(second)}, 1, parent=parent.identity)
    restic.check()
    assert restic.run("dump", hexadecimal(parent), "/vda.raw") == first
    assert restic.run("dump", hexadecimal(made), "/vda.raw") == second
    restic.run("diff", hexadecimal(parent), hexadecimal(made))

    restic.run("forget", "--keep-last", "1", "--prune", "--max-unused", "0")
    restic.check()
    opened = await reopened(restic)
    assert [(one.identity, one.note) for one in (await opened.snapshots()).snapshots] == [(made.identity, NOTE)]
    assert await content_of(opened, made) == second
    third = await backup(opened, {"vda": bytes(first)}, 2)
    restic.check()
    assert restic.run("dump", hexadecimal(third), "/vda.raw") == first


@pytest.mark.parametrize("missing", [True, False])
async def test_what_a_lost_pack_held_is_written_anew(
    restic: Restic, repository: Repository, missing: bool
) -> None:
    first = await backup(repository, {"vda": disk(1)})
    largest = max((restic.folder / "data").rglob("*"), key=lambda path: path.stat().st_size)
    if missing:
        largest.unlink()
    else:
        os.truncate(largest, 9 * MIB)
    opened = await Repository.open(DirectoryBackend(restic.folder), PASSWORD)
    second = await backup(opened, {"vda": disk(1)}, 1)
    assert opened.lacking == (bytes.fromhex(largest.name),)
    for made in (first, second):
        assert await content_of(await reopened(restic), made) == disk(1)
    largest.unlink(missing_ok=True)  # restic itself asks for 15 minutes for a pack that its index lists
    restic.run(*(["rebuild-index"] if restic.version == "0.14" else ["repair", "index"]))
    assert "no errors were found" in restic.run("check", "--read-data").decode()
    for made in (first, second):
        assert restic.run("dump", hexadecimal(made), "/vda.raw") == disk(1)


async def test_what_we_forget_prune_frees(restic: Restic, repository: Repository) -> None:
    old, new = await backup(repository, {"vda": disk(1)}), await backup(repository, {"vda": disk(2)}, 1)
    await repository.forget(old)
    restic.run("prune")
    restic.check()
    assert sum(path.stat().st_size for path in (restic.folder / "data").rglob("*") if path.is_file()) < 13 * MIB
    assert await content_of(await reopened(restic), new) == disk(2)


async def test_an_index_made_anew_is_read(restic: Restic, repository: Repository) -> None:
    made = await backup(repository, {"vda": disk(1)})
    if restic.version == "0.18":
        shutil.rmtree(restic.folder / "index")
        (restic.folder / "index").mkdir()
        restic.run("repair", "index")
    else:
        restic.run("rebuild-index", "--read-all-packs")
    restic.check()
    assert await content_of(await reopened(restic), made) == disk(1)


async def test_a_copy_is_read(restic: Restic, repository: Repository, tmp_path: Path) -> None:
    await backup(repository, {"vda": disk(1)})
    copy = Restic(restic.version, tmp_path / "copy", "battery")
    copy.run("init")
    copy.run("copy", "--from-repo", str(restic.repository), RESTIC_FROM_PASSWORD=PASSWORD)
    copy.check()
    opened = await reopened(copy)
    (made,) = (await opened.snapshots()).snapshots
    assert (made.hostname, made.tags, made.paths, made.note) == ("web01", ("run-1",), ("/web01",), {})
    assert await content_of(opened, made) == disk(1)


async def test_tags_that_restic_changes(restic: Restic, repository: Repository) -> None:
    made = await backup(repository, {"vda": disk(1, MIB)})
    restic.run("tag", "--add", "keep", "latest")
    (tagged,) = (await repository.snapshots()).snapshots
    assert tagged.identity != made.identity
    assert (tagged.original, set(tagged.tags), tagged.note) == (made.identity, {"run-1", "keep"}, {})
    restic.check()
    assert await content_of(await reopened(restic), tagged) == disk(1, MIB)


async def test_tags_that_we_change(restic: Restic, repository: Repository) -> None:
    made = await backup(repository, {"vda": disk(1, MIB)})
    async with repository.lock():
        tagged = await repository.replace(made, tags=["run-1", "protected"])
    (listed,) = restic.json("snapshots", "--tag", "protected")
    assert (listed["id"], listed["original"]) == (hexadecimal(tagged), hexadecimal(made))
    assert tagged.note == NOTE
    restic.check()
    assert restic.run("dump", "latest", "/vda.raw") == disk(1, MIB)


async def test_rewriting_finds_that_our_trees_are_as_its_own(restic: Restic, repository: Repository) -> None:
    if restic.version == "0.14":
        return  # has no such command
    await backup(repository, {"vda": disk(1, MIB), "vdb": b"x"})
    restic.run("rewrite", "--exclude", "/vdb.raw", "--forget", "latest")
    restic.check()
    (made,) = (await repository.snapshots()).snapshots
    opened = await reopened(restic)
    assert set(await opened.files(made)) == {"vda.raw", "vm.json"}


async def test_passwords_of_both(restic: Restic, repository: Repository, tmp_path: Path) -> None:
    await repository.add_password("ours", cost=Cost())
    Restic(restic.version, restic.repository, "ours").run("snapshots")
    (tmp_path / "password").write_text("theirs\n")
    restic.run("key", "add", "--new-password-file", str(tmp_path / "password"))
    opened = await Repository.open(DirectoryBackend(restic.folder), "theirs")
    assert opened.identity == repository.identity
    with pytest.raises(WrongPassword):
        await Repository.open(DirectoryBackend(restic.folder), "staple")
    Restic(restic.version, restic.repository, "staple").run(
        "snapshots", code={"0.14": 1, "0.18": 12}[restic.version]
    )


@pytest.mark.parametrize("compression", ["auto", "max", "off"])
async def test_what_restic_writes_is_read(restic: Restic, tmp_path: Path, compression: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "vda.raw").write_bytes(disk(1))
    (source / "link").symlink_to("vda.raw")
    (source / 'ünïcode "quoted" \\ <&>').write_bytes(b"x")
    restic.run("init", "--repository-version", "2")
    restic.run("backup", "--compression", compression, ".", cwd=source)
    opened = await reopened(restic)
    (made,) = (await opened.snapshots()).snapshots
    assert made.paths == (str(source),)
    nodes = opened.read_tree(made.tree)
    while nodes[0].subtree is not None:
        nodes = opened.read_tree(nodes[0].subtree)
    kinds = {node.name: node.kind for node in nodes}
    assert (len(kinds), kinds["link"], kinds["vda.raw"]) == (3, "symlink", "file")
    (written,) = [node for node in nodes if node.name == "vda.raw"]
    assert b"".join(opened.read_file(written.content)) == disk(1)
    assert not opened.on_grid(written.content, CHUNK_BYTES), "its chunks vary in length"

    ours = await backup(opened, {"vda": disk(1)}, 1)
    restic.check()
    assert restic.run("dump", hexadecimal(ours), "/vda.raw") == disk(1)


async def test_restic_backs_up_beside_us(restic: Restic, repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "vda.raw").write_bytes(disk(1))
    async with repository.lock() as lock:
        await repository.load_index()
        await asyncio.to_thread(restic.run, "backup", str(tmp_path / "vda.raw"))
        made = await write(repository, lock, {"vda": disk(1)})
    said = restic.run("check", "--read-data").decode()
    assert "no errors were found" in said
    assert restic.run("dump", hexadecimal(made), "/vda.raw") == disk(1)


def make_bucket(url: str) -> None:
    request = urllib.request.Request(url, method="PUT")  # noqa: S310  our own server
    urllib.request.urlopen(request, timeout=30).close()  # noqa: S310


async def test_a_bucket_is_a_repository_for_both(version: str) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url, bucket = f"http://{host}:{port}", f"vms-{version}"  # it keeps buckets as long as the process lives
        make_bucket(f"{url}/{bucket}")
        backend = s3(bucket, "main", access_key="key", secret_key="secret", endpoint=url)
        made = await backup(await Repository.create(backend, PASSWORD, cost=CHEAP), {"vda": disk(1)})
        restic = Restic(version, f"s3:{url}/{bucket}/main")
        await asyncio.to_thread(restic.check)
        assert await asyncio.to_thread(restic.run, "dump", "latest", "/vda.raw") == disk(1)
        await asyncio.to_thread(restic.run, "prune", "--max-unused", "0", "--repack-cacheable-only")
        opened = await Repository.open(backend, PASSWORD)
        await opened.load_index()
        assert await content_of(opened, made) == disk(1)
    finally:
        server.stop()


# Locks


@pytest.fixture
async def held(repository: Repository) -> AsyncIterator[Lock]:
    await backup(repository, {"vda": disk(1, MIB)})
    async with repository.lock() as lock:
        yield lock


@pytest.mark.usefixtures("held")
async def test_nobody_prunes_while_we_hold_a_lock_and_all_may_read(restic: Restic) -> None:
    for command in (["prune"], ["forget", "--keep-last", "1"], ["check"]):
        said = await asyncio.to_thread(restic.run, *command, code=LOCKED_EXIT[restic.version])
        assert b"lock" in said
    for command in (["snapshots"], ["ls", "latest"], ["dump", "latest", "/vda.raw"], ["check", "--no-lock"]):
        await asyncio.to_thread(restic.run, *command)


async def test_afterwards_it_prunes(restic: Restic, repository: Repository) -> None:
    async with repository.lock():
        pass
    restic.run("prune")


@pytest.mark.usefixtures("held")
async def test_unlock_leaves_a_fresh_lock_and_sends_its_process_a_hangup(
    restic: Restic, backend: DirectoryBackend
) -> None:
    hangups: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: hangups.append(number))
    try:
        await asyncio.to_thread(restic.run, "unlock")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(list(backend.list(Kind.LOCKS))) == 1
    assert hangups, "docs/repository.md warns of it"


def dead_process() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


async def test_unlock_removes_a_lock_of_ours_whose_process_is_dead(
    restic: Restic, repository: Repository, backend: DirectoryBackend
) -> None:
    dead = lock_file.LockFile(datetime.now(UTC), True, os.uname().nodename, "root", dead_process())
    for remove in ("ours", "restic's"):
        content = lock_file.seal(dead, repository._key)
        backend.save(File(Kind.LOCKS, hashlib.sha256(content).digest()), content)
        restic.run("snapshots", code=LOCKED_EXIT[restic.version])
        with pytest.raises(RepositoryLocked, match="restic unlock"):
            await backup(repository, {})
        if remove == "ours":
            assert await repository.remove_stale_locks() == 1
        else:
            restic.run("unlock")
        assert list(backend.list(Kind.LOCKS)) == []


async def test_we_wait_for_restics_exclusive_lock(restic: Restic, repository: Repository, tmp_path: Path) -> None:
    """restic holds it as long as it waits for what it cannot read: a pack that is a pipe."""
    await backup(repository, {"vda": disk(1, MIB)})
    pack = next(path for path in (restic.folder / "data").rglob("*") if path.is_file())
    pack.rename(tmp_path / "pack")
    os.mkfifo(pack)
    checking = restic.start("check", "--read-data")
    try:
        while not list((restic.folder / "locks").iterdir()):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)
        with pytest.raises(RepositoryLocked, match="exclusive"):
            async with repository.lock():
                pass
    finally:
        checking.kill()
        checking.wait()
    assert len(list((restic.folder / "locks").iterdir())) == 1, "only restic's own is left"
