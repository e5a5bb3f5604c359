"""A unix socket between the product and QEMU's monitor: cut at any moment, cut or held at an exact command.

It passes descriptors on as well. QEMU stays; who connects again gets through.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

READ_BYTES = 1 << 16
DESCRIPTORS_MAX = 8


@dataclass(frozen=True, slots=True)
class Trap:
    """`act` is done once `reached` says so of a message's names: before it is passed on, or after."""

    reached: Callable[[Sequence[str]], bool]
    act: Callable[[], None]
    after: bool


class Proxy:
    """Listens at `path` for the block and passes everything on to `to`.

    `rewrite` may change each command on its way.
    """

    def __init__(self, path: Path, to: Path) -> None:
        self.path = path
        self.connections = 0
        self.cuts = 0
        self.held = threading.Event()
        self._to = to
        self.rewrite: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        self._trap: Trap | None = None
        self._hold_before: str | None = None
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def cut(self) -> None:
        """Cut all connections, at both ends."""
        with self._lock:
            open_now, self._open = self._open, []
            self.cuts += bool(open_now)
        for end in open_now:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut_after(self, command: str) -> None:
        """Cut as soon as this command was passed on to QEMU, and nothing that was sent behind it."""
        self.at(lambda names: command in names, self.cut, after=True)

    def at(self, reached: Callable[[Sequence[str]], bool], act: Callable[[], None], *, after: bool) -> None:
        """Act, in the proxy's thread, at the first message of which this is so; the connection ends there.

        Nothing that was sent behind that message is passed on, nor itself unless it is `after` it.
        """
        self._trap = Trap(reached, act, after)

    def disarm(self) -> bool:
        """Forget `at`; whether it was still to come."""
        armed, self._trap = self._trap is not None, None
        return armed

    def hold_before(self, command: str) -> None:
        """Hold the connection on which this command comes, once: nothing more is passed on, until it is closed."""
        self._hold_before = command

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            qemu = socket.socket(socket.AF_UNIX)
            try:
                qemu.connect(str(self._to))
            except OSError:  # QEMU is gone
                client.close()
                qemu.close()
                continue
            with self._lock:
                self.connections += 1
                self._open += [client, qemu]
            self._start(self._pass_on, client, qemu)

    def _pass_on(self, client: socket.socket, qemu: socket.socket) -> None:
        """Both directions of one connection, until either end is closed or it is cut."""
        back = threading.Thread(target=_answers, args=(qemu, client), daemon=True)
        back.start()
        with contextlib.suppress(OSError):
            self._commands(client, qemu)
        for end in (client, qemu):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        back.join()
        with self._lock:
            self._open = [end for end in self._open if end not in (client, qemu)]
        client.close()
        qemu.close()

    def _commands(self, client: socket.socket, qemu: socket.socket) -> None:
        unsent = b""
        while True:
            data, descriptors, _, _ = socket.recv_fds(client, READ_BYTES, DESCRIPTORS_MAX)
            if not data:
                return
            if descriptors:
                socket.send_fds(qemu, [b" "], descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
            unsent += data
            while message := _first_message(unsent):
                unsent = unsent[len(message) :]
                command = json.loads(message)
                names = _names(command)
                if self._hold_before in names:
                    self._hold_before = None
                    self.held.set()
                    while client.recv(READ_BYTES):
                        pass
                    return
                trap = self._sprung(names)
                if trap is None or trap.after:
                    qemu.sendall(json.dumps(self.rewrite(command)).encode() if self.rewrite else message)
                if trap is not None:
                    trap.act()
                    return

    def _sprung(self, names: Sequence[str]) -> Trap | None:
        with self._lock:
            trap = self._trap
            if trap is None or not trap.reached(names):
                return None
            self._trap = None
            return trap


def _names(message: dict[str, Any]) -> list[str]:
    """The command, and what is done in it if it is a transaction."""
    actions = message.get("arguments", {}).get("actions", [])
    return [message.get("execute", ""), *(action["type"] for action in actions)]


def _answers(qemu: socket.socket, client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := qemu.recv(READ_BYTES):
            client.sendall(data)
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


def _first_message(data: bytes) -> bytes:
    """The first complete JSON message and the blanks around it; nothing if there is none yet."""
    text = data.decode()
    start = len(text) - len(text.lstrip())
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        return b""
    return text[:end].encode()
