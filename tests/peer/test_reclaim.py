"""Freeing the space of forgotten snapshots: by restic, and beside nobody."""

import asyncio
import os
import socket
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from orchestrator import aio
from orchestrator.config import TargetDriver, TargetSettings
from orchestrator.service import reclaim
from orchestrator.target.restic import lock_file
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.lock_file import LockFile
from orchestrator.target.restic.repository import Repository
from tests.guest.restics import CHEAP, Restic

PASSWORD = "correct horse"


@pytest.fixture
async def settings(tmp_path: Path) -> TargetSettings:
    path, password = tmp_path / "repository", tmp_path / "password"
    password.touch(mode=0o600)
    password.write_text(PASSWORD)
    await Repository.create(DirectoryBackend(path), PASSWORD, cost=CHEAP)
    return TargetSettings("main", TargetDriver.RESTIC, str(path), path, password_file=password)


@pytest.fixture
def restic(settings: TargetSettings, tmp_path: Path) -> Restic:
    """With a snapshot that was forgotten."""
    made = Restic(Path(settings.place), PASSWORD)
    (tmp_path / "file").write_bytes(os.urandom(100_000))
    made.run("backup", str(tmp_path / "file"))
    made.run("forget", made.snapshots()[0]["id"])
    assert packs(settings)
    return made


def packs(settings: TargetSettings) -> list[Path]:
    return list(Path(settings.place, "data").rglob("?" * 64))


async def test_space_is_freed_once_no_run_writes(settings: TargetSettings, restic: Restic) -> None:
    gate = aio.SharedLock()
    with capture_logs() as logs:
        async with gate.shared():
            freeing = asyncio.create_task(reclaim.free_space(settings, gate))
            await asyncio.sleep(0.3)
            assert packs(settings)
            assert logs == []
        await freeing
    assert packs(settings) == []
    restic.check()
    told = [line for line in logs if line["event"] != "reclaim.said"]
    assert [line["event"] for line in told] == ["reclaim.started", "reclaim.finished"]
    assert len(logs) > 4  # what restic says


async def test_it_is_tried_again_while_another_host_writes(settings: TargetSettings, restic: Restic) -> None:
    repository = await Repository.open(DirectoryBackend(Path(settings.place)), PASSWORD)
    theirs = LockFile(datetime.now(UTC), False, f"not-{socket.gethostname()}", "root", 7, 0, 0)
    content = lock_file.seal(theirs, repository._key)
    lock = Path(settings.place, "locks", sha256(content).hexdigest())
    lock.write_bytes(content)
    with capture_logs() as logs:
        freeing = asyncio.create_task(reclaim.free_space(settings, aio.SharedLock(), pause_seconds=0.1))
        while not any(line["event"] == "reclaim.failed" for line in logs):
            await asyncio.sleep(0.05)
        lock.unlink()
        await freeing
    assert logs[-1]["event"] == "reclaim.finished"
    assert next(line for line in logs if line["event"] == "reclaim.failed")["code"] == "repository-locked"
    assert packs(settings) == []
    restic.check()


async def test_what_waiting_does_not_help_is_said_once(settings: TargetSettings) -> None:
    assert settings.password_file is not None
    settings.password_file.write_text("wrong")
    with capture_logs() as logs:
        await reclaim.free_space(settings, aio.SharedLock())
    assert [(line["event"], line.get("code")) for line in logs] == [
        ("reclaim.started", None),
        ("reclaim.failed", "wrong-password"),
    ]
