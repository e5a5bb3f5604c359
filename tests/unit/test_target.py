"""Snapshots as folders of qcow2 files: what is particular to them.

What holds for every target: tests/component/test_target_contract.py.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from orchestrator import aio
from orchestrator.errors import TargetError
from orchestrator.model import Compression, Disk
from orchestrator.qemu import reading
from orchestrator.target.base import Draft, FileSink, HashOf, Snapshot, Target
from orchestrator.target.images import manifest, removal
from orchestrator.target.images import target as images_module
from orchestrator.target.images.target import ImagesTarget

STARTED = datetime(2026, 11, 22, 2, 30, 0, 123456, tzinfo=UTC)
STAMP = "20261122T023000Z"
KIB, MIB = 1024, 1024 * 1024
CLUSTER = 64 * KIB
DETAILS = {"kind": "full", "run": "0a1b2c3d"}


def disk(name: str = "vda", size_bytes: int = MIB) -> Disk:
    return Disk(name, f"node-{name}", f"/machine/peripheral/{name}", size_bytes, "raw", None)


def content(size_bytes: int, seed: int = 1) -> bytes:
    """A third random, a third repeated, a third zero, whatever the size."""
    third = size_bytes // 3
    made = hashlib.shake_128(bytes([seed])).digest(third) + b"\x5a" * third
    return made + bytes(size_bytes - len(made))


async def write(sink: FileSink, size_bytes: int, data: bytes) -> None:
    """Play QEMU's part: put a disk's content into a sink."""
    # qemu-img makes images of whole sectors only, and cuts none: the sizes are multiples of 512.
    assert len(data) == size_bytes
    compressed = ["-c"] if sink.compress else []
    with in_memory(data) as source:
        argv = ["qemu-img", "convert", "-n", *compressed, "-f", "raw", "-O", "qcow2", f"/dev/fd/{source}"]
        done = await aio.run_process([*argv, f"/dev/fd/{sink.descriptor}"], pass_fds=[source, sink.descriptor])
    assert done.returncode == 0, done


@contextlib.contextmanager
def in_memory(data: bytes) -> Iterator[int]:
    """A file without a name for the block."""
    with open(os.memfd_create("content"), "wb", buffering=0) as file:  # noqa: PTH123
        file.write(data)
        yield file.fileno()


async def write_changes(sink: FileSink, changes: dict[int, bytes]) -> None:
    """Play QEMU's part in an incremental backup: write what changed, by cluster, without opening the parent."""
    writes = []
    for cluster, data in changes.items():
        how = "-z" if not any(data) else f"-P {data[0]}"
        writes += ["-c", f"write -q {how} {cluster * CLUSTER} {len(data)}"]
    image = {"driver": "file", "filename": f"/dev/fd/{sink.descriptor}"}
    options = "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": image})
    if writes:
        finished = await aio.run_process(["qemu-io", options, *writes], pass_fds=[sink.descriptor])
        assert finished.returncode == 0, finished


async def changed_chain(
    target: Target, size_bytes: int, changes: Sequence[dict[int, bytes]]
) -> list[tuple[Snapshot, bytes]]:
    """A full snapshot and incremental ones, each an hour later, and what is in each of them."""
    now = bytearray(content(size_bytes, 0))
    points = [(await snapshot(target, disk(size_bytes=size_bytes)), bytes(now))]
    for hours, changed in enumerate(changes, start=1):
        draft = await target.begin("web01", STARTED + timedelta(hours=hours))
        sink = await draft.add_disk(disk(size_bytes=size_bytes), compressible=True, parent=points[-1][0].id)
        await write_changes(sink, changed)
        for cluster, data in changed.items():
            now[cluster * CLUSTER : cluster * CLUSTER + len(data)] = data
        await draft.seal(disk(size_bytes=size_bytes))
        points.append((await draft.commit(DETAILS | {"kind": "incremental"}), bytes(now)))
    return points


def seen(folder: Path) -> set[str]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(params=[Compression.NONE, Compression.ZSTD], ids=["images", "images, zstd"])
async def target(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Target]:
    """One param for each way of using it."""
    made = ImagesTarget("main", tmp_path / "backup" / "vms", compression=request.param)
    await made.prepare()
    yield made
    assert not partials(tmp_path), "a draft was left open"
    assert not list(tmp_path.rglob("*.removed")), "a removal was left half done"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The target's folder."""
    return tmp_path / "backup" / "vms"


async def filled(target: Target, *disks: Disk, vm: str = "web01", started: datetime = STARTED) -> Draft:
    """A draft that could be committed."""
    draft = await target.begin(vm, started)
    for number, one in enumerate(disks or (disk(),)):
        sink = await draft.add_disk(one, compressible=True)
        await write(sink, one.size_bytes, content(one.size_bytes, number))
        await draft.seal(one)
    return draft


async def snapshot(target: Target, *disks: Disk, vm: str = "web01", started: datetime = STARTED) -> Snapshot:
    return await (await filled(target, *disks, vm=vm, started=started)).commit(DETAILS)


async def based_on(target: Target, *parents: Snapshot, hours: int = 1) -> Draft:
    """A draft that could be committed, in which nothing has changed: a disk for each parent."""
    draft = await target.begin("web01", STARTED + timedelta(hours=hours))
    for number, parent in enumerate(parents):
        one = disk(f"vd{'abc'[number]}")
        await draft.add_disk(one, compressible=True, parent=parent.id)
        await draft.seal(one)
    return draft


async def chain(target: Target, length: int) -> list[Snapshot]:
    """A full snapshot and incremental ones, each based on the one before it."""
    points = [await snapshot(target)]
    for hours in range(1, length):
        points.append(await (await based_on(target, points[-1], hours=hours)).commit(DETAILS))
    return points


async def refused(act: Coroutine[Any, Any, object]) -> TargetError:
    with pytest.raises(TargetError) as error:
        await act
    return error.value


def as_raw(path: Path, image_format: str) -> bytes:
    if image_format == "raw":
        return path.read_bytes()
    raw = path.with_suffix(".asraw")
    subprocess.check_call(["qemu-img", "convert", "-f", image_format, "-O", "raw", path, raw])
    return raw.read_bytes()


async def test_the_hash_is_of_the_image_as_it_is_stored(target: Target, root: Path) -> None:
    for point, _ in await changed_chain(target, MIB, [{1: b"\1" * CLUSTER}, {}]):
        stored = (root / point.id / "vda.qcow2").read_bytes()
        assert point.disk("vda").sha256 == hashlib.sha256(stored).hexdigest()
        assert point.disk("vda").sha256_of is HashOf.FILE


async def test_sealing_what_builds_on_another_does_not_read_what_that_holds(target: Target, root: Path) -> None:
    """Else an incremental backup would take as long as a full one: the base is not even looked at."""
    first = await snapshot(target)
    draft = await target.begin("web01", STARTED + timedelta(hours=1))
    sink = await draft.add_disk(disk(), compressible=True, parent=first.id)
    await write_changes(sink, {3: b"\1" * CLUSTER})
    (root / first.id / "vda.qcow2").unlink()
    await draft.seal(disk())
    await draft.commit(DETAILS | {"kind": "incremental"})


async def test_cancelled_a_long_hash_ends_soon(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    hashing = asyncio.create_task(reading.file_sha256(path))
    await asyncio.sleep(0.1)
    assert not hashing.done()
    hashing.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await hashing
    assert open_files(tmp_path) == set()


async def test_what_is_read_is_not_removed_meanwhile(
    target: Target, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what it builds on: QEMU's tools open the files of a chain one after the other."""
    points = await chain(target, 3)
    other = await snapshot(target, started=STARTED + timedelta(hours=9))
    refusals = []

    real = images_module.tools.convert

    async def removing(*arguments: Any, **more: Any) -> None:
        refusals.extend([await refused(ImagesTarget("main", root).remove(one)) for one in reversed(points)])
        await target.remove(other)
        await real(*arguments, **more)

    monkeypatch.setattr(images_module.tools, "convert", removing)
    await target.extract(points[-1], "vda", to=tmp_path / "out", image_format="raw")
    assert [error.code for error in refusals] == ["needed"] * 3
    assert "a backup, a restore or a merge of web01 that is under way" in refusals[0].message
    assert open_files(root) == set()
    for one in reversed(points):
        await target.remove(one)


async def test_what_is_gone_cannot_be_extracted(target: Target, root: Path, tmp_path: Path) -> None:
    first, second = await chain(target, 2)
    await target.remove(second)
    gone = await refused(target.extract(second, "vda", to=tmp_path / "out", image_format="raw"))
    assert (gone.code, second.id in gone.message) == ("no-snapshot", True)
    third = await (await based_on(target, first)).commit(DETAILS)
    await asyncio.to_thread(shutil.rmtree, root / first.id)
    broken = await refused(target.extract(third, "vda", to=tmp_path / "out", image_format="raw"))
    assert broken.code == "content-wrong"
    assert broken.message == f"snapshot {third.id} builds on {first.id}, which is not there"
    assert open_files(root) == set()
    assert not (tmp_path / "out").exists()


async def test_a_chain_can_be_moved(tmp_path: Path) -> None:
    """Backing files are named relative to each other."""
    target = ImagesTarget("main", tmp_path / "here")
    await target.prepare()
    first = await snapshot(target)  # content(MIB, 0)
    draft = await target.begin("web01", STARTED + timedelta(hours=1))
    await draft.add_disk(disk(), compressible=True, parent=first.id)
    await draft.seal(disk())
    second = await draft.commit(DETAILS)
    (tmp_path / "here").rename(tmp_path / "there")
    out = tmp_path / "out"
    await ImagesTarget("main", tmp_path / "there").extract(second, "vda", to=out, image_format="raw")
    assert out.read_bytes() == content(MIB, 0)


async def test_each_disk_keeps_what_it_builds_on(target: Target) -> None:
    first = await snapshot(target, disk("vda"), disk("vdb"))
    second = await snapshot(target, disk("vda"), disk("vdb"), started=STARTED + timedelta(minutes=1))
    both = await (await based_on(target, first, second)).commit(DETAILS)
    assert both.parents == (first.id, second.id)
    for one in (first, second):
        assert (await refused(target.remove(one))).code == "needed"
    await target.remove(both)
    await target.remove(first)


@pytest.mark.parametrize("ends", ["abort", "commit"])
async def test_what_a_draft_builds_on_is_not_removed_while_it_lasts(target: Target, root: Path, ends: str) -> None:
    first, second = await chain(target, 2)
    draft = await based_on(target, second, hours=2)
    error = await refused(target.remove(second))
    assert error.code == "needed"
    assert second.id in error.message
    assert (await refused(target.remove(first))).code == "needed"
    assert await target.snapshots() == [first, second]
    if ends == "abort":
        await draft.abort()
    else:
        third = await draft.commit(DETAILS)
        assert third.id in (await refused(target.remove(second))).message
        await target.remove(third)
    assert open_files(root) == set()
    await target.remove(second)
    assert await target.snapshots() == [first]


@pytest.mark.parametrize("step", ["remove", "protect"])
async def test_cancelled_it_is_finished(
    target: Target, root: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    made = await snapshot(target)
    slow = SlowDisk(monkeypatch)
    task: asyncio.Task[object]
    task = asyncio.create_task(target.remove(made) if step == "remove" else target.protect(made, protected=True))
    assert await asyncio.to_thread(slow.begun.wait, 10)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slow.under_way == 0
    assert await target.snapshots() == ([] if step == "remove" else [replace(made, protected=True)])
    assert open_files(root) == set()


def open_files(root: Path) -> set[str]:
    links = {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    return {link for link in links if link.startswith(str(root))}


class SlowDisk:
    """fsync and flock that take their time, as on a busy disk; it knows how many are under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.under_way, self.begun = 0, threading.Event()
        for module, name in ((os, "fsync"), (fcntl, "flock")):
            monkeypatch.setattr(module, name, partial(self._slow, getattr(module, name)))

    def _slow(self, real: Callable[..., Any], *arguments: Any) -> None:
        self.under_way += 1
        self.begun.set()
        time.sleep(0.05)
        real(*arguments)
        self.under_way -= 1


@pytest.mark.parametrize("step", ["begin", "seal", "commit"])
async def test_cancelling_a_step_waits_for_the_disk_and_leaves_what_abort_removes(
    target: Target, root: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    draft: Draft | None = None
    if step != "begin":
        draft = await target.begin("web01", STARTED)
        sink = await draft.add_disk(disk(), compressible=True)
        await write(sink, MIB, content(MIB))
    if step == "commit":
        assert draft is not None
        await draft.seal(disk())
    slow = SlowDisk(monkeypatch)
    task: asyncio.Task[object]
    match draft, step:
        case None, _:
            task = asyncio.create_task(target.begin("web01", STARTED))
        case _, "seal":
            task = asyncio.create_task(draft.seal(disk()))
        case _:
            task = asyncio.create_task(draft.commit(DETAILS))
    assert await asyncio.to_thread(slow.begun.wait, 10)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slow.under_way == 0
    if draft is not None:
        await draft.abort()
    assert await target.snapshots() == []
    assert seen(root) == set()
    assert open_files(root) == set()


def partials(root: Path) -> list[Path]:
    return list(root.rglob("*.partial"))


@pytest.fixture
async def images(root: Path) -> ImagesTarget:
    made = ImagesTarget("main", root)
    await made.prepare()
    return made


async def test_a_snapshot_is_a_folder_that_needs_nothing_but_qemu_img(target: Target, root: Path) -> None:
    await snapshot(target, disk("vda"), disk("vdb"))
    folder = root / "web01" / STAMP
    assert seen(root) == {
        "web01",
        *(f"web01/{STAMP}{name}" for name in ("", "/manifest.json", "/vda.qcow2", "/vdb.qcow2")),
    }
    for number, name in enumerate(["vda", "vdb"]):
        image = folder / f"{name}.qcow2"
        await asyncio.to_thread(subprocess.check_call, ["qemu-img", "check", "-q", image])
        assert await asyncio.to_thread(as_raw, image, "qcow2") == content(MIB, number)
    document = json.loads((folder / "manifest.json").read_text())
    assert document["version"] == 2
    assert (document["snapshot"], document["vm"], document["kind"]) == (f"web01/{STAMP}", "web01", "full")
    assert document["created"] == "2026-11-22T02:30:00+00:00"
    assert [one["file"] for one in document["disks"]] == ["vda.qcow2", "vdb.qcow2"]
    assert document["details"] == DETAILS


async def test_protected_is_an_empty_file_and_the_manifest_stays_as_it_was(target: Target, root: Path) -> None:
    made = await snapshot(target)
    there, written = seen(root), (root / made.id / "manifest.json").read_bytes()
    await target.protect(made, protected=True)
    marker = root / made.id / "protected"
    assert seen(root) - there == {f"{made.id}/protected"}
    assert marker.read_bytes() == b""
    assert stat.S_IMODE(marker.stat().st_mode) == 0o600
    assert (root / made.id / "manifest.json").read_bytes() == written


def test_wherever_a_removal_is_killed_a_snapshot_is_listed_whole_or_not_at_all(tmp_path: Path) -> None:
    code = f"import test_target as suite; suite.remove_killed_at_each_step({str(tmp_path)!r})"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=import_suite(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def remove_killed_at_each_step(folder: str) -> None:
    """In a process without threads, since it forks: the child is killed before its first step, its second, …"""
    original = Path(folder) / "original"
    first, second, third = asyncio.run(chain(ImagesTarget("main", original), 3))
    whole, ways = files(original), set()
    for step in itertools.count(1):
        root = Path(folder) / str(step)
        shutil.copytree(original, root)
        target = ImagesTarget("main", root)
        child = os.fork()
        if child == 0:
            kill_at(step)
            target._remove(third)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        listed = asyncio.run(target.snapshots())
        assert listed in ([first, second, third], [first, second]), (step, listed)
        there = {name: data for name, data in files(root).items() if ".removed" not in name}
        ids = tuple(one.id for one in listed)
        assert there == {name: data for name, data in whole.items() if name.startswith(ids)}, step
        ways.add((len(listed), len(files(root)) - len(there)))
        if os.WIFEXITED(status):
            assert (status, len(listed), files(root)) == (0, 2, there)
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        if step % 2:  # a new draft clears what is left, and so does a removal
            asyncio.run(aborted(target))
        else:
            asyncio.run(target.remove(third))
            assert asyncio.run(target.snapshots()) == [first, second]
        assert not list(root.rglob("*.removed")), step
        shutil.rmtree(root)
    # Before it was taken off the list, with each number of files still there after, and when all was done.
    assert ways == {(3, 0), (2, 2), (2, 1), (2, 0)}


def kill_at(step: int) -> None:
    """Die before this process's step of that number: whatever it opens, locks, renames, deletes or lists."""
    steps = itertools.count(1)

    def seen_step(event: str, _arguments: object) -> None:
        if event.startswith(("os.", "fcntl.", "shutil.", "open")) and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(seen_step)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


async def aborted(target: Target) -> None:
    await (await target.begin("web01", STARTED + timedelta(days=1))).abort()


async def test_it_is_durably_off_the_list_before_anything_is_deleted(
    images: ImagesTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, steps = await snapshot(images), list[tuple[str, Path]]()

    def noted(name: str, real: Callable[[Path], None], path: Path) -> None:
        assert not (root / made.id).exists()
        steps.append((name, path))
        real(path)

    for module, name in ((removal.durable, "sync"), (removal.shutil, "rmtree")):
        monkeypatch.setattr(module, name, partial(noted, name, getattr(module, name)))
    await images.remove(made)
    assert steps == [("sync", root / "web01"), ("rmtree", root / f"{made.id}.removed")]


@pytest.mark.parametrize("way", ["begin", "remove another", "remove it"])
async def test_what_a_killed_removal_left_is_not_listed_and_goes_next_time(
    images: ImagesTarget, root: Path, way: str
) -> None:
    left, kept, other = [await snapshot(images, started=STARTED + timedelta(hours=hours)) for hours in range(3)]
    (root / left.id).rename(root / f"{left.id}.removed")
    with capture_logs() as lines:
        assert await images.snapshots() == [kept, other]
        await (aborted(images) if way == "begin" else images.remove(left if way == "remove it" else other))
    assert not list(root.rglob("*.removed"))
    assert kept in await images.snapshots()
    if way != "remove it":
        assert lines == [
            {"event": "draft.removed", "log_level": "info", "target": "main", "path": f"{root / left.id}.removed"}
        ]


async def test_a_removal_waits_for_another_one_that_is_under_way(images: ImagesTarget, root: Path) -> None:
    made = await snapshot(images)
    removed = root / f"{made.id}.removed"
    (root / made.id).rename(removed)
    lock = os.open(removed, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    waiting = asyncio.create_task(images.remove(made))
    await asyncio.sleep(0.05)
    await aborted(images)  # but who does not need the space does not wait
    assert removed.exists()
    assert not waiting.done()
    os.close(lock)
    await waiting
    assert seen(root) == {"web01"}


async def test_what_was_left_of_one_is_not_in_the_way_of_another_of_the_same_time(
    images: ImagesTarget, root: Path
) -> None:
    made = await snapshot(images)
    shutil.copytree(root / made.id, root / f"{made.id}.removed")
    await images.remove(made)
    assert seen(root) == {"web01"}


@pytest.mark.parametrize("harm", ["unreadable", "misplaced"])
async def test_what_is_not_listed_but_can_still_be_read_keeps_what_it_builds_on(
    images: ImagesTarget, root: Path, harm: str, tmp_path: Path
) -> None:
    """qemu-img does without a manifest."""
    first, second = await chain(images, 2)
    other = await snapshot(images, started=STARTED + timedelta(hours=5))
    folder = root / second.id
    (folder / "notes.qcow2").write_bytes(b"no image")
    (folder / "short.qcow2").write_bytes(b"QFI\xfb")
    (folder / "odd.qcow2").write_bytes(b"QFI\xfb" + b"\xff" * 60)
    if harm == "unreadable":
        (folder / manifest.NAME).write_text("{")
    else:
        folder = folder.rename(root / "web01" / "saved")
    with capture_logs() as lines:
        assert await images.snapshots() == [first, other]
    assert [line["event"] for line in lines] == ["snapshot.unreadable"]
    error = await refused(images.remove(first))
    assert (error.code, folder.name in error.message) == ("needed", True)
    await images.remove(other)
    await asyncio.to_thread(
        subprocess.check_call, ["qemu-img", "convert", "-O", "raw", folder / "vda.qcow2", tmp_path / "out"]
    )
    assert (tmp_path / "out").read_bytes() == content(MIB, 0)


async def test_a_copy_of_a_snapshot_is_not_taken_for_it(images: ImagesTarget, root: Path) -> None:
    made = await snapshot(images)
    shutil.copytree(root / made.id, root / "web01" / "copy")
    shutil.copytree(root / "web01", root / "web02")
    with capture_logs() as lines:
        assert await images.snapshots() == [made]
    assert len(lines) == 3
    assert all(f"is of snapshot {made.id}, not web0" in line["error"] for line in lines)
    await images.remove(made)
    assert (root / "web01" / "copy" / "vda.qcow2").exists()


async def test_what_cannot_be_removed_says_why_and_stays_whole(
    images: ImagesTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await snapshot(images)
    there = files(root)

    def read_only(path: Path, _to: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", read_only)
        error = await refused(images.remove(made))
    assert error.code == "target-unwritable"
    assert f"Read-only file system: {root / made.id}" in error.message
    assert await images.snapshots() == [made]
    assert files(root) == there
    assert open_files(root) == set()


async def test_only_we_may_read_it(target: Target, root: Path) -> None:
    await snapshot(target)
    modes = {name: stat.S_IMODE((root / name).stat().st_mode) for name in (".", *seen(root))}
    image, folder = f"web01/{STAMP}/vda.qcow2", f"web01/{STAMP}"
    assert modes.pop(f"{folder}/manifest.json") & 0o022 == 0  # names and hashes; the folder keeps others out
    assert modes == {".": 0o700, "web01": 0o700, folder: 0o700, image: 0o600}


async def test_compression_makes_it_smaller_where_qemu_writes_each_cluster_once(root: Path) -> None:
    stored = {}
    for compression, compressible in (
        (Compression.NONE, True),
        (Compression.ZSTD, True),
        (Compression.ZSTD, False),
    ):
        made = ImagesTarget("main", root, compression=compression)
        await made.prepare()
        draft = await made.begin("web01", STARTED)
        sink = await draft.add_disk(disk(size_bytes=3 * MIB), compressible=compressible)
        assert sink.compress is (compression is Compression.ZSTD and compressible)
        await write(sink, 3 * MIB, content(3 * MIB))
        stored[compression, compressible] = (await draft.seal(disk(size_bytes=3 * MIB))).stored_bytes
        await draft.abort()
    assert stored[Compression.ZSTD, True] < 0.7 * stored[Compression.NONE, True]
    assert stored[Compression.ZSTD, False] == stored[Compression.NONE, True]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError"),
        ('{"version": 1}', "KeyError"),
        ('{"version": 3}', "version 3; this vmfleece reads 1 and 2"),
        ("\udcff", "UnicodeDecodeError"),
    ],
)
async def test_a_broken_manifest_hides_no_other_snapshot(
    images: ImagesTarget, root: Path, broken: str, said: str
) -> None:
    kept = await snapshot(images)
    bad = root / "web01" / "20261121T023000Z" / manifest.NAME
    bad.parent.mkdir()
    bad.write_bytes(broken.encode(errors="surrogateescape"))
    (root / "web01" / "notes.txt").touch()
    (root / "lost+found").mkdir()
    with capture_logs() as lines:
        assert await images.snapshots() == [kept]
    (line,) = lines
    assert (line["event"], line["target"]) == ("snapshot.unreadable", "main")
    assert said in line["error"]
    assert str(bad) in line["error"]


async def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theirs")
    for path in (tmp_path / "file", tmp_path / "file" / "vms"):
        made = ImagesTarget("main", path)
        for act in (made.prepare(), made.begin("web01", STARTED)):
            with pytest.raises(TargetError) as failed:
                await act
            assert failed.value.code == "target-unwritable"
            assert failed.value.message.startswith("target main: ")
            assert str(path) in failed.value.message
        assert await made.snapshots() == []
    assert (tmp_path / "file").read_text() == "theirs"


async def test_a_rename_that_is_not_durable_is_undone(
    images: ImagesTarget, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    given_up, tried_again = await filled(images, vm="db01"), await filled(images)
    with monkeypatch.context() as patched:
        patched.setattr(images_module.durable, "sync", broken)
        for draft in (given_up, tried_again):
            with pytest.raises(TargetError, match="Input/output error"):
                await draft.commit(DETAILS)
    await given_up.abort()
    committed = await tried_again.commit(DETAILS)
    assert await images.snapshots() == [committed]
    assert not (root / "db01").exists()


async def test_a_full_target_says_so_and_can_be_committed_to_once_there_is_room(tmp_path: Path) -> None:
    """In a process of its own, with a small file system that nobody else sees."""
    small = tmp_path / "small"
    small.mkdir()
    code = f"import asyncio, test_target as suite; asyncio.run(suite.on_a_full_file_system({str(small)!r}))"
    mounting = (
        f"mount -t tmpfs -o size=4m,nr_inodes=20 none {small} && exec {sys.executable} -c {shlex.quote(code)}"
    )
    argv = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", mounting]
    done = await asyncio.to_thread(
        partial(subprocess.run, argv, env=import_suite(), capture_output=True, text=True, check=False, timeout=60)
    )
    assert done.returncode == 0, done.stderr


def import_suite() -> dict[str, str]:
    places = (Path(__file__).parents[2], Path(__file__).parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}


async def on_a_full_file_system(path: str) -> None:
    root = Path(path) / "vms"
    made = ImagesTarget("main", root)
    await made.prepare()
    draft = await filled(made)
    with (root / "junk").open("wb", buffering=0) as junk, contextlib.suppress(OSError):
        while junk.write(bytes(512)):
            pass
    await full(draft.commit(DETAILS))
    assert await made.snapshots() == []
    (root / "junk").unlink()
    committed = await draft.commit(DETAILS)
    assert await made.snapshots() == [committed]
    for number in range(20):  # no inode is left
        with contextlib.suppress(OSError):
            (root / f"junk{number}").touch()
    await full(made.begin("db01", STARTED))
    await full(made.begin("web01", STARTED))
    assert await made.snapshots() == [committed]


async def full(act: Coroutine[Any, Any, object]) -> None:
    with pytest.raises(TargetError) as failed:
        await act
    assert failed.value.code == "target-full"
    assert "No space left" in failed.value.message
