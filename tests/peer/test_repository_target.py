"""Snapshots of VMs in a repository that restic works on, too: what it changes, makes and removes disturbs nothing.

With the restic of Debian 12, and that of Debian 13.
"""

import asyncio
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from orchestrator.errors import TargetError
from orchestrator.target.base import Snapshot
from orchestrator.target.repository import listing
from orchestrator.target.repository.target import RepositoryTarget
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.pack import BlobKind
from orchestrator.target.restic.repository import Repository
from orchestrator.units import MIB
from tests.component.test_target_contract import (
    FILES,
    PASSWORD,
    assert_holds,
    chain,
    filled,
    short_settling,
    write_parts,
)
from tests.guest.restics import CHEAP, Restic
from tests.peer.test_restic_repository import LOCKED_EXIT
from tests.unit.test_target import CLUSTER, DETAILS, STARTED, content, disk, refused

__all__ = ["short_settling"]  # fixtures

SIZE = 5 * MIB
CHANGES = [{0: b"\1" * CLUSTER}, {4 * MIB: b"\2" * CLUSTER}]
TAGS = [["--add", "kept"], ["--set", "protected,other"], ["--remove", "other"], ["--remove", "protected"]]
Points = Sequence[tuple[Snapshot, bytes]]


async def made_at(path: Path) -> RepositoryTarget:
    await Repository.create(DirectoryBackend(path), PASSWORD, cost=CHEAP)
    return RepositoryTarget("main", str(path), lambda: PASSWORD)


@pytest.fixture
async def target(tmp_path: Path) -> RepositoryTarget:
    return await made_at(tmp_path / "repository")


@pytest.fixture
def restic(target: RepositoryTarget, version: str) -> Restic:
    return Restic(Path(target.place), PASSWORD, version)


async def with_files(target: RepositoryTarget) -> tuple[Snapshot, bytes]:
    draft = await filled(target, disk(size_bytes=SIZE), hours=-1)
    return await draft.commit(DETAILS, FILES), content(SIZE, 0)


async def assert_same(target: RepositoryTarget, points: Points, out: Path, *, protected: bool = False) -> None:
    """For whoever knew them before, and who comes anew; they can be built on."""
    known, anew = target, RepositoryTarget("main", target.place, lambda: PASSWORD)
    found = await anew.snapshots()
    assert [one.id for one in found] == [one.id for one, _ in points]
    assert await known.snapshots() == found
    for one, (before, data) in zip(found, points, strict=True):
        expected = replace(before, details=one.details, created=one.created, protected=protected)
        assert one == expected
        assert one.details | {listing.RESTIC_ID: ""} == before.details | {listing.RESTIC_ID: ""}
        for reader, wanted in ((anew, one), (known, before)):
            await assert_holds(reader, wanted, data, out)
            assert (await reader.verify(wanted, share=1.0)).problems == ()
    assert await known.extra_files(points[0][0]) == await anew.extra_files(found[0]) == FILES


async def assert_built_on(target: RepositoryTarget, point: tuple[Snapshot, bytes], out: Path) -> None:
    (before, data), one = point, disk(size_bytes=SIZE)
    draft = await target.begin("web01", STARTED + timedelta(days=1))
    await write_parts(await draft.add_disk(one, compressible=True, parent=before.id), {MIB: b"\7" * CLUSTER})
    await draft.seal(one)
    made = await draft.commit(DETAILS | {"kind": "incremental"})
    await assert_holds(target, made, data[:MIB] + b"\7" * CLUSTER + data[MIB + CLUSTER :], out)
    await target.remove(made)


async def test_what_restic_wrote_anew_is_the_same(
    target: RepositoryTarget, restic: Restic, tmp_path: Path, version: str
) -> None:
    points = [await with_files(target), *await chain(target, SIZE, CHANGES[:1])]
    changes = [["tag", *change] for change in TAGS]
    if version == "0.18":
        changes.append(["rewrite", "--new-time", "2026-11-22 12:00:00", "--forget", "latest"])
        changes.append(["rewrite", "--exclude", "vda.raw", "latest"])  # and the old one stays
    for change in changes:
        restic.run(*change)
        await assert_same(target, points, tmp_path / "out", protected=change[1:] in TAGS[1:3])
    await assert_built_on(target, points[-1], tmp_path / "out")
    for one, _ in points:
        assert (await target.protect(one, protected=True)).protected
        assert (await refused(target.remove(one))).code == "protected"
        assert not (await target.protect(one, protected=False)).protected
        await target.remove(one)
    assert restic.snapshots() == []
    restic.run("prune")
    restic.check()


async def test_what_restic_copied_elsewhere_is_the_same_there(
    target: RepositoryTarget, restic: Restic, tmp_path: Path
) -> None:
    points = [await with_files(target), *await chain(target, SIZE, CHANGES)]
    await target.protect(points[0][0], protected=True)
    elsewhere = await made_at(tmp_path / "elsewhere")
    other = replace(restic, repository=tmp_path / "elsewhere")
    for _ in range(2):
        other.run("copy", "--from-repo", str(restic.repository), RESTIC_FROM_PASSWORD=PASSWORD)
    other.check()
    await target.protect(points[0][0], protected=False)
    (first, *_) = await elsewhere.snapshots()
    assert first.protected
    await elsewhere.protect(first, protected=False)
    await assert_same(elsewhere, points, tmp_path / "out")
    await assert_same(target, points, tmp_path / "out")
    await assert_built_on(elsewhere, points[-1], tmp_path / "out")


async def test_what_restic_keeps_is_whole(target: RepositoryTarget, restic: Restic, tmp_path: Path) -> None:
    points = [*await chain(target, SIZE, CHANGES), await with_files(target)]
    restic.run("forget", "--host", "web01", "--keep-last", "1", "--prune")
    assert await target.snapshots() == [points[-2][0]]
    await assert_holds(target, *points[-2], tmp_path / "out")
    for one, data in (points[0], points[1]):
        error = await refused(target.extract(one, "vda", to=tmp_path / "out", image_format="raw"))
        assert error.code == "no-snapshot"
        await target.remove(one)
        assert len(data) == SIZE
    await assert_built_on(target, points[-2], tmp_path / "out")
    restic.check()


async def test_what_restic_backed_up_disturbs_nothing_and_can_be_read(
    target: RepositoryTarget, restic: Restic, tmp_path: Path
) -> None:
    points = [await with_files(target)]
    files = {
        "vm.json": b"no JSON",
        "disk": os.urandom(SIZE),  # the next one is not it
        "disk.raw": os.urandom(SIZE),
        'a folder/of one/ä "quoted".img': os.urandom(9 * MIB + 512),
        "empty": b"",
        "zeroes": bytes(3 * MIB),
    }
    source = tmp_path / "source"
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    (source / "link").symlink_to("disk.raw")
    (source / "again").hardlink_to(source / "disk.raw")
    files["again"] = files["disk.raw"]
    os.mkfifo(source / "pipe")
    restic.run("backup", "--host", "web01", str(source))
    restic.run("backup", "--host", "web01", "--stdin", "--stdin-filename", "web01", stdin=files["disk"])
    await assert_same(target, points, tmp_path / "out")
    of_files, of_stdin = restic.snapshots("--host", "web01")[1:]
    for made in (of_files, of_stdin):
        wanted = await target.look_up(made["id"][:8])
        assert wanted is not None
        assert wanted == await target.look_up(made["id"])
        assert (await target.verify(wanted, share=1.0)).problems == ()
        assert await target.extra_files(wanted) == []
        prefix = str(source).removeprefix("/") + "/" if made is of_files else ""
        expected = {prefix + name: data for name, data in files.items()} if prefix else {"web01": files["disk"]}
        held = {one.disk.replace('\\"', '"'): one.disk for one in wanted.disks}
        assert set(held) == set(expected)
        for name, data in expected.items():
            await target.extract(wanted, held[name], to=tmp_path / "out", image_format="raw")
            assert (tmp_path / "out").read_bytes() == data, name
            (tmp_path / "out").unlink()
    assert await target.look_up("01234567") is None
    await assert_built_on(target, points[0], tmp_path / "out")


async def test_two_writers_at_once_beside_whom_nobody_prunes(
    target: RepositoryTarget, restic: Restic, tmp_path: Path
) -> None:
    other = RepositoryTarget("main", target.place, lambda: PASSWORD)
    drafts = await asyncio.gather(
        filled(target, disk(size_bytes=SIZE)), filled(other, disk(size_bytes=SIZE), vm="db01")
    )
    assert b"lock" in await asyncio.to_thread(restic.run, "prune", code=LOCKED_EXIT[restic.version])
    made = await asyncio.gather(*(draft.commit(DETAILS) for draft in drafts))
    await asyncio.to_thread(restic.run, "prune")
    restic.check()
    for one in made:
        await assert_holds(target, one, content(SIZE, 0), tmp_path / "out")


@pytest.mark.parametrize("then", ["abort", "commit"])
async def test_whenever_a_mover_is_killed_as_it_commits_what_is_listed_is_what_was_said(
    target: RepositoryTarget, tmp_path: Path, then: str
) -> None:
    ways = set()
    for milliseconds in (0, 1, 2, 4, 8, 16, 30, 60):
        draft = await filled(target)
        committing = asyncio.create_task(draft.commit(DETAILS | {"run": str(milliseconds)}))
        await asyncio.sleep(milliseconds / 1000)
        process = draft._mover.value._process
        if process.returncode is None:
            os.kill(process.pid, signal.SIGKILL)
        (said,) = await asyncio.gather(committing, return_exceptions=True)
        if isinstance(said, TargetError) and then == "commit":
            (said,) = await asyncio.gather(draft.commit(DETAILS), return_exceptions=True)
        await draft.abort()
        found = await target.snapshots()
        ways.add(isinstance(said, Snapshot))
        if isinstance(said, Snapshot):
            assert [one.id for one in found] == [said.id]
            await assert_holds(target, said, content(MIB, 0), tmp_path / "out")
            await target.remove(said)
        else:
            assert isinstance(said, TargetError)
            assert found == []
    assert False in ways


async def test_a_snapshot_whose_list_of_files_is_damaged_is_named(
    target: RepositoryTarget, tmp_path: Path
) -> None:
    made, _ = await with_files(target)
    repository = await target.repository()
    await repository.load_index()
    (one,) = (await repository.snapshots()).snapshots
    (location,) = repository._locations(BlobKind.TREE, one.tree)
    path = Path(target.place, "data", location.pack.hex()[:2], location.pack.hex())
    stored = bytearray(path.read_bytes())
    stored[location.entry.offset + 20] ^= 1
    path.unlink()
    path.write_bytes(stored)
    (said,) = (await target.verify(made, share=1.0)).problems
    errors = [
        await refused(target.extract(made, "vda", to=tmp_path / "out", image_format="raw")),
        await refused(target.extra_files(made)),
    ]
    for text in (said, *(str(error) for error in errors)):
        assert made.id in text
        assert path.name in text
    assert {error.code for error in errors} == {"content-wrong"}
    assert await target.snapshots() == [made]


async def test_who_died_while_exchanging_a_snapshot_left_one_for_us(
    target: RepositoryTarget, tmp_path: Path
) -> None:
    """Both are there, one of them protected."""
    made, data = await with_files(target)
    folder = Path(target.place, "snapshots")
    (old,) = folder.iterdir()
    before = old.read_bytes()
    await target.protect(made, protected=True)
    old.write_bytes(before)
    (one,) = await target.snapshots()
    assert (one.id, one.protected) == (made.id, True)
    assert (await refused(target.remove(made))).code == "protected"
    await assert_holds(target, one, data, tmp_path / "out")
    assert not (await target.protect(one, protected=False)).protected
    await target.remove(one)
    assert list(folder.iterdir()) == []


async def test_a_repository_that_was_made_anew_is_opened_anew(tmp_path: Path) -> None:
    place = tmp_path / "repository"
    target = RepositoryTarget("main", str(place), lambda: "secret")
    for _ in range(2):
        made = await Repository.create(DirectoryBackend(place), "secret", cost=CHEAP)
        await target.prepare()
        assert (await target.repository()).identity == made.identity
        assert await target.snapshots() == []
        shutil.rmtree(place)
