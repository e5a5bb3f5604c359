"""The contract of a storage, over every way in which one makes its files; and what it finds lacking.

No file system that lacks O_TMPFILE, sparse files or descriptor passing can be had on every kernel, so what the
kernel would answer is put in its place. Real file systems: tests/component/test_file_systems.py.
"""

import errno
import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from orchestrator.errors import StorageError
from orchestrator.storage import nameless, probe
from orchestrator.storage.base import Feature, Lack, Storage
from orchestrator.storage.directory import DirectoryStorage
from orchestrator.units import GIB, MIB, Share

Make = Callable[..., DirectoryStorage]
NAME = "vmf-1a2b3c4d-0"

real_open = os.open


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


class TmpfileRefused:
    """os.open on a file system without O_TMPFILE: NFS, some FUSE, old overlays; each says so differently."""

    def __init__(self, error: int) -> None:
        self.error, self.times = error, 0
        self.opened: list[Path] = []

    def __call__(self, path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            self.times += 1
            raise OSError(self.error, os.strerror(self.error), str(path))
        self.opened.append(Path(path))
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
    files = [storage.create(NAME, GIB), storage.create("vmf-1a2b3c4d-1", GIB)]
    assert list((tmp_path / "deep" / "fleecing").iterdir()) == []
    for file in files:
        status = os.fstat(file.descriptor)
        assert (status.st_nlink, status.st_size) == (0, 0)
        file.close()


def test_only_we_may_open_it(storage: Storage, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "deep" / "fleecing").stat().st_mode) == 0o700
    file = storage.create(NAME, GIB)
    assert stat.S_IMODE(os.fstat(file.descriptor).st_mode) == 0o600
    assert not os.get_inheritable(file.descriptor)
    file.close()


def test_used_bytes_are_what_it_occupies_not_its_length(storage: Storage) -> None:
    file = storage.create(NAME, GIB)
    file.extend(10 * GIB)
    assert file.used_bytes() == 0
    os.pwrite(file.descriptor, bytes(MIB), 5 * GIB)
    os.fsync(file.descriptor)
    assert MIB <= file.used_bytes() <= MIB + 64 * 1024
    file.close()


def test_extending_keeps_what_is_there(storage: Storage) -> None:
    file = storage.create(NAME, GIB)
    os.pwrite(file.descriptor, b"image", 0)
    file.extend(GIB)
    assert os.fstat(file.descriptor).st_size == GIB
    assert os.pread(file.descriptor, 5, 0) == b"image"
    file.close()


@pytest.fixture
def longest_file() -> Iterator[int]:
    """As file systems have it that are not made for large files; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * GIB, hard))
    yield 4 * GIB
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_become_so_long_says_how_long(storage: Storage, longest_file: int) -> None:
    file = storage.create(NAME, GIB)
    with pytest.raises(StorageError, match=rf"storage local: .* {longest_file + 1} bytes: File too large"):
        file.extend(longest_file + 1)
    file.close()


def test_closing_lets_go_of_it_once(storage: Storage) -> None:
    file = storage.create(NAME, GIB)
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


def create(storage: Storage) -> None:
    storage.create(NAME, GIB).close()


@pytest.mark.parametrize("act", [DirectoryStorage.prepare, create, DirectoryStorage.space])
def test_a_path_below_a_file_is_named(
    make: Make, tmp_path: Path, act: Callable[[DirectoryStorage], object]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="storage local: cannot ") as failed:
        act(make(tmp_path / "file" / "fleecing"))
    assert f"{tmp_path}/file/fleecing: Not a directory" in failed.value.message
    assert failed.value.hint


@pytest.mark.parametrize("act", [DirectoryStorage.prepare, create, DirectoryStorage.space])
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
        made.create(NAME, GIB)


# --- a file system without files that never had a name ---


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> TmpfileRefused:
    refusing = TmpfileRefused(errno.EOPNOTSUPP)
    monkeypatch.setattr(os, "open", refusing)
    return refusing


def test_the_name_is_had_for_a_moment(make: Make, refusing: TmpfileRefused) -> None:
    made = make()
    made.prepare()
    made.create(NAME, GIB).close()
    assert refusing.opened[-1] == made.path / NAME


def test_a_name_that_is_taken_stays_anothers(make: Make, refusing: TmpfileRefused) -> None:
    made = make()
    made.prepare()
    (made.path / NAME).write_text("theirs")
    file = made.create(NAME, GIB)
    os.pwrite(file.descriptor, b"ours", 0)
    file.close()
    assert refusing.opened[-1].name.startswith(f"{NAME}-")
    assert [(path.name, path.read_text()) for path in made.path.iterdir()] == [(NAME, "theirs")]


@pytest.mark.usefixtures("refusing")
def test_a_name_that_cannot_be_taken_away_again_costs_no_descriptor(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    made.prepare()
    before = open_descriptors()

    def unlink(path: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(StorageError, match="Operation not permitted"):
        made.create(NAME, GIB)
    assert open_descriptors() == before


# --- its space ---


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


def test_space_is_asked_for_without_looking_around(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()
    made.prepare()

    def existing(storage: DirectoryStorage) -> Path:
        raise AssertionError(storage.path)

    monkeypatch.setattr(DirectoryStorage, "_existing", existing)
    assert made.space().free_bytes > 0


def test_a_folder_that_is_not_made_yet_has_the_space_of_the_one_that_is(make: Make) -> None:
    with TemporaryDirectory(dir="/dev/shm") as other:
        made = make(Path(other) / "not" / "made", min_free=Share(10))
        status = os.statvfs(other)
        assert made.space().floor_bytes == status.f_blocks * status.f_frsize // 10
        assert not made.path.parent.exists()


# --- what is lacking ---


def features(lacks: tuple[Lack, ...]) -> list[Feature]:
    return [lack.feature for lack in lacks]


def test_what_is_lacking_is_returned_and_kept(make: Make, refusing: TmpfileRefused) -> None:
    made = make()
    assert made.lacks == ()
    [lack] = made.prepare()
    assert (lack.feature, lack.required) == (Feature.NAMELESS_FILES, False)
    assert "unlinked at once" in lack.consequence
    assert made.lacks == (lack,)
    assert [path.name for path in refusing.opened if path.parent == made.path] == ["vmf-probe"]
    assert list(made.path.iterdir()) == []


def test_a_file_system_is_probed_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[Path] = []

    def find_lacks(folder: Path) -> tuple[Lack, ...]:
        probed.append(folder)
        return probe.LACKS[:1]

    monkeypatch.setattr(probe, "find_lacks", find_lacks)
    made = make()
    assert made.prepare() == made.prepare() == made.lacks == probe.LACKS[:1]
    assert probed == [made.path]


def test_preparing_again_sees_that_nothing_can_be_made_any_more(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    made.prepare()
    monkeypatch.setattr(os, "open", TmpfileRefused(errno.EROFS))
    with pytest.raises(StorageError, match="Read-only file system"):
        made.prepare()


def assert_refused(storage: DirectoryStorage, feature: Feature) -> None:
    """It says what is missing, where, and what to do; and it looks again the next time."""
    for _ in range(2):
        with pytest.raises(StorageError, match=f"storage local: .* lacks {feature}: ") as failed:
            storage.prepare()
        assert str(storage.path) in failed.value.message
        assert failed.value.code == "storage"
        assert "ext4" in failed.value.hint
        assert features(storage.lacks) == [feature]
    assert list(storage.path.iterdir()) == []


@pytest.mark.usefixtures("longest_file")
def test_without_long_files_there_are_no_images(make: Make) -> None:
    assert_refused(make(), Feature.SPARSE_FILES)


def test_without_sparse_files_there_are_no_images(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def fill(descriptor: int, length: int) -> None:
        lengths.append(length)
        os.posix_fallocate(descriptor, 0, length)

    monkeypatch.setattr(os, "ftruncate", fill)
    assert_refused(make(), Feature.SPARSE_FILES)
    assert max(lengths) == MIB


def test_without_descriptor_passing_there_are_no_images(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_by_name(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).startswith("/dev/fd/"):
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), path)
        return real_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", only_by_name)
    assert_refused(make(), Feature.DESCRIPTOR_PASSING)


def test_a_file_that_is_another_one_when_opened_again_cannot_be_passed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).startswith("/dev/fd/"):
            path = tmp_path / "another"
        return real_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", another)
    assert_refused(make(), Feature.DESCRIPTOR_PASSING)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM])
def test_without_hole_punching_images_can_be_made(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_arguments: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(probe, "_punch", refuse)
    [lack] = make().prepare()
    assert (lack.feature, lack.required) == (Feature.HOLE_PUNCHING, False)


def test_a_hole_that_gives_nothing_back_is_none(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_punch", lambda *_arguments: None)
    monkeypatch.setattr(probe, "COUNTING_SECONDS", 0.05)
    assert features(make().prepare()) == [Feature.HOLE_PUNCHING]


def test_a_hole_may_be_counted_late(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    punch = probe._punch
    waiting: list[tuple[int, int, int]] = []
    monkeypatch.setattr(probe, "_punch", lambda *arguments: waiting.append(arguments))
    monkeypatch.setattr(probe.time, "sleep", lambda _seconds: punch(*waiting.pop()))
    assert make().prepare() == ()
    assert waiting == []


def test_data_may_be_counted_late(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nameless, "occupied_bytes", lambda _descriptor: 512)
    assert make().prepare() == ()


def test_a_huge_page_may_be_occupied_for_little(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    occupied = iter([0, 0, 2 * MIB, MIB])
    monkeypatch.setattr(nameless, "occupied_bytes", lambda _descriptor: next(occupied))
    assert make().prepare() == ()


def test_a_write_may_be_done_in_parts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, content, at: write(fd, content[: -(-len(content) // 2)], at))
    assert make().prepare() == ()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize(
    "call", ["os.ftruncate", "os.pwrite", "os.fsync", "probe._punch", "os.pread", "socket.socketpair"]
)
def test_a_reason_of_the_moment_is_no_lack(
    make: Make, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    made = make()
    before = open_descriptors()

    def fail(*_arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as now:
        where, _, what = call.partition(".")
        now.setattr(probe if where == "probe" else getattr(probe, where), what, fail)
        with pytest.raises(StorageError) as failed:
            made.prepare()
    assert f"{made.path}: {os.strerror(number)}" in failed.value.message
    assert ("is full" in failed.value.hint) == (number in probe.FULL)
    assert made.lacks == ()
    assert open_descriptors() == before
    assert made.prepare() == ()


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
