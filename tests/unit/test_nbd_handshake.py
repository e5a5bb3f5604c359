"""The server's side of the negotiation, without sockets; and which requests are refused."""

import itertools
import struct
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.nbd import protocol, requests
from orchestrator.nbd.export import LONGEST_PAYLOAD_BYTES, BlockSizes, Data, Export
from orchestrator.nbd.handshake import LIST_MOST_BYTES, Agreed, Handshake
from orchestrator.nbd.protocol import (
    Act,
    Can,
    Errno,
    Option,
    OptionReply,
    Piece,
    ProtocolError,
    Request,
    RequestFlag,
)

SIZE = (1 << 20) + 512
ALLOCATION = protocol.ALLOCATION
HELLO = protocol.CLIENT_FLAGS.pack(3)
OPTION_NUMBERS = [*Option, 4, 5, 11, 255]


class Disk(Export):
    def __init__(self, *, read_only: bool = False, sizes: BlockSizes | None = None, description: str = "") -> None:
        self.read_only = read_only
        self.block_sizes = sizes or BlockSizes()
        self.description = description

    @property
    def size_bytes(self) -> int:
        return SIZE

    async def read(self, offset: int, length: int) -> Data:
        raise AssertionError(offset, length)

    async def flush(self) -> None:
        raise AssertionError


EXPORTS = {"disk": Disk(), "old": Disk(read_only=True, description="yesterday's"), "": Disk(), "ü/ 1": Disk()}


def talk(machine: Handshake, data: bytes) -> tuple[list[bytes], int]:
    """What the machine answers, step by step, and how many bytes it took."""
    said: list[bytes] = []
    taken = 0
    while machine.wants and len(data) - taken >= machine.wants:
        assert machine.wants <= protocol.LONGEST_OPTION_BYTES
        step = data[taken : taken + machine.wants]
        taken += len(step)
        said.append(machine.take(step))
    return said, taken


def replies(said: Iterable[bytes]) -> list[tuple[int, int, bytes]]:
    """Option, kind and data of each reply. Fails on what is none."""
    rest = b"".join(said)
    found = []
    while rest:
        magic, option, kind, length = protocol.OPTION_REPLY.unpack_from(rest)
        assert magic == protocol.OPTION_REPLY_MAGIC
        end = protocol.OPTION_REPLY.size + length
        assert len(rest) >= end
        found.append((option, kind, rest[protocol.OPTION_REPLY.size : end]))
        rest = rest[end:]
    return found


def said_to(*options: tuple[int, bytes], machine: Handshake | None = None) -> list[tuple[int, int, bytes]]:
    machine = machine or Handshake(EXPORTS)
    encoded = b"".join(
        protocol.OPTION.pack(protocol.HAVE_OPTION, number, len(data)) + data for number, data in options
    )
    said, _ = talk(machine, HELLO + encoded)
    return replies(said)


STRUCTURED = (Option.STRUCTURED_REPLY, b"")


def kinds(found: Sequence[tuple[int, int, bytes]]) -> list[int]:
    return [kind for _, kind, _ in found]


def test_the_greeting() -> None:
    assert Handshake.greeting == b"NBDMAGIC" + b"IHAVEOPT" + b"\0\3"


def test_the_list() -> None:
    found = said_to((Option.LIST, b""))
    assert kinds(found) == [OptionReply.SERVER] * 4 + [OptionReply.ACK]
    assert [data for _, _, data in found[:2]] == [b"\0\0\0\4disk", b"\0\0\0\3oldyesterday's"]
    assert kinds(said_to((Option.LIST, b"x"), (Option.LIST, b""))) == [OptionReply.ERROR_INVALID, *kinds(found)]


def test_a_long_list_is_cut_off() -> None:
    machine = Handshake({f"{number:04000}": Disk() for number in range(1000)})
    found = said_to((Option.LIST, b""), machine=machine)
    assert found[-1][1] == OptionReply.ACK
    assert sum(len(data) for _, _, data in found) < LIST_MOST_BYTES + 5000


def test_go_tells_size_and_block_sizes() -> None:
    machine = Handshake({"disk": Disk(sizes=BlockSizes(512, 4096, 1 << 20))})
    found = said_to((Option.GO, protocol.go("disk")), machine=machine)
    flags = Can.HAS_FLAGS | Can.FLUSH | Can.FUA | Can.TRIM | Can.WRITE_ZEROES | Can.MULTI_CONN
    assert [data for _, _, data in found] == [
        struct.pack(">HQH", 0, SIZE, flags),
        struct.pack(">HIII", 3, 512, 4096, 1 << 20),
        b"",
    ]
    assert (machine.wants, machine.agreed) == (0, Agreed("disk", machine._exports["disk"], False, False))


def test_name_and_description_on_request() -> None:
    found = said_to((Option.INFO, protocol.go("old", 1, 2, 77)), (Option.INFO, protocol.go("disk", 2)))
    infos = [(data[1], data[2:]) for _, kind, data in found if kind == OptionReply.INFO]
    assert [(kind, text) for kind, text in infos if kind in {1, 2}] == [(1, b"old"), (2, b"yesterday's")]
    size, flags = struct.unpack(">QH", infos[0][1])
    assert (size, flags) == (SIZE, Can.HAS_FLAGS | Can.READ_ONLY | Can.FLUSH | Can.MULTI_CONN)


def test_info_does_not_begin() -> None:
    machine = Handshake(EXPORTS)
    said_to((Option.INFO, protocol.go("disk")), machine=machine)
    assert machine.agreed is None
    assert machine.wants == protocol.OPTION.size


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        b"\0\0\0\4disk",
        b"\0\0\0\4disk\0",
        b"\0\0\0\4disk\0\1",
        b"\0\0\0\4disk\0\0x",
        b"\xff\xff\xff\xffdisk\0\0",
        b"\0\0\0\1\xff\0\0",
        struct.pack(">I", 5000) + b"x" * 5000 + b"\0\0",
    ],
)
def test_a_broken_choice_is_refused_and_the_next_one_heard(option: Option, data: bytes) -> None:
    machine = Handshake(EXPORTS)
    found = said_to((option, data), (Option.GO, protocol.go("disk")), machine=machine)
    assert kinds(found) == [OptionReply.ERROR_INVALID, OptionReply.INFO, OptionReply.INFO, OptionReply.ACK]
    assert machine.agreed is not None


@pytest.mark.parametrize("option", [4, 5, 11, 255, 1 << 31])
def test_an_unknown_option_is_refused(option: int) -> None:
    found = said_to((option, b"whatever"), (Option.GO, protocol.go("")))
    assert found[0][:2] == (option, OptionReply.ERROR_UNSUPPORTED)
    assert found[-1][1] == OptionReply.ACK


@pytest.mark.parametrize("option", [Option.INFO, Option.GO, Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT])
def test_an_unknown_export_is_refused(option: Option) -> None:
    data = protocol.go("x") if option in {Option.INFO, Option.GO} else protocol.set_meta_context("x", ALLOCATION)
    assert kinds(said_to(STRUCTURED, (option, data)))[1:] == [OptionReply.ERROR_UNKNOWN]


def test_abort() -> None:
    machine = Handshake(EXPORTS)
    assert kinds(said_to((Option.ABORT, b"bye"), (Option.LIST, b""), machine=machine)) == [OptionReply.ACK]
    assert (machine.wants, machine.agreed) == (0, None)


@pytest.mark.parametrize(
    ("option", "queries", "found"),
    [
        (Option.SET_META_CONTEXT, [ALLOCATION], [1]),
        (Option.SET_META_CONTEXT, ["qemu:dirty-bitmap:x", ALLOCATION], [1]),
        (Option.SET_META_CONTEXT, ["base:"], []),
        (Option.SET_META_CONTEXT, ["base:allocations", ""], []),
        (Option.SET_META_CONTEXT, [], []),
        (Option.LIST_META_CONTEXT, [], [0]),
        (Option.LIST_META_CONTEXT, ["base:"], [0]),
        (Option.LIST_META_CONTEXT, [ALLOCATION], [0]),
        (Option.LIST_META_CONTEXT, ["qemu:"], []),
    ],
)
def test_contexts(option: Option, queries: list[str], found: list[int]) -> None:
    machine = Handshake(EXPORTS)
    asked = (option, protocol.set_meta_context("disk", *queries))
    said = said_to(STRUCTURED, asked, (Option.GO, protocol.go("disk")), machine=machine)
    contexts = [data for _, kind, data in said if kind == OptionReply.META_CONTEXT]
    assert contexts == [struct.pack(">I", number) + ALLOCATION.encode() for number in found]
    assert machine.agreed is not None
    assert machine.agreed.allocation is (found == [1])


@pytest.mark.parametrize(
    "later",
    [
        (Option.SET_META_CONTEXT, protocol.set_meta_context("old", ALLOCATION)),
        (Option.SET_META_CONTEXT, protocol.set_meta_context("disk")),
        (Option.SET_META_CONTEXT, protocol.set_meta_context("nothing", ALLOCATION)),
        (Option.SET_META_CONTEXT, b"broken"),
    ],
)
def test_contexts_are_those_of_the_last_choice_and_its_export(later: tuple[int, bytes]) -> None:
    machine = Handshake(EXPORTS)
    chosen = (Option.SET_META_CONTEXT, protocol.set_meta_context("disk", ALLOCATION))
    said_to(STRUCTURED, chosen, later, (Option.GO, protocol.go("disk")), machine=machine)
    assert machine.agreed is not None
    assert machine.agreed.structured
    assert not machine.agreed.allocation


@pytest.mark.parametrize("option", [Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT])
@pytest.mark.parametrize("count", [0, 2, (1 << 32) - 1])
def test_contexts_need_structured_replies_and_the_right_count(option: Option, count: int) -> None:
    data = protocol.set_meta_context("disk", ALLOCATION)
    assert kinds(said_to((option, data))) == [OptionReply.ERROR_INVALID]
    wrong = data.replace(b"disk\0\0\0\1", b"disk" + struct.pack(">I", count))
    assert kinds(said_to(STRUCTURED, (option, wrong))) == [OptionReply.ACK, OptionReply.ERROR_INVALID]


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\4",
        HELLO + b"IHAVEOPX" + bytes(8),
        HELLO + protocol.OPTION.pack(protocol.HAVE_OPTION, 3, protocol.LONGEST_OPTION_BYTES + 1),
        HELLO + protocol.encode_option(Option.EXPORT_NAME, b"nothing"),
        HELLO + protocol.encode_option(Option.EXPORT_NAME, b"\xff"),
    ],
)
def test_where_nothing_can_be_answered_it_ends(data: bytes) -> None:
    machine = Handshake(EXPORTS)
    with pytest.raises(ProtocolError):
        talk(machine, data)
    assert (machine.wants, machine.agreed) == (0, None)


def test_it_takes_what_it_wants_and_nothing_else() -> None:
    with pytest.raises(ValueError, match="3 bytes instead of 4"):
        Handshake(EXPORTS).take(b"123")


texts = st.sampled_from(["disk", "old", "", "ü/ 1", "nothing", ALLOCATION, "base:", "qemu:x"])
option_data = st.one_of(
    st.just(b""),
    st.binary(max_size=40),
    st.builds(lambda name, infos: protocol.go(name, *infos), texts, st.lists(st.integers(0, 5), max_size=3)),
    st.builds(lambda name, asked: protocol.set_meta_context(name, *asked), texts, st.lists(texts, max_size=3)),
)
one_option = st.builds(
    lambda number, data: protocol.OPTION.pack(protocol.HAVE_OPTION, number, len(data)) + data,
    st.sampled_from(OPTION_NUMBERS),
    option_data,
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(one_option, max_size=8),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
    st.binary(max_size=30),
)
def test_whatever_comes_it_answers_or_ends(
    options: list[bytes], flips: list[tuple[int, int]], noise: bytes
) -> None:
    """Each option is answered by replies to it, the last of them an acknowledgement or an error."""
    data = bytearray(HELLO + b"".join(options) + noise)
    for at, byte in flips:
        data[at % len(data)] = byte
    machine = Handshake(EXPORTS)
    taken = 0
    try:
        while machine.wants and len(data) - taken >= machine.wants:
            assert machine.wants <= protocol.LONGEST_OPTION_BYTES
            step = bytes(data[taken : taken + machine.wants])
            taken += len(step)
            answer = machine.take(step)
            if answer and answer[:8] == struct.pack(">Q", protocol.OPTION_REPLY_MAGIC):
                found = replies([answer])
                assert len({option for option, _, _ in found}) == 1
                assert all(kind != 1 and not kind & protocol.OPTION_ERROR for _, kind, _ in found[:-1])
                assert found[-1][1] == OptionReply.ACK or found[-1][1] & protocol.OPTION_ERROR
            elif answer:
                assert machine.agreed is not None  # EXPORT_NAME
                assert len(answer) in {10, 134}
    except ProtocolError:
        assert (machine.wants, machine.agreed) == (0, None)
    if machine.agreed is not None:
        assert machine.wants == 0
        assert EXPORTS[machine.agreed.name] is machine.agreed.export
        assert machine.agreed.structured or not machine.agreed.allocation


# Which requests are refused -----------------------------------------------------------------------------------


def agreed(**changed: object) -> Agreed:
    return Agreed(**({"name": "disk", "export": Disk(), "structured": True, "allocation": True} | changed))  # type: ignore[arg-type]


FLAGS_OF = [
    (Act.READ, RequestFlag.DF),
    (Act.WRITE, RequestFlag(0)),
    (Act.TRIM, RequestFlag(0)),
    (Act.WRITE_ZEROES, RequestFlag.NO_HOLE),
    (Act.BLOCK_STATUS, RequestFlag.REQ_ONE),
]


@pytest.mark.parametrize(("act", "allowed"), FLAGS_OF)
def test_flags(act: Act, allowed: RequestFlag) -> None:
    for bit in range(16):
        told = requests.refusal(Request(1 << bit, act, 1, 0, 512), agreed())
        assert told == (None if 1 << bit & (allowed | RequestFlag.FUA) else Errno.INVAL)


@pytest.mark.parametrize(("act", "_allowed"), FLAGS_OF)
def test_ranges(act: Act, _allowed: RequestFlag) -> None:
    beyond = Errno.NOSPC if act in {Act.WRITE, Act.WRITE_ZEROES} else Errno.INVAL
    for offset, length, told in [
        (0, 512, None),
        (SIZE - 1, 1, None),
        (SIZE - 1, 2, beyond),
        (SIZE, 1, beyond),
        ((1 << 64) - 1, 1, beyond),
        (0, 0, Errno.INVAL),
    ]:
        assert requests.refusal(Request(0, act, 1, offset, length), agreed()) == told


def test_a_flush_has_no_range() -> None:
    assert requests.refusal(Request(0, Act.FLUSH, 1, 0, 0), agreed()) is None
    assert requests.refusal(Request(0, Act.FLUSH, 1, 0, 1), agreed()) == Errno.INVAL


def test_what_was_not_agreed_on_is_refused() -> None:
    status = Request(0, Act.BLOCK_STATUS, 1, 0, 512)
    assert requests.refusal(status, agreed(allocation=False)) == Errno.INVAL
    assert requests.refusal(Request(RequestFlag.DF, Act.READ, 1, 0, 512), agreed(structured=False)) == Errno.INVAL
    old = agreed(export=Disk(read_only=True))
    for act in (Act.WRITE, Act.WRITE_ZEROES, Act.TRIM):
        assert requests.refusal(Request(0, act, 1, 0, 512), old) == Errno.PERM
    for unknown in (5, 8, 99, 65535):
        assert requests.refusal(Request(0, unknown, 1, 0, 512), agreed()) == Errno.INVAL


def test_block_sizes() -> None:
    coarse = agreed(export=Disk(sizes=BlockSizes(512, 512, 8192)))
    for offset, length, told in [
        (512, 8192, None),
        (0, 8704, Errno.INVAL),
        (1, 512, Errno.INVAL),
        (0, 1, Errno.INVAL),
    ]:
        assert requests.refusal(Request(0, Act.READ, 1, offset, length), coarse) == told
    assert requests.refusal(Request(0, Act.WRITE_ZEROES, 1, 0, 1 << 20), coarse) is None
    assert requests.payload_bytes(Request(0, Act.WRITE, 1, 0, 8192), coarse) == 8192
    with pytest.raises(ProtocolError, match="at most 8192 bytes"):
        requests.payload_bytes(Request(0, Act.WRITE, 1, 0, 8193), coarse)


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 4096, 8192),
        (3, 4096, 8192),
        (1, 256, 8192),
        (1, 4097, 8192),
        (8192, 4096, 8192),
        (512, 4096, 8191),
        (1, 4096, LONGEST_PAYLOAD_BYTES + 1),
    ],
)
def test_block_sizes_that_no_client_understands(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no client understands"):
        BlockSizes(*sizes)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=30),
    st.integers(1, 500),
    st.booleans(),
)
def test_the_pieces_that_are_told_are_true(drawn: list[tuple[int, int]], length: int, one: bool) -> None:
    request = Request(RequestFlag.REQ_ONE if one else 0, Act.BLOCK_STATUS, 1, 0, length)
    found = requests.clipped([Piece(*each) for each in drawn], request)
    truth = [status for size, status in drawn for _ in range(size)]
    told = [piece.status for piece in found for _ in range(piece.length)]
    assert told == truth[: len(told)]
    assert all(before.status != after.status for before, after in itertools.pairwise(found))
    assert len(found) == 1 if one else len(told) == min(length, len(truth))
    assert 0 < len(told) <= length


def test_pieces_that_are_no_answer() -> None:
    request = Request(0, Act.BLOCK_STATUS, 1, 0, 512)
    for pieces in ([], [Piece(0, 0)], [Piece(8, 0), Piece(-1, 0)]):
        with pytest.raises(ValueError, match=r"piece of|no status"):
            requests.clipped(pieces, request)


@given(st.binary(min_size=28, max_size=28))
def test_a_request_is_read_as_it_was_sent(header: bytes) -> None:
    magic = struct.pack(">I", protocol.REQUEST_MAGIC)
    request = protocol.decode_request(magic + header[4:])
    again = protocol.encode_request(
        request.act, request.cookie, request.offset, request.length, flags=request.flags
    )
    assert again == magic + header[4:]
    assert str(request)
