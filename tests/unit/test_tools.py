"""QEMU's and libnbd's tools, as they are run."""

import asyncio
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from orchestrator.errors import ToolError
from orchestrator.qemu import serving, tools

MIB = 1 << 20


def image(path: Path, content: bytes = b"vmfleece" * 1000) -> Path:
    path.write_bytes(content + bytes(-len(content) % 512))
    return path


async def qcow2(path: Path, size_bytes: int, *, options: str = "") -> Path:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        await tools.create_qcow2(descriptor, size_bytes, options=options)
    finally:
        os.close(descriptor)
    return path


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"  # its reaper may be slow
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("size", [512, 528 * 1024, (1 << 20) + 512, 1 << 40])
async def test_an_image_has_the_size_that_it_was_made_with(tmp_path: Path, size: int) -> None:
    path = await qcow2(tmp_path / "a.qcow2", size, options="compression_type=zstd")
    assert await tools.virtual_size(path, "qcow2") == size


@pytest.mark.parametrize("size", [0, 512, 528 * 1024, (1 << 20) + 512, 3 << 20])
async def test_the_hash_is_sha256sums(tmp_path: Path, size: int) -> None:
    raw = image(tmp_path / "a.raw", os.urandom(size))
    await tools.convert(raw, "raw", tmp_path / "a.qcow2", "qcow2", into_existing=False)
    wanted = hashlib.sha256(raw.read_bytes()).hexdigest()
    assert await tools.sha256(raw, "raw") == wanted
    assert await tools.sha256(tmp_path / "a.qcow2", "qcow2") == wanted


async def test_what_a_tool_says_is_passed_on(tmp_path: Path) -> None:
    raw = image(tmp_path / "a.raw")
    with pytest.raises(ToolError, match=r"qemu-img info failed: .*not in qcow2 format"):
        await tools.virtual_size(raw, "qcow2")
    with pytest.raises(ToolError, match=r"cannot read back .*not in qcow2 format"):
        await tools.sha256(raw, "qcow2")
    with pytest.raises(ToolError, match=r"(?s)cannot read back .*absent.*No such file"):
        await tools.sha256(tmp_path / "absent", "raw")
    with pytest.raises(ToolError, match=r"qemu-img convert failed: .*No such file"):
        await tools.convert(tmp_path / "absent", "raw", tmp_path / "b", "raw", into_existing=False)


async def test_a_tool_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await qcow2(tmp_path / "a.qcow2", 512)
    await tools.virtual_size(made, "qcow2")  # a loop opens descriptors of its own for its first child
    before = open_descriptors()
    monkeypatch.setenv("PATH", str(tmp_path))
    for program, use in (("qemu-img", tools.virtual_size), ("nbdcopy", tools.sha256)):
        with pytest.raises(ToolError, match=f"{program} is not installed") as missing:
            await use(made, "qcow2")
        assert missing.value.code == "tool-missing"
        assert "apt-get install" in missing.value.hint
    async with asyncio.timeout(5):  # uvloop closes its pipes a little later
        while open_descriptors() != before:
            await asyncio.sleep(0.01)


async def test_cancelling_a_hash_ends_the_server_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nbdcopy that has started qemu-nbd but has not connected yet: qemu-nbd would wait for ever."""
    pid_file = tmp_path / "pid"
    program = tmp_path / "nbdcopy"
    program.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {pid_file}.new\nmv {pid_file}.new {pid_file}\nwait\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    task = asyncio.create_task(tools.sha256(image(tmp_path / "a.qcow2"), "qcow2"))
    async with asyncio.timeout(10):
        while not pid_file.exists():
            await asyncio.sleep(0.01)
    task.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(asyncio.CancelledError):
            await task
    async with asyncio.timeout(5):  # it is killed, but nobody waits for it
        while not has_ended(int(pid_file.read_text())):
            await asyncio.sleep(0.01)


async def test_writing_back_bears_what_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    paths = [image(tmp_path / "a.raw"), tmp_path / "absent", tmp_path, tmp_path / "fifo"]
    tools.write_back(map(str, paths))


# --- serving ---


async def test_an_image_is_served_for_the_block(tmp_path: Path) -> None:
    raw = image(tmp_path / "a.raw", os.urandom(MIB))
    await tools.convert(raw, "raw", tmp_path / "a.qcow2", "qcow2", into_existing=False)
    async with serving.served(tmp_path / "a.qcow2", at=tmp_path / "s s?", export="d&?ü") as uri:
        await tools.convert(uri, "raw", tmp_path / "b.raw", "raw", into_existing=False)
    assert (tmp_path / "b.raw").read_bytes() == raw.read_bytes()
    assert not (tmp_path / "s s?").exists()


async def test_what_cannot_be_served_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = image(tmp_path / "a.raw")
    for path, why in ((raw, "not in qcow2 format"), (tmp_path / "absent", "No such file")):
        with pytest.raises(ToolError, match=f"cannot serve {path}: .*{why}"):
            async with serving.served(path, at=tmp_path / "s", export=""):
                pass
    with pytest.raises(ToolError, match=r"no NBD server can listen at .*too long"):
        async with serving.served(raw, at=tmp_path / ("s" * 200), export=""):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw"]
    for program in ("sh", "setpriv"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="qemu-nbd is not installed") as missing:
        async with serving.served(raw, at=tmp_path / "s", export=""):
            pass
    assert missing.value.code == "tool-missing"


# --- comparing ---


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_difference_is_told_wherever_it_is(tmp_path: Path, image_format: str) -> None:
    content = os.urandom(MIB) + bytes(2 * MIB + 512)
    source = image(tmp_path / "source.raw", content)
    for at in (None, 0, MIB - 1, 2 * MIB, len(content) - 1):
        written = bytearray(content)
        if at is not None:
            written[at] ^= 1
        path = tmp_path / f"{at}.{image_format}"
        await tools.convert(
            image(tmp_path / "a.raw", bytes(written)), "raw", path, image_format, into_existing=False
        )
        told = await tools.difference(path, image_format, source, "raw", size_bytes=len(content))
        assert ("mismatch" in told) is (at is not None)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_length_that_differs_is_told_even_if_all_of_it_is_zero(tmp_path: Path, image_format: str) -> None:
    source = image(tmp_path / "source.raw", bytes(MIB))
    for size in (0, MIB - 512, MIB + 512):
        path = tmp_path / f"{size}.{image_format}"
        await tools.convert(image(tmp_path / "a.raw", bytes(size)), "raw", path, image_format, into_existing=False)
        told = await tools.difference(path, image_format, source, "raw", size_bytes=MIB)
        assert told == f"it has {size} bytes instead of {MIB}"


async def test_an_image_whose_own_tables_are_wrong_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    await tools.convert(image(tmp_path / "a.raw"), "raw", path, "qcow2", into_existing=False)
    await tools.check(path)
    with path.open("r+b") as file:
        file.seek(40)  # where its first table is, by its header
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        file.write((1 << 63 | 1 << 40).to_bytes(8, "big"))
    with pytest.raises(ToolError, match="qemu-img check failed"):
        await tools.check(path)
