"""The contract of a storage, over every way in which one makes its files."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from orchestrator.errors import StorageError
from orchestrator.storage.base import Storage
from orchestrator.storage.directory import DirectoryStorage
from orchestrator.units import GIB, MIB, Share

Make = Callable[..., DirectoryStorage]

real_open = os.open


class TmpfileRefused:
    """os.open on a file system without O_TMPFILE: NFS, some FUSE, old overlays; each says so differently."""

    def __init__(self, error: int) -> None:
        self.error, self.times = error, 0

    def __call__(self, path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            self.times += 1
            raise OSError(self.error, os.strerror(self.error), str(path))
        return real_open(path, flags, *rest, **more)


@pytest.fixture(params=["O_TMPFILE", errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "O_TMPFILE":
        yield
        return
    refusing = TmpfileRefused(request.param)
    monkeypatch.setattr(os, "open", refusing)
    yield
    assert refusing.times


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def storage(path: Path = tmp_path / "deep" / "fleecing", min_free: Share | int = 0) -> DirectoryStorage:
        return DirectoryStorage("local", path, quota_bytes=GIB, min_free=min_free)

    return storage


@pytest.fixture
def storage(make: Make, way: None) -> Storage:  # noqa: ARG001
    made = make()
    made.prepare()
    return made


def test_nothing_of_an_image_is_visible(storage: Storage, tmp_path: Path) -> None:
    files = [storage.create(), storage.create()]
    assert list((tmp_path / "deep" / "fleecing").iterdir()) == []
    for file in files:
        status = os.fstat(file.descriptor)
        assert (status.st_nlink, status.st_size) == (0, 0)
        file.close()


def test_only_we_may_open_it(storage: Storage, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "deep" / "fleecing").stat().st_mode) == 0o700
    file = storage.create()
    assert stat.S_IMODE(os.fstat(file.descriptor).st_mode) == 0o600
    assert not os.get_inheritable(file.descriptor)
    file.close()


def test_used_bytes_are_what_it_occupies_not_its_length(storage: Storage) -> None:
    file = storage.create()
    os.ftruncate(file.descriptor, 10 * GIB)
    assert file.used_bytes() == 0
    os.pwrite(file.descriptor, bytes(MIB), 5 * GIB)
    os.fsync(file.descriptor)
    assert MIB <= file.used_bytes() <= MIB + 64 * 1024
    file.close()


def test_closing_lets_go_of_it_once(storage: Storage) -> None:
    file = storage.create()
    descriptor = file.descriptor
    file.close()
    reused = os.open("/dev/null", os.O_RDONLY)  # the lowest free number: the same one
    assert reused == descriptor
    file.close()
    os.fstat(reused)
    os.close(reused)
    assert file.used_bytes() == 0


def test_preparing_again_leaves_the_folder_as_it_is(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "fleecing"
    folder.chmod(0o750)
    storage.prepare()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


@pytest.mark.parametrize("act", [DirectoryStorage.prepare, DirectoryStorage.create, DirectoryStorage.space])
def test_a_path_below_a_file_is_named(
    make: Make, tmp_path: Path, act: Callable[[DirectoryStorage], object]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="storage local: cannot ") as failed:
        act(make(tmp_path / "file" / "fleecing"))
    assert f"{tmp_path}/file/fleecing: Not a directory" in failed.value.message
    assert failed.value.hint


@pytest.mark.parametrize("act", [DirectoryStorage.prepare, DirectoryStorage.create])
def test_a_path_that_is_a_file_is_named(
    make: Make, tmp_path: Path, act: Callable[[DirectoryStorage], object]
) -> None:
    path = tmp_path / "file"
    path.write_text("theirs")
    with pytest.raises(StorageError, match=str(path)):
        act(make(path))
    assert path.read_text() == "theirs"


def test_another_refusal_is_no_missing_tmpfile(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()
    made.prepare()
    monkeypatch.setattr(os, "open", TmpfileRefused(errno.EROFS))
    with pytest.raises(StorageError, match=r"cannot create a fleecing image in it: .*: Read-only file system"):
        made.create()


@pytest.mark.parametrize(
    ("min_free", "floor"),
    [(Share(25), lambda total: total // 4), (5 * GIB, lambda _total: 5 * GIB), (0, lambda _total: 0)],
)
def test_space_is_the_file_systems(make: Make, min_free: Share | int, floor: Callable[[int], int]) -> None:
    made = make(min_free=min_free)
    made.prepare()
    status = os.statvfs(made.path)
    space = made.space()
    assert space.floor_bytes == floor(status.f_blocks * status.f_frsize)
    # Others write here, too: about what statvfs says, for those who are not root.
    assert abs(space.free_bytes - status.f_bavail * status.f_frsize) < GIB


# --- which storage is near ---


def test_the_storage_that_holds_the_image_is_nearest_and_the_deepest_wins(make: Make, tmp_path: Path) -> None:
    image = tmp_path / "vms" / "web01" / "vda.qcow2"
    image.parent.mkdir(parents=True)
    image.touch()
    outer, inner = make(tmp_path / "vms"), make(tmp_path / "vms" / "web01")
    elsewhere, not_made = make(tmp_path), make(tmp_path / "x" / "y" / "z")
    elsewhere.path = tmp_path / "elsewhere"
    elsewhere.path.mkdir()
    assert inner.nearness(image) > outer.nearness(image) > elsewhere.nearness(image) > 0
    assert not_made.nearness(image) == elsewhere.nearness(image)


def test_another_file_system_is_not_near(make: Make, tmp_path: Path) -> None:
    with TemporaryDirectory(dir="/dev/shm") as other:
        image = Path(other) / "vda.raw"
        image.touch()
        assert Path(other).stat().st_dev != tmp_path.stat().st_dev, "this test needs /dev/shm apart from /tmp"
        assert make(tmp_path).nearness(image) == 0
        assert make(tmp_path / "not" / "made").nearness(image) == 0
        assert make(Path(other) / "not" / "made").nearness(image) > 0


def test_links_are_followed_on_both_sides(make: Make, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "vda").touch()
    (tmp_path / "link").symlink_to("real")
    direct = make(tmp_path / "real").nearness(tmp_path / "real" / "vda")
    assert make(tmp_path / "link").nearness(tmp_path / "real" / "vda") == direct
    assert make(tmp_path / "real").nearness(tmp_path / "link" / "vda") == direct


def test_what_is_not_there_is_near_nothing(make: Make, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert make(tmp_path).nearness(tmp_path / "absent") == 0
    assert make(tmp_path).nearness(tmp_path / "loop") == 0


def test_a_storage_whose_path_is_a_loop_of_links_breaks_no_choice(make: Make, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "image").touch()
    assert make(tmp_path / "loop").nearness(tmp_path / "image") <= 1
    with pytest.raises(StorageError):
        make(tmp_path / "loop").prepare()
