"""vmfleece on a host of its own beside a real guest, and what must be true after whatever happened to them."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu.qmp import ExecuteError

from orchestrator import config
from orchestrator.model import Fleecing, Outcome, Phase, Progress, RunOptions, RunResult
from orchestrator.qemu import qmp
from orchestrator.run.backup import Connect
from orchestrator.run.restore import restore
from orchestrator.service import engine
from orchestrator.target.base import Snapshot, find
from tests.guest import images
from tests.guest.leftovers import leftovers
from tests.guest.vm import GuestVm

PROJECT = Path(__file__).resolve().parents[2]
VM = "web01"
FLEECED = Fleecing(storage="local")
DIRECT = Fleecing(enabled=False)
MIB = 1 << 20
SLOWLY = 256 * 1024  # bytes per second
TICK_SECONDS = 0.02

CONFIG = """
[daemon]
state_dir = "{folder}/{state}"
run_dir = "{folder}/run"
[storage.local]
path = "{storage}"
quota = "{quota}"
min_free = "1MiB"
[target.main]
path = "{target}"
[target.zstd]
path = "{folder}/zstd"
compress = "zstd"
[vm.{vm}]
qmp = "{socket}"
exclude_disks = [{exclude}]
{more}
"""


class UnderWay:
    """A backup that runs: what it said so far, and in the end its result."""

    def __init__(self, vm: GuestVm) -> None:
        self.progress: list[Progress] = []
        self.task: asyncio.Task[RunResult] | None = None
        self._vm = vm

    @property
    def result(self) -> RunResult:
        assert self.task is not None
        return self.task.result()

    @property
    def phase(self) -> Phase | None:
        return self.progress[-1].phase if self.progress else None

    def fleecing_bytes(self) -> int:
        """What all fleecing images occupied when it was last said."""
        return sum(disk.fleecing_bytes for disk in self.progress[-1].disks) if self.progress else 0

    def largest_grants(self) -> dict[str, int]:
        """The largest grant that each disk ever had."""
        largest: dict[str, int] = {}
        for progress in self.progress:
            for disk in progress.disks:
                largest[disk.disk] = max(largest.get(disk.disk, 0), disk.grant_bytes)
        return largest

    async def until(self, done: Callable[[], bool], what: str, *, deadline_seconds: float = 60) -> None:
        """Wait for something that the run brings about."""
        assert self.task is not None
        try:
            async with asyncio.timeout(deadline_seconds):
                while not done():
                    assert not self.task.done(), f"the run ended before {what}: {self.task.result()}"
                    await asyncio.sleep(TICK_SECONDS)
        except TimeoutError:
            self._vm.fail(f"waited {deadline_seconds} s for {what}; the run is {self.progress[-1:]}")

    async def copying(self) -> None:
        """Wait until the point in time is made and all jobs are started."""
        await self.until(lambda: self.phase is Phase.COPYING, "copying")
        await until_jobs_run(self._vm)

    async def hurry(self) -> None:
        """Lift the jobs' speed limit, also where the product sets it anew, until the run ends."""
        assert self.task is not None
        while not self.task.done():
            for job in await our_jobs(self._vm):
                with contextlib.suppress(ExecuteError):  # it has just ended
                    await self._vm.execute("block-job-set-speed", {"device": job, "speed": 0})
            await asyncio.wait([self.task], timeout=0.2)


async def our_jobs(vm: GuestVm) -> list[str]:
    """The product's block jobs that are there."""
    return [job["id"] for job in await vm.execute("query-jobs") if job["id"].startswith("vmf-")]


async def until_jobs_run(
    vm: GuestVm, process: asyncio.subprocess.Process | None = None, *, deadline_seconds: float = 60
) -> None:
    """Wait until the product, in that process if one is given, has started its jobs."""
    async with asyncio.timeout(deadline_seconds):
        while not await our_jobs(vm):
            assert process is None or process.returncode is None, await said(process)
            await asyncio.sleep(TICK_SECONDS)


@dataclass(frozen=True, slots=True)
class Said:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


class Host:
    """Folders, configuration and commands. `connect` is how the product in this process reaches the VM."""

    def __init__(
        self,
        folder: Path,
        vm: GuestVm,
        *,
        storage: Path | None = None,
        target: Path | None = None,
        quota: str = "1GiB",
        exclude: Sequence[str] = (),
        state: str = "state",
        socket: Path | None = None,
        connect: Connect = qmp.connect,
        more: str = "",
    ) -> None:
        self.folder = folder
        self.vm = vm
        self.storage = storage or folder / "fleecing"
        self.target = target or folder / "backups"
        self.connect = connect
        self.config = folder / f"{state}.toml"
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(
            CONFIG.format(
                folder=folder,
                state=state,
                storage=self.storage,
                quota=quota,
                target=self.target,
                vm=VM,
                socket=socket or vm.product_socket,
                exclude=", ".join(f'"{disk}"' for disk in exclude),
                more=more,
            )
        )

    # --- the product in this process ---

    @contextlib.asynccontextmanager
    async def backing_up(
        self, fleecing: Fleecing = FLEECED, *, target: str = "main", bwlimit: int = 0, cbw_timeout: int = 10
    ) -> AsyncIterator[UnderWay]:
        """A backup beside the block; it is awaited at its end."""
        under_way = UnderWay(self.vm)
        options = RunOptions(target, fleecing, bwlimit_bytes_per_second=bwlimit, cbw_timeout_seconds=cbw_timeout)
        async with engine.opened(config.load(self.config), connect=self.connect) as opened:
            work = opened.back_up(VM, options, on_progress=under_way.progress.append)
            under_way.task = asyncio.create_task(work)
            try:
                yield under_way
                await asyncio.wait([under_way.task], timeout=150)
                assert under_way.task.done(), f"the run did not end: {under_way.progress[-1:]}"
            finally:
                under_way.task.cancel()
                await asyncio.wait([under_way.task])

    async def back_up(self, fleecing: Fleecing = FLEECED, *, target: str = "main", bwlimit: int = 0) -> RunResult:
        """A backup from its start to its end."""
        async with self.backing_up(fleecing, target=target, bwlimit=bwlimit) as under_way:
            pass
        return under_way.result

    async def snapshots(self, target: str = "main") -> list[Snapshot]:
        """What is listed."""
        return await engine.targets(config.load(self.config))[target].snapshots()

    async def restored(self, target: str = "main", snapshot: str | None = None) -> dict[str, Path]:
        """The disks of a snapshot, the newest one if none is named, as raw files by the guest's name for them."""
        source = engine.targets(config.load(self.config))[target]
        found = find(await source.snapshots(), snapshot or f"{VM}@latest")
        folder = self.folder / "restored" / found.id
        folder.mkdir(parents=True)
        by_image = {str(self.vm.image_path(disk.id).absolute()): disk.id for disk in self.vm.disks}
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

    def descriptors(self) -> list[str]:
        """Files of ours that QEMU holds open, named or not."""
        found = []
        for link in Path(f"/proc/{self.vm.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                path = str(link.readlink())
                ours = (self.storage, self.target, self.folder / "zstd")
                if any(path.startswith(f"{folder}/") for folder in ours):
                    found.append(path)
        return found

    async def assert_as_before(self, *, writes: bool = True) -> None:
        """The guest is unharmed and goes on, and nothing of ours is left anywhere."""
        assert await leftovers(self.vm) == []
        assert self.descriptors() == []
        self.assert_no_files()
        if writes:
            await self.vm.assert_healthy()
            await self.vm.wait_writes(20)
            await self.vm.assert_healthy()

    def assert_no_files(self) -> None:
        """Neither fleecing images nor unfinished snapshots are left."""
        assert not self.storage.exists() or list(self.storage.iterdir()) == []
        assert self.partial() == []


async def said(process: asyncio.subprocess.Process, *, deadline_seconds: float = 120) -> Said:
    """Await a command's end."""
    try:
        async with asyncio.timeout(deadline_seconds):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            await process.wait()
    assert process.returncode is not None
    return Said(process.returncode, out.decode(), err.decode())


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
