"""A fleet of scripted QEMUs behind real QMP sockets: `python -m benchmarks.fleet FOLDER COUNT`, for `scale`.

Each is a `FakeQemu` of the component tests, with the schema of a real QEMU, read from FOLDER/schema.json. The
first few have a disk that is large enough for its grant to be extended. The process does what it is told on its
standard input, a line each, answers each with a line of JSON, and ends with its input.
"""

import asyncio
import contextlib
import json
import random
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from orchestrator.errors import CommandFailed
from orchestrator.qemu.commands import Command
from orchestrator.qemu.monitor import Event
from orchestrator.units import GIB
from tests.component.fake_blocks import CLUSTER, Node
from tests.component.fake_qemu import FakeQemu

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": []}}
RECEIVED_BYTES = 1 << 16
LARGE_VMS = 10
LARGE_BYTES = GIB
"""Its first grant is a quarter of that."""
DISK = "vda"
QUIET_SECONDS = 2.0
THRESHOLDS_PER_SECOND = 20


@dataclass
class Reaction:
    """A threshold that was reported: when, and when what was asked first and what was answered with came."""

    told: float
    asked: float | None = None
    answered: float | None = None


@dataclass
class Vm:
    """One of them, and what is seen of those who speak to it."""

    qemu: FakeQemu
    large: bool
    commands: int = 0
    last: float = 0.0
    reaction: Reaction | None = None
    reactions: list[Reaction] = field(default_factory=list)

    def grant(self) -> Node | None:
        """The node that a fleecing image's grant is, once it has a threshold."""
        return next((node for node in self.qemu.nodes.values() if node.threshold), None)

    def see(self, command: Command) -> None:
        """Note a command, and whether it is what a threshold is answered with."""
        now = time.monotonic()
        self.commands, self.last = self.commands + 1, now
        if self.reaction is None:
            return
        if self.reaction.asked is None:
            self.reaction.asked = now
        if command.name == "block-set-write-threshold":
            self.reaction.answered = now
            self.reactions.append(self.reaction)
            self.reaction = None

    def cross_threshold(self) -> bool:
        """Have the image reach its threshold, as the guest's writes do; False if there is none to reach."""
        grant = self.grant()
        if grant is None or self.reaction is not None:
            return False
        threshold, grant.threshold = grant.threshold, 0
        grant.high_water = threshold + CLUSTER
        self.reaction = Reaction(time.monotonic())
        data = {"node-name": grant.name, "amount-exceeded": CLUSTER, "write-threshold": threshold}
        self.qemu.emit("BLOCK_WRITE_THRESHOLD", **data)
        return True


class Client:
    """One connection to one of them; what `FakeQemu` takes for a monitor."""

    def __init__(self, connection: socket.socket, vm: Vm, schema: bytes) -> None:
        self._socket = connection
        self._vm = vm
        self._schema = schema
        self._received = ""
        self._descriptors: list[int] = []
        self._unsent = bytearray()
        self._loop = asyncio.get_running_loop()
        connection.setblocking(False)
        vm.qemu.monitors = [self]  # type: ignore[list-item]
        self._send(GREETING)
        self._loop.add_reader(connection, self._read)

    def receive(self, event: Event) -> None:
        """Tell of an event."""
        seconds, fraction = divmod(event.timestamp, 1)
        stamp = {"seconds": int(seconds), "microseconds": int(fraction * 1e6)}
        self._send({"event": event.name, "data": event.data, "timestamp": stamp})

    def take_descriptor(self) -> int | None:
        """The descriptor that was sent last."""
        return self._descriptors.pop() if self._descriptors else None

    def lose(self) -> None:
        """Close the connection."""
        self._vm.qemu.monitors = []
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, RECEIVED_BYTES, 4)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        self._descriptors += descriptors
        if not data:
            self.lose()
            return
        self._received = (self._received + data.decode()).lstrip()
        decoder = json.JSONDecoder()
        while self._received:
            try:
                message, end = decoder.raw_decode(self._received)
            except json.JSONDecodeError:  # not all of it has come
                return
            self._received = self._received[end:].lstrip()
            self._execute(message)

    def _execute(self, message: dict[str, Any]) -> None:
        command = Command(message["execute"], message.get("arguments", {}))
        self._vm.see(command)
        number = message.get("id")
        if command.name == "query-qmp-schema":
            self._send_text(b'{"return": %s, "id": %s}\n' % (self._schema, json.dumps(number).encode()))
            return
        reply = {} if command.name == "qmp_capabilities" else self._vm.qemu.carry_out(command, self)  # type: ignore[arg-type]
        if isinstance(reply, CommandFailed):
            self._send({"error": {"class": "GenericError", "desc": reply.description}, "id": number})
        else:
            self._send({"return": reply, "id": number})

    def _send(self, message: dict[str, Any]) -> None:
        self._send_text(json.dumps(message).encode() + b"\n")

    def _send_text(self, text: bytes) -> None:
        self._unsent += text
        self._write()

    def _write(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        if self._unsent:
            self._loop.add_writer(self._socket, self._write)
        else:
            self._loop.remove_writer(self._socket)


class Fleet:
    """All of them, and what it can be told."""

    def __init__(self, folder: Path, count: int) -> None:
        self._schema = (folder / "schema.json").read_bytes()
        self._vms = [self._made(number < LARGE_VMS) for number in range(count)]
        self._servers = [self._listen(folder / f"vm{number:04d}.qmp", vm) for number, vm in enumerate(self._vms)]

    def _made(self, large: bool) -> Vm:
        qemu = FakeQemu({DISK: bytes(CLUSTER)})
        qemu.automatic = False
        if large:  # of its content nothing but the first cluster is ever looked at
            qemu.nodes[qemu.devices[DISK].own_node].size = LARGE_BYTES
        return Vm(qemu, large)

    def _listen(self, path: Path, vm: Vm) -> socket.socket:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(str(path))
        server.listen(1)
        server.setblocking(False)

        def accept() -> None:
            if not vm.qemu.monitors:  # QEMU serves one at a time
                Client(server.accept()[0], vm, self._schema)

        asyncio.get_running_loop().add_reader(server, accept)
        return server

    def quiet(self) -> dict[str, Any]:
        """How many were connected to and have not been asked anything for a while."""
        now = time.monotonic()
        count = sum(bool(vm.qemu.monitors) and now - vm.last > QUIET_SECONDS for vm in self._vms)
        return {"quiet": count, "commands": sum(vm.commands for vm in self._vms)}

    def copying(self) -> dict[str, Any]:
        """How many have a block job of a backup, and what was done to any that would end a real QEMU."""
        count = sum(bool(vm.qemu.jobs) for vm in self._vms)
        return {"copying": count, "deaths": [death for vm in self._vms for death in vm.qemu.deaths]}

    async def load(self, events_per_second: int, seconds: float) -> dict[str, Any]:
        """Tell of so many events, evenly, of which some are thresholds; how long those took to be answered.

        All but the thresholds are guests' resets, of which the daemon keeps an eye on each.
        """
        large = [vm for vm in self._vms if vm.large]
        rng, began, told, crossed = random.Random(1), time.monotonic(), 0, 0
        while (elapsed := time.monotonic() - began) < seconds:
            while told < elapsed * events_per_second:
                told += 1
                vm = rng.choice(large)
                if crossed < elapsed * THRESHOLDS_PER_SECOND and vm.cross_threshold():
                    crossed += 1
                else:
                    rng.choice(self._vms).qemu.emit("RESET", guest=True, reason="guest-reset")
            await asyncio.sleep(0.001)
        await asyncio.sleep(1)
        reactions = [one for vm in large for one in vm.reactions]
        return {
            "told": told,
            "seconds": elapsed,
            "asked": [one.asked - one.told for one in reactions if one.asked],
            "answered": [one.answered - one.told for one in reactions if one.answered],
            "unanswered": sum(vm.reaction is not None for vm in large),
        }


async def main(folder: Path, count: int) -> None:
    fleet = Fleet(folder, count)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps({"listening": count}), flush=True)
    while line := (await reader.readline()).decode().split():
        if line[0] == "load":
            answer = await fleet.load(int(line[1]), float(line[2]))
        else:
            answer = {"quiet": fleet.quiet, "copying": fleet.copying}[line[0]]()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Path(sys.argv[1]), int(sys.argv[2])))
