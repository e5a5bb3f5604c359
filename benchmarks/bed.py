"""A guest, and what backs it up: the bed of benchmarks. Targets: `main`, a folder, and `repo`, a repository."""

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks import slow_target
from benchmarks.slow_target import Place
from orchestrator import config
from orchestrator.qemu import qmp
from orchestrator.service import engine
from tests.guest.vm import DiskSpec, GuestVm, Workload

VM = "bench"
PASSWORD = "benchmark"
CONFIG = """
[daemon]
state_dir = "{folder}/state"
run_dir = "{folder}/run"
[storage.local]
path = "{folder}/fleecing"
quota = "1TiB"
min_free = "64MiB"
[target.main]
path = "{folder}/backups"
[target.repo]
driver = "restic"
path = "{folder}/repository"
password_file = "{folder}/password"
[vm.{vm}]
qmp = "{socket}"
{more}
"""


def write_config(folder: Path, socket: Path, *, more: str = "") -> Path:
    """The configuration file of a VM whose monitor is at a socket; all else lies in the folder.

    `more`: what else is set for the VM, then tables of its own.
    """
    password = folder / "password"
    password.touch(mode=0o600)
    password.write_text(PASSWORD)
    file = folder / "vmfleece.toml"
    file.write_text(CONFIG.format(folder=folder, socket=socket, vm=VM, more=more))
    return file


@contextlib.asynccontextmanager
async def made(
    folder: Path, disks: Sequence[DiskSpec], workload: Workload, *, slow: Sequence[Place] = (), more: str = ""
) -> AsyncIterator[tuple[GuestVm, engine.Engine]]:
    """A guest that is ready, and an engine, for the block; with throttles, not limited yet, at some places.

    `more`: see `write_config`.
    """
    arguments = [
        argument for place in slow for argument in slow_target.qemu_arguments(0, disks=len(disks), place=place)
    ]
    connect = partial(slow_target.connect, places=slow) if slow else qmp.connect
    async with GuestVm(folder / "vm", disks, workload, extra_args=arguments) as vm:
        await vm.wait_ready()
        settings = config.load(write_config(folder, vm.product_socket, more=more))
        async with engine.opened(settings, connect=connect) as opened:
            yield vm, opened


def fill(path: Path, size_bytes: int) -> None:
    """Make a raw image in which nothing can be compressed, and no MiB is like another; blocks."""
    block = bytearray(os.urandom(1 << 20))
    with path.open("wb") as file:
        for number in range(size_bytes // len(block)):
            block[:8] = number.to_bytes(8, "little")
            file.write(block)
        file.flush()
        os.fsync(file.fileno())  # a snapshot would wait for it
