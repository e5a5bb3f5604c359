"""What every place of a repository promises, over each of them; then what only a folder can promise, or break."""

import atexit
import errno
import functools
import os
import secrets
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import obstore
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import LocalStore, MemoryStore

from orchestrator.target.restic.backend.base import CONFIG, Backend, File, Kind, Stored
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.backend.memory import MemoryBackend
from orchestrator.target.restic.backend.objects import ObjectsBackend, s3
from orchestrator.target.restic.errors import BackendError, FileExists, FileMissing, Unreachable

ONE, TWO = bytes.fromhex("ab" * 32), bytes.fromhex("cd" * 32)
Make = Callable[[Path], Backend]


def local_objects(folder: Path) -> Backend:
    folder.mkdir()
    return ObjectsBackend("file://repository", LocalStore(folder))


@functools.cache
def s3_server() -> str:
    """A server of our own on this host's loopback, as long as the tests run."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    atexit.register(server.stop)
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


def in_s3(_folder: Path) -> Backend:
    bucket = f"bucket{secrets.token_hex(8)}"
    made = urllib.request.Request(f"{s3_server()}/{bucket}", method="PUT")  # noqa: S310  our own server
    urllib.request.urlopen(made, timeout=30).close()  # noqa: S310
    return s3(bucket, "pre/fix", access_key="key", secret_key="secret", endpoint=s3_server())


KINDS: dict[str, Make] = {
    "memory": lambda _folder: MemoryBackend(),
    "directory": DirectoryBackend,
    "objects in memory": lambda _folder: ObjectsBackend("memory://", MemoryStore()),
    "objects in a folder": local_objects,
    "S3": in_s3,
}


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    made = KINDS[request.param](tmp_path / "repository")
    made.create()
    return made


def test_paths_are_those_of_the_format() -> None:
    files = [CONFIG, File(Kind.KEYS, ONE), File(Kind.DATA, ONE)]
    assert [file.path for file in files] == ["config", f"keys/{'ab' * 32}", f"data/ab/{'ab' * 32}"]


@pytest.mark.parametrize("file", [CONFIG, *(File(kind, ONE) for kind in Kind)], ids=str)
def test_what_was_saved_is_read_and_gone_once_removed(backend: Backend, file: File) -> None:
    backend.create()
    backend.save(file, bytearray(b"content"))
    assert backend.read(file) == b"content"
    backend.remove(file)
    backend.remove(file)
    with pytest.raises(FileMissing) as missing:
        backend.read(file)
    assert missing.value.code == "file-missing"


@pytest.mark.parametrize(
    ("offset", "length", "part"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (3, 7, b"3456789"),
        (3, 99, b"3456789"),
        (10, 1, b""),
        (99, 1, b""),
        (99, None, b""),
        (3, 0, b""),
        (0, 0, b""),
    ],
)
def test_parts_of_a_file(backend: Backend, offset: int, length: int | None, part: bytes) -> None:
    backend.save(File(Kind.DATA, ONE), b"0123456789")
    assert backend.read(File(Kind.DATA, ONE), offset=offset, length=length) == part


def test_a_part_of_what_is_missing(backend: Backend) -> None:
    for length in (0, 5, None):
        with pytest.raises(FileMissing):
            backend.read(File(Kind.DATA, ONE), offset=3, length=length)


def test_an_empty_file(backend: Backend) -> None:
    backend.save(File(Kind.LOCKS, ONE), b"")
    assert backend.read(File(Kind.LOCKS, ONE)) == b""
    assert list(backend.list(Kind.LOCKS)) == [Stored(File(Kind.LOCKS, ONE), 0)]


def test_each_kind_is_listed_by_itself_with_its_sizes(backend: Backend) -> None:
    assert [list(backend.list(kind)) for kind in Kind] == [[]] * len(Kind)
    for kind in Kind:
        backend.save(File(kind, ONE), b"one")
        backend.save(File(kind, TWO), b"second")
    backend.save(CONFIG, b"config")
    for kind in Kind:
        assert set(backend.list(kind)) == {Stored(File(kind, ONE), 3), Stored(File(kind, TWO), 6)}


def test_many_files_are_listed(backend: Backend) -> None:
    files = {File(Kind.DATA, bytes([n % 256, n // 256] * 16)) for n in range(1500)}
    if isinstance(backend, DirectoryBackend):
        files = set(list(files)[:50])  # each is made durable
    for file in files:
        backend.save(file, b"x")
    assert {stored.file for stored in backend.list(Kind.DATA)} == files


def test_saving_again_is_harmless_and_heals(backend: Backend) -> None:
    file = File(Kind.INDEX, ONE)
    for content in (b"cut o", b"cut off", b"cut off"):
        backend.save(file, content)
    assert backend.read(file) == b"cut off"
    assert list(backend.list(Kind.INDEX)) == [Stored(file, 7)]


def test_what_is_there_is_not_replaced_if_so_wished(backend: Backend) -> None:
    backend.save(CONFIG, b"first", replace=False)
    with pytest.raises(FileExists):
        backend.save(CONFIG, b"second", replace=False)
    assert backend.read(CONFIG) == b"first"


def test_of_many_who_create_one_wins(backend: Backend) -> None:
    def create(number: int) -> bool:
        try:
            backend.save(CONFIG, b"%d" % number, replace=False)
        except FileExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(16)))
    assert won.count(True) == 1
    assert backend.read(CONFIG) == b"%d" % won.index(True)


def test_a_file_is_never_seen_in_part(backend: Backend) -> None:
    content = bytes(range(256)) * 4096
    file = File(Kind.DATA, ONE)

    def look(_: int) -> set[int]:
        sizes = {stored.size_bytes for stored in backend.list(Kind.DATA)}
        try:
            return sizes | {len(backend.read(file))}
        except FileMissing:
            return sizes

    with ThreadPoolExecutor(4) as pool:
        saving = [pool.submit(backend.save, file, content) for _ in range(5)]
        seen = set().union(*pool.map(look, range(20)))
        for future in saving:
            future.result()
    assert seen <= {len(content)}


def test_there_is_nothing_to_clean(backend: Backend) -> None:
    backend.save(CONFIG, b"config")
    assert backend.clean() == 0
    assert backend.read(CONFIG) == b"config"


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> DirectoryBackend:
    made = DirectoryBackend(tmp_path / "deep" / "repository")
    made.create()
    return made


def test_nobody_else_reads_and_nobody_writes(folder: DirectoryBackend) -> None:
    folder.save(File(Kind.DATA, ONE), b"x")
    root = Path(folder.place)
    for path in (root, *root.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o400), path
    assert len(list((root / "data").iterdir())) == 256


def test_what_is_not_the_formats_is_neither_listed_nor_removed(folder: DirectoryBackend) -> None:
    root = Path(folder.place)
    strange = [
        root / "index" / "README",
        root / "index" / ("AB" * 32),
        root / "data" / "00" / ("ab" * 32),
        root / "data" / "ab" / f"{'ab' * 32}.tmp",
        root / "locks" / f"{'ab' * 31}-tmp-12",
    ]
    for path in strange:
        path.write_bytes(b"x")
        os.utime(path, (0, 0))
    assert folder.clean() == 0
    assert not any(list(folder.list(kind)) for kind in Kind)
    assert all(path.exists() for path in strange)


def test_where_nothing_is_nothing_is_listed(tmp_path: Path) -> None:
    folder = DirectoryBackend(tmp_path / "nowhere")
    assert not any(list(folder.list(kind)) for kind in Kind)
    assert folder.clean() == 0
    with pytest.raises(FileMissing):
        folder.read(CONFIG)
    with pytest.raises(FileMissing):
        folder.save(File(Kind.INDEX, ONE), b"x")
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_a_copy_lost_is_made(folder: DirectoryBackend) -> None:
    (Path(folder.place) / "data" / "ab").rmdir()
    folder.save(File(Kind.DATA, ONE), b"x")
    assert stat.S_IMODE((Path(folder.place) / "data" / "ab").stat().st_mode) == 0o700


def test_a_failed_save_leaves_nothing_and_says_what_to_do(
    folder: DirectoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    for number, kind, code in (
        (errno.ENOSPC, BackendError, "target-full"),
        (errno.EDQUOT, BackendError, "target-full"),
        (errno.EROFS, BackendError, "target-unwritable"),
        (errno.EIO, Unreachable, "target-unreachable"),
        (errno.ESTALE, Unreachable, "target-unreachable"),
    ):

        def fail(descriptor: int, number: int = number) -> None:
            real(descriptor)
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(kind) as failed:
            folder.save(File(Kind.INDEX, ONE), b"x")
        assert (failed.value.code, failed.value.retryable) == (code, True)
        assert list((Path(folder.place) / "index").iterdir()) == []
        monkeypatch.undo()


def test_the_file_is_durable_before_it_is_named_and_the_name_before_save_returns(
    folder: DirectoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Path(folder.place) / "index"
    steps: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_sync(descriptor)

    def rename(path: Path, to: Path) -> Path:
        steps.append(f"rename in {to.parent.name}")
        assert path.parent == to.parent
        return real_rename(path, to)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    folder.save(File(Kind.INDEX, ONE), b"x")
    folder.remove(File(Kind.INDEX, ONE))
    assert steps == ["file", f"rename in {index.name}", "folder", "folder"]


def test_one_creates_where_there_are_no_links(folder: DirectoryBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    folder.save(CONFIG, b"first", replace=False)
    with pytest.raises(FileExists):
        folder.save(CONFIG, b"second", replace=False)
    assert [path.name for path in Path(folder.place).iterdir() if path.is_file()] == ["config"]


KILLED = """
import os, pathlib, signal, sys
from orchestrator.target.restic.backend.base import File, Kind
from orchestrator.target.restic.backend.directory import DirectoryBackend
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
DirectoryBackend(pathlib.Path(sys.argv[1])).save(File(Kind.DATA, bytes(32)), b"content")
"""


def test_what_a_killed_writer_left_is_never_listed_and_cleaned_once_it_is_old(folder: DirectoryBackend) -> None:
    subprocess.run([sys.executable, "-c", KILLED, folder.place], check=False, timeout=60)
    left = list((Path(folder.place) / "data" / "00").iterdir())
    assert len(left) == 1
    assert list(folder.list(Kind.DATA)) == []
    assert folder.clean() == 0, "its writer may still be writing"
    old = time.time() - 7200
    os.utime(left[0], (old, old))
    assert folder.clean() == 1
    assert not left[0].exists()


# Object stores


def test_a_server_that_is_not_there_is_unreachable_and_no_secret_is_told() -> None:
    backend = s3(
        "bucket",
        "prefix",
        access_key="AKIAKEY",
        secret_key="hush",
        endpoint="http://127.0.0.1:9",
        patience=timedelta(0),
    )
    for call in (
        lambda: backend.read(CONFIG),
        lambda: backend.save(CONFIG, b"x"),
        lambda: backend.list(Kind.LOCKS),
        lambda: backend.remove(CONFIG),
    ):
        with pytest.raises(Unreachable) as failed:
            call()
        assert failed.value.retryable
        assert "s3://bucket/prefix" in str(failed.value)
        assert failed.value.__cause__ is None
        assert "hush" not in repr(backend) + str(failed.value)


def test_other_objects_are_not_listed() -> None:
    store = MemoryStore()
    backend = ObjectsBackend("memory://", store)
    for path in ("index/README", f"index/sub/{'ab' * 32}", f"data/00/{'ab' * 32}", f"indexes/{'ab' * 32}"):
        obstore.put(store, path, b"x")
    assert not any(list(backend.list(kind)) for kind in Kind)
