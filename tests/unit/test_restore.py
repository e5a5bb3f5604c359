"""Giving disks back: only what is right gets its name, and nothing that was there is lost."""

import asyncio
import errno
import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from test_target import MIB, content, disk, filled

from orchestrator.errors import TargetError, ToolError
from orchestrator.qemu import tools
from orchestrator.run.restore import restore
from orchestrator.target.base import Snapshot
from orchestrator.target.images.target import ImagesTarget

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
    restored = await restore(target, snapshot, "vda", to=to, image_format=image_format)
    assert (restored.disk, restored.path, restored.size_bytes) == ("vda", to, SIZE)
    assert restored.sha256 == snapshot.disk("vda").sha256 == await tools.sha256(to, image_format)
    assert await tools.virtual_size(to, image_format) == SIZE
    if image_format == "raw":
        assert to.read_bytes() == CONTENT
    assert names(out) == ["vda.img"]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_wrong_content_is_not_given_back(
    target: ImagesTarget, snapshot: Snapshot, out: Path, image_format: str
) -> None:
    await asyncio.to_thread(damage, target, snapshot)
    with pytest.raises(TargetError, match="was restored wrong") as wrong:
        await restore(target, snapshot, "vda", to=out / "vda.img", image_format=image_format)
    assert wrong.value.code == "content-wrong"
    assert snapshot.disk("vda").sha256 in wrong.value.message
    assert names(out) == []


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
    real = tools.sha256

    async def hashed(*arguments: Any, **more: Any) -> str:
        (out / "vda.raw").write_text("precious")
        return await real(*arguments, **more)

    monkeypatch.setattr(tools, "sha256", hashed)
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
    with pytest.raises(ToolError, match="No such file"):
        await restore(target, snapshot, "vda", to=out / "vda.raw", image_format="raw")
    assert names(out) == []


@pytest.mark.parametrize("step", ["convert", "sha256"])
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
    restored = await restore(target, snapshot, "vda", to=out / "vda.raw", image_format="raw")
    assert names(out) == ["vda.raw"]
    assert restored.sha256 == snapshot.disk("vda").sha256


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
    restored = await restore(target, snapshot, "vda", to=device, image_format="raw", overwrite=True)
    assert restored.sha256 == snapshot.disk("vda").sha256
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
