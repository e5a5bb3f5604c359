"""A mover and a bucket: restic reads what it wrote, and a server that is gone costs a bounded time."""

import asyncio
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from orchestrator.errors import TargetError
from orchestrator.target.mover.process import Mover
from orchestrator.target.restic.errors import Unreachable
from orchestrator.target.restic.place import backend_at, restic_name
from orchestrator.target.restic.repository import Repository
from tests.guest.restics import CHEAP
from tests.peer.test_mover_beside_restic import MIB, PASSWORD, SIZE, noise, opened, restic, tool
from tests.peer.test_mover_process import qemu
from tests.peer.test_restic_repository import make_bucket

SHORT = timedelta(seconds=2)


@pytest.fixture
def server() -> Iterator[ThreadedMotoServer]:
    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    yield started
    started.stop()


@pytest.fixture
def place(server: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository."""
    host, port = server.get_host_and_port()
    settings = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hush", "AWS_SESSION_TOKEN": "token"}
    for name, value in (settings | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
        monkeypatch.setenv(name, value)
    bucket = f"vms{secrets.token_hex(8)}"  # it keeps buckets as long as the process lives
    make_bucket(f"http://{host}:{port}/{bucket}")
    asyncio.run(Repository.create(backend_at(f"s3://{bucket}/main"), PASSWORD, cost=CHEAP))
    return f"s3://{bucket}/main"


async def write(mover: Mover, folder: Path, content: bytes) -> None:
    source = folder / "source.raw"
    source.write_bytes(content)
    async with qemu(mover, folder, "vda", len(content)) as uri:
        await tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri)


async def test_restic_reads_what_it_wrote_to_a_bucket(place: str, tmp_path: Path) -> None:
    content = noise(SIZE, 1)
    async with Mover.started(place, await opened(place)) as mover:
        await write(mover, tmp_path, content)
        await mover.seal("vda")
        snapshot = await mover.commit("web01", datetime.now(UTC), b"{}", tags=[], note={"run": "1"})
    assert await asyncio.to_thread(restic, restic_name(place), "dump", snapshot.hex(), "/vda.raw") == content
    await asyncio.to_thread(restic, restic_name(place), "check", "--read-data")


async def test_a_server_that_vanishes_is_told_in_time_and_nothing_is_told_of_keys(
    server: ThreadedMotoServer, place: str, tmp_path: Path
) -> None:
    async with Mover.started(place, await opened(place), patience=SHORT) as mover:
        await asyncio.to_thread(server.stop)
        began = time.monotonic()
        with pytest.raises(AssertionError, match="Input/output error"):
            await write(mover, tmp_path, noise(64 * MIB, 2))
        trouble = await mover.trouble("vda")
        assert (type(trouble), trouble and trouble.code) == (Unreachable, "target-unreachable")
        with pytest.raises(Unreachable, match="s3://vms"):
            await mover.seal("vda")
        assert time.monotonic() - began < 30
        assert "hush" not in str(trouble)


async def test_one_that_is_not_there_from_the_beginning(server: ThreadedMotoServer, place: str) -> None:
    key = await opened(place)
    await asyncio.to_thread(server.stop)
    began = time.monotonic()
    with pytest.raises(Unreachable):
        async with Mover.started(place, key, patience=SHORT):
            pytest.fail("it was started")
    assert time.monotonic() - began < 30


async def test_keys_that_are_missing_are_told_by_the_worker(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await opened(place)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(TargetError, match="AWS_SECRET_ACCESS_KEY") as failed:
        async with Mover.started(place, key):
            pytest.fail("it was started")
    assert failed.value.code == "target-keys"
