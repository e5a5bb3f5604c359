"""The NBD server with clients that do what they may, what they must not, and nothing at all."""

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
import tracemalloc
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import NbdError
from orchestrator.nbd import protocol, server
from orchestrator.nbd.client import NbdClient
from orchestrator.nbd.connection import Limits, Trouble
from orchestrator.nbd.protocol import Act, Can, Errno, Option, Piece, RequestFlag
from orchestrator.nbd.server import NbdServer
from orchestrator.nbd.stream import Stream
from orchestrator.units import GIB, KIB, MIB
from tests.component.nbd_memory import HOLE, SOON_SECONDS, MemoryExport, Rig, serving
from tests.component.nbd_wire import HELLO, Wire, options
from tests.component.world import open_descriptors

SIZE = 4 * MIB + 512
PATIENT = Limits(requests=4, held_bytes=4 * MIB)
IMPATIENT = replace(PATIENT, handshake_seconds=0.5, stall_seconds=0.2)
SLOW = replace(PATIENT, stall_seconds=1.0)

impatient = pytest.mark.parametrize("limits", [IMPATIENT], ids=["impatient"])
slow = pytest.mark.parametrize("limits", [SLOW], ids=["slow"])


@pytest.fixture
def disk() -> MemoryExport:
    return MemoryExport(SIZE)


@pytest.fixture
def limits() -> Limits:
    return PATIENT


@pytest.fixture
async def rig(disk: MemoryExport, tmp_path: Path, limits: Limits) -> AsyncIterator[Rig]:
    exports = {"disk": disk, "old": MemoryExport(SIZE, read_only=True)}
    async with serving(tmp_path, exports, limits=limits) as one:
        yield one
        await still_serves(one)
    assert all(export.lent == export.under_way == 0 for export in exports.values())


async def still_serves(rig: Rig) -> None:
    """Tried twice, since a busy machine may take longer than an impatient server waits."""
    for last in (False, True):
        wire = await Wire.over(rig.connect())
        try:
            await wire.begin()
            answer = await wire.does(Act.READ, SIZE - 4, 4)
            assert (answer.error, len(answer.content)) == (0, 4)
            break
        except (asyncio.IncompleteReadError, ConnectionError):
            if last:
                raise
        finally:
            await wire.leave()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def said(rig: Rig) -> str:
    return "; ".join(str(trouble.error) for trouble in rig.troubles)


@pytest.fixture
async def before() -> list[str]:
    """The descriptors open before the test, with the one that a loop opens for its first stream."""
    ours, theirs = socket.socketpair()
    stream = await Stream.over(ours)
    await stream.abort()
    theirs.close()
    return open_descriptors()


# What it does for those who ask rightly -----------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False])
async def test_what_is_written_is_read(rig: Rig, disk: MemoryExport, *, structured: bool) -> None:
    wire = await Wire.begun(rig.connect(), structured=structured)
    assert (await wire.does(Act.WRITE, 100, data=b"abc" * 30_000)).error == 0
    assert (await wire.does(Act.READ, 99, 8)).content == b"\0abcabca"
    assert (await wire.does(Act.WRITE_ZEROES, 101, 2)).error == 0
    assert (await wire.does(Act.TRIM, 103, 1)).error == 0
    assert (await wire.does(Act.READ, 99, 8)).content == b"\0a\0\0\0bca"
    assert bool(Can(wire.flags) & Can.DF) is structured
    assert disk.content[100:104] == b"a\0\0\0"
    await wire.leave()
    await asyncio.sleep(0.01)
    assert rig.troubles == []


async def test_our_own_client(rig: Rig, disk: MemoryExport) -> None:
    disk.status_of[:512] = [0] * 512
    async with NbdClient(rig.connect(), "disk", context="base:allocation") as client:
        assert client.size_bytes == SIZE
        assert await client.status() == [Piece(2 * MIB, 0), Piece(SIZE - 2 * MIB, int(HOLE))]
        await client.trim(MIB, MIB)
        assert await client.status() == [Piece(MIB, 0), Piece(SIZE - MIB, int(HOLE))]
        with pytest.raises(NbdError, match="refuses TRIM"):
            await client.trim(SIZE, 512)
    for name, context, words in (
        ("nothing", "base:allocation", "there is no export 'nothing'"),
        ("disk", "qemu:dirty-bitmap:x", "has no qemu:dirty-bitmap:x"),
    ):
        with pytest.raises(NbdError, match=words):
            async with NbdClient(rig.connect(), name, context=context):
                pass


async def test_a_status_in_more_pieces_than_an_answer_holds(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.nbd.requests.MOST_PIECES", 10)
    rig.exports["disk"].status_of[::2] = [0] * len(rig.exports["disk"].status_of[::2])
    async with NbdClient(rig.connect(), "disk", context="base:allocation") as client:
        pieces = await client.status()
    assert [piece.length for piece in pieces] == [4 * KIB] * 1024 + [512]


async def test_only_the_first_piece_if_so_wished(rig: Rig) -> None:
    rig.exports["disk"].status_of[1] = 0
    wire = await Wire.begun(rig.connect())
    answer = await wire.does(Act.BLOCK_STATUS, 100, 64 * KIB, flags=RequestFlag.REQ_ONE)
    assert answer.content == struct.pack(">III", protocol.ALLOCATION_ID, 4096 - 100, HOLE)
    await wire.leave()


async def test_the_oldest_way_to_begin(rig: Rig) -> None:
    for flags, zeroes in ((0, 124), (protocol.FIXED_NEWSTYLE, 124), (3, 0)):
        wire = await Wire.over(rig.connect())
        wire.writer.write(protocol.CLIENT_FLAGS.pack(flags) + protocol.encode_option(Option.EXPORT_NAME, b"disk"))
        await wire.reader.readexactly(protocol.GREETING.size)
        size, can = struct.unpack(">QH", await wire.reader.readexactly(10))
        assert (size, bool(can & Can.READ_ONLY)) == (SIZE, False)
        assert await wire.reader.readexactly(zeroes) == bytes(zeroes)
        assert len((await wire.does(Act.READ, 0, 10)).content) == 10
        await wire.leave()


async def test_requests_go_side_by_side_but_not_more_than_may(rig: Rig, disk: MemoryExport) -> None:
    disk.open_gate.clear()
    one, other = await Wire.begun(rig.connect()), await Wire.begun(rig.connect())
    cookies = [one.ask(Act.WRITE, at * 4096, data=bytes([at]) * 4096) for at in range(20)]
    await until(lambda: disk.under_way == 4)
    await asyncio.sleep(0.05)
    assert disk.under_way == 4
    other.ask(Act.READ, 0, 10)  # its connection has turns of its own
    await until(lambda: disk.under_way == 5)
    disk.open_gate.set()
    answers = [await one.answer() for _ in range(20)]
    assert {answer.error for answer in answers} == {0}
    assert sorted(answer.cookie for answer in answers) == cookies
    assert [disk.content[at * 4096] for at in range(20)] == list(range(20))
    await one.leave()
    await other.leave()


async def test_what_is_held_is_bounded(rig: Rig, disk: MemoryExport) -> None:
    """4 MiB are, so of four writes of 1.5 MiB two are received, and a read of more than all goes alone."""
    disk.open_gate.clear()
    wire = await Wire.begun(rig.connect())
    for at in range(4):
        wire.ask(Act.WRITE, at * 512, data=bytes(3 * MIB // 2))
    wire.ask(Act.READ, 0, SIZE)
    await until(lambda: disk.under_way == 2)
    await asyncio.sleep(0.05)
    assert (disk.under_way, disk.lent) == (2, 2)
    disk.open_gate.set()
    answers = [await wire.answer() for _ in range(5)]
    assert {answer.error for answer in answers} == {0}
    assert len(answers[-1].content) == SIZE
    await wire.leave()


@impatient
async def test_an_answer_may_take_longer_than_any_deadline(rig: Rig, disk: MemoryExport) -> None:
    disk.open_gate.clear()
    wire = await Wire.begun(rig.connect())
    wire.ask(Act.WRITE, data=b"x")
    await asyncio.sleep(3 * IMPATIENT.stall_seconds)
    disk.open_gate.set()
    assert (await wire.answer()).error == 0
    await asyncio.sleep(3 * IMPATIENT.stall_seconds)  # and between requests a client may be silent
    assert (await wire.does(Act.READ, 0, 1)).content == b"x"
    await wire.leave()


async def test_a_flush_follows_the_writes_that_were_answered(rig: Rig, disk: MemoryExport) -> None:
    one, other = await Wire.begun(rig.connect()), await Wire.begun(rig.connect())
    await one.does(Act.WRITE, 0, data=b"a")
    assert (await other.does(Act.FLUSH)).error == 0
    await other.does(Act.WRITE, 0, data=b"b", flags=RequestFlag.FUA)
    assert [what for what, _, _ in disk.seen] == ["write", "flush", "write", "flush"]
    disk.fail["flush"] = OSError(errno.ENOSPC, "full")
    assert (await one.does(Act.WRITE, 0, data=b"c", flags=RequestFlag.FUA)).error == Errno.NOSPC
    del disk.fail["flush"]
    await one.leave()
    await other.leave()


async def test_who_takes_leave_has_all_done_even_if_gone(rig: Rig, disk: MemoryExport) -> None:
    disk.open_gate.clear()
    wire = await Wire.begun(rig.connect())
    for at in range(3):
        wire.ask(Act.WRITE, at, data=b"x")
    await wire.leave()
    await until(lambda: disk.under_way == 3)
    await asyncio.sleep(0.05)
    disk.open_gate.set()
    await until(lambda: disk.content[:3] == b"xxx")
    await asyncio.sleep(0.01)
    assert rig.troubles == []


async def test_exports_come_and_go(rig: Rig, disk: MemoryExport) -> None:
    wire = await Wire.begun(rig.connect())
    rig.exports["new"] = rig.exports.pop("disk")
    newer = await Wire.begun(rig.connect(), "new")
    await newer.does(Act.WRITE, 0, data=b"n")
    assert (await wire.does(Act.READ, 0, 1)).content == b"n"
    await wire.leave()
    await newer.leave()
    rig.exports["disk"] = disk


async def test_a_connected_socket_without_a_name(disk: MemoryExport) -> None:
    ours, theirs = socket.socketpair()
    troubles: list[Trouble] = []
    async with asyncio.TaskGroup() as group:
        group.create_task(NbdServer({"disk": disk}, report=troubles.append).converse(theirs))
        ours.setblocking(False)
        wire = await Wire.begun(ours)
        assert (await wire.does(Act.READ, 0, 3)).content == b"\0\0\0"
        await wire.leave()
    assert troubles == []


# What an export does wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (OSError(errno.ENOSPC, "full"), Errno.NOSPC),
        (OSError(errno.EDQUOT, "quota"), Errno.NOSPC),
        (OSError(errno.EROFS, "read-only"), Errno.PERM),
        (OSError(errno.ESTALE, "stale"), Errno.IO),
        (MemoryError(), Errno.NOMEM),
        (TimeoutError("the storage is slow"), Errno.IO),
        (ConnectionResetError("of the storage"), Errno.IO),
        (RuntimeError("a bug"), Errno.IO),
    ],
)
@pytest.mark.parametrize("what", ["read", "write", "buffer"])
async def test_an_error_is_told_and_reported(
    rig: Rig, disk: MemoryExport, failure: Exception, told: Errno, what: str
) -> None:
    disk.fail[what] = failure
    wire = await Wire.begun(rig.connect())
    data = b"" if what == "read" else b"data"
    assert (await wire.does(Act.WRITE if data else Act.READ, 0, 4, data=data)).error == told
    del disk.fail[what]
    assert (await wire.does(Act.READ, 0, 4)).content == bytes(4)
    assert [(trouble.export, trouble.error) for trouble in rig.troubles] == [("disk", failure)]
    await wire.leave()


async def test_an_export_that_gives_too_little(
    rig: Rig, disk: MemoryExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(_offset: int, _length: int) -> bytes:
        await asyncio.sleep(0)
        return b""

    monkeypatch.setattr(disk, "read", nothing)
    monkeypatch.setattr(disk, "status", nothing)
    wire = await Wire.begun(rig.connect())
    assert (await wire.does(Act.READ, 0, 4)).error == Errno.IO
    assert (await wire.does(Act.BLOCK_STATUS, 0, 4)).error == Errno.IO
    assert said(rig) == "0 bytes were read for READ of 4 bytes at 0; no status for BLOCK_STATUS of 4 bytes at 0"
    monkeypatch.undo()
    await wire.leave()


# What a client does wrong -------------------------------------------------------------------------------------


WRITE = protocol.encode_request(Act.WRITE, 1, 0, 1000)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        pytest.param(b"", "did not negotiate within", id="says nothing"),
        pytest.param(HELLO + b"IHAVEOPT", "did not negotiate within", id="stops in an option"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", "client flags", id="another protocol"),
        pytest.param(HELLO + bytes(16), "this is no option", id="no option"),
        pytest.param(
            HELLO + protocol.OPTION.pack(protocol.HAVE_OPTION, 7, 1 << 31), "has 2147483648 bytes", id="endless"
        ),
        pytest.param(
            HELLO + protocol.encode_option(Option.EXPORT_NAME, b"x"), "there is no export 'x'", id="oldest unknown"
        ),
        pytest.param(options() + b"\1" * 28, "this is no request", id="no request"),
        pytest.param(options() + WRITE[:-1], "did not send the rest within", id="stalls in a request"),
        pytest.param(options() + WRITE + b"some", "did not send the rest within", id="stalls in the data"),
        pytest.param(
            options("old") + WRITE + b"some", "did not send the rest within", id="stalls in refused data"
        ),
        pytest.param(
            options() + protocol.encode_request(Act.WRITE, 1, 0, 33 * MIB),
            "WRITE of 34603008 bytes at 0; at most 33554432",
            id="too much",
        ),
    ],
)
@impatient
async def test_who_makes_no_sense_is_cut_off(rig: Rig, sent: bytes, words: str) -> None:
    wire = await Wire.over(rig.connect())
    wire.writer.write(sent)
    assert await wire.is_cut_off()
    await until(lambda: rig.troubles)
    assert words in said(rig)
    await wire.close()


@impatient
async def test_who_does_not_receive_is_cut_off(rig: Rig, disk: MemoryExport) -> None:
    wire = await Wire.begun(rig.connect())
    other = await Wire.begun(rig.connect())
    wire.reader._transport.pause_reading()  # type: ignore[attr-defined]  as if it hung
    for _ in range(12):
        wire.ask(Act.READ, 0, MIB)
    await until(lambda: disk.seen)
    assert len((await other.does(Act.READ, 0, MIB)).content) == MIB
    await until(lambda: rig.troubles)
    assert said(rig) == "the client received nothing for 0.2 s"
    assert sum(length == MIB for _, _, length in disk.seen) <= 5  # four of it are under way, one is the other's
    await wire.close()
    await other.leave()


@slow
async def test_who_receives_slowly_is_not(rig: Rig) -> None:
    wire = await Wire.begun(rig.connect())
    wire.ask(Act.READ, 0, SIZE)
    found = b""
    while len(found) < SIZE + 28:
        part = await wire.reader.read(256 * KIB)
        assert part, said(rig)
        found += part
        await asyncio.sleep(SLOW.stall_seconds / 8)
    assert rig.troubles == []
    await wire.leave()


@pytest.mark.parametrize("kind", ["write", "read", "receiving"])
async def test_who_vanishes_leaves_nothing(rig: Rig, disk: MemoryExport, kind: str) -> None:
    disk.open_gate.clear()
    wire = await Wire.begun(rig.connect())
    if kind == "receiving":
        wire.writer.write(WRITE + b"some")
        await until(lambda: disk.lent)
    else:
        for _ in range(3):
            wire.ask(*((Act.READ, 0, MIB) if kind == "read" else (Act.WRITE, 0, 0)), data=b"x" * (kind == "write"))
        await until(lambda: disk.under_way == 3)
    wire.writer.transport.abort()
    await until(lambda: disk.under_way == 0 and disk.lent == 0)
    await until(lambda: rig.troubles)
    assert isinstance(rig.troubles[0].error, ConnectionError)
    disk.open_gate.set()
    await wire.close()


async def test_lengths_are_judged_before_memory_is_taken(rig: Rig) -> None:
    wire = await Wire.begun(rig.connect())
    tracemalloc.start()
    try:
        for act in (Act.READ, Act.TRIM, Act.WRITE_ZEROES, Act.BLOCK_STATUS):
            assert (await wire.does(act, 0, 4 * GIB - 1)).error in (Errno.INVAL, Errno.NOSPC)
        assert (await wire.does(Act.READ, 2**64 - 1, 4096)).error == Errno.INVAL
        wire.ask(Act.WRITE, 0, 4 * GIB - 1)
        assert await wire.is_cut_off()
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
    await wire.close()


async def test_a_write_to_what_is_read_only_is_refused_and_skipped(rig: Rig) -> None:
    wire = await Wire.begun(rig.connect(), "old")
    assert Can(wire.flags) & (Can.READ_ONLY | Can.TRIM | Can.WRITE_ZEROES | Can.FUA) == Can.READ_ONLY
    assert (await wire.does(Act.WRITE, 0, data=bytes(3 * MIB))).error == Errno.PERM
    assert (await wire.does(Act.WRITE_ZEROES, 0, 10)).error == Errno.PERM
    assert (await wire.does(Act.READ, 0, 1)).error == 0
    assert [what for what, _, _ in rig.exports["old"].seen] == ["read"]
    await wire.leave()


@impatient
async def test_a_list_of_options_without_end_costs_the_deadline(rig: Rig) -> None:
    rig.exports |= {f"export {number}": MemoryExport(512) for number in range(1000)}
    wire = await Wire.over(rig.connect())
    wire.writer.write(HELLO + protocol.encode_option(Option.LIST) * 3000)
    wire.reader._transport.pause_reading()  # type: ignore[attr-defined]  it does not receive what it asks for
    await until(lambda: rig.troubles)
    assert "did not negotiate within 0.5 s" in said(rig)
    await wire.close()


# Beginning and ending -----------------------------------------------------------------------------------------


async def test_nothing_is_left(disk: MemoryExport, tmp_path: Path, before: list[str]) -> None:
    disk.open_gate.clear()
    async with serving(tmp_path, {"disk": disk}) as rig:
        assert stat.S_IMODE(rig.path.stat().st_mode) == server.OWNER_ONLY
        wires = [await Wire.begun(rig.connect()) for _ in range(3)]
        waiting = await Wire.over(rig.connect())
        for wire in wires:
            wire.ask(Act.WRITE, 0, data=b"x")
            wire.ask(Act.READ, 0, MIB)
        await until(lambda: disk.under_way == 6)
    assert (disk.under_way, disk.lent) == (0, 0)
    assert list(tmp_path.iterdir()) == []
    for wire in (*wires, waiting):
        assert await wire.is_cut_off()
        await wire.close()
    await asyncio.sleep(0.01)
    assert open_descriptors() == before


@pytest.mark.parametrize("steps", range(50))
async def test_it_can_be_cancelled_at_any_time(
    disk: MemoryExport, tmp_path: Path, before: list[str], steps: int
) -> None:
    clients: list[socket.socket] = []

    async def serve() -> None:
        async with serving(tmp_path, {"disk": disk}) as rig:
            for _ in range(3):
                one = rig.connect()
                clients.append(one)
                one.send(options() + protocol.encode_request(Act.WRITE, 1, 0, 100) + bytes(steps))
            await asyncio.sleep(SOON_SECONDS)

    task = asyncio.create_task(serve())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    for one in clients:
        one.close()
    assert list(tmp_path.iterdir()) == []
    assert disk.lent == 0
    await asyncio.sleep(0.01)
    assert open_descriptors() == before


async def test_an_error_of_the_block_comes_out_as_it_is(disk: MemoryExport, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with serving(tmp_path, {"disk": disk}):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


async def test_a_path_that_is_taken_stays_as_it_is(disk: MemoryExport, tmp_path: Path) -> None:
    (tmp_path / "server.sock").write_text("somebody's")
    with pytest.raises(NbdError, match=r"no NBD server can listen at .*server\.sock"):
        async with serving(tmp_path, {"disk": disk}):
            pass
    assert (tmp_path / "server.sock").read_text() == "somebody's"


async def test_without_descriptors_it_waits_for_some(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FULL_SECONDS", 0.01)
    client = socket.socket(socket.AF_UNIX)
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(client.fileno()))
        client.connect(str(rig.path))
        await until(lambda: rig.troubles)
    finally:
        for one in taken:
            os.close(one)
    assert "Too many open files" in said(rig)
    client.setblocking(False)
    wire = await Wire.begun(client)
    await wire.leave()
