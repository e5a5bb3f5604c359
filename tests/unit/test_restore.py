"""Giving disks back: only what is right gets its name, and nothing that was there is lost."""

import asyncio
import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import TargetError, ToolError
from orchestrator.model import Compression
from orchestrator.qemu import tools
from orchestrator.run.restore import restore, restore_extra_files
from orchestrator.target.base import Snapshot
from orchestrator.target.extra_files import ExtraFile
from orchestrator.target.images import qcow2
from orchestrator.target.images.target import ImagesTarget
from tests.guest import images
from tests.unit.test_target import CLUSTER, MIB, changed_chain, content, disk, filled

SIZE = MIB + 512
CONTENT = content(SIZE, 0)
STARTED = datetime(2026, 11, 22, 2, 30, tzinfo=UTC)


@pytest.fixture
async def target(tmp_path: Path) -> ImagesTarget:
    made = ImagesTarget("main", tmp_path / "backup")
    await made.prepare()
    return made


@pytest.fixture
async def snapshot(target: ImagesTarget) -> Snapshot:
    return await (await filled(target, disk("vda", SIZE), started=STARTED)).commit({"kind": "full"})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(target: ImagesTarget, snapshot: Snapshot) -> None:
    """Flip a bit in the first data cluster: qcow2 has no checksums, so only the hash can tell."""
    path = target.path / snapshot.id / "vda.qcow2"
    mapped = subprocess.check_output(["qemu-img", "map", "-f", "qcow2", path], text=True)
    offset = int(mapped.splitlines()[1].split()[2], 16)
    with path.open("r+b") as image:
        image.seek(offset + 12345)
        byte = image.read(1)[0]
        image.seek(offset + 12345)
        image.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_disk_is_restored_and_checked(
    target: ImagesTarget, snapshot: Snapshot, out: Path, image_format: str
) -> None:
    to = out / "vda.img"
    told: list[int] = []
    restored = await restore(target, snapshot, "vda", to=to, image_format=image_format, on_progress=told.append)
    assert told == sorted(told)
    assert (restored.disk, restored.path, restored.size_bytes) == ("vda", to, SIZE)
    assert await tools.sha256(to, image_format) == hashlib.sha256(CONTENT).hexdigest()
    assert await tools.virtual_size(to, image_format) == SIZE
    if image_format == "raw":
        assert to.read_bytes() == CONTENT
    assert names(out) == ["vda.img"]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_wrong_content_is_not_given_back(
    target: ImagesTarget, snapshot: Snapshot, out: Path, image_format: str
) -> None:
    await asyncio.to_thread(damage, target, snapshot)
    with pytest.raises(TargetError, match="is damaged: SHA-256") as wrong:
        await restore(target, snapshot, "vda", to=out / "vda.img", image_format=image_format)
    assert wrong.value.code == "content-wrong"
    assert snapshot.disk("vda").sha256 in wrong.value.message
    assert snapshot.id in wrong.value.message
    assert names(out) == []


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_what_is_written_wrong_is_not_given_back(
    target: ImagesTarget,
    snapshot: Snapshot,
    out: Path,
    image_format: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    damaged: bool,
) -> None:
    """If the image that it was written from is damaged, too, that is what is said."""
    if damaged:
        await asyncio.to_thread(damage, target, snapshot)
    real = tools.convert

    async def wrong(source: Path, source_format: str, to: Path, to_format: str, *, into_existing: bool) -> None:
        await real(source, source_format, to, to_format, into_existing=into_existing)
        await images.run_tool("qemu-io", "-f", to_format, "-c", "write -q -P 7 4096 512", str(to))

    monkeypatch.setattr(tools, "convert", wrong)
    why = "is damaged: SHA-256" if damaged else "was restored wrong: Content mismatch at offset 4096"
    with pytest.raises(TargetError, match=why) as told:
        await restore(target, snapshot, "vda", to=out / "vda.img", image_format=image_format)
    assert told.value.code == "content-wrong"
    assert names(out) == []


async def test_a_manifest_of_version_1_has_the_hash_of_the_content(
    target: ImagesTarget, snapshot: Snapshot, out: Path
) -> None:
    path = target.path / snapshot.id / "manifest.json"
    document = json.loads(path.read_text()) | {"version": 1}
    (disk,) = document["disks"]
    del disk["sha256_of"]
    disk["sha256"] = hashlib.sha256(CONTENT).hexdigest()
    path.write_text(json.dumps(document))
    (old,) = await target.snapshots()
    assert (await target.verify(old, share=1.0)).problems == ()
    await restore(target, old, "vda", to=out / "vda.raw", image_format="raw")
    assert (out / "vda.raw").read_bytes() == CONTENT
    await asyncio.to_thread(damage, target, snapshot)
    with pytest.raises(TargetError, match="is damaged: SHA-256"):
        await restore(target, old, "vda", to=out / "again.raw", image_format="raw")
    assert names(out) == ["vda.raw"]


# --- chains ---

CHAIN_BYTES = 3 * MIB
BASE, MIDDLE, LAST = 0, 1, 2


@pytest.fixture(params=[Compression.NONE, Compression.ZSTD], ids=["plain", "zstd"])
async def points(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[ImagesTarget, list[Snapshot], bytes]:
    """A target with a full snapshot and two that build on it, and what is in the last one."""
    made = ImagesTarget("main", tmp_path / "backup", compression=request.param)
    await made.prepare()
    changes = [{0: b"\1" * CLUSTER, 2: bytes(CLUSTER)}, {47: b"\2" * CLUSTER}]
    chain = await changed_chain(made, CHAIN_BYTES, changes)
    return made, [snapshot for snapshot, _ in chain], chain[-1][1]


Points = tuple[ImagesTarget, list[Snapshot], bytes]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_chain_is_restored_and_checked(points: Points, out: Path, image_format: str) -> None:
    target, snapshots, data = points
    to = out / "vda.img"
    await restore(target, snapshots[LAST], "vda", to=to, image_format=image_format)
    assert hashlib.sha256(data).hexdigest() == await tools.sha256(to, image_format)
    assert names(out) == ["vda.img"]


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), at)


def first_data(image: Path) -> int:
    """Where the image's first data cluster is in its file."""
    argv = ["qemu-img", "map", "-U", "--output=json", "-f", "qcow2", image]
    pieces = json.loads(subprocess.check_output(argv))
    return int(next(piece["offset"] for piece in pieces if piece["depth"] == 0 and piece.get("offset")))


def hole(image: Path) -> int:
    """Where there is nothing in the file: QEMU leaves most of the refcount table's cluster empty."""
    with image.open("rb") as file:
        found = os.lseek(file.fileno(), 0, os.SEEK_HOLE)
    assert found < image.stat().st_size
    return found


def link_elsewhere(image: Path) -> None:
    """Another backing file's name of the same length, in the header."""
    data = image.read_bytes()
    name = qcow2.backing_name(image).encode()
    image.write_bytes(data.replace(name, name.replace(b"3000Z", b"3001Z"), 1))


HARMS: dict[str, Callable[[Path], None]] = {
    "a data byte": lambda image: flip(image, first_data(image) + 77),
    "a byte in a hole": lambda image: flip(image, hole(image)),
    "the last byte": lambda image: flip(image, image.stat().st_size - 1),
    "cut": lambda image: os.truncate(image, image.stat().st_size - CLUSTER),
    "cut to nothing": lambda image: os.truncate(image, 0),
    "longer": lambda image: os.truncate(image, image.stat().st_size + 1),
    "gone": Path.unlink,
    "linked elsewhere": link_elsewhere,
}


@pytest.mark.parametrize(
    ("number", "harm"),
    [
        *((BASE, harm) for harm in ("cut to nothing", "gone")),
        *((number, harm) for number in (MIDDLE, LAST) for harm in HARMS),
    ],
)
async def test_a_damaged_image_of_a_chain_is_named(points: Points, out: Path, number: int, harm: str) -> None:
    target, snapshots, _ = points
    image = target.path / snapshots[number].id / "vda.qcow2"
    await asyncio.to_thread(HARMS[harm], image)
    for damaged in snapshots[number:]:
        if damaged.disk("vda").parent is None:
            continue
        with pytest.raises(TargetError, match="is damaged: ") as wrong:
            await restore(target, damaged, "vda", to=out / "vda.img", image_format="raw")
        assert wrong.value.code == "content-wrong"
        assert wrong.value.message.startswith(
            f"the image of disk vda in snapshot {snapshots[number].id} is damaged: "
        )
        assert "restore one that does not build on it" in wrong.value.hint
        assert names(out) == []
    for whole in snapshots[:number]:
        await restore(target, whole, "vda", to=out / "vda.img", image_format="raw")
        (out / "vda.img").unlink()


@pytest.mark.parametrize(("number", "harm"), [(BASE, "a data byte"), (MIDDLE, "the last byte"), (LAST, "cut")])
async def test_verifying_names_what_is_damaged_and_goes_on(points: Points, number: int, harm: str) -> None:
    target, snapshots, _ = points
    await asyncio.to_thread(HARMS[harm], target.path / snapshots[number].id / "vda.qcow2")
    also = target.path / snapshots[LAST].id / "vda.qcow2"
    await asyncio.to_thread(HARMS["longer"], also)
    for place, snapshot in enumerate(snapshots):
        found = await target.verify(snapshot, share=1.0)
        named = {problem.split()[7] for problem in found.problems}
        assert named == {snapshots[one].id for one in {number, LAST} if one <= place}
        assert found.checked_bytes == found.total_bytes


async def test_a_chain_that_is_not_complete_is_a_problem_of_its_verification(points: Points) -> None:
    target, snapshots, _ = points
    await asyncio.to_thread(shutil.rmtree, target.path / snapshots[BASE].id)
    found = await target.verify(snapshots[LAST], share=1.0)
    assert found.checked_bytes == 0
    assert found.problems == (
        f"snapshot {snapshots[MIDDLE].id} builds on {snapshots[BASE].id}, which is not there",
    )


async def test_a_flipped_bit_in_the_base_is_found_through_the_chain(target: ImagesTarget, out: Path) -> None:
    """In a cluster that the later ones have overwritten, too: another snapshot may need it."""
    (base, _), (last, _) = await changed_chain(target, CHAIN_BYTES, [{0: b"\1" * CLUSTER}])
    await asyncio.to_thread(damage, target, base)
    for image_format in ("raw", "qcow2"):
        with pytest.raises(TargetError, match=f"in snapshot {base.id} is damaged: SHA-256") as wrong:
            await restore(target, last, "vda", to=out / "vda.img", image_format=image_format)
        assert wrong.value.code == "content-wrong"
        assert names(out) == []


async def test_a_manifest_that_names_another_parent_is_found(points: Points, out: Path) -> None:
    target, snapshots, _ = points
    path = target.path / snapshots[LAST].id / "manifest.json"
    document = json.loads(path.read_text())
    document["disks"][0]["parent"] = snapshots[BASE].id
    path.write_text(json.dumps(document))
    with pytest.raises(
        TargetError, match=f"it builds on .*{snapshots[MIDDLE].id[6:]}.*, and its manifest"
    ) as wrong:
        await restore(target, snapshots[LAST], "vda", to=out / "vda.img", image_format="raw")
    assert wrong.value.code == "content-wrong"
    assert names(out) == []


async def test_what_was_written_wrong_is_not_given_back_though_the_chain_is_right(
    points: Points, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, snapshots, _ = points
    real = tools.convert

    async def badly(source: Path, source_format: str, to: Path, to_format: str, *, into_existing: bool) -> None:
        await real(source, source_format, to, to_format, into_existing=into_existing)
        flip(to, 5 * CLUSTER)

    monkeypatch.setattr(tools, "convert", badly)
    with pytest.raises(TargetError, match="was restored wrong") as wrong:
        await restore(target, snapshots[LAST], "vda", to=out / "vda.img", image_format="raw")
    assert wrong.value.code == "content-wrong"
    assert names(out) == []


async def test_what_cannot_be_written_is_not_called_damaged(points: Points, out: Path) -> None:
    target, snapshots, _ = points
    with pytest.raises(ToolError, match="qemu-img convert failed"):
        await target.extract(snapshots[LAST], "vda", to=out / "absent" / "vda.img", image_format="raw")


# --- files ---


async def test_an_existing_file_is_left_alone(target: ImagesTarget, snapshot: Snapshot, out: Path) -> None:
    (out / "theirs").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(TargetError, match="exists already") as refused:
            await restore(target, snapshot, "vda", to=out / "theirs", image_format="raw", overwrite=overwrite)
        assert refused.value.code == "restore-path"
    assert (out / "theirs").read_text() == "precious"


async def test_a_file_that_appears_meanwhile_is_left_alone(
    target: ImagesTarget, snapshot: Snapshot, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tools.difference

    async def compared(*arguments: Any, **more: Any) -> str:
        (out / "vda.raw").write_text("precious")
        return await real(*arguments, **more)

    monkeypatch.setattr(tools, "difference", compared)
    with pytest.raises(TargetError, match="File exists") as refused:
        await restore(target, snapshot, "vda", to=out / "vda.raw", image_format="raw")
    assert refused.value.code == "restore-path"
    assert (out / "vda.raw").read_text() == "precious"
    assert names(out) == ["vda.raw"]


async def test_a_folder_that_is_not_there_is_named(target: ImagesTarget, snapshot: Snapshot, out: Path) -> None:
    with pytest.raises(TargetError, match="no such folder") as refused:
        await restore(target, snapshot, "vda", to=out / "absent" / "vda.raw", image_format="raw")
    assert refused.value.code == "restore-path"
    assert names(out) == []


async def test_a_disk_that_is_not_in_it_is_named(target: ImagesTarget, snapshot: Snapshot, out: Path) -> None:
    with pytest.raises(TargetError, match="has no disk 'vdz'"):
        await restore(target, snapshot, "vdz", to=out / "vdz.raw", image_format="raw")
    assert names(out) == []


async def test_an_image_that_is_gone_leaves_nothing(target: ImagesTarget, snapshot: Snapshot, out: Path) -> None:
    (target.path / snapshot.id / "vda.qcow2").unlink()
    with pytest.raises(TargetError, match="No such file") as told:
        await restore(target, snapshot, "vda", to=out / "vda.raw", image_format="raw")
    assert told.value.code == "content-wrong"
    assert names(out) == []


@pytest.mark.parametrize("step", ["convert", "difference"])
async def test_cancellation_leaves_no_file(
    target: ImagesTarget, snapshot: Snapshot, out: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    reached = asyncio.Event()
    real = getattr(tools, step)

    async def stuck(*arguments: Any, **more: Any) -> None:
        await real(*arguments, **more)
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(tools, step, stuck)
    task = asyncio.create_task(restore(target, snapshot, "vda", to=out / "vda.raw", image_format="raw"))
    await reached.wait()
    (written,) = names(out)
    assert written.startswith("vda.raw.")
    assert written.endswith(".partial")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert names(out) == []


async def test_a_file_system_without_hard_links(
    target: ImagesTarget, snapshot: Snapshot, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_arguments: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    await restore(target, snapshot, "vda", to=out / "vda.raw", image_format="raw")
    assert names(out) == ["vda.raw"]


# --- block devices ---


@pytest.fixture
def device(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A loop device of the given size, full of other data. Needs root."""
    backing = tmp_path / "device"
    backing.write_bytes(b"\xff" * request.param)
    path = subprocess.check_output(["losetup", "--show", "--find", backing], text=True).strip()
    yield Path(path)
    subprocess.check_call(["losetup", "--detach", path])


LARGE = 2 * MIB


@pytest.mark.parametrize("device", [LARGE], indirect=True)
async def test_a_block_device_takes_no_qcow2(target: ImagesTarget, snapshot: Snapshot, device: Path) -> None:
    before = device.read_bytes()
    with pytest.raises(TargetError, match="a block device takes a disk as it is") as refused:
        await restore(target, snapshot, "vda", to=device, image_format="qcow2", overwrite=True)
    assert refused.value.code == "restore-path"
    assert device.read_bytes() == before


@pytest.mark.parametrize("device", [LARGE], indirect=True)
async def test_a_block_device_is_not_overwritten_unasked(
    target: ImagesTarget, snapshot: Snapshot, device: Path
) -> None:
    with pytest.raises(TargetError, match="would be overwritten") as refused:
        await restore(target, snapshot, "vda", to=device, image_format="raw")
    assert refused.value.code == "restore-path"
    assert "--force" in refused.value.hint
    assert await asyncio.to_thread(device.read_bytes) == b"\xff" * LARGE


@pytest.mark.parametrize("device", [LARGE, SIZE], indirect=True)
async def test_a_block_device_gets_the_content_and_keeps_the_rest(
    target: ImagesTarget, snapshot: Snapshot, device: Path
) -> None:
    before = await asyncio.to_thread(device.read_bytes)
    await restore(target, snapshot, "vda", to=device, image_format="raw", overwrite=True)
    assert await asyncio.to_thread(device.read_bytes) == CONTENT + before[SIZE:]


@pytest.mark.parametrize("device", [MIB], indirect=True)
async def test_a_block_device_that_is_too_small_is_left_alone(
    target: ImagesTarget, snapshot: Snapshot, device: Path
) -> None:
    with pytest.raises(TargetError, match=f"it has {MIB} bytes, the disk has {SIZE}"):
        await restore(target, snapshot, "vda", to=device, image_format="raw", overwrite=True)
    assert await asyncio.to_thread(device.read_bytes) == b"\xff" * MIB


@pytest.mark.parametrize("device", [LARGE], indirect=True)
async def test_wrong_content_on_a_block_device_is_said(
    target: ImagesTarget, snapshot: Snapshot, device: Path
) -> None:
    await asyncio.to_thread(damage, target, snapshot)
    with pytest.raises(TargetError) as wrong:
        await restore(target, snapshot, "vda", to=device, image_format="raw", overwrite=True)
    assert wrong.value.code == "content-wrong"
    assert await asyncio.to_thread(device.is_block_device)


# --- files beside the disks ---


async def test_extra_files_come_back_under_their_names(target: ImagesTarget, out: Path) -> None:
    files = [
        ExtraFile("/a/OVMF_VARS.fd", 0o640, b"a's"),
        ExtraFile("/b/OVMF_VARS.fd", 0o600, b"b's"),
        ExtraFile("/b/tpm.bin", 0o600, b"tpm"),
    ]
    draft = await target.begin("web01", datetime.now(UTC))
    snapshot = await draft.commit({"kind": "full"}, files)
    restored = await restore_extra_files(target, snapshot, to=out)
    assert [(file, path.name) for file, path in restored] == list(
        zip(files, ["a_OVMF_VARS.fd", "b_OVMF_VARS.fd", "tpm.bin"], strict=True)
    )
    for file, path in restored:
        assert path.read_bytes() == file.content
        assert path.stat().st_mode & 0o777 == file.mode
    with pytest.raises(TargetError, match="File exists"):
        await restore_extra_files(target, snapshot, to=out)
    assert (out / "tpm.bin").read_bytes() == b"tpm"


async def test_damaged_extra_files_are_not_given_back(target: ImagesTarget, out: Path) -> None:
    draft = await target.begin("web01", datetime.now(UTC))
    snapshot = await draft.commit({"kind": "full"}, [ExtraFile("/a", 0o600, b"content")])
    path = target.path / snapshot.id / "extra_files.json"
    path.write_text(path.read_text().replace('"content": "', '"content": "AAAA'))
    with pytest.raises(TargetError, match="damaged") as damaged:
        await restore_extra_files(target, snapshot, to=out)
    assert damaged.value.code == "content-wrong"
    assert names(out) == []
