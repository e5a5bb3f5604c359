"""Files of a repository, read back by QEMU's and libnbd's tools, onto disks, and only to check them."""

import asyncio
import errno
import fcntl
import itertools
import json
import os
import random
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from orchestrator.aio import run_process
from orchestrator.errors import TargetError, ToolError
from orchestrator.nbd.protocol import Allocation
from orchestrator.qemu import tools
from orchestrator.target.repository import chunks, contents, raw_file
from orchestrator.target.repository.chunks import Layout
from orchestrator.target.restic.backend.base import File, Kind
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.crypto import Cost
from orchestrator.target.restic.errors import Unreachable
from orchestrator.target.restic.pack import CHUNK_BYTES, BlobKind
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.tree import FileContent
from orchestrator.units import KIB, MIB

CHEAP = Cost(16, 1, 1)
NOISE = random.Random(7).randbytes(11 * MIB)  # noqa: S311  no secret
DISK = NOISE[: 5 * MIB] + bytes(9 * MIB) + b"text " * (MIB // 5) + NOISE[5 * MIB :] + bytes(MIB + 512)
DISK += bytes(-len(DISK) % 512)
HOLE = int(Allocation.HOLE | Allocation.ZERO)


class CountingBackend(DirectoryBackend):
    """A folder that says what was read of its packs; `failure`, if given, is what comes of that."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[tuple[str, int]] = []
        self.failure: Exception | None = None
        self.open_gate = threading.Event()
        self.open_gate.set()

    def read(self, file: File, *, offset: int = 0, length: int | None = None) -> bytes:
        if file.kind is Kind.DATA:
            self.reads.append((file.path, offset))
            self.open_gate.wait(30)
            if self.failure is not None:
                raise self.failure
        return super().read(file, offset=offset, length=length)


@dataclass
class Rig:
    """A repository with files that were cut into chunks of any lengths."""

    root: Path
    backend: CountingBackend
    repository: Repository
    files: dict[str, FileContent] = field(default_factory=dict)

    async def add(self, name: str, content: bytes, cuts: Sequence[int]) -> FileContent:
        """Write a file whose chunks begin at 0 and at `cuts`."""
        async with self.repository.lock() as lock:
            await self.repository.load_index()
            writer = self.repository.writer(lock)
            starts = [0, *cuts, len(content)]
            pieces = [content[a:b] for a, b in itertools.pairwise(starts)]
            made = FileContent(len(content), [writer.add_chunk(piece)[0] for piece in pieces])
            await writer.write_file_tree({name: made}, b"{}", datetime.now(UTC))
            await asyncio.to_thread(writer.flush)
        self.files[name] = made
        self.backend.reads.clear()
        return made

    def place(self, identity: bytes) -> tuple[Path, int]:
        """Where a chunk's sealed bytes are."""
        (found,) = self.repository._index.find(chunk_kind(), identity)
        return self.root / File(Kind.DATA, found.pack).path, found.entry.offset

    def damage(self, *identities: bytes) -> None:
        for identity in identities:
            path, offset = self.place(identity)
            path.chmod(0o600)
            with path.open("r+b") as pack:
                pack.seek(offset + 20)
                byte = pack.read(1)[0]
                pack.seek(offset + 20)
                pack.write(bytes([byte ^ 1]))


def chunk_kind() -> BlobKind:
    return BlobKind.DATA


def grid(content: bytes) -> list[int]:
    return list(range(CHUNK_BYTES, len(content), CHUNK_BYTES))


def anyhow(content: bytes, seed: int = 3) -> list[int]:
    """Where chunks begin that are as different in length as can be."""
    source = random.Random(seed)  # noqa: S311
    return sorted({1, 2, 513, len(content) - 1, *(source.randrange(1, len(content)) for _ in range(20))})


@pytest.fixture
async def rig(tmp_path: Path) -> Rig:
    backend = CountingBackend(tmp_path / "repository")
    repository = await Repository.create(backend, "correct horse", cost=CHEAP)
    return Rig(tmp_path / "repository", backend, repository)


@pytest.fixture(params=[grid, anyhow], ids=["4 MiB", "any length"])
async def disk(rig: Rig, request: pytest.FixtureRequest) -> FileContent:
    return await rig.add("vda", DISK, request.param(DISK))


@pytest.fixture
def sockets() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


async def run(*argv: str | Path, fails: bool = False) -> str:
    async with asyncio.timeout(60):
        done = await run_process([str(part) for part in argv])
    assert bool(done.returncode) is fails, f"{argv}: {done.stdout.decode()} {done.stderr}"
    return done.stdout.decode() + done.stderr


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


# --- onto disks ---


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_file_is_extracted(rig: Rig, disk: FileContent, tmp_path: Path, image_format: str) -> None:
    out = tmp_path / "out"
    await contents.extract(rig.repository, disk, name="vda", to=out, image_format=image_format)
    raw = out
    if image_format != "raw":
        raw = tmp_path / "raw"
        await run("qemu-img", "convert", "-f", image_format, "-O", "raw", out, raw)
    assert raw.read_bytes() == DISK
    assert out.stat().st_blocks * 512 < 13 * MIB, "there are holes where it is zero"


async def test_what_is_written_wrong_is_told(
    rig: Rig, disk: FileContent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tools.convert

    async def wrong(source: str, source_format: str, to: Path, to_format: str, *, into_existing: bool) -> None:
        await real(source, source_format, to, to_format, into_existing=into_existing)
        await run("qemu-io", "-f", to_format, "-c", "write -q -P 7 4096 512", to)

    monkeypatch.setattr(tools, "convert", wrong)
    with pytest.raises(TargetError, match="vda was restored wrong: Content mismatch at offset 4096") as told:
        await contents.extract(rig.repository, disk, name="vda", to=tmp_path / "out", image_format="qcow2")
    assert told.value.code == "content-wrong"


async def test_an_empty_file(rig: Rig, tmp_path: Path) -> None:
    empty = FileContent(0, [])
    await contents.extract(rig.repository, empty, name="vda", to=tmp_path / "out", image_format="raw")
    assert (tmp_path / "out").read_bytes() == b""
    assert (await contents.verify(rig.repository, {"vda": empty}, share=1.0)).problems == ()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device, larger than the disk, full of other data. Needs root."""
    backing = tmp_path / "device"
    backing.write_bytes(b"\xff" * (len(DISK) + MIB))
    path = subprocess.check_output(["losetup", "--show", "--find", backing], text=True).strip()
    yield Path(path)
    subprocess.check_call(["losetup", "--detach", path])


async def test_a_block_device_gets_zeroes_where_it_held_others(rig: Rig, device: Path) -> None:
    disk = await rig.add("vda", DISK, grid(DISK))
    await contents.extract(rig.repository, disk, name="vda", to=device, image_format="raw")
    found = await asyncio.to_thread(device.read_bytes)
    assert found == DISK + b"\xff" * (len(found) - len(DISK))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_damage_is_named_and_nothing_else(
    rig: Rig, disk: FileContent, tmp_path: Path, image_format: str
) -> None:
    rig.damage(disk.chunks[0])
    path, offset = rig.place(disk.chunks[0])
    with pytest.raises(TargetError) as wrong:
        await contents.extract(
            rig.repository, disk, name="disk vda of it", to=tmp_path / "out", image_format=image_format
        )
    assert wrong.value.code == "content-wrong"
    name = path.relative_to(rig.root)
    assert wrong.value.message.startswith(f"disk vda of it cannot be read: the blob at {offset} in {name} ")


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_what_cannot_be_reached_is_not_called_damaged(
    rig: Rig, disk: FileContent, tmp_path: Path, image_format: str
) -> None:
    rig.backend.failure = Unreachable("the NAS is gone")
    with pytest.raises(Unreachable, match="the NAS is gone"):
        await contents.extract(rig.repository, disk, name="vda", to=tmp_path / "out", image_format=image_format)


@pytest.mark.parametrize(("image_format", "kind"), [("raw", TargetError), ("qcow2", ToolError)])
async def test_what_cannot_be_written_is_not_called_damaged(
    rig: Rig, disk: FileContent, tmp_path: Path, image_format: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="No such file") as refused:
        await contents.extract(
            rig.repository, disk, name="vda", to=tmp_path / "absent" / "out", image_format=image_format
        )
    assert "content-wrong" not in str(refused.value)


async def test_a_chunk_that_no_index_knows(rig: Rig, disk: FileContent, tmp_path: Path, sockets: Path) -> None:
    lost = FileContent(disk.size_bytes, [*disk.chunks[:-1], b"\7" * 32])
    with pytest.raises(TargetError) as wrong:
        await contents.extract(rig.repository, lost, name="vda", to=tmp_path / "out", image_format="raw")
    assert (wrong.value.code, "07" * 32 in wrong.value.message) == ("content-wrong", True)
    with pytest.raises(TargetError, match="vda cannot be read: ") as wrong:
        async with contents.exported(rig.repository, {"vda": lost}, sockets):
            pass
    assert wrong.value.code == "content-wrong"
    found = await contents.verify(rig.repository, {"vda": lost}, share=1.0)
    assert [one.startswith(f"vda: data blob {'07' * 32}") for one in found.problems] == [True]


async def test_a_pack_that_is_gone_costs_what_was_in_it_only(rig: Rig, sockets: Path) -> None:
    disk = await rig.add("vda", NOISE, grid(NOISE))
    other = await rig.add("vdb", b"!" + NOISE, [1, *grid(NOISE)])
    gone, _ = rig.place(other.chunks[0])
    gone.unlink()
    await rig.repository.load_index()
    found = await contents.verify(rig.repository, rig.files, share=1.0)
    assert [one for one in found.problems if gone.name in one and "it is missing" in one] == list(found.problems)
    assert [one.partition(":")[0] for one in found.problems] == ["vdb"] * len(set(other.chunks) - set(disk.chunks))
    with pytest.raises(TargetError, match=f"vdb cannot be read: .*{gone.name}.* it is missing") as wrong:
        await contents.extract(rig.repository, other, name="vdb", to=sockets / "out", image_format="raw")
    assert wrong.value.code == "content-wrong"
    async with contents.exported(rig.repository, {"vda": disk, "vdb": other}, sockets) as uris:
        await run("nbdcopy", uris["vda"], "null:")
        await run("nbdcopy", uris["vdb"], "null:", fails=True)


async def test_a_length_that_is_not_its_chunks(rig: Rig, disk: FileContent, tmp_path: Path) -> None:
    wrong = FileContent(disk.size_bytes - 1, disk.chunks)
    with pytest.raises(TargetError, match=f"{len(DISK)} bytes where its tree says {len(DISK) - 1}"):
        await contents.extract(rig.repository, wrong, name="vda", to=tmp_path / "out", image_format="raw")
    found = await contents.verify(rig.repository, {"vda": wrong, "vdb": disk}, share=1.0)
    assert found.problems == (f"vda: its chunks are {len(DISK)} bytes, and it has {len(DISK) - 1}",)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_cancelled_it_ends_and_leaves_nothing_running(
    rig: Rig, disk: FileContent, tmp_path: Path, image_format: str
) -> None:
    await run("qemu-img", "--version")  # a loop opens descriptors of its own for its first child
    rig.backend.open_gate.clear()
    before = open_descriptors()
    task = asyncio.create_task(
        contents.extract(rig.repository, disk, name="vda", to=tmp_path / "out", image_format=image_format)
    )
    async with asyncio.timeout(20):
        while not rig.backend.reads:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.1)
        assert not task.done(), "a thread may still write to the file"
        rig.backend.open_gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        read = len(rig.backend.reads)
        while open_descriptors() - before:
            await asyncio.sleep(0.01)
    assert len(rig.backend.reads) == read <= chunks.THREADS


async def test_what_is_there_twice_is_read_once(rig: Rig, tmp_path: Path) -> None:
    twice = NOISE[: 4 * MIB] * 3 + NOISE[: 4 * MIB - 1] + b"!"
    disk = await rig.add("vda", twice, grid(twice))
    await contents.extract(rig.repository, disk, name="vda", to=tmp_path / "out", image_format="raw")
    assert (tmp_path / "out").read_bytes() == twice
    assert len(rig.backend.reads) == 2


# --- by NBD ---


@pytest.fixture
async def uri(rig: Rig, disk: FileContent, sockets: Path) -> AsyncIterator[str]:
    async with contents.exported(rig.repository, {"vda": disk}, sockets) as uris:
        yield uris["vda"]
    assert list(sockets.iterdir()) == []


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "disk.raw").write_bytes(DISK)
    return tmp_path / "disk.raw"


async def test_everybodys_tools_read_it(uri: str, raw: Path, tmp_path: Path) -> None:
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, raw)
    await run("nbdcopy", uri, tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == DISK
    await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "copy.qcow2")
    await run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", tmp_path / "copy.qcow2", raw)
    (about,) = json.loads(await run("nbdinfo", "--json", uri))["exports"]
    assert (about["export-size"], about["is_read_only"], about["can_multi_conn"]) == (len(DISK), True, True)
    said = await run("qemu-io", "-f", "raw", "-c", "write 0 512", uri, fails=True)
    assert "read-only" in said.lower() or "permi" in said.lower()


async def test_a_qcow2_overlay_makes_it_writable(uri: str, raw: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    await run("qemu-img", "create", "-q", "-f", "qcow2", "-b", uri, "-F", "raw", overlay)
    await run("qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 1M", overlay)
    await run("qemu-io", "-f", "raw", "-c", "write -P 9 1M 1M", raw)
    await run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", overlay, raw)


async def test_zero_chunks_are_holes_that_nobody_reads(rig: Rig, sockets: Path) -> None:
    content = bytes(8 * MIB) + NOISE[: 4 * MIB] + bytes(4 * MIB + 512)
    await rig.add("vda", content, grid(content))
    async with contents.exported(rig.repository, rig.files, sockets) as uris:
        pieces = json.loads(await run("nbdinfo", "--map", "--json", uris["vda"]))
        found = [(piece["offset"], piece["length"], piece["type"]) for piece in pieces]
        assert found == [(0, 8 * MIB, HOLE), (8 * MIB, 4 * MIB, 0), (12 * MIB, 4 * MIB + 512, HOLE)]
        await run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 8M", "-c", "read -P 0 12M 4M", uris["vda"])
        assert rig.backend.reads == []


async def test_several_disks_at_one_socket(rig: Rig, sockets: Path, tmp_path: Path) -> None:
    disks = {"vda": DISK, "efi 0&?": NOISE[: 528 * KIB]}
    for name, content in disks.items():
        await rig.add(name, content, anyhow(content))
    async with contents.exported(rig.repository, rig.files, sockets) as uris:
        (socket,) = sockets.iterdir()
        assert socket.stat().st_mode & 0o777 == 0o600
        await asyncio.gather(*(run("nbdcopy", uri, tmp_path / str(n)) for n, uri in enumerate(uris.values())))
    assert [(tmp_path / str(number)).read_bytes() for number in range(2)] == list(disks.values())


async def test_damage_is_an_io_error_there_only_and_is_logged(rig: Rig, sockets: Path) -> None:
    disk = await rig.add("vda", NOISE, grid(NOISE))
    rig.damage(disk.chunks[1])
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("info"))
    with capture_logs() as logs:
        async with contents.exported(rig.repository, rig.files, sockets) as uris:
            said = await run("qemu-io", "-r", "-f", "raw", "-c", "read 5M 1M", uris["vda"], fails=True)
            assert "Input/output error" in said
            await run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4M", "-c", "read 8M 3M", uris["vda"])
            await run("nbdcopy", uris["vda"], "null:", fails=True)
    warned = [line for line in logs if line["log_level"] == "warning"]
    assert {(line["event"], line["disk"]) for line in warned} == {("export.failed", "vda")}
    assert str(rig.place(disk.chunks[1])[0].relative_to(rig.root)) in warned[0]["error"]


# --- requests ---


async def test_reads_of_any_place_and_length(rig: Rig, disk: FileContent) -> None:
    layout = Layout.of(rig.repository, disk)
    source = random.Random(11)  # noqa: S311
    async with chunks.chunks_of(rig.repository) as some:
        export = contents.DiskExport(some, layout)
        assert export.size_bytes == len(DISK)
        for _ in range(60):
            offset = source.choice([source.randrange(len(DISK)), *layout.starts[:-1]])
            length = min(source.choice([1, 512, 70_000, 3 * MIB, 12 * MIB]), len(DISK) - offset)
            found = await export.read(offset, length)
            assert bytes(found) == DISK[offset : offset + length]
            at = offset
            for piece in await export.status(offset, length):
                if piece.status == HOLE:
                    assert not any(DISK[at : at + piece.length])
                at += piece.length
            assert at == offset + length


async def test_a_chunk_is_decoded_once_for_all_who_wait(rig: Rig) -> None:
    disk = await rig.add("vda", NOISE, grid(NOISE))
    async with chunks.chunks_of(rig.repository) as some:
        export = contents.DiskExport(some, Layout.of(rig.repository, disk))
        rig.backend.open_gate.clear()
        waiting = [asyncio.create_task(read_half_mib(export, at * 512 * KIB)) for at in range(22)]
        await asyncio.sleep(0.1)
        waiting[0].cancel()
        await asyncio.sleep(0.1)
        rig.backend.open_gate.set()
        found = await asyncio.gather(*waiting[1:])
        assert b"".join(found) == NOISE[512 * KIB :]
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        assert len(rig.backend.reads) == 3
        assert await read_half_mib(export, 0) == NOISE[: 512 * KIB]
        assert len(rig.backend.reads) == 3, "it is kept for a while"


async def read_half_mib(export: contents.DiskExport, offset: int) -> bytes:
    return bytes(await export.read(offset, 512 * KIB))


async def test_what_is_kept_is_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CACHE_BYTES", 9 * MIB)
    disk = await rig.add("vda", NOISE, grid(NOISE))
    async with chunks.chunks_of(rig.repository) as some:
        for number in (0, 1, 0, 2, 0):  # what was used last stays
            await some.read(disk.chunks[number])
            assert sum(map(len, some._kept.values())) == some._kept_bytes <= 9 * MIB
    assert len(rig.backend.reads) == 3


async def test_damage_is_told_to_each_who_asks_and_may_be_repaired(rig: Rig) -> None:
    disk = await rig.add("vda", NOISE, grid(NOISE))
    rig.damage(disk.chunks[0])
    async with chunks.chunks_of(rig.repository) as some:
        outcomes = await asyncio.gather(*(some.read(disk.chunks[0]) for _ in range(3)), return_exceptions=True)
        assert [type(outcome).__name__ for outcome in outcomes] == ["Damaged"] * 3
        rig.damage(disk.chunks[0])  # the bit is flipped back
        assert await some.read(disk.chunks[0]) == NOISE[:CHUNK_BYTES]


# --- only to check ---


async def test_what_is_right_is_verified(rig: Rig, disk: FileContent) -> None:
    found = await contents.verify(rig.repository, {"vda": disk, "vdb": disk}, share=1.0)
    distinct = len(set(disk.chunks))
    assert (found.checked_bytes, found.problems) == (found.total_bytes, ())
    assert len(rig.backend.reads) == distinct
    rig.backend.reads.clear()
    some = await contents.verify(rig.repository, {"vda": disk}, share=0.25)
    assert len(rig.backend.reads) == max(1, round(0.25 * distinct))
    assert 0 < some.checked_bytes < some.total_bytes == found.total_bytes


async def test_all_damage_is_listed_with_whose_it_is(rig: Rig) -> None:
    first, second = NOISE[: 8 * MIB], NOISE[4 * MIB :]
    vda, vdb = await rig.add("vda", first, grid(first)), await rig.add("vdb", second, grid(second))
    rig.damage(vda.chunks[0], vda.chunks[1])
    found = await contents.verify(rig.repository, rig.files, share=1.0)
    assert {one.split(": ")[0] for one in found.problems} == {"vda", "vda, vdb"}
    assert all(" of the repository is damaged: " in one for one in found.problems)
    assert vdb.chunks[0] == vda.chunks[1]


async def test_much_damage_is_counted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "MOST_PROBLEMS", 3)
    disk = await rig.add("vda", NOISE, [MIB * n for n in range(1, 11)])
    rig.damage(*disk.chunks)
    found = await contents.verify(rig.repository, rig.files, share=1.0)
    assert len(found.problems) == 4
    assert found.problems[-1] == "and 8 more"


async def test_what_cannot_be_reached_ends_a_verification(rig: Rig, disk: FileContent) -> None:
    rig.backend.failure = Unreachable("the NAS is gone")
    with pytest.raises(Unreachable):
        await contents.verify(rig.repository, {"vda": disk}, share=1.0)


@pytest.mark.parametrize("length", [0, 1, raw_file.HOLE_BYTES, 3 * raw_file.HOLE_BYTES + 17])
def test_runs_leave_out_whole_blocks_of_zeroes_only(length: int) -> None:
    assert list(raw_file._runs(bytes(length))) == []
    for at in {0, length // 2, length - 1} - {-1}:
        if length:
            content = bytearray(length)
            content[at] = 1
            ((begin, end),) = raw_file._runs(bytes(content))
            assert begin <= at < end <= length
            assert end - begin <= raw_file.HOLE_BYTES


@pytest.mark.parametrize("refused", ["open", "pwrite"])
async def test_a_file_system_that_cannot_write_past_the_cache(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    disk = await rig.add("vda", DISK, range(0, len(DISK), 512 * KIB)[1:])
    real, asked = getattr(os, refused), []

    def refuse(file: Path | int, *arguments: Any, **more: Any) -> Any:
        flags = arguments[0] if refused == "open" else fcntl.fcntl(file, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            asked.append(file)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(file, *arguments, **more)

    monkeypatch.setattr(os, refused, refuse)
    await contents.extract(rig.repository, disk, name="vda", to=tmp_path / "out", image_format="raw")
    assert 0 < len(asked) <= chunks.THREADS, "it is not asked again once it has refused"
    assert (tmp_path / "out").read_bytes() == DISK


# --- what only hashes can tell ---


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_an_index_that_is_wrong_is_found(rig: Rig, tmp_path: Path, image_format: str) -> None:
    """Sealed with the repository's key, and yet another content: reading tells, or what was written."""
    disk = await rig.add("vda", NOISE, grid(NOISE))
    (there,) = rig.repository._index.find(BlobKind.DATA, disk.chunks[0])
    forged = b"\7" * 32
    rig.repository._index.add(there.pack, [replace(there.entry, identity=forged)])
    wrong = FileContent(disk.size_bytes, [disk.chunks[0], forged, disk.chunks[2]])
    found = await contents.verify(rig.repository, {"vda": wrong}, share=1.0)
    assert [forged.hex() in one for one in found.problems] == [True]
    out = tmp_path / "out"
    with pytest.raises(TargetError, match=forged.hex()) as told:
        await contents.extract(rig.repository, wrong, name="vda", to=out, image_format=image_format)
    assert told.value.code == "content-wrong"
