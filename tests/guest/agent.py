"""A guest with an agent (`GuestVm(…, agent=True)`): a shell in it, what it has synced, what its agent says."""

import asyncio
import json
import secrets
from typing import Any

from tests.guest import console
from tests.guest.vm import GuestVm

DEADLINE_SECONDS = 20.0


async def run(vm: GuestVm, command: str) -> None:
    """Run a line of shell in the guest; it must succeed. init.sh's functions are there: `start_agent`."""
    _, writer = await asyncio.open_unix_connection(vm.shell_socket)
    before = len(_done(vm))
    try:
        writer.write(command.encode() + b"\n")
        # QEMU may drop what it has not passed on when the connection is closed.
        await vm.wait_until(lambda: len(_done(vm)) > before, f"{command!r} in the guest", DEADLINE_SECONDS)
    finally:
        writer.close()
    if _done(vm)[before]["code"] != "0":
        vm.fail(f"{command!r} ended with {_done(vm)[before]['code']} in the guest")


def _done(vm: GuestVm) -> list[dict[str, str]]:
    return console.whole_lines(vm.console(), "done ")


def synced(vm: GuestVm) -> int:
    """Return up to which number the guest's files are synced, on all its disks."""
    lines = console.whole_lines(vm.console(), "synced ")
    return int(lines[-1]["file"]) if lines else 0


async def wait_synced(vm: GuestVm, files: int) -> None:
    """Wait until the guest has synced so many more files."""
    wanted = synced(vm) + files
    await vm.wait_until(lambda: synced(vm) >= wanted, f"file {wanted} to be synced", DEADLINE_SECONDS)


async def freeze_status(vm: GuestVm) -> str:
    """Return `thawed` or `frozen`, as the agent has it."""
    assert vm.agent_socket is not None
    async with asyncio.timeout(DEADLINE_SECONDS):
        reader, writer = await asyncio.open_unix_connection(vm.agent_socket)
        try:
            number = secrets.randbits(32)
            writer.write(b"\xff" + _command("guest-sync-delimited", id=number))
            answer = {}
            while answer.get("return") != number:
                await reader.readuntil(b"\xff")
                answer = json.loads(await reader.readline())
            writer.write(_command("guest-fsfreeze-status"))
            return str(json.loads(await reader.readline())["return"])
        finally:
            writer.close()
            await writer.wait_closed()


def _command(name: str, **arguments: Any) -> bytes:
    return json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"
