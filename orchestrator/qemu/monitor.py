"""The contract of a connection to one QEMU: commands with deadlines, events that end loudly.

Implemented by `qmp.QmpMonitor` over a real socket and by the tests' fake; one conformance suite runs over both.

What an implementation promises:
- Commands reach QEMU in the order in which they were given, also those of one `pipeline`.
- Every wait ends: with a reply, with CommandTimeout, or with ConnectionLost. After the last two the command's
  outcome is unknown: query before doing anything else.
- An event stream that is open when the connection is lost raises ConnectionLost; it never goes silent.
- It is a connection to one QEMU process. It never goes on with another one that took its place at the socket:
  what was done to the first one is gone with it.
- Cancelling any method leaves the connection usable; the command may still have been carried out.
"""

import abc
import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import CommandFailed, ConnectionLost, MonitorError
from orchestrator.qemu.commands import Command

DEADLINE_SECONDS = 30.0
"""How long QEMU may take to answer. Its main loop can be busy for seconds under a heavily loaded host."""

OUTCOME_UNKNOWN = "what the commands under way did is unknown; vmfleece asks QEMU before it goes on"


@dataclass(frozen=True, slots=True)
class Event:
    """One QMP event. `timestamp` is QEMU's own clock: seconds since 1970, microseconds resolved."""

    name: str
    data: dict[str, Any]
    timestamp: float


class EventStream:
    """The events of some names since it was opened. Nothing is dropped."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._events: deque[Event] = deque()
        self._lost: MonitorError | None = None
        self._news = asyncio.Event()

    def offer(self, event: Event) -> None:
        """Take an event if it is one of ours."""
        if event.name in self._names:
            self._events.append(event)
            self._news.set()

    def lose(self, error: MonitorError) -> None:
        """End the stream: what was received is still delivered, then `error` is raised."""
        self._lost = error
        self._news.set()

    def received(self) -> list[Event]:
        """Take what has arrived, without waiting."""
        events = list(self._events)
        self._events.clear()
        return events

    async def next(self) -> Event:
        """Wait for the next event. Raises ConnectionLost. Cancellation loses nothing."""
        while not self._events:
            if self._lost is not None:
                raise ConnectionLost(self._lost.message, hint=self._lost.hint)
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()


class EventRouter:
    """Hands each event to the streams that are open."""

    def __init__(self) -> None:
        self._streams: list[EventStream] = []

    @contextmanager
    def open(self, names: tuple[str, ...]) -> Iterator[EventStream]:
        """A stream of the named events, until the block ends."""
        stream = EventStream(frozenset(names))
        self._streams.append(stream)
        try:
            yield stream
        finally:
            self._streams.remove(stream)

    def publish(self, event: Event) -> None:
        """Hand an event to every open stream that wants it."""
        for stream in self._streams:
            stream.offer(event)

    def lose(self, error: MonitorError) -> None:
        """End every open stream."""
        for stream in self._streams:
            stream.lose(error)


class Monitor(abc.ABC):
    """A connection to one QEMU. See the module for what it promises."""

    def __init__(self) -> None:
        self._router = EventRouter()

    def subscribe(self, *names: str) -> AbstractContextManager[EventStream]:
        """Open a stream of the named events. Subscribe before executing what causes them."""
        return self._router.open(names)

    async def execute(self, command: Command, *, deadline_seconds: float = DEADLINE_SECONDS) -> Any:
        """Execute one command and return its reply.

        Raises CommandFailed, CommandTimeout, ConnectionLost.
        """
        (reply,) = await self.pipeline([command], deadline_seconds=deadline_seconds)
        if isinstance(reply, CommandFailed):
            raise reply
        return reply

    @abc.abstractmethod
    async def pipeline(
        self, commands: Sequence[Command], *, deadline_seconds: float = DEADLINE_SECONDS
    ) -> list[Any]:
        """Send all commands at once, in order, and return their replies in the same order.

        A command that QEMU refuses has its CommandFailed in place of a reply; those behind it are executed all
        the same. Either all of them are sent or none. Raises CommandTimeout, ConnectionLost.
        """

    @abc.abstractmethod
    async def pass_descriptor(self, descriptor: int, *, opaque: str) -> int:
        """Give QEMU a duplicate of an open file; returns the id of the descriptor set that holds it.

        Raises CommandFailed, CommandTimeout, ConnectionLost.
        """

    @abc.abstractmethod
    async def lend_descriptor(self, descriptor: int, *, name: str) -> None:
        """Give QEMU a duplicate of an open file or socket, which the next command that says `name` takes.

        Raises CommandFailed, CommandTimeout, ConnectionLost.
        """

    @property
    @abc.abstractmethod
    def connected(self) -> bool:
        """Whether commands can be sent right now."""

    @property
    @abc.abstractmethod
    def process(self) -> str:
        """Which QEMU process it is connected to: the same text as long as that lives, without blanks."""

    @abc.abstractmethod
    async def reconnect(self, *, deadline_seconds: float) -> None:
        """Connect again after a loss, trying with growing pauses until the deadline.

        Returns at once if connected. Raises NobodyThere ("vm-gone") as soon as it is known that the process has
        ended, because nobody listens any more or another one does; else ConnectFailed at the deadline.
        """


def raise_first(replies: Sequence[Any]) -> None:
    """Raise the first refusal among the replies of a pipeline, if there is one."""
    for reply in replies:
        if isinstance(reply, CommandFailed):
            raise reply


class Connect(Protocol):
    """How a VM's monitor is reached; `qmp.connect` but in tests."""

    def __call__(self, path: Path, *, vm: str) -> AbstractAsyncContextManager[Monitor]: ...
