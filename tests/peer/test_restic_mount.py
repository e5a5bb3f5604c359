"""`restic mount` shows a snapshot's disks as files, which read as the disks do."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.snapshot import ResticSnapshot
from orchestrator.target.restic.tree import FileContent
from tests.guest.restics import CHEAP, Restic

MIB = 1 << 20
PASSWORD = "correct horse"
CONTENT = os.urandom(5 * MIB) + bytes(9 * MIB) + os.urandom(MIB + 512)
SOON_SECONDS = 30.0


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    async def make() -> None:
        made = await Repository.create(DirectoryBackend(tmp_path / "repo"), PASSWORD, cost=CHEAP)
        async with made.lock() as lock:
            await made.load_index()
            writer = made.writer(lock)
            chunks = [CONTENT[at : at + 4 * MIB] for at in range(0, len(CONTENT), 4 * MIB)]
            content = FileContent(len(CONTENT), [writer.add_chunk(chunk)[0] for chunk in chunks])
            now = datetime.now(UTC)
            tree = await writer.write_file_tree({"vda.raw": content}, b"{}", now)
            await writer.commit(ResticSnapshot(now, tree, "web01", ("/web01",), ("vmfleece",)))

    asyncio.run(make())
    return tmp_path / "repo"


@pytest.fixture
def mounted(version: str, repository: Path, tmp_path: Path) -> Iterator[Path]:
    at = tmp_path / "mounted"
    at.mkdir()
    process = Restic(repository, PASSWORD, version).started("mount", str(at))
    try:
        deadline = time.monotonic() + SOON_SECONDS
        while not (at / "hosts").is_dir():
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield at
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SOON_SECONDS)
        subprocess.run(["umount", "--lazy", str(at)], capture_output=True, check=False)


def test_a_disk_reads_as_it_was(mounted: Path) -> None:
    disk = mounted / "hosts" / "web01" / "latest" / "vda.raw"
    assert disk.stat().st_size == len(CONTENT)
    assert disk.read_bytes() == CONTENT
    with disk.open("rb") as file:
        for at in (0, 4 * MIB - 100, 5 * MIB - 7, 12 * MIB, len(CONTENT) - 600):
            file.seek(at)
            assert file.read(200) == CONTENT[at : at + 200]
