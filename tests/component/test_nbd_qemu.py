"""QEMU's blockdev-backup into the NBD server: what it sends, and that it is the disk."""

import asyncio
import contextlib
import errno
import itertools
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.units import KIB, MIB
from tests.component.nbd_memory import SOON_SECONDS, MemoryExport, Rig, serving
from tests.guest.versions import QEMUS
from tests.guest.versions import qemu as program

CHUNK = 4 * MIB
SIZE = 6 * CHUNK + 528 * KIB + 512
JOB: dict[str, Any] = {"job-id": "job", "device": "disk", "target": "sink", "sync": "full", "auto-dismiss": False}
AS_QEMU_LIKES = "7.2"
"""There the size of what is sent cannot be chosen: the tests run as QEMU likes it."""


class Qemu:
    """A QEMU without a machine, by its monitor."""

    def __init__(self, process: asyncio.subprocess.Process, version: str) -> None:
        self._process = process
        self.whole_chunks = version != AS_QEMU_LIKES

    async def backs_up(self, **options: object) -> None:
        """Begin, with 4 MiB pieces if it can."""
        perf = {"x_perf": {"min-cluster-size": CHUNK}} if self.whole_chunks else {}
        await self.does("blockdev-backup", **JOB, **perf, **options)

    async def said(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return dict(json.loads(await self._process.stdout.readline()))

    async def does(self, command: str, **arguments: object) -> Any:
        assert self._process.stdin is not None
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._process.stdin.write(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        while True:
            said = await self.said()
            assert "error" not in said, said
            if "return" in said:
                return said["return"]

    async def job_ends(self) -> str:
        """The job's error, or an empty string."""
        while True:
            job = next(job for job in await self.does("query-jobs") if job["id"] == "job")
            if job["status"] == "concluded":
                await self.does("job-dismiss", id="job")
                return str(job.get("error", ""))
            await asyncio.sleep(0.02)


@pytest.fixture(params=QEMUS)
async def qemu(request: pytest.FixtureRequest) -> AsyncIterator[Qemu]:
    argv = [*program(request.param), "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]
    pipe = asyncio.subprocess.PIPE
    async with asyncio.timeout(3 * SOON_SECONDS):
        process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
        try:
            one = Qemu(process, request.param)
            await one.said()
            await one.does("qmp_capabilities")
            yield one
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Chunks: noise, a hole, half noise, zeroes that are allocated, noise, noise; and the odd rest."""
    noise = random.Random(3).randbytes(CHUNK)  # noqa: S311  no secret
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(noise)
        file.seek(2 * CHUNK)
        file.write(noise[: CHUNK // 2])
        file.seek(3 * CHUNK)
        file.write(bytes(CHUNK) + noise[::-1] + noise)
        file.write(noise[: SIZE - 6 * CHUNK])
    return path


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    disk = MemoryExport(SIZE)
    disk.content[:] = b"\xee" * SIZE  # what is not written is found out
    async with serving(tmp_path, {"disk": disk}) as one:
        yield one


async def connect(qemu: Qemu, rig: Rig, image: Path) -> None:
    file = {"driver": "file", "filename": str(image)}
    await qemu.does("blockdev-add", driver="raw", node_name="disk", file=file)
    server = {"type": "unix", "path": str(rig.path)}
    await qemu.does("blockdev-add", driver="nbd", node_name="sink", server=server, export="disk", open_timeout=5)


@pytest.mark.parametrize("as_qemu_likes", [False, True])
async def test_a_backup_is_the_disk(qemu: Qemu, rig: Rig, image: Path, *, as_qemu_likes: bool) -> None:
    await connect(qemu, rig, image)
    await (qemu.does("blockdev-backup", **JOB) if as_qemu_likes else qemu.backs_up())
    assert await qemu.job_ends() == ""
    disk = rig.exports["disk"]
    assert disk.content == image.read_bytes()
    if qemu.whole_chunks and not as_qemu_likes:
        pieces = [(offset, length) for what, offset, length in disk.seen if what in {"write", "zero", "hole"}]
        assert sorted(pieces) == [(at * CHUNK, min(CHUNK, SIZE - at * CHUNK)) for at in range(7)]
    await qemu.does("blockdev-del", node_name="sink")
    while disk.seen[-1] != ("flush", 0, 0):  # not when the job ends
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert rig.troubles == []


async def test_answers_held_back_hold_the_job_back(qemu: Qemu, rig: Rig, image: Path) -> None:
    await connect(qemu, rig, image)
    disk = rig.exports["disk"]
    disk.open_gate.clear()
    workers = {"x_perf": {"max-workers": 2}}
    await qemu.does("blockdev-backup", **JOB, **workers)
    while disk.under_way < 2:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert disk.under_way == 2
    disk.open_gate.set()
    assert await qemu.job_ends() == ""
    assert disk.content == image.read_bytes()


async def test_a_job_waits_for_space_and_asks_again(qemu: Qemu, rig: Rig, image: Path) -> None:
    await connect(qemu, rig, image)
    disk = rig.exports["disk"]
    disk.fail["write"] = OSError(errno.ENOSPC, "full")
    await qemu.backs_up(on_target_error="stop")
    while (await qemu.does("query-block-jobs"))[0]["io-status"] != "nospace":
        await asyncio.sleep(0.02)
    del disk.fail["write"]
    for _ in itertools.repeat(None, 100):
        if (await qemu.does("query-jobs"))[0]["status"] == "paused":
            await qemu.does("block-job-resume", device="job")
        if (await qemu.does("query-jobs"))[0]["status"] == "concluded":
            break
        await asyncio.sleep(0.05)
    assert await qemu.job_ends() == ""
    assert disk.content == image.read_bytes()
    assert {type(trouble.error) for trouble in rig.troubles} == {OSError}


async def test_an_error_ends_the_job_with_its_words(qemu: Qemu, rig: Rig, image: Path) -> None:
    await connect(qemu, rig, image)
    rig.exports["disk"].fail["write"] = OSError(errno.ENOSPC, "full")
    await qemu.backs_up()
    assert await qemu.job_ends() == "No space left on device"


async def test_a_server_that_ends_fails_the_job_at_once(qemu: Qemu, image: Path, tmp_path: Path) -> None:
    disk = MemoryExport(SIZE)
    disk.open_gate.clear()
    async with serving(tmp_path, {"disk": disk}) as rig:
        await connect(qemu, rig, image)
        await qemu.backs_up()
        while not disk.under_way:
            await asyncio.sleep(0.01)
    assert await qemu.job_ends() == "Input/output error"
    assert disk.lent == 0
