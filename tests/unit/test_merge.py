"""Snapshots that are made to stand alone: whoever dies in it, each remaining one gives back what it had."""

import asyncio
import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from orchestrator import aio
from orchestrator.errors import TargetError, ToolError
from orchestrator.model import Compression
from orchestrator.target.base import HashOf, Snapshot
from orchestrator.target.images import chain, merging, qcow2
from orchestrator.target.images.target import ImagesTarget
from tests.unit.test_target import (
    CLUSTER,
    DETAILS,
    MIB,
    STARTED,
    based_on,
    changed_chain,
    content,
    disk,
    files,
    import_suite,
    open_files,
    refused,
    seen,
    snapshot,
    write,
    write_changes,
)

SIZE = MIB
CHANGES = [{0: b"\1" * CLUSTER, 2: bytes(CLUSTER)}, {1: b"\2" * CLUSTER}, {15: b"\3" * CLUSTER}]
OLDEST, SECOND, MERGED, NEWEST = range(4)
"""In a chain with these changes, the third is merged."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "backup"


@pytest.fixture
async def target(root: Path) -> ImagesTarget:
    made = ImagesTarget("main", root)
    await made.prepare()
    return made


@pytest.fixture
async def points(target: ImagesTarget) -> list[tuple[Snapshot, bytes]]:
    return await changed_chain(target, SIZE, CHANGES)


async def assert_given_back(target: ImagesTarget, *points: tuple[Snapshot, bytes]) -> None:
    """Each is listed, and gives back what it had, checked and byte for byte."""
    listed = {one.id: one for one in await target.snapshots()}
    out = target.path.parent / "out.raw"
    for point, data in points:
        await target.extract(listed[point.id], "vda", to=out, image_format="raw")
        assert out.read_bytes() == data, point.id
        out.unlink()


async def test_what_it_was_built_on_can_go_and_what_builds_on_it_stays(
    target: ImagesTarget, root: Path, points: list[tuple[Snapshot, bytes]]
) -> None:
    (oldest, _), (second, _), (merged, data), (newest, _) = points
    await target.merge(merged)
    after = await target.snapshots()
    image = root / merged.id / "vda.qcow2"
    (one,) = after[MERGED].disks
    assert one == replace(
        merged.disk("vda"),
        parent=None,
        sha256=hashlib.sha256(data).hexdigest(),
        sha256_of=HashOf.CONTENT,
        stored_bytes=image.stat().st_blocks * 512,
    )
    assert after[MERGED] == replace(merged, kind="full", disks=(one,))
    assert [*after[:MERGED], *after[MERGED + 1 :]] == [oldest, second, newest]
    assert qcow2.backing_name(image) == ""
    assert image.stat().st_mode & 0o777 == 0o600
    await assert_given_back(target, *points)
    for gone in (second, oldest):
        await target.remove(gone)
    assert seen(root) == {
        "web01",
        *(f"{one.id}{name}" for one in (merged, newest) for name in ("", "/manifest.json", "/vda.qcow2")),
    }
    await assert_given_back(target, *points[MERGED:])
    assert (await refused(target.remove(merged))).code == "needed"
    draft = await based_on(target, newest, hours=9)  # the chain goes on
    await draft.commit(DETAILS | {"kind": "incremental"})
    assert open_files(root) == set()


async def test_what_stands_alone_is_left_as_it_is(target: ImagesTarget, root: Path) -> None:
    made = await snapshot(target)
    before = files(root)
    await target.merge(made)
    assert files(root) == before


async def test_a_disk_that_stands_alone_beside_others_is_left_as_it_is(target: ImagesTarget, root: Path) -> None:
    first = await snapshot(target, disk("vda"), disk("vdb"))
    draft = await target.begin("web01", STARTED + timedelta(hours=1))
    await write_changes(await draft.add_disk(disk("vda"), compressible=True, parent=first.id), CHANGES[0])
    await write(await draft.add_disk(disk("vdb"), compressible=True), MIB, content(MIB, 7))
    for name in ("vda", "vdb"):
        await draft.seal(disk(name))
    second = await draft.commit(DETAILS | {"kind": "incremental"})
    kept = (root / second.id / "vdb.qcow2").stat()
    await target.merge(second)
    assert (root / second.id / "vdb.qcow2").stat() == kept
    assert (await target.snapshots())[1].disk("vdb") == second.disk("vdb")
    await target.remove(first)


async def test_protection_and_unknown_keys_of_the_manifest_are_kept(
    target: ImagesTarget, root: Path, points: list[tuple[Snapshot, bytes]]
) -> None:
    merged = points[MERGED][0]
    path = root / merged.id / "manifest.json"
    document = json.loads(path.read_text())
    document["later"] = {"a": 1}
    document["disks"][0]["later"] = 2
    path.write_text(json.dumps(document))
    await target.protect(merged, protected=True)
    await target.merge(merged)
    after = json.loads(path.read_text())
    assert (after["later"], after["disks"][0]["later"]) == ({"a": 1}, 2)
    assert after["details"] == document["details"]
    assert (await target.snapshots())[MERGED].protected


@pytest.mark.parametrize("compression", Compression)
async def test_what_was_compressed_stays_so(root: Path, compression: Compression) -> None:
    size = 3 * MIB
    made = ImagesTarget("main", root, compression=compression)
    await made.prepare()
    points = await changed_chain(made, size, CHANGES[:1])
    await ImagesTarget("main", root).merge(points[1][0])  # whatever the configuration says by now
    image = root / points[1][0].id / "vda.qcow2"
    info = json.loads(
        await asyncio.to_thread(subprocess.check_output, ["qemu-img", "info", "--output=json", image])
    )
    said = info["format-specific"]["data"]["compression-type"]
    assert (said, qcow2.is_zstd(image)) == (("zstd", True) if compression is Compression.ZSTD else ("zlib", False))
    first, second = await made.snapshots()
    assert second.stored_bytes <= first.stored_bytes + 2 * CLUSTER
    await assert_given_back(made, *points)


def unchanged(root: Path, before: dict[str, bytes]) -> bool:
    return files(root) == before and open_files(root) == set()


@pytest.mark.parametrize("number", [OLDEST, SECOND, MERGED])
async def test_a_damaged_chain_is_not_merged(
    target: ImagesTarget, root: Path, points: list[tuple[Snapshot, bytes]], number: int
) -> None:
    image = root / points[number][0].id / "vda.qcow2"
    data = bytearray(image.read_bytes())
    data[data.index(content(SIZE, 0)[4096:4128] if number == OLDEST else (b"\1\2"[number - 1 : number] * 64))] ^= 1
    image.write_bytes(data)
    before = files(root)
    error = await refused(target.merge(points[MERGED][0]))
    assert error.code == "content-wrong"
    assert f"in snapshot {points[number][0].id} is damaged" in error.message
    assert unchanged(root, before)


async def test_what_was_written_wrong_is_not_published(
    target: ImagesTarget, root: Path, points: list[tuple[Snapshot, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = files(root), merging.tools.flatten

    async def badly(_source: Path, descriptor: int, *, compress: bool) -> None:
        await real(root / points[OLDEST][0].id / "vda.qcow2", descriptor, compress=compress)

    monkeypatch.setattr(merging.tools, "flatten", badly)
    error = await refused(target.merge(points[MERGED][0]))
    assert (error.code, "was merged wrong" in error.message) == ("content-wrong", True)
    assert unchanged(root, before)


async def test_where_it_might_not_fit_it_is_refused_beforehand(
    target: ImagesTarget, root: Path, points: list[tuple[Snapshot, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = files(root), os.statvfs(root)
    most = MIB + MIB * 1025 // 1024  # an empty image and the whole disk: the chain occupies more
    for free_bytes in (most - real.f_frsize, most + real.f_frsize):
        fields = list(real)
        fields[4] = free_bytes // real.f_frsize
        monkeypatch.setattr(os, "statvfs", lambda _path, fields=fields: os.statvfs_result(fields))
        if free_bytes < most:
            error = await refused(target.merge(points[MERGED][0]))
            assert error.code == "target-full"
            assert f"merging {points[MERGED][0].id} needs up to 2.0 MiB, and 2.0 MiB are free" in error.message
            assert unchanged(root, before)
        else:
            await target.merge(points[MERGED][0])


async def test_a_tool_that_fails_leaves_everything_as_it_was(
    target: ImagesTarget, root: Path, points: list[tuple[Snapshot, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(root)

    async def failing(*_arguments: object, **_more: object) -> None:
        raise ToolError("qemu-img convert failed: No space left on device")

    monkeypatch.setattr(merging.tools, "flatten", failing)
    error = await refused(target.merge(points[MERGED][0]))
    assert (error.code, error.message[:13]) == ("target-unwritable", "target main: ")
    assert unchanged(root, before)


async def test_what_is_gone_cannot_be_merged(target: ImagesTarget, points: list[tuple[Snapshot, bytes]]) -> None:
    await target.remove(points[NEWEST][0])
    assert (await refused(target.merge(points[NEWEST][0]))).code == "no-snapshot"


@pytest.mark.parametrize("use", list(itertools.product(["a reader", "a draft"], ["beforehand", "at the end"])))
async def test_what_is_in_use_is_not_merged(
    target: ImagesTarget,
    root: Path,
    points: list[tuple[Snapshot, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    use: tuple[str, str],
) -> None:
    """A restore of what builds on it holds it, too: its manifest says how its image is checked."""
    merged, before, real = points[MERGED][0], files(root), merging.tools.flatten
    written, (by, when) = [], use
    async with contextlib.AsyncExitStack() as stack:

        async def used() -> None:
            if by == "a draft":
                draft = await based_on(target, merged, hours=9)
                stack.push_async_callback(draft.abort)
                before.update(files(root))
            else:
                reading = chain.held(root / "web01", points[NEWEST][0].id, ["vda"], target="main")
                await stack.enter_async_context(reading)

        async def flatten(*arguments: Any, **more: Any) -> None:
            written.append(arguments)
            if when == "at the end":
                before.update(files(root))
                before.pop(f"{merged.id}/vda.qcow2.merged")
                await used()
                before.pop(f"{merged.id}/vda.qcow2.merged", None)
            await real(*arguments, **more)

        monkeypatch.setattr(merging.tools, "flatten", flatten)
        if when == "beforehand":
            await used()
        error = await refused(target.merge(merged))
        assert error.code == "needed"
        assert f"snapshot {merged.id} is being restored, merged, or built on" in error.message
        assert bool(written) == (when == "at the end")
        assert files(root) == before
    monkeypatch.setattr(merging.tools, "flatten", real)
    await target.merge(merged)
    await assert_given_back(target, *points)
    assert list(root.rglob("*.merged")) == []


async def test_two_merges_of_one_do_not_meet(
    target: ImagesTarget, root: Path, points: list[tuple[Snapshot, bytes]]
) -> None:
    merged = points[MERGED][0]
    outcomes = await asyncio.gather(
        *(ImagesTarget("main", root).merge(merged) for _ in range(3)), return_exceptions=True
    )
    for outcome in outcomes:
        assert outcome is None or (isinstance(outcome, TargetError) and outcome.code == "needed"), outcome
    await target.merge(merged)
    assert (await target.snapshots())[MERGED].parents == ()
    assert list(root.rglob("*.merged")) == []
    await assert_given_back(target, *points)


async def test_what_a_merge_reads_is_not_removed_meanwhile(
    target: ImagesTarget, points: list[tuple[Snapshot, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals, real = [], merging.tools.flatten

    async def meanwhile(*arguments: Any, **more: Any) -> None:
        refusals.extend([(await refused(target.remove(one))).code for one, _ in points[:NEWEST]])
        await (await target.begin("web01", STARTED + timedelta(days=1))).abort()  # leaves a live one's files alone
        for one, _ in points:  # but all of them can be read
            argv = ["flock", "--nonblock", "--shared", target.path / one.id, "true"]
            await asyncio.to_thread(subprocess.run, argv, check=True)
        await real(*arguments, **more)

    monkeypatch.setattr(merging.tools, "flatten", meanwhile)
    await target.merge(points[MERGED][0])
    assert refusals == ["needed"] * 3
    assert (await target.snapshots())[MERGED].parents == ()


async def until_it_is_free(act: Callable[[Snapshot], Coroutine[Any, Any, None]], one: Snapshot) -> None:
    while True:
        try:
            return await act(one)
        except TargetError as error:
            if error.code != "needed":
                raise
            await asyncio.sleep(0.01)


async def test_restores_beside_it_are_not_harmed(
    target: ImagesTarget, root: Path, points: list[tuple[Snapshot, bytes]]
) -> None:
    """Others restore it and what builds on it, while it is merged and what it was built on is removed."""
    (oldest, _), (second, _), (merged, _), _ = points
    done = asyncio.Event()
    counts = {"before": 0, "after": 0}

    async def restoring() -> None:
        out, other = root.parent / "out", ImagesTarget("main", root)
        pauses_seconds = itertools.cycle([0.05, 0.4, 0.1])  # moments in which nobody reads it
        for (point, data), pause_seconds in zip(itertools.cycle(points[MERGED:]), pauses_seconds, strict=False):
            await other.extract(point, "vda", to=out, image_format="raw")
            assert await asyncio.to_thread(out.read_bytes) == data
            counts["after" if done.is_set() else "before"] += 1
            if counts["after"] == 4:
                return
            out.unlink()
            await asyncio.sleep(pause_seconds)

    async def merging_and_removing() -> None:
        while counts["before"] < 2:
            await asyncio.sleep(0.01)
        for act, one in ((target.merge, merged), (target.remove, second), (target.remove, oldest)):
            await until_it_is_free(act, one)
        done.set()

    async with asyncio.timeout(120):
        await aio.all_or_first_error([merging_and_removing(), restoring()])
    assert [one.parents for one in await target.snapshots()] == [(), (merged.id,)]


async def test_cancelled_while_it_writes_nothing_is_left(
    target: ImagesTarget, root: Path, points: list[tuple[Snapshot, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, writing = files(root), asyncio.Event()

    async def slowly(*_arguments: object, **_more: object) -> None:
        writing.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(merging.tools, "flatten", slowly)
    task = asyncio.create_task(target.merge(points[MERGED][0]))
    await asyncio.wait_for(writing.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert unchanged(root, before)


async def test_cancelled_while_it_takes_over_it_is_finished(
    target: ImagesTarget, root: Path, points: list[tuple[Snapshot, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, publishing, real = asyncio.get_running_loop(), asyncio.Event(), merging._publish

    def slowly(*arguments: Any) -> None:
        loop.call_soon_threadsafe(publishing.set)
        time.sleep(0.1)
        real(*arguments)

    monkeypatch.setattr(merging, "_publish", slowly)
    task = asyncio.create_task(target.merge(points[MERGED][0]))
    await asyncio.wait_for(publishing.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await target.snapshots())[MERGED].parents == ()
    assert open_files(root) == set()
    assert list(root.rglob("*.merged")) == []
    await assert_given_back(target, *points)


# --- dying in it ---


async def half_done(target: ImagesTarget, merged: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die after the manifest says that it stands alone, before its image does."""

    def dying(*_arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(merging, "_take_over", dying)
        assert (await refused(target.merge(merged))).code == "target-unwritable"
    assert (await target.snapshots())[MERGED].parents == ()
    assert (target.path / merged.id / "vda.qcow2.merged").exists()


@pytest.mark.parametrize("way", ["begin", "remove an older one", "merge again"])
async def test_whoever_comes_next_finishes_it(
    target: ImagesTarget,
    root: Path,
    points: list[tuple[Snapshot, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    merged = points[MERGED][0]
    await half_done(target, merged, monkeypatch)
    await assert_given_back(target, *points)
    with capture_logs() as lines:
        match way:
            case "begin":
                await (await target.begin("web01", STARTED + timedelta(days=1))).abort()
            case "merge again":
                await target.merge(merged)
            case _:
                await target.remove(points[SECOND][0])
                points.pop(SECOND)
    assert [line for line in lines if line["event"] == "merge.settled"] == [
        {"event": "merge.settled", "log_level": "info", "target": "main", "snapshot": merged.id, "finished": True}
    ]
    assert qcow2.backing_name(root / merged.id / "vda.qcow2") == ""
    assert list(root.rglob("*.merged")) == []
    await assert_given_back(target, *points)


async def test_while_somebody_reads_it_what_its_image_is_built_on_stays(
    target: ImagesTarget, root: Path, points: list[tuple[Snapshot, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest says that it stands alone; QEMU's tools may open its image now and its backing file later."""
    (oldest, _), (second, _), (merged, _), _ = points
    await half_done(target, merged, monkeypatch)
    async with chain.held(root / "web01", merged.id, ["vda"], target="main") as held:
        assert len(held.links["vda"]) == 1
        await (await target.begin("web01", STARTED + timedelta(days=1))).abort()
        for one, needed_by in ((second, merged), (oldest, second)):
            error = await refused(target.remove(one))
            assert (error.code, needed_by.id in error.message) == ("needed", True)
        await assert_given_back(target, *points)
    await target.remove(second)
    await target.remove(oldest)
    await assert_given_back(target, *points[MERGED:])


def test_an_image_that_cannot_be_read_keeps_others_only_where_its_manifest_does_not_say(root: Path) -> None:
    target = ImagesTarget("main", root)
    (first, _), (second, _) = asyncio.run(changed_chain(target, SIZE, CHANGES[:1]))
    image = root / second.id / "vda.qcow2"
    image.unlink()
    image.mkdir()  # as one that cannot be read
    other = asyncio.run(snapshot(target, started=STARTED + timedelta(days=1)))
    asyncio.run(target.remove(other))
    (root / second.id / "manifest.json").write_text("{")
    error = asyncio.run(refused(target.remove(first)))
    assert error.code == "target-unwritable"
    assert (root / first.id / "vda.qcow2").exists()


async def test_what_must_outlast_a_power_loss_is_synced_before_each_step(
    target: ImagesTarget, root: Path, points: list[tuple[Snapshot, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, steps = root / points[MERGED][0].id, list[str]()
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append(f"sync {path.name if path != folder else 'folder'}")
        real_fsync(descriptor)

    def rename(path: Path, to: Path) -> None:
        steps.append(f"{path.name} -> {to.name}")
        assert subprocess.run(["flock", "-n", root / "web01", "true"], check=False).returncode == 1
        assert subprocess.run(["flock", "-n", "-s", folder, "true"], check=False).returncode == 1
        real_rename(path, to)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    await target.merge(points[MERGED][0])
    assert steps == [
        "sync vda.qcow2.merged",
        "sync folder",
        "sync manifest.json.new",
        "manifest.json.new -> manifest.json",
        "sync folder",
        "vda.qcow2.merged -> vda.qcow2",
        "sync folder",
    ]


@pytest.mark.timeout(300)
def test_wherever_it_is_killed_everything_is_given_back(tmp_path: Path) -> None:
    code = f"import test_merge as suite; suite.merge_killed_at_each_step({str(tmp_path)!r})"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=import_suite(), capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr


def merge_killed_at_each_step(folder: str) -> None:
    """In a process without threads, since it forks: the child is killed before its first step, its second, …"""
    original = Path(folder) / "original"
    older, merged, newest = asyncio.run(two_disks(ImagesTarget("main", original)))
    ways = set()
    for step, way in zip(itertools.count(1), itertools.cycle(WAYS), strict=False):
        root = Path(folder) / str(step)
        shutil.copytree(original, root)
        target = ImagesTarget("main", root)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            kill_at(step, root)
            asyncio.run(target.merge(merged))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        listed = asyncio.run(target.snapshots())
        assert [one.id for one in listed] == [older.id, merged.id, newest.id], step
        left = sorted(path.name for path in (root / merged.id).iterdir() if path.suffix in (".merged", ".new"))
        ways.add((listed[1].parents == (), *left))
        asyncio.run(all_given_back(target, merged, newest))
        if os.WIFEXITED(status):
            assert (status, left) == (0, [])
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        asyncio.run(WAYS[way](target, older))
        assert not [path for path in root.rglob("*") if path.suffix in (".merged", ".new")], (step, way)
        asyncio.run(target.merge(merged))
        asyncio.run(target.remove(older))
        asyncio.run(all_given_back(target, merged, newest))
        shutil.rmtree(root)
    both = ("vda.qcow2.merged", "vdb.qcow2.merged")
    assert ways == {
        (False,),
        (False, "vda.qcow2.merged"),
        (False, *both),
        (False, "manifest.json.new", *both),
        (True, *both),
        (True, "vdb.qcow2.merged"),
        (True,),
    }


def test_who_settles_it_may_be_killed_too(tmp_path: Path) -> None:
    code = f"import test_merge as suite; suite.settle_killed_at_each_step({str(tmp_path)!r})"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=import_suite(), capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr


def settle_killed_at_each_step(folder: str) -> None:
    """After a merge that died before, and after, its manifest was renamed."""
    original = Path(folder) / "original"
    target = ImagesTarget("main", original)
    _, merged, newest = asyncio.run(two_disks(target))
    before = (original / merged.id / "manifest.json").read_bytes()
    take_over, merging._take_over = merging._take_over, lambda *_: os.fstat(-1)
    error = asyncio.run(refused(target.merge(merged)))
    assert error.code == "target-unwritable"
    merging._take_over = take_over
    after = (original / merged.id / "manifest.json").read_bytes()
    for text, new, least in ((before, after, 4), (after, None, 3)):
        (original / merged.id / "manifest.json").write_bytes(text)
        if new:
            (original / merged.id / "manifest.json.new").write_bytes(new)
        else:
            (original / merged.id / "manifest.json.new").unlink()
        for step in itertools.count(1):
            root = Path(folder) / str(step)
            shutil.copytree(original, root)
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                kill_at(step, root)
                merging.settle(root / "web01", target="main")
                os._exit(0)
            _, status = os.waitpid(child, 0)
            target = ImagesTarget("main", root)
            asyncio.run(all_given_back(target, merged, newest))
            if os.WIFEXITED(status):
                assert status == 0
                assert step > least
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            merging.settle(root / "web01", target="main")
            assert not [path for path in root.rglob("*") if path.suffix in (".merged", ".new")], step
            assert (asyncio.run(target.snapshots())[1].parents == ()) == (new is None)
            asyncio.run(all_given_back(target, merged, newest))
            shutil.rmtree(root)
        shutil.rmtree(root)


async def begun(target: ImagesTarget, _older: Snapshot) -> None:
    await (await target.begin("web01", STARTED + timedelta(days=1))).abort()


async def removed(target: ImagesTarget, older: Snapshot) -> None:
    """As retention would: it goes if it is not needed any more, and nothing else does."""
    is_merged = not (await target.snapshots())[1].parents
    if is_merged:
        await target.remove(older)
    else:
        assert (await refused(target.remove(older))).code == "needed"


async def merged_again(target: ImagesTarget, _older: Snapshot) -> None:
    await target.merge((await target.snapshots())[1])


WAYS = {"begin": begun, "remove": removed, "merge": merged_again}
CONTENTS = {name: content(SIZE, number) for number, name in enumerate(["vda", "vdb"])}


def changed(name: str, hours: int) -> bytes:
    data = bytearray(CONTENTS[name])
    for number in range(1, hours + 1):
        data[number * CLUSTER : (number + 1) * CLUSTER] = bytes([number]) * CLUSTER
    return bytes(data)


async def two_disks(target: ImagesTarget) -> list[Snapshot]:
    """A chain of three, with two disks; in each cluster of that number is what was changed."""
    await target.prepare()
    points = [await snapshot(target, disk("vda"), disk("vdb"))]
    for hours in (1, 2):
        draft = await target.begin("web01", STARTED + timedelta(hours=hours))
        for name in CONTENTS:
            sink = await draft.add_disk(disk(name), compressible=True, parent=points[-1].id)
            await write_changes(sink, {hours: bytes([hours]) * CLUSTER})
            await draft.seal(disk(name))
        points.append(await draft.commit(DETAILS | {"kind": "incremental"}))
    return points


async def all_given_back(target: ImagesTarget, *points: Snapshot) -> None:
    listed = {one.id: one for one in await target.snapshots()}

    async def given_back(id_: str, name: str, hours: int) -> None:
        out = target.path / f"{hours}-{name}.raw"
        await target.extract(listed[id_], name, to=out, image_format="raw")
        data = out.read_bytes()
        out.unlink()
        assert data == changed(name, hours)

    await asyncio.gather(
        *(given_back(point.id, name, hours) for hours, point in enumerate(points, 1) for name in CONTENTS)
    )


def kill_at(step: int, root: Path) -> None:
    """Die before this process's step of that number: whatever it opens, renames or deletes there, or locks."""
    steps = itertools.count(1)

    def seen_step(event: str, arguments: tuple[object, ...]) -> None:
        there = bool(arguments) and str(arguments[0]).startswith(str(root))
        acts = event in ("open", "os.rename", "os.remove") and there
        if (acts or event == "fcntl.flock") and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(seen_step)
