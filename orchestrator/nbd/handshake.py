"""A server's side of the negotiation, as a machine that is told what came and says what to send. Pure.

    machine = Handshake(exports)
    send(machine.greeting)
    while machine.wants:
        send(machine.take(receive_exactly(machine.wants)))
    machine.agreed  # None if the client only asked

It never wants more than protocol.LONGEST_OPTION_BYTES at once. It raises ProtocolError where a client cannot be
answered any more, and is over then. Source: doc/proto.md of NetworkBlockDevice/nbd, "Newstyle negotiation".
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from orchestrator.nbd import protocol
from orchestrator.nbd.export import Export
from orchestrator.nbd.protocol import Can, Option, OptionReply, ProtocolError

LIST_MOST_BYTES = 1 << 20
"""A list of exports is cut off here: a client that asks again and again must not cost much."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What both sides speak from now on. `allocation`: block status in base:allocation may be asked for."""

    name: str
    export: Export
    structured: bool
    allocation: bool


class Handshake:
    """One connection's negotiation. The exports are looked up when they are asked for."""

    greeting = protocol.encode_greeting()

    def __init__(self, exports: Mapping[str, Export]) -> None:
        self._exports = exports
        self._no_zeroes = False
        self._structured = False
        self._allocation: str | None = None  # the export for which the context was chosen
        self._option = 0
        self._next = self._client_flags
        self.wants = protocol.CLIENT_FLAGS.size
        self.agreed: Agreed | None = None

    def take(self, data: bytes) -> bytes:
        """What to send now that the `wants` bytes came. Raises ProtocolError."""
        if len(data) != self.wants or not data:
            raise ValueError(f"{len(data)} bytes instead of {self.wants}")
        try:
            return self._next(data)
        except ProtocolError:
            self.wants = 0
            raise

    def _client_flags(self, data: bytes) -> bytes:
        self._no_zeroes = bool(protocol.decode_client_flags(data) & protocol.NO_ZEROES)
        self._await_option()
        return b""

    def _await_option(self) -> None:
        self._next, self.wants = self._header, protocol.OPTION.size

    def _header(self, data: bytes) -> bytes:
        self._option, length = protocol.decode_option(data)
        if not length:
            return self._data(b"")
        self._next, self.wants = self._data, length
        return b""

    def _data(self, data: bytes) -> bytes:
        self._await_option()
        if self._option == Option.EXPORT_NAME:
            return self._export_name(data)
        answer = self._answers().get(self._option)
        if answer is None:
            return self._refuse(OptionReply.ERROR_UNSUPPORTED, "this server does not know that option")
        try:
            return answer(data)
        except ProtocolError as error:  # within one option: the next one can be told apart
            return self._refuse(OptionReply.ERROR_INVALID, str(error))

    def _answers(self) -> dict[int, Callable[[bytes], bytes]]:
        return {
            Option.ABORT: self._abort,
            Option.LIST: self._list,
            Option.INFO: self._info,
            Option.GO: self._go,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._list_meta_context,
            Option.SET_META_CONTEXT: self._set_meta_context,
        }

    def _export_name(self, data: bytes) -> bytes:
        """The oldest way to begin, which has no answer but the export or the end of the connection."""
        name = protocol.decode_name(data)
        export = self._exports.get(name)
        if export is None:
            raise ProtocolError(f"there is no export {name!r}, and EXPORT_NAME cannot be refused otherwise")
        self._begin(name, export)
        return self._described(export) + (b"" if self._no_zeroes else bytes(124))

    def _abort(self, data: bytes) -> bytes:
        del data  # the client is leaving whatever it says
        self.wants = 0
        return self._reply(OptionReply.ACK)

    def _list(self, data: bytes) -> bytes:
        _expect_nothing(data)
        found: list[bytes] = []
        room = LIST_MOST_BYTES
        for name, export in self._exports.items():
            found.append(self._reply(OptionReply.SERVER, protocol.encode_server(name, export.description)))
            room -= len(found[-1])
            if room < 0:
                break
        return b"".join(found) + self._reply(OptionReply.ACK)

    def _info(self, data: bytes) -> bytes:
        name, wanted = protocol.decode_go(data)
        export = self._exports.get(name)
        return self._unknown(name) if export is None else self._tell(name, export, wanted)

    def _go(self, data: bytes) -> bytes:
        name, wanted = protocol.decode_go(data)
        export = self._exports.get(name)
        if export is None:
            return self._unknown(name)
        self._begin(name, export)
        return self._tell(name, export, wanted)

    def _tell(self, name: str, export: Export, wanted: Iterable[int]) -> bytes:
        """Sizes are told unasked: a client that does not understand them ignores them."""
        sizes = export.block_sizes
        about = {
            protocol.INFO_EXPORT: self._described(export),
            protocol.INFO_BLOCK_SIZE: protocol.encode_block_sizes(sizes.minimum, sizes.preferred, sizes.maximum),
        }
        if protocol.INFO_NAME in wanted:
            about[protocol.INFO_NAME] = name.encode()
        if protocol.INFO_DESCRIPTION in wanted and export.description:
            about[protocol.INFO_DESCRIPTION] = export.description.encode()[: protocol.LONGEST_NAME_BYTES]
        infos = [self._reply(OptionReply.INFO, protocol.encode_info(kind, data)) for kind, data in about.items()]
        return b"".join(infos) + self._reply(OptionReply.ACK)

    def _structured_reply(self, data: bytes) -> bytes:
        _expect_nothing(data)
        self._structured = True
        return self._reply(OptionReply.ACK)

    def _list_meta_context(self, data: bytes) -> bytes:
        name, queries = self._contexts(data)
        if name not in self._exports:
            return self._unknown(name)
        if queries and not {protocol.ALLOCATION, "base:"} & set(queries):
            return self._reply(OptionReply.ACK)
        return self._context(0)

    def _set_meta_context(self, data: bytes) -> bytes:
        self._allocation = None  # whatever comes of it, the choice before is void
        name, queries = self._contexts(data)
        if name not in self._exports:
            return self._unknown(name)
        if protocol.ALLOCATION not in queries:
            return self._reply(OptionReply.ACK)
        self._allocation = name
        return self._context(protocol.ALLOCATION_ID)

    def _contexts(self, data: bytes) -> tuple[str, list[str]]:
        if not self._structured:
            raise ProtocolError("contexts need structured replies, which were not asked for")
        return protocol.decode_meta_context(data)

    def _context(self, number: int) -> bytes:
        context = protocol.encode_context(number, protocol.ALLOCATION)
        return self._reply(OptionReply.META_CONTEXT, context) + self._reply(OptionReply.ACK)

    def _begin(self, name: str, export: Export) -> None:
        self.agreed = Agreed(name, export, self._structured, self._allocation == name)
        self.wants = 0

    def _described(self, export: Export) -> bytes:
        return protocol.encode_export_info(export.size_bytes, _flags(export, structured=self._structured))

    def _unknown(self, name: str) -> bytes:
        return self._refuse(OptionReply.ERROR_UNKNOWN, f"there is no export {name[:200]!r}")

    def _refuse(self, kind: OptionReply, message: str) -> bytes:
        return self._reply(kind, message.encode())

    def _reply(self, kind: OptionReply, data: bytes = b"") -> bytes:
        return protocol.encode_option_reply(self._option, kind, data)


def _expect_nothing(data: bytes) -> None:
    if data:
        raise ProtocolError(f"{len(data)} bytes of data with an option that has none")


def _flags(export: Export, *, structured: bool) -> Can:
    """A flush makes durable what all connections wrote, so several may be used at once."""
    flags = Can.HAS_FLAGS | Can.FLUSH | Can.MULTI_CONN
    if structured:
        flags |= Can.DF
    if export.read_only:
        return flags | Can.READ_ONLY
    return flags | Can.FUA | Can.TRIM | Can.WRITE_ZEROES
