"""The contract of a target, over every target there is. What is particular to one is tested elsewhere.

To add one: give `CASES` a case that makes it, and `write` and `write_parts` what QEMU does with its sinks. What
differs by design is a property of the case: what holds then is tested for each value.
"""

import abc
import asyncio
import contextlib
import errno
import itertools
import json
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator import aio
from orchestrator.errors import TargetError
from orchestrator.model import Compression, Disk
from orchestrator.target.base import Draft, FileSink, ParentUnusable, Sink, Snapshot, Target, find
from orchestrator.target.extra_files import ExtraFile
from orchestrator.target.images import target as images_module
from orchestrator.target.images.target import ImagesTarget
from orchestrator.target.mover.process import Mover
from orchestrator.target.repository import listing
from orchestrator.target.repository.target import RepositoryTarget
from orchestrator.target.restic import lock
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.crypto import Cost
from orchestrator.target.restic.pack import BlobKind
from orchestrator.target.restic.repository import Repository
from tests.component.steps import Steps
from tests.component.test_cancelling import sampled
from tests.component.test_file_systems import mounted
from tests.component.world import open_descriptors
from tests.unit.test_target import CLUSTER, DETAILS, KIB, MIB, STARTED, content, disk, in_memory, refused
from tests.unit.test_target import write as write_image

PROJECT = Path(__file__).parents[2]
PASSWORD = "correct horse"
CHEAP = Cost(16, 1, 1)
FILES = [ExtraFile("/etc/qemu/web01.xml", 0o640, b"<domain/>\n"), ExtraFile("/etc/empty", 0o600, b"")]
SAMPLES = 5
Parts = Mapping[int, bytes]
"""What is written, by where it begins: whole clusters, or what is left of the disk."""


class Case(abc.ABC):
    """A target at a place, and what it does by design.

    `builds_on_parents`: a snapshot keeps what it builds on from being removed; else it needs nothing of it.
    `hashes_disks`: it knows a disk's SHA-256.
    """

    builds_on_parents: bool
    hashes_disks: bool

    def __init__(self, name: str, place: Path) -> None:
        self.name = name
        self.place = place

    @abc.abstractmethod
    def target(self) -> Target:
        """One more of the same place, as another process has it."""

    @abc.abstractmethod
    async def make(self) -> None:
        """Have the place ready."""

    @abc.abstractmethod
    def seen(self) -> set[str]:
        """All files at the place but what waits to be reclaimed."""

    @abc.abstractmethod
    async def damage(self, snapshot: Snapshot, disk: str | None) -> None:
        """Change what a disk's content is stored as, or the extra files."""

    @abc.abstractmethod
    def lose_the_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the next commits list a snapshot, and then fail."""


class ImagesCase(Case):
    builds_on_parents = True
    hashes_disks = True

    def target(self) -> ImagesTarget:
        compression = Compression.ZSTD if "zstd" in self.name else Compression.NONE
        return ImagesTarget("main", self.place, compression=compression)

    async def make(self) -> None:
        await self.target().prepare()

    def seen(self) -> set[str]:
        return {str(path.relative_to(self.place)) for path in self.place.rglob("*") if path.is_file()}

    async def damage(self, snapshot: Snapshot, disk: str | None) -> None:
        path = self.place / snapshot.id / (f"{disk}.qcow2" if disk else images_module.EXTRA_FILES)
        stored = path.read_bytes()
        if disk is None:
            path.write_bytes(stored.replace(b'"content": "P', b'"content": "Q'))
        else:  # metadata are at its beginning
            at = len(stored) * 3 // 4
            path.write_bytes(stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :])
        assert path.read_bytes() != stored

    def lose_the_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(path: Path) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

        monkeypatch.setattr(images_module.durable, "sync", broken)


class RepositoryCase(Case):
    builds_on_parents = False
    hashes_disks = False

    def target(self) -> RepositoryTarget:
        return RepositoryTarget("main", str(self.place), lambda: PASSWORD)

    async def make(self) -> None:
        await Repository.create(DirectoryBackend(self.place), PASSWORD, cost=CHEAP)

    def seen(self) -> set[str]:
        reclaimed = {self.place / "data", self.place / "index"}
        files = [path for path in self.place.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.place)) for path in files if reclaimed.isdisjoint(path.parents)}

    async def damage(self, snapshot: Snapshot, disk: str | None) -> None:
        repository = await Repository.open(DirectoryBackend(self.place), PASSWORD)
        await repository.load_index()
        made = (await repository.snapshots()).find(bytes.fromhex(snapshot.details[listing.RESTIC_ID]))
        assert made is not None
        file = (await repository.files(made))[f"{disk}.raw" if disk else "vm.json"]
        (location, *_) = repository._locations(BlobKind.DATA, file.chunks[0])
        path = self.place / "data" / location.pack.hex()[:2] / location.pack.hex()
        stored = bytearray(path.read_bytes())
        stored[location.entry.offset + 20] ^= 1
        path.unlink()
        path.write_bytes(stored)

    def lose_the_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        commit = Mover.commit

        async def lost(mover: Mover, *arguments: Any, **more: Any) -> bytes:
            await commit(mover, *arguments, **more)
            mover.kill()
            await mover._process.wait()
            raise TargetError("its answer is lost", code="mover-died")

        monkeypatch.setattr(Mover, "commit", lost)


CASES: dict[str, type[Case]] = {
    "images": ImagesCase,
    "images, zstd": ImagesCase,
    "repository": RepositoryCase,
}


@pytest.fixture(autouse=True)
def short_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of locks in this process, beside which there are few others."""
    monkeypatch.setattr(lock, "Pace", partial(lock.Pace, settle_seconds=0.01))


@pytest.fixture(params=CASES)
async def case(request: pytest.FixtureRequest, tmp_path: Path, before: list[str]) -> AsyncIterator[Case]:
    """Each in turn. At the end nothing of a draft may be left: no process, descriptor, lock or unlisted file."""
    made = CASES[request.param](request.param, tmp_path / "backup")
    await made.make()
    there = made.seen()
    yield made
    await assert_nothing_is_left(made, there, before)


async def assert_nothing_is_left(case: Case, there: set[str], before: list[str]) -> None:
    await assert_nothing_runs(before)
    target = case.target()
    for one in reversed(await target.snapshots()):
        await target.remove(await target.protect(one, protected=False) if one.protected else one)
    assert case.seen() == there


async def assert_nothing_runs(before: list[str]) -> None:
    with contextlib.suppress(TimeoutError):  # a loop closes some descriptors a little later
        async with asyncio.timeout(2):
            while open_descriptors() != before:
                await asyncio.sleep(0.01)
    assert open_descriptors() == before
    assert children() == []


def children() -> list[str]:
    return [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


@pytest.fixture
def target(case: Case) -> Target:
    return case.target()


async def write(sink: Sink, size_bytes: int, data: bytes) -> None:
    """Play QEMU's part: put a disk's whole content into a sink."""
    if isinstance(sink, FileSink):
        await write_image(sink, size_bytes, data)
        return
    assert len(data) == size_bytes
    there = f"driver=raw,file.driver=nbd,file.server.type=fd,file.server.str={sink.descriptor}"
    with in_memory(data) as source:
        argv = ["qemu-img", "convert", "-n", "--target-image-opts", "-f", "raw", f"/dev/fd/{source}"]
        await tool([*argv, f"{there},file.export={sink.export}"], source, sink.descriptor)


async def write_parts(sink: Sink, parts: Parts) -> None:
    """Play QEMU's part in an incremental backup: write what changed, each part of one repeated byte."""
    commands = []
    for at, data in parts.items():
        assert len(set(data)) == 1
        commands += ["-c", f"write -q {f'-P {data[0]}' if data[0] else '-z'} {at} {len(data)}"]
    file: dict[str, Any] = {"driver": "file", "filename": f"/dev/fd/{sink.descriptor}"}
    image: dict[str, Any] = {"driver": "qcow2", "backing": None, "file": file}
    if not isinstance(sink, FileSink):
        server = {"type": "fd", "str": str(sink.descriptor)}
        image = {"driver": "raw", "file": {"driver": "nbd", "server": server, "export": sink.export}}
    await tool(["qemu-io", f"json:{json.dumps(image)}", *(commands or ["-c", "length"])], sink.descriptor)


async def tool(argv: Sequence[str], *descriptors: int) -> None:
    done = await aio.run_process(argv, pass_fds=descriptors)
    assert done.returncode == 0, done
    assert b"error" not in done.stdout, done


async def filled(
    target: Target, *disks: Disk, vm: str = "web01", hours: int = 0, parent: Snapshot | None = None
) -> Draft:
    """A draft that could be committed; with a parent, one in which nothing changed."""
    draft = await target.begin(vm, STARTED + timedelta(hours=hours))
    for number, one in enumerate(disks or (disk(),)):
        sink = await draft.add_disk(one, compressible=True, parent=parent.id if parent else None)
        if parent is None:
            await write(sink, one.size_bytes, content(one.size_bytes, number))
        else:
            await write_parts(sink, {})
        await draft.seal(one)
    return draft


async def snapshot(target: Target, *disks: Disk, vm: str = "web01", hours: int = 0) -> Snapshot:
    return await (await filled(target, *disks, vm=vm, hours=hours)).commit(DETAILS)


async def chain(target: Target, size_bytes: int, changes: Sequence[Parts]) -> list[tuple[Snapshot, bytes]]:
    """A full snapshot and incremental ones, each an hour later, and what is in each of them."""
    now = bytearray(content(size_bytes, 0))
    one = disk(size_bytes=size_bytes)
    points = [(await snapshot(target, one), bytes(now))]
    for hours, parts in enumerate(changes, start=1):
        draft = await target.begin("web01", STARTED + timedelta(hours=hours))
        await write_parts(await draft.add_disk(one, compressible=True, parent=points[-1][0].id), parts)
        for at, data in parts.items():
            now[at : at + len(data)] = data
        await draft.seal(one)
        points.append((await draft.commit(DETAILS | {"kind": "incremental"}), bytes(now)))
    return points


async def assert_holds(target: Target, made: Snapshot, data: bytes, out: Path, name: str = "vda") -> None:
    await target.extract(made, name, to=out, image_format="raw")
    assert out.read_bytes() == data
    out.unlink()


def listed(one: Snapshot) -> Snapshot:
    """Without what a target notes of it for itself."""
    return replace(one, details={name: value for name, value in one.details.items() if name in DETAILS})


# --- writing ---


async def test_commit_lists_it_and_nothing_did_before(target: Target, case: Case) -> None:
    assert await target.snapshots() == []
    draft = await target.begin("web01", STARTED)
    sink = await draft.add_disk(disk(), compressible=True)
    assert await target.snapshots() == []
    await write(sink, MIB, content(MIB))
    sealed = await draft.seal(disk())
    assert await target.snapshots() == []
    details = dict(DETAILS)
    committed = await draft.commit(details)
    assert await target.snapshots() == [committed] == await case.target().snapshots()
    assert listed(committed) == Snapshot(
        draft.snapshot_id, "main", "web01", STARTED.replace(microsecond=0), "full", (sealed,), DETAILS
    )
    assert details == DETAILS
    assert (sealed.disk, sealed.size_bytes) == ("vda", MIB)
    assert (sealed.sha256 is not None) is case.hashes_disks
    assert sealed.stored_bytes > 0


SIZES = {"tiny": 512, "efi": 528 * KIB, "odd": 4 * MIB + 512, "vda": 9 * MIB}


async def test_what_comes_back_is_what_was_written(target: Target, tmp_path: Path) -> None:
    committed = await snapshot(target, *(disk(name, size) for name, size in SIZES.items()))
    for number, (name, size) in enumerate(SIZES.items()):
        await assert_holds(target, committed, content(size, number), tmp_path / "out", name)
        image, raw = tmp_path / f"{name}.qcow2", tmp_path / f"{name}.raw"
        await target.extract(committed, name, to=image, image_format="qcow2")
        await tool(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(raw)])
        assert raw.read_bytes() == content(size, number)
        assert committed.disk(name).size_bytes == size


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_what_is_given_back_is_durable(
    target: Target, tmp_path: Path, image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out = await snapshot(target, disk()), tmp_path / "out"
    real, synced, broken = os.fsync, list[bytes](), False

    def fsync(descriptor: int) -> None:
        if out.exists() and os.path.samestat(os.fstat(descriptor), out.stat()):
            if broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            synced.append(out.read_bytes())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    await target.extract(made, "vda", to=out, image_format=image_format)
    assert synced[-1] == out.read_bytes()
    out.unlink()
    broken = True
    told = await refused(target.extract(made, "vda", to=out, image_format=image_format))
    assert (told.code, os.strerror(errno.EIO) in told.message) == ("restore-path", True)


CHANGES = [
    {0: b"\1" * CLUSTER, 2 * CLUSTER: bytes(CLUSTER), 4 * MIB - CLUSTER: b"\2" * (2 * CLUSTER)},
    {9 * MIB: b"\3" * 512, 5 * MIB: b"\4" * CLUSTER},
    {},
    {4 * MIB: bytes(4 * MIB), 8 * MIB: b"\5" * MIB},
]


async def test_a_chain_gives_back_each_of_its_points_whole(target: Target, case: Case, tmp_path: Path) -> None:
    """Of each point after the first only what changed is written, as QEMU does: without opening the parent."""
    points = await chain(target, 9 * MIB + 512, CHANGES)
    assert await target.snapshots() == [point for point, _ in points]
    parents = [None, *(point.id for point, _ in points[:-1])] if case.builds_on_parents else [None] * 5
    assert [point.disk("vda").parent for point, _ in points] == parents
    for point, data in points:
        await assert_holds(target, point, data, tmp_path / "out")


async def test_disks_are_listed_in_the_order_in_which_they_were_added(target: Target) -> None:
    draft = await target.begin("web01", STARTED)
    disks = [disk("vdb"), disk("vda"), disk("sdc")]
    sinks = [await draft.add_disk(one, compressible=True) for one in disks]
    for one, sink in reversed(list(zip(disks, sinks, strict=True))):  # the last one is copied first
        await write(sink, MIB, content(MIB))
        await draft.seal(one)
    committed = await draft.commit(DETAILS)
    assert [one.disk for one in committed.disks] == ["vdb", "vda", "sdc"]
    assert await target.snapshots() == [committed]


async def test_commit_again_says_the_same_and_abort_after_it_removes_nothing(target: Target, case: Case) -> None:
    draft = await filled(target)
    committed = await draft.commit(DETAILS)
    there = case.seen()
    assert await draft.commit(DETAILS) == committed
    await draft.cut_off()
    for _ in range(2):
        await draft.abort()
    assert await draft.commit(DETAILS) == committed
    assert case.seen() == there
    assert await target.snapshots() == [committed]


@pytest.mark.parametrize(("steps", "cut_off"), [(0, False), (1, False), (2, False), (2, True), (3, False)])
async def test_abort_leaves_nothing_however_far_it_was(
    target: Target, case: Case, before: list[str], steps: int, cut_off: bool
) -> None:
    kept = await snapshot(target, hours=-1)
    there = case.seen()
    draft = await target.begin("web01", STARTED)
    if steps >= 1:
        sink = await draft.add_disk(disk(), compressible=True)
    if steps >= 2:
        await write(sink, MIB, content(MIB))
    if steps >= 3:
        await draft.seal(disk())
    if cut_off:
        await draft.cut_off()
    for _ in range(2):
        await draft.abort()
        assert await target.snapshots() == [kept]
        await assert_nothing_runs(before)
    if not cut_off:
        assert case.seen() == there
    if steps == 3:
        await refused(draft.commit(DETAILS))
    await (await target.begin("web01", STARTED)).abort()
    assert case.seen() == there, "a later draft removes what is left of one that was cut off"


Act = Callable[[Draft], Coroutine[Any, Any, object]]
STEPS: dict[str, Act] = {
    "add_disk": lambda draft: draft.add_disk(disk("vdb"), compressible=True),
    "seal": lambda draft: draft.seal(disk()),
    "commit": lambda draft: draft.commit(DETAILS),
    "abort": lambda draft: draft.abort(),
}


@pytest.mark.parametrize("step", STEPS)
async def test_cancelled_at_any_step_abort_leaves_nothing(
    target: Target, case: Case, before: list[str], step: str
) -> None:
    parent = await snapshot(target, hours=-1)
    there = case.seen()

    async def cancelled(at: int) -> int:
        """How many steps there were."""
        draft = await target.begin("web01", STARTED)
        sink = await draft.add_disk(disk(), compressible=True, parent=parent.id)
        await write_parts(sink, {0: b"\1" * CLUSTER})
        if step == "commit":
            await draft.seal(disk())
        steps = Steps(at)
        try:
            done = await steps.run(STEPS[step](draft))
        except asyncio.CancelledError:
            done = None
        await draft.abort()
        if isinstance(done, Snapshot):
            await target.remove(done)
        assert await target.snapshots() == [parent]
        assert case.seen() == there
        await assert_nothing_runs(before)
        return steps.count

    for at in sampled(await cancelled(-1), SAMPLES):
        await cancelled(at)


async def test_cancelled_at_any_step_a_draft_does_not_begin(target: Target, case: Case, before: list[str]) -> None:
    there = case.seen()

    async def cancelled(at: int) -> int:
        steps = Steps(at)
        with contextlib.suppress(asyncio.CancelledError):
            await (await steps.run(target.begin("web01", STARTED))).abort()
        assert case.seen() == there
        await assert_nothing_runs(before)
        return steps.count

    for at in sampled(await cancelled(-1), SAMPLES):
        await cancelled(at)


async def test_a_commit_whose_answer_was_lost_can_be_aborted_or_done_again(
    target: Target, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up, tried_again = await filled(target, vm="db01"), await filled(target)
    with monkeypatch.context() as patched:
        case.lose_the_answer(patched)
        for draft in (given_up, tried_again):
            await refused(draft.commit(DETAILS))
    for _ in range(2):
        await given_up.abort()
    committed = await tried_again.commit(DETAILS)
    assert await tried_again.commit(DETAILS) == committed
    assert await case.target().snapshots() == [committed]
    await tried_again.abort()
    assert await case.target().snapshots() == [committed]
    await (await target.begin("web01", STARTED)).abort()  # removes the lock of the process that died


async def test_on_a_full_target_nothing_is_listed_until_there_is_room(tmp_path: Path, before: list[str]) -> None:
    with mounted(tmp_path, "tmpfs", 24) as folder:
        for name, kind in CASES.items():
            case = kind(name, folder / name.replace(", ", "-"))
            await case.make()
            target, there = case.target(), case.seen()
            kept = await snapshot(target, hours=-1)
            draft = await filled(target)
            fill(folder / "junk")
            for _ in range(2):
                assert (await refused(draft.commit(DETAILS))).code == "target-full"
                assert await target.snapshots() == [kept]
            await assert_holds(target, kept, content(MIB, 0), tmp_path / "out")
            (folder / "junk").unlink()
            committed = await draft.commit(DETAILS)
            assert await target.snapshots() == [kept, committed]
            await assert_holds(target, committed, content(MIB, 0), tmp_path / "out")
            await assert_nothing_is_left(case, there, before)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as junk:
        for piece in (MIB, 4 * KIB):
            try:
                while junk.write(bytes(piece)):
                    pass
            except OSError as full:
                assert full.errno == errno.ENOSPC  # noqa: PT017


async def test_a_disk_cannot_be_added_twice(target: Target, tmp_path: Path) -> None:
    draft = await filled(target)
    await refused(draft.add_disk(disk(), compressible=True))
    await assert_holds(target, await draft.commit(DETAILS), content(MIB, 0), tmp_path / "out")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../../etc/passwd", "a b", "ä", "x" * 129])
async def test_a_disk_whose_id_is_no_file_name_is_refused(target: Target, name: str) -> None:
    draft = await target.begin("web01", STARTED)
    error = await refused(draft.add_disk(disk(name), compressible=True))
    assert (error.code, repr(name) in error.message) == ("disk-name", True)
    await draft.abort()


async def test_two_drafts_in_one_second_do_not_meet(target: Target, case: Case, tmp_path: Path) -> None:
    first, second = await asyncio.gather(*(target.begin("web01", STARTED) for _ in range(2)))
    assert first.snapshot_id != second.snapshot_id
    both = []
    for number, draft in enumerate((second, first)):
        await write(await draft.add_disk(disk(), compressible=True), MIB, content(MIB, number))
        await draft.seal(disk())
        both.append(await draft.commit(DETAILS))
    third = await snapshot(case.target())
    assert len({one.created for one in (*both, third)}) == 3
    assert await target.snapshots() == sorted([*both, third], key=lambda one: one.created)
    for number, one in enumerate(both):
        await assert_holds(target, one, content(MIB, number), tmp_path / "out")


async def test_two_drafts_of_other_processes_in_one_second_do_not_meet(case: Case, tmp_path: Path) -> None:
    """Nothing of the one is lost or hidden by the other, whoever comes first, and whatever becomes of it."""
    drafts = [await filled(case.target()) for _ in range(3)]
    committing = [draft.commit(DETAILS | {"run": str(number)}) for number, draft in enumerate(drafts[:2])]
    ended = await asyncio.gather(*committing, return_exceptions=True)
    for draft in drafts:
        await draft.abort()
    made = [one for one in ended if isinstance(one, Snapshot)]
    # Each may see the other's: then both give way, and are tried again.
    assert {one.code for one in ended if isinstance(one, TargetError)} <= {"snapshot-exists"}
    found = await case.target().snapshots()
    assert sorted(one.id for one in found) == sorted(one.id for one in made)
    for one in found:
        await assert_holds(case.target(), one, content(MIB, 0), tmp_path / "out")


async def test_what_a_dead_process_left_is_removed_by_the_next_draft(target: Target, case: Case) -> None:
    """A writer that was killed in the middle, and one in another process that still lives."""
    there = case.seen()
    dead, alive = await writer(case), await writer(case)
    with_a_live_one = case.seen()
    await end(dead)
    draft = await target.begin("web01", STARTED)
    assert await target.snapshots() == []
    await draft.abort()
    assert there < case.seen() < with_a_live_one, "the dead one's is gone, the live one's is there"
    await end(alive)
    await (await target.begin("web01", STARTED)).abort()
    assert case.seen() == there


async def writer(case: Case, parent: Snapshot | None = None) -> asyncio.subprocess.Process:
    """Another process with a draft of which one disk is sealed, and what it started, in a session of their own."""
    arguments = f"{case.name!r}, {str(case.place)!r}, {parent.id if parent else None!r}"
    importing = "import asyncio; from tests.component import test_target_contract as suite"
    code = f"{importing}; asyncio.run(suite.wait({arguments}))"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        cwd=PROJECT,
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 20) == b"ready\n"
    return process


async def end(process: asyncio.subprocess.Process) -> None:
    """Kill it and all that it started: at once, as the host's end would."""
    started = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, started)):
        os.kill(pid, signal.SIGKILL)
    await process.communicate()
    async with asyncio.timeout(10):
        while any(Path("/proc", pid).exists() for pid in started):
            await asyncio.sleep(0.01)


async def wait(name: str, place: str, parent: str | None) -> None:
    target = CASES[name](name, Path(place)).target()
    if parent is None:
        draft = await filled(target, hours=1)
    else:
        draft = await target.begin("web01", STARTED + timedelta(hours=1))
        await draft.add_disk(disk(), compressible=True, parent=parent)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.sleep(600)
    await draft.abort()


# --- what is listed ---


async def test_snapshots_are_listed_by_vm_and_then_oldest_first(target: Target) -> None:
    for vm, hours in (("web01", 9600), ("db01", 9600), ("web01", 0)):
        await snapshot(target, vm=vm, hours=hours)
    found = [(one.vm, one.created.year) for one in await target.snapshots()]
    assert found == [("db01", 2027), ("web01", 2026), ("web01", 2027)]
    assert [one.vm for one in await target.snapshots("db01")] == ["db01"]
    for nobody in ("web", "", "*", "web*", "..", "/", "web01/", "a\0b"):
        assert await target.snapshots(nobody) == []
    assert find(await target.snapshots(), "web01@latest").created.year == 2027


async def test_what_nobody_knows_is_not_looked_up(target: Target) -> None:
    made = await snapshot(target)
    for name in ("", "web01", made.id, "web01@latest", "0", "01234567", "f" * 64, "F" * 64, "zz", "../web01"):
        assert await target.look_up(name) is None


async def test_extra_files_come_back_as_they_were(target: Target, case: Case) -> None:
    bare, made = await filled(target), await filled(target, hours=1)
    committed = [await bare.commit(DETAILS), await made.commit(DETAILS, FILES)]
    assert await case.target().snapshots() == committed
    for one, files in zip(committed, ([], FILES), strict=True):
        assert await case.target().extra_files(one) == files
        assert await target.extra_files(one) == files


async def test_extra_files_that_are_damaged_are_told(target: Target, case: Case, tmp_path: Path) -> None:
    made = await (await filled(target)).commit(DETAILS, FILES)
    await case.damage(made, None)
    error = await refused(case.target().extra_files(made))
    assert (error.code, made.id in error.message) == ("content-wrong", True)
    assert await case.target().snapshots() == [made]
    await assert_holds(case.target(), made, content(MIB, 0), tmp_path / "out")


async def test_what_is_protected_is_not_removed(target: Target, case: Case) -> None:
    made = await snapshot(target)
    for _ in range(2):
        assert not made.protected
        protected = await target.protect(made, protected=True)
        assert (protected.id, protected.disks, protected.protected) == (made.id, made.disks, True)
        assert await target.snapshots() == [protected] == await case.target().snapshots()
        for known in (made, protected):  # whatever the caller knows of it
            for one in (target, case.target()):
                error = await refused(one.remove(known))
                assert error.code == "protected"
                assert f"snapshot protect {made.id} --off" in error.hint
    for _ in range(2):
        off = await target.protect(protected, protected=False)
        assert listed(off) == listed(made)
        assert await target.snapshots() == [off] == await case.target().snapshots()
    await target.remove(protected)
    for wanted in (True, False):
        assert (await refused(target.protect(made, protected=wanted))).code == "no-snapshot"


async def test_what_was_protected_since_is_still_known(
    target: Target, case: Case, tmp_path: Path, sockets: Path
) -> None:
    made = await (await filled(target)).commit(DETAILS, FILES)
    await case.target().protect(made, protected=True)
    await assert_holds(target, made, content(MIB, 0), tmp_path / "out")
    assert await target.extra_files(made) == FILES
    assert (await target.verify(made, share=1.0)).problems == ()
    async with target.exported(made, ["vda"], sockets) as uris:
        assert await read_by_nbd(uris["vda"], tmp_path / "out") == content(MIB, 0)
    draft = await filled(target, hours=1, parent=made)
    await draft.commit(DETAILS)
    assert [one.protected for one in await target.snapshots()] == [True, False]


async def test_a_draft_that_begins_before_its_parent_is_protected(target: Target, tmp_path: Path) -> None:
    first = await snapshot(target)
    draft = await filled(target, hours=1, parent=first)
    await target.protect(first, protected=True)
    second = await draft.commit(DETAILS)
    assert [one.protected for one in await target.snapshots()] == [True, False]
    await assert_holds(target, second, content(MIB, 0), tmp_path / "out")


async def test_what_is_removed_is_gone_and_removing_it_again_does_nothing(target: Target, case: Case) -> None:
    there = case.seen()
    kept, going = await snapshot(target), await snapshot(target, hours=1)
    for one in (target, case.target()):
        await one.remove(going)
        assert await one.snapshots() == [kept]
    await target.remove(kept)
    assert await target.snapshots() == []
    assert case.seen() == there
    await target.remove(replace(going, id="db01/20261122T023000Z", vm="db01"))  # there never was such a VM


@pytest.mark.parametrize("step", ["remove", "protect"])
async def test_cancelled_it_is_done_or_not_begun(target: Target, case: Case, before: list[str], step: str) -> None:
    there = case.seen()

    async def cancelled(at: int) -> int:
        made = await snapshot(target)
        acting: Coroutine[Any, Any, object]
        acting = target.remove(made) if step == "remove" else target.protect(made, protected=True)
        steps = Steps(at, at + 1)
        with contextlib.suppress(asyncio.CancelledError):
            await steps.run(acting)
        assert open_descriptors() == before
        found = await case.target().snapshots()
        assert [one.id for one in found] in ([made.id], [] if step == "remove" else [made.id])
        for one in found:
            await target.protect(one, protected=False)
            await target.remove(one)
        assert case.seen() == there
        return steps.count

    for at in sampled(await cancelled(-9), SAMPLES):
        await cancelled(at)


async def test_what_is_done_to_one_snapshot_at_the_same_time_has_one_outcome(target: Target, case: Case) -> None:
    """Removed by two, protected and built on: whatever was protected, or is needed, is there."""
    for _ in range(3):
        made = await snapshot(target)
        draft = await target.begin("web01", STARTED + timedelta(hours=1))
        *removed, protected, built = await asyncio.gather(
            target.remove(made),
            case.target().remove(made),
            target.protect(made, protected=True),
            draft.add_disk(disk(), compressible=True, parent=made.id),
            return_exceptions=True,
        )
        refusals = {outcome.code for outcome in removed if isinstance(outcome, TargetError)}
        assert refusals <= ({"protected", "needed"} if case.builds_on_parents else {"protected"})
        is_there = made.id in {one.id for one in await target.snapshots()}
        assert isinstance(protected, Snapshot) is is_there, (removed, protected)
        if not isinstance(protected, Snapshot):
            assert isinstance(protected, TargetError)
            assert protected.code == "no-snapshot"
        if isinstance(built, BaseException):
            assert isinstance(built, ParentUnusable)
        elif case.builds_on_parents:
            assert is_there
        await draft.abort()
        if is_there:
            await target.remove(await target.protect(made, protected=False))
        assert await target.snapshots() == []


# --- what is needed stays ---


async def test_of_what_is_built_on_nothing_goes_that_is_needed(target: Target, case: Case, tmp_path: Path) -> None:
    points = await chain(target, 5 * MIB, [{0: b"\1" * CLUSTER}, {4 * MIB: b"\2" * CLUSTER}])
    for (one, _), (needed_by, _) in itertools.pairwise(points):
        if not case.builds_on_parents:
            await target.remove(one)
            continue
        error = await refused(target.remove(one))
        assert error.code == "needed"
        assert f"{one.id} is needed by {needed_by.id}" in error.message
    last, data = points[-1]
    await assert_holds(target, last, data, tmp_path / "out")
    assert (await target.verify(last, share=1.0)).problems == ()
    draft = await target.begin("web01", STARTED + timedelta(hours=9))
    await write_parts(
        await draft.add_disk(disk(size_bytes=5 * MIB), compressible=True, parent=last.id), CHANGES[0]
    )
    await draft.seal(disk(size_bytes=5 * MIB))
    after = bytearray(data)
    for at, part in CHANGES[0].items():
        after[at : at + len(part)] = part
    await assert_holds(target, await draft.commit(DETAILS), bytes(after), tmp_path / "out")


@pytest.mark.parametrize("ends", ["abort", "commit"])
async def test_of_what_a_draft_builds_on_nothing_goes_that_is_needed(
    target: Target, case: Case, tmp_path: Path, ends: str
) -> None:
    first = await snapshot(target)
    draft = await target.begin("web01", STARTED + timedelta(hours=1))
    sink = await draft.add_disk(disk(), compressible=True, parent=first.id)
    if case.builds_on_parents:
        assert (await refused(case.target().remove(first))).code == "needed"
    else:
        await case.target().remove(first)
    await write_parts(sink, {CLUSTER: b"\1" * CLUSTER})
    await draft.seal(disk())
    if ends == "abort":
        await draft.abort()
        await target.remove(first)
        assert await target.snapshots() == []
    else:
        second = await draft.commit(DETAILS)
        data = content(MIB, 0)
        data = data[:CLUSTER] + b"\1" * CLUSTER + data[2 * CLUSTER :]
        await assert_holds(target, second, data, tmp_path / "out")


async def test_a_writer_in_another_process_keeps_what_it_builds_on_until_it_dies(
    target: Target, case: Case
) -> None:
    there = case.seen()
    first = await snapshot(target)
    process = await writer(case, parent=first)
    if case.builds_on_parents:
        assert (await refused(target.remove(first))).code == "needed"
    await end(process)
    await target.remove(first)
    await (await target.begin("web01", STARTED)).abort()
    assert case.seen() == there


async def test_what_is_gone_cannot_be_built_on_and_the_disk_can_be_copied_whole(
    target: Target, tmp_path: Path
) -> None:
    gone = await snapshot(target)
    await target.remove(gone)
    draft = await target.begin("web01", STARTED)
    error = await refused(draft.add_disk(disk(), compressible=True, parent=gone.id))
    assert (type(error), error.code) == (ParentUnusable, "parent-unusable")
    assert gone.id in error.message
    await write(await draft.add_disk(disk(), compressible=True), MIB, content(MIB, 3))
    await draft.seal(disk())
    made = await draft.commit(DETAILS)
    assert [one.disk for one in made.disks] == ["vda"]
    await assert_holds(target, made, content(MIB, 3), tmp_path / "out")


async def read_by_nbd(uri: str, to: Path) -> bytes:
    await tool(["nbdcopy", uri, str(to)])
    return await asyncio.to_thread(to.read_bytes)


@pytest.fixture
def sockets(tmp_path: Path) -> Path:
    (tmp_path / "sockets").mkdir(mode=0o700)
    return tmp_path / "sockets"


async def test_disks_are_exported(target: Target, tmp_path: Path, sockets: Path) -> None:
    sizes = {"tiny": 512, "odd": 4 * MIB + 512}
    made = await snapshot(target, *(disk(name, size) for name, size in sizes.items()))
    async with target.exported(made, list(sizes), sockets) as uris:
        assert list(uris) == list(sizes)
        for number, (name, uri) in enumerate(uris.items()):
            assert await read_by_nbd(uri, tmp_path / name) == content(sizes[name], number)
            about = json.loads((await aio.run_process(["nbdinfo", "--json", uri])).stdout)["exports"][0]
            assert (about["export-name"], about["export-size"], about["is_read_only"]) == (name, sizes[name], True)
        modes = {stat.filemode(path.stat().st_mode) for path in sockets.iterdir()}
        assert modes == {"srw-------"}
    assert list(sockets.iterdir()) == []
    for uri in uris.values():
        assert (await aio.run_process(["nbdinfo", uri])).returncode != 0


async def test_of_what_is_exported_nothing_goes_that_is_needed(
    target: Target, case: Case, tmp_path: Path, sockets: Path
) -> None:
    """Each point of a chain, to several readers, and again."""
    points = await chain(target, 5 * MIB, [{CLUSTER: b"\1" * CLUSTER}, {2 * CLUSTER: b"\2" * CLUSTER}])
    for point, data in points:
        async with target.exported(point, ["vda"], sockets) as uris:
            for one, _ in points:
                if one.created > point.created:
                    continue
                if case.builds_on_parents:
                    assert (await refused(case.target().remove(one))).code == "needed"
                else:
                    await case.target().remove(one)
            reading = [read_by_nbd(uris["vda"], tmp_path / f"out{number}") for number in range(3)]
            assert await asyncio.gather(*reading) == [data] * 3
    for point, _ in reversed(points):
        await target.remove(point)


async def test_an_export_ends_with_its_block_however_that_ends(target: Target, sockets: Path) -> None:
    made = await snapshot(target, disk("vda"), disk("vdb"))
    serving = asyncio.Event()
    known: list[str] = []

    async def serve() -> None:
        async with target.exported(made, ["vda", "vdb"], sockets) as uris:
            known.extend(uris.values())
            serving.set()
            await asyncio.Event().wait()

    for stage in range(12):
        serving.clear()
        task = asyncio.create_task(serve())
        if stage:
            await asyncio.sleep(0.002 * stage * stage)
        else:
            await serving.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list(sockets.iterdir()) == []
    for uri in known:
        assert (await aio.run_process(["nbdinfo", uri])).returncode != 0
    await target.remove(made)


async def test_what_is_gone_cannot_be_read(target: Target, tmp_path: Path, sockets: Path) -> None:
    made = await snapshot(target)
    with pytest.raises(TargetError, match="has no disk 'vdz'"):
        async with target.exported(made, ["vdz"], sockets):
            pass
    with pytest.raises(TargetError, match="has no disk 'vdz'"):
        await target.extract(made, "vdz", to=tmp_path / "out", image_format="raw")
    await target.remove(made)
    with pytest.raises(TargetError) as gone:
        async with target.exported(made, ["vda"], sockets):
            pass
    errors = [
        gone.value,
        await refused(target.verify(made, share=1.0)),
        await refused(target.extract(made, "vda", to=tmp_path / "out", image_format="raw")),
        await refused(target.merge(made)),
    ]
    assert [(error.code, made.id in error.message) for error in errors] == [("no-snapshot", True)] * 4
    assert list(sockets.iterdir()) == []
    assert not (tmp_path / "out").exists()


async def test_what_is_merged_is_the_same_and_stands_alone(target: Target, tmp_path: Path) -> None:
    points = await chain(target, 5 * MIB, [{0: b"\1" * CLUSTER}, {4 * MIB: b"\2" * CLUSTER}])
    (first, _), (second, _), (third, _) = points
    for _ in range(2):
        await target.merge(second)
    await target.remove(first)
    found = {one.id: one for one in await target.snapshots()}
    assert list(found) == [second.id, third.id]
    assert found[second.id].parents == ()
    for one, data in points[1:]:
        await assert_holds(target, found[one.id], data, tmp_path / "out")


async def test_what_is_right_is_verified(target: Target) -> None:
    sizes = {"vda": 5 * MIB, "vdb": 9 * MIB, "vdc": 512}
    made = await snapshot(target, *(disk(name, size) for name, size in sizes.items()))
    found = await target.verify(made, share=1.0)
    assert found.problems == ()
    assert found.checked_bytes == found.total_bytes > 0
    some = await target.verify(made, share=0.01)
    assert some.problems == ()
    assert 0 < some.checked_bytes < some.total_bytes == found.total_bytes


async def test_what_is_damaged_is_found_and_only_that(target: Target, case: Case, tmp_path: Path) -> None:
    made, other = await snapshot(target, disk("vda"), disk("vdb")), await snapshot(target, disk("vdc"), hours=1)
    # Both have a disk of the same content, which a repository keeps once: the second disk is the first's alone.
    await case.damage(made, "vdb")
    reader = case.target()
    (found,) = (await reader.verify(made, share=1.0)).problems
    assert "vdb" in found
    out = tmp_path / "out"
    with pytest.raises(TargetError) as told:
        await reader.extract(made, "vdb", to=out, image_format="raw")
    assert (told.value.code, made.id in told.value.message) == ("content-wrong", True)
    await assert_holds(reader, made, content(MIB, 0), out, "vda")
    assert (await reader.verify(other, share=1.0)).problems == ()
    assert await reader.snapshots() == [made, other]
