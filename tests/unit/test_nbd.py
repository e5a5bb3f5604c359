"""The NBD client with a real server (qemu-nbd), and with servers that talk nonsense."""

import asyncio
import contextlib
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import NbdError
from orchestrator.fleecing.coverage import DIRTY, clean_extents
from orchestrator.nbd import protocol
from orchestrator.nbd.client import NbdClient
from orchestrator.nbd.protocol import Piece

MIB = 1 << 20
SIZE = 8 * MIB + 512
CONTEXT = "qemu:dirty-bitmap:changed"
ALLOCATION = "base:allocation"
SOON_SECONDS = 10.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk with data, and a bitmap in which MiB 2 and 5 are dirty."""
    path = tmp_path / "disk.qcow2"

    def run(*argv: str) -> None:
        subprocess.run(argv, check=True, capture_output=True)

    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE))
    run("qemu-io", "-c", f"write -P 1 0 {SIZE}", str(path))
    run("qemu-img", "bitmap", "--add", "-g", "64k", str(path), "changed")
    run("qemu-io", "-c", "write -P 2 2M 1M", "-c", "write -P 2 5M 64k", str(path))
    return path


@pytest_asyncio.fixture
async def connect(image: Path, tmp_path: Path) -> AsyncIterator[Callable[[], socket.socket]]:
    path = str(tmp_path / "nbd.sock")
    argv = [
        "qemu-nbd",
        "-f",
        "qcow2",
        "-x",
        "disk",
        "-B",
        "changed",
        "-k",
        path,
        "-e",
        "4",
        "-t",
        "--discard=unmap",
    ]
    server = await asyncio.create_subprocess_exec(*argv, str(image))
    try:
        async with asyncio.timeout(SOON_SECONDS):
            while not Path(path).exists():
                await asyncio.sleep(0.02)

        def connected() -> socket.socket:
            one = socket.socket(socket.AF_UNIX)
            one.connect(path)
            one.setblocking(False)
            return one

        yield connected
    finally:
        server.terminate()
        await server.wait()


async def test_what_is_dirty(connect: Callable[[], socket.socket]) -> None:
    async with NbdClient(connect(), "disk", context=CONTEXT) as client:
        assert client.size_bytes == SIZE
        pieces = await client.status()
    assert sum(piece.length for piece in pieces) == SIZE
    assert list(clean_extents(pieces)) == [
        (0, 2 * MIB),
        (3 * MIB, 2 * MIB),
        (5 * MIB + 65536, SIZE - 5 * MIB - 65536),
    ]


async def test_what_is_trimmed_reads_as_zero(connect: Callable[[], socket.socket]) -> None:
    async with NbdClient(connect(), "disk", context=ALLOCATION) as client:
        assert [piece.status for piece in await client.status()] == [0]
        await client.trim(MIB, 3 * MIB)
        assert [(piece.length, piece.status) for piece in await client.status()] == [
            (MIB, 0),
            (3 * MIB, 3),  # a hole that reads as zero
            (SIZE - 4 * MIB, 0),
        ]


async def test_many_pieces_come_in_several_replies(
    connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.nbd.client.LONGEST_REQUEST_BYTES", 192 * 1024)
    async with NbdClient(connect(), "disk", context=CONTEXT) as client:
        pieces = await client.status()
        assert len(pieces) > 40
        await client.trim(0, MIB)
    assert sum(piece.length for piece in pieces if piece.status & DIRTY) == MIB + 65536


@pytest.mark.parametrize(
    ("export", "context", "said"),
    [
        ("nothing", ALLOCATION, "refuses SET_META_CONTEXT for export nothing"),
        ("disk", "qemu:dirty-bitmap:other", "export disk has no qemu:dirty-bitmap:other"),
    ],
)
async def test_what_there_is_not(
    connect: Callable[[], socket.socket], export: str, context: str, said: str
) -> None:
    with pytest.raises(NbdError, match=said):
        async with NbdClient(connect(), export, context=context):
            pass


async def test_a_request_beyond_the_end_is_refused(connect: Callable[[], socket.socket]) -> None:
    async with NbdClient(connect(), "disk", context=ALLOCATION) as client:
        with pytest.raises(NbdError, match="refuses TRIM"):
            await client.trim(SIZE, 512)
        assert await client.status()  # it goes on


# A server that means harm, or is none -------------------------------------------------------------------------


GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return protocol.OPTION_REPLY.pack(protocol.OPTION_REPLY_MAGIC, option, kind, len(data)) + data


NEGOTIATED = (
    GREETING
    + option_reply(8, 1)
    + option_reply(10, 4, struct.pack(">I", 1) + b"base:allocation")
    + option_reply(10, 1)
    + option_reply(7, 3, struct.pack(">HQH", 0, MIB, 1))
    + option_reply(7, 1)
)


def chunk(kind: int, payload: bytes, *, cookie: int = 1, flags: int = 1) -> bytes:
    return struct.pack(">IHHQI", protocol.CHUNK_MAGIC, flags, kind, cookie, len(payload)) + payload


def statuses(*pieces: tuple[int, int]) -> bytes:
    return struct.pack(">I", 1) + b"".join(struct.pack(">II", *piece) for piece in pieces)


async def answers(sent: bytes) -> list[Piece]:
    """What the client makes of a server that says this, whatever it is asked, and hangs up."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(SOON_SECONDS), NbdClient(ours, "disk", context=ALLOCATION) as client:
            return await client.status()


async def test_an_honest_server_of_ours() -> None:
    pieces = [Piece(MIB // 2, 3), Piece(MIB // 2, 0)]
    assert await answers(NEGOTIATED + chunk(5, statuses((MIB // 2, 3), (MIB // 2, 0)))) == pieces
    halves = chunk(5, statuses((MIB // 2, 3))) + chunk(5, statuses((MIB // 2, 0)), cookie=2)
    assert await answers(NEGOTIATED + halves) == pieces


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        pytest.param(b"", "ended", id="nothing"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", "no NBD server", id="another protocol"),
        pytest.param(b"NBDMAGIC" + b"\0" * 10, "no NBD server", id="the oldest style"),
        pytest.param(GREETING[:-1] + b"\0", "an old style", id="not fixed"),
        pytest.param(GREETING + option_reply(8, (1 << 31) + 1), "refuses STRUCTURED_REPLY", id="too simple"),
        pytest.param(GREETING + option_reply(9, 1), "no reply to option 8", id="another option"),
        pytest.param(
            GREETING + protocol.OPTION_REPLY.pack(protocol.OPTION_REPLY_MAGIC, 8, 1, 1 << 31),
            "no reply",
            id="endless",
        ),
        pytest.param(NEGOTIATED[:-4], "ended", id="cut off"),
        pytest.param(NEGOTIATED + chunk(5, statuses()), "block status in", id="no piece"),
        pytest.param(NEGOTIATED + chunk(5, statuses((0, 0))), "of nothing", id="an empty piece"),
        pytest.param(NEGOTIATED + chunk(5, statuses((2 * MIB, 0))), "the status of", id="too long"),
        pytest.param(NEGOTIATED + chunk(0, b""), "the status of", id="no progress"),
        pytest.param(NEGOTIATED + chunk(5, statuses((MIB, 0)), cookie=7), "request 7", id="another request"),
        pytest.param(NEGOTIATED + chunk(32769, b"\0\0\0\5\0\3bad"), "BLOCK_STATUS at 0: bad", id="an error"),
        pytest.param(NEGOTIATED + chunk(32769, b"\0"), "an error in 1 bytes", id="a broken error"),
        pytest.param(
            NEGOTIATED + struct.pack(">IIQ", protocol.SIMPLE_MAGIC, 5, 1), "at 0: error 5", id="a simple error"
        ),
        pytest.param(
            NEGOTIATED + struct.pack(">IHHQI", protocol.CHUNK_MAGIC, 1, 5, 1, 1 << 31), "a chunk of", id="huge"
        ),
        pytest.param(NEGOTIATED + b"\1\2\3\4", "no reply begins with", id="no reply"),
    ],
)
async def test_nonsense_is_an_error(sent: bytes, said: str) -> None:
    with pytest.raises(NbdError, match=said):
        await answers(sent)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(NEGOTIATED)))
def test_whatever_is_sent_it_is_an_error_or_the_whole_status(noise: bytes, kept: int) -> None:
    with contextlib.suppress(NbdError):
        pieces = asyncio.run(answers(NEGOTIATED[:kept] + noise))
        assert sum(piece.length for piece in pieces) in (0, MIB) or kept < len(NEGOTIATED)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), max_size=20), st.integers(1, 30))
def test_clean_parts_are_clean_and_none_is_missed(drawn: list[tuple[int, int]], least: int) -> None:
    pieces = [Piece(length, status) for length, status in drawn]
    dirty = [bool(piece.status & DIRTY) for piece in pieces for _ in range(piece.length)]
    found = list(clean_extents(pieces, least))
    for offset, length in found:
        assert length >= least
        assert not any(dirty[offset : offset + length])
        assert offset == 0 or dirty[offset - 1]
        assert offset + length == len(dirty) or dirty[offset + length]
    covered = {at for offset, length in found for at in range(offset, offset + length)}
    run = 0
    for at, is_dirty in enumerate([*dirty, True]):
        if is_dirty:
            assert run < least or at - 1 in covered
        run = 0 if is_dirty else run + 1
