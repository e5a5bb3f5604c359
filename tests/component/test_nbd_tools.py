"""The NBD server with everybody else's clients: QEMU's tools and libnbd's."""

import asyncio
import errno
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from orchestrator.aio import run_process
from orchestrator.nbd.export import BlockSizes
from orchestrator.units import KIB, MIB
from tests.component.nbd_memory import BLOCK, SOON_SECONDS, MemoryExport, Rig, serving

SIZE = 9 * MIB + 512
DATA = 3 * MIB + 70_000
NOISE = random.Random(5).randbytes(SIZE)  # noqa: S311  no secret


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    exports = {"disk": MemoryExport(SIZE), "old": MemoryExport(SIZE, read_only=True), "a b/ü": MemoryExport(MIB)}
    exports["old"].description = "yesterday's"
    exports["old"].content[:] = NOISE
    exports["old"].status_of = [0] * len(exports["old"].status_of)
    async with serving(tmp_path, exports) as one:
        yield one


async def run(*argv: str, fails: bool = False) -> str:
    async with asyncio.timeout(SOON_SECONDS):
        done = await run_process(argv)
    assert bool(done.returncode) is fails, f"{argv}: {done.stdout.decode()} {done.stderr}"
    return done.stdout.decode() + done.stderr


async def io(rig: Rig, *commands: str, name: str = "disk", fails: bool = False) -> str:
    options = [part for command in commands for part in ("-c", command)]
    read_only = ["-r"] if rig.exports[name].read_only else []
    said = await run("qemu-io", *read_only, "-f", "raw", *options, rig.uri(name), fails=fails)
    assert "Pattern verification failed" not in said
    return said


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image: data, a hole, data, a hole to the end."""
    path = tmp_path / "disk.raw"
    path.write_bytes(NOISE[:DATA])
    with path.open("r+b") as file:
        file.seek(6 * MIB)
        file.write(b"\7" * MIB)
        file.truncate(SIZE)
    return path


async def test_an_image_is_written_and_read_back(rig: Rig, image: Path, tmp_path: Path) -> None:
    await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), rig.uri())
    assert rig.exports["disk"].content == image.read_bytes()
    assert ("flush", 0, 0) in rig.exports["disk"].seen
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), rig.uri())
    back = tmp_path / "back.qcow2"
    await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", rig.uri(), str(back))
    await run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(image), str(back))
    rig.exports["disk"].content[DATA - 1] ^= 1
    said = await run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), rig.uri(), fails=True)
    assert "Content mismatch" in said
    assert rig.troubles == []


async def test_qemu_is_told_the_size_to_the_byte(rig: Rig) -> None:
    about = json.loads(await run("qemu-img", "info", "--output=json", "-f", "raw", rig.uri()))
    assert about["virtual-size"] == SIZE
    assert rig.troubles == []


async def test_qemu_io_does_all_there_is(rig: Rig) -> None:
    disk = rig.exports["disk"]
    await io(rig, "write -P 7 0 2M", "write -P 8 1000 100", "read -P 8 1000 100", "read -P 7 1100 64k")
    assert disk.content[999:1101] == b"\7" + b"\10" * 100 + b"\7"
    await io(rig, "write -z 64k 64k", "write -z -u 256k 64k", "discard 512k 64k", "flush")
    assert ("zero", 64 * KIB, 64 * KIB) in disk.seen
    assert ("hole", 256 * KIB, 64 * KIB) in disk.seen
    assert ("trim", 512 * KIB, 64 * KIB) in disk.seen
    await io(rig, f"write -P 9 {SIZE - 512} 512", f"read -P 9 {SIZE - 512} 512")
    assert rig.troubles == []


@pytest.mark.parametrize("command", ["write -f -P 1 0 64k", "write -f -z 0 64k"])
async def test_what_must_be_durable_at_once_is_flushed_before_the_answer(rig: Rig, command: str) -> None:
    await io(rig, command)
    seen = [what for what, _, _ in rig.exports["disk"].seen if what != "status"]
    assert seen[1] == "flush"


async def test_a_read_only_export_stays_as_it_is(rig: Rig) -> None:
    before = bytes(rig.exports["old"].content)
    said = await run("qemu-io", "-f", "raw", "-c", "write 0 4k", rig.uri("old"), fails=True)
    assert "read-only" in said.lower() or "permi" in said.lower()
    await io(rig, "read 0 1M", name="old")
    assert rig.exports["old"].content == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EPERM])
async def test_an_error_reaches_the_client_as_it_is(rig: Rig, number: int) -> None:
    failure = OSError(number, "on purpose")
    rig.exports["disk"].fail["write"] = failure
    said = await io(rig, "write 0 64k", fails=True)
    expected = {errno.ENOSPC: "No space left", errno.EIO: "Input/output error", errno.EPERM: "not permitted"}
    assert expected[number] in said
    assert [trouble.error for trouble in rig.troubles] == [failure]
    assert rig.troubles[0].export == "disk"
    assert rig.troubles[0].request is not None
    assert rig.troubles[0].request.length == 64 * KIB


@pytest.mark.parametrize("what", ["read", "status", "buffer", "hole", "flush"])
async def test_an_error_of_each_kind_costs_that_request_only(rig: Rig, what: str) -> None:
    rig.exports["disk"].fail[what] = OSError(errno.EIO, "on purpose")
    if what == "status":
        assert "error" in (await run("nbdinfo", "--map", rig.uri(), fails=True)).lower()
    else:
        command = {"read": "read 0 4k", "buffer": "write 0 1M", "hole": "write -z -u 0 4k", "flush": "flush"}[what]
        said = await io(rig, command, fails=True)
        assert "Input/output error" in said or what == "flush"  # qemu-io says nothing then
    del rig.exports["disk"].fail[what]
    await io(rig, "write -P 3 0 1M", "read -P 3 0 1M")
    assert {str(one.error) for one in rig.troubles if one.request is not None} == {"[Errno 5] on purpose"}


async def test_the_list_of_exports(rig: Rig) -> None:
    found = json.loads(await run("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={rig.path}"))["exports"]
    about = {one["export-name"]: one for one in found}
    assert set(about) == {"disk", "old", "a b/ü"}
    assert about["old"]["description"] == "yesterday's"
    assert about["old"]["is_read_only"]
    assert not about["disk"]["is_read_only"]
    assert about["disk"]["export-size"] == SIZE
    assert about["disk"]["contexts"] == ["base:allocation"]
    sizes = [about["disk"][f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 32 * MIB]
    for flag in ("can_flush", "can_fua", "can_trim", "can_zero", "can_df", "can_multi_conn"):
        assert about["disk"][flag], flag
    assert rig.troubles == []


async def test_a_name_with_more_than_ascii_is_found(rig: Rig) -> None:
    assert int(await run("nbdinfo", "--size", rig.uri("a%20b/%C3%BC"))) == MIB


async def test_an_unknown_export_is_refused_with_its_name(rig: Rig) -> None:
    assert "No such file or directory" in await run("nbdinfo", rig.uri("nothing"), fails=True)
    assert "there is no export 'nothing'" in await run("qemu-img", "info", rig.uri("nothing"), fails=True)


async def test_the_map_of_holes_and_data(rig: Rig) -> None:
    await io(rig, "write 64k 64k", "write -z 1M 4k", "write 2M 64k", "discard 2M 64k")
    pieces = json.loads(await run("nbdinfo", "--map", "--json", rig.uri()))
    found = [(piece["offset"], piece["length"], piece["type"]) for piece in pieces]
    assert found == [
        (0, 64 * KIB, 3),
        (64 * KIB, 64 * KIB, 0),
        (128 * KIB, MIB - 128 * KIB, 3),
        (MIB, BLOCK, 2),
        (MIB + BLOCK, SIZE - MIB - BLOCK, 3),
    ]


async def test_nbdcopy_in_both_directions(rig: Rig, image: Path, tmp_path: Path) -> None:
    await run("nbdcopy", "--flush", str(image), rig.uri())
    assert rig.exports["disk"].content == image.read_bytes()
    assert rig.exports["disk"].seen[-1] == ("flush", 0, 0)
    back = tmp_path / "back.raw"
    back.touch()
    await run("nbdcopy", rig.uri(), str(back))
    assert back.read_bytes() == image.read_bytes()
    await run("nbdcopy", rig.uri("old"), rig.uri("disk"))
    assert rig.exports["disk"].content == rig.exports["old"].content
    assert rig.troubles == []


async def test_reads_of_a_snapshot_go_side_by_side(rig: Rig, tmp_path: Path) -> None:
    old = rig.exports["old"]
    old.open_gate.clear()
    copying = asyncio.create_task(run("nbdcopy", "--request-size=65536", rig.uri("old"), str(tmp_path / "out")))
    try:
        async with asyncio.timeout(SOON_SECONDS):
            while sum(what == "read" for what, _, _ in old.seen) < 32:
                old.open_gate.set()
                await asyncio.sleep(0)
                old.open_gate.clear()
                await asyncio.sleep(0.01)
    finally:
        old.open_gate.set()
        await copying
    assert old.most_under_way >= 16


async def test_block_sizes_are_heeded(tmp_path: Path) -> None:
    exports = {"disk": MemoryExport(MIB, sizes=BlockSizes(minimum=512, preferred=4096, maximum=64 * KIB))}
    async with serving(tmp_path, exports) as rig:
        await io(rig, "write -P 1 0 1M", "write -P 2 700 100", "read -P 2 700 100")
    writes = [(offset, length) for what, offset, length in exports["disk"].seen if what == "write"]
    assert max(length for _, length in writes) == 64 * KIB
    assert all(offset % 512 == 0 and length % 512 == 0 for offset, length in writes)
    assert exports["disk"].content[699:801] == b"\1" + b"\2" * 100 + b"\1"


@pytest.mark.parametrize("tool", ["qemu-img", "nbdinfo"])
async def test_whoever_is_too_many_is_turned_away_at_once(rig: Rig, tool: str) -> None:
    connections = [rig.connect() for _ in range(16)]
    try:
        await asyncio.sleep(0.05)
        await run(*([tool, "info"] if tool == "qemu-img" else [tool]), rig.uri(), fails=True)
    finally:
        for one in connections:
            one.close()
    assert "too many clients" in {str(trouble.error) for trouble in rig.troubles}
