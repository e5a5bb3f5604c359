"""vmfleece on a host of its own beside real guests, and what must be true after whatever happened to them."""

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from orchestrator import config
from orchestrator.model import Consistency, Discard, Fleecing, Outcome, RunOptions, RunResult
from orchestrator.qemu import qmp
from orchestrator.run.backup import Connect
from orchestrator.run.restore import restore
from orchestrator.service import drivers, engine
from orchestrator.service.engine import Engine
from orchestrator.target.base import Snapshot, find
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.repository import Repository
from tests.guest import images
from tests.guest.leftovers import leftovers
from tests.guest.restics import CHEAP
from tests.guest.vm import GuestVm
from tests.qemu.under_way import Said, UnderWay, said

PROJECT = Path(__file__).resolve().parents[2]
VM = "web01"
FLEECED = Fleecing(storage="local")
DIRECT = Fleecing(enabled=False)
MIB = 1 << 20
PASSWORD = "correct horse"
SLOWLY = 256 * 1024  # bytes per second

CONFIG = """
[daemon]
state_dir = "{folder}/{state}"
run_dir = "{folder}/run"
{daemon}
[storage.local]
path = "{storage}"
quota = "{quota}"
min_free = "{min_free}"
[target.main]
path = "{target}"
[target.zstd]
path = "{folder}/zstd"
compress = "zstd"
[vm.{vm}]
qmp = "{socket}"
{agent}
priority = {priority}
exclude_disks = [{exclude}]
{more}
"""

REPOSITORY = """
[target.repo]
driver = "restic"
path = "{repository}"
password_file = "{folder}/password"
"""


class Host:
    """Folders, configuration and commands of a host with one guest, VM, and maybe `others`, by name.

    `connect` is how the product in this process reaches them; `priority` and `exclude` are VM's. `repository`:
    there is a target `repo`, too. `sockets` are those at which the others are reached, if not at their own.
    """

    def __init__(
        self,
        folder: Path,
        vm: GuestVm,
        *,
        others: Mapping[str, GuestVm] | None = None,
        storage: Path | None = None,
        target: Path | None = None,
        quota: str = "1GiB",
        min_free: str = "1MiB",
        priority: int = 50,
        exclude: Sequence[str] = (),
        state: str = "state",
        socket: Path | None = None,
        sockets: Mapping[str, Path] | None = None,
        connect: Connect = qmp.connect,
        repository: bool = False,
        repository_path: Path | None = None,
        daemon: str = "",
        more: str = "",
    ) -> None:
        self.folder = folder
        self.vm = vm
        self.vms = {VM: vm, **(others or {})}
        self.storage = storage or folder / "fleecing"
        self.target = target or folder / "backups"
        self.repository = repository_path or folder / "repository"
        """Where target `repo` lies; `make_repository` makes it."""
        self.connect = connect
        self.config = folder / f"{state}.toml"
        folder.mkdir(parents=True, exist_ok=True)
        for name, one in (others or {}).items():
            more += f'[vm.{name}]\nqmp = "{(sockets or {}).get(name, one.product_socket)}"\n'
        if repository:
            more += REPOSITORY.format(folder=folder, repository=self.repository)
        self.config.write_text(
            CONFIG.format(
                folder=folder,
                daemon=daemon,
                state=state,
                storage=self.storage,
                quota=quota,
                min_free=min_free,
                target=self.target,
                vm=VM,
                socket=socket or vm.product_socket,
                agent=f'agent = "{vm.agent_socket}"' if vm.agent_socket else "",
                priority=priority,
                exclude=", ".join(f'"{disk}"' for disk in exclude),
                more=more,
            )
        )

    async def make_repository(self) -> None:
        """An empty one, with a password that is quick to check."""
        password = self.folder / "password"
        password.touch(mode=0o600)
        password.write_text(PASSWORD + "\n")
        await Repository.create(DirectoryBackend(self.repository), PASSWORD, cost=CHEAP)

    # --- the product in this process ---

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Engine]:
        """The product in this process, for the block."""
        async with engine.opened(config.load(self.config), connect=self.connect) as opened:
            yield opened

    @contextlib.asynccontextmanager
    async def backing_up(
        self,
        fleecing: Fleecing = FLEECED,
        *,
        name: str = VM,
        on: Engine | None = None,
        target: str = "main",
        bwlimit: int = 0,
        cbw_timeout: int = 10,
        discard: Discard = Discard.AUTO,
        consistency: Consistency = Consistency.PAUSE,
    ) -> AsyncIterator[UnderWay]:
        """A backup beside the block, by an engine of its own if none is given; it is awaited at its end."""
        under_way = UnderWay(self.vms[name])
        options = RunOptions(
            target,
            fleecing,
            bwlimit_bytes_per_second=bwlimit,
            cbw_timeout_seconds=cbw_timeout,
            discard=discard,
            consistency=consistency,
        )
        async with self.opened() if on is None else contextlib.nullcontext(on) as opened:
            work = opened.back_up(name, options, on_progress=under_way.progress.append)
            under_way.task = asyncio.create_task(work)
            try:
                yield under_way
                await asyncio.wait([under_way.task], timeout=150)
                assert under_way.task.done(), f"the run did not end: {under_way.progress[-1:]}"
            finally:
                under_way.task.cancel()
                await asyncio.wait([under_way.task])

    async def back_up(
        self,
        fleecing: Fleecing = FLEECED,
        *,
        on: Engine | None = None,
        target: str = "main",
        bwlimit: int = 0,
        consistency: Consistency = Consistency.PAUSE,
    ) -> RunResult:
        """A backup from its start to its end."""
        async with self.backing_up(
            fleecing, on=on, target=target, bwlimit=bwlimit, consistency=consistency
        ) as under_way:
            pass
        return under_way.result

    async def snapshots(self, target: str = "main") -> list[Snapshot]:
        """What is listed."""
        return await drivers.targets(config.load(self.config))[target].snapshots()

    async def restored(
        self, target: str = "main", snapshot: str | None = None, *, name: str = VM
    ) -> dict[str, Path]:
        """The disks of a snapshot, the newest one if none is named, as raw files by the guest's name for them."""
        vm = self.vms[name]
        source = drivers.targets(config.load(self.config))[target]
        found = find(await source.snapshots(), snapshot or f"{name}@latest")
        folder = self.folder / "restored" / found.id
        folder.mkdir(parents=True)
        by_image = {str(vm.image_path(disk.id).absolute()): disk.id for disk in vm.disks}
        paths = {}
        for detail in found.details["disks"]:
            path = folder / detail["disk"]
            await restore(source, found, detail["disk"], to=path, image_format="raw")
            paths[by_image[detail["source"]]] = path
        return paths

    async def assert_restores(self, wanted: dict[str, Path], target: str = "main") -> None:
        """The newest snapshot holds exactly these disks, byte for byte."""
        restored = await self.restored(target)
        assert restored.keys() == wanted.keys()
        for disk, path in wanted.items():
            comparison = await asyncio.to_thread(images.compare, path, restored[disk])
            assert comparison.identical, f"disk {disk}: {comparison}"
        shutil.rmtree(self.folder / "restored")

    async def copies(self) -> dict[str, Path]:
        """Copies of the paused guest's disks, taken from outside."""
        folder = self.folder / "copies"
        folder.mkdir(exist_ok=True)
        paths = {disk.id: folder / disk.id for disk in self.vm.disks}
        for disk, path in paths.items():
            await self.vm.copy_disk(disk, path)
        return paths

    # --- the product as a command ---

    async def command(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start a command as a user does. It ends by itself or must be ended."""
        environment = {**os.environ, "VMFLEECE_CONFIG": str(self.config)}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "orchestrator", *arguments),
            cwd=PROJECT,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *arguments: str) -> Said:
        """Run a command to its end."""
        return await said(await self.command(*arguments))

    # --- afterwards ---

    def partial(self) -> list[Path]:
        """Unfinished snapshots."""
        return [*self.target.rglob("*.partial*"), *(self.folder / "zstd").rglob("*.partial*")]

    def descriptors(self, vm: GuestVm | None = None) -> list[str]:
        """Files of ours that QEMU holds open, named or not."""
        found = []
        for link in Path(f"/proc/{(vm or self.vm).pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                path = str(link.readlink())
                ours = (self.storage, self.target, self.folder / "zstd")
                if any(path.startswith(f"{folder}/") for folder in ours):
                    found.append(path)
        return found

    async def assert_as_before(self, *, writes: bool = True) -> None:
        """The guests are unharmed and go on unless the test has paused them; nothing of ours is left anywhere."""
        for vm in self.vms.values():
            assert await leftovers(vm) == []
            assert self.descriptors(vm) == []
        self.assert_no_files()
        for vm in self.vms.values():
            if writes and vm.expected_status == "running":
                await vm.assert_healthy()
                await vm.wait_writes(20)
                await vm.assert_healthy()

    def assert_no_files(self) -> None:
        """Neither fleecing images nor unfinished snapshots are left."""
        assert not self.storage.exists() or list(self.storage.iterdir()) == []
        assert self.partial() == []


def assert_succeeded(result: RunResult) -> None:
    """It ended well, without a warning."""
    assert result.error is None, result
    assert result.outcome is Outcome.SUCCEEDED, result
    assert result.snapshot is not None


def assert_failed(result: RunResult, *codes: str) -> None:
    """It failed for this reason, and has nothing to warn of beside that."""
    assert result.error is not None, result
    assert result.error.code in codes, result
    assert result.outcome is Outcome.FAILED
    assert result.snapshot is None
    assert result.warnings == (), result
