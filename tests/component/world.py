"""One VM in a fake QEMU with all that its backup needs, and what must be true after whatever happened."""

import asyncio
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.admission.controller import Controller
from orchestrator.admission.ledger.memory import MemoryLedger
from orchestrator.model import (
    Fleecing,
    Outcome,
    Progress,
    RunOptions,
    RunResult,
    Vm,
)
from orchestrator.qemu.builds import Builds
from orchestrator.run.backup import Means, back_up
from orchestrator.run.survey import Storages
from orchestrator.state.journal import Journal
from orchestrator.storage.directory import DirectoryStorage
from orchestrator.target.base import Target
from tests.component.fake_blocks import CLUSTER
from tests.component.fake_monitor import FakeHost, Troubles
from tests.component.fake_qemu import FakeQemu
from tests.component.fake_target import FakeTarget

MIB = 1 << 20
HANGS_SECONDS = 30.0
"""A run that takes so long hangs; the longest one takes half a second on an idle machine."""
SOCKET = Path("/run/qemu/web01.qmp")
RUN = "0badcafe"
OTHER_RUN = "deadbeef"
STRANGER = "11111111"


OPTIONS = RunOptions("main", Fleecing(storage="local"), job="nightly")


@functools.cache
def pattern(disk: str, size: int) -> bytes:
    """A disk's first content: each cluster differs from every other one, of this and other disks."""
    found = bytearray()
    for at in range(-(-size // CLUSTER)):
        found += f"{disk} {at:6d}".encode().ljust(64, b".") * (CLUSTER // 64)
    return bytes(found[:size])


@dataclass
class World:
    """Everything around one VM. `first` is each disk's content when the test began."""

    folder: Path
    qemu: FakeQemu
    target: Target
    storages: dict[str, DirectoryStorage]
    controller: Controller
    host: FakeHost
    is_ours: Callable[[str], bool] = lambda run: run in (RUN, OTHER_RUN) or run.startswith("0000")
    vm: Vm = field(default_factory=lambda: Vm("web01", SOCKET))
    first: dict[str, bytes] = field(default_factory=dict)
    progress: list[Progress] = field(default_factory=list)
    cancelled: list[RunResult] = field(default_factory=list)
    options: RunOptions = OPTIONS
    past_results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def journal(self) -> Journal:
        return Journal(self.folder)

    @property
    def troubles(self) -> Troubles:
        return self.host.troubles

    @property
    def fake_target(self) -> FakeTarget:
        assert isinstance(self.target, FakeTarget)
        return self.target

    async def back_up(
        self, *, run: str = RUN, fleecing: Fleecing | None = None, bwlimit: int = 0, vm: Vm | None = None
    ) -> RunResult:
        """One run."""
        means = Means(
            storages=Storages(self.storages, dict.fromkeys(self.storages, 0), lambda _vm: self.past_results),
            targets={"main": self.target},
            controller=self.controller,
            is_ours=self.is_ours,
            journal=self.journal,
            builds=Builds(),
            connect=self.host.connect,
        )
        options = replace(
            self.options, fleecing=fleecing or self.options.fleecing, bwlimit_bytes_per_second=bwlimit
        )
        async with asyncio.timeout(HANGS_SECONDS):
            return await back_up(
                vm or self.vm,
                options,
                means,
                run=run,
                on_progress=self.progress.append,
                on_cancelled=self.cancelled.append,
            )

    async def assert_nothing_is_left(self, descriptors: list[str], *, status: str = "running") -> None:
        """The guest is as it was, nobody holds anything, and nothing has come near QEMU's death."""
        assert self.qemu.deaths == []
        self.qemu.catch_up()
        await settled(lambda: not self.qemu.ours())
        assert self.qemu.ours() == [], self.qemu.ours()
        assert self.qemu.status == status or not self.qemu.alive
        for name, storage in self.storages.items():
            assert self.controller.accounts.granted_bytes(name) == 0
            assert list(storage.path.iterdir()) == []
        assert self.controller.waiting() == {}
        await settled(lambda: open_descriptors() == descriptors)
        left = Counter(open_descriptors()) - Counter(descriptors)
        assert not left, f"descriptors are left open: {left}"

    async def assert_nothing_is_listed(self) -> None:
        """The target shows no trace of a run that failed."""
        assert await self.target.snapshots() == []
        if isinstance(self.target, FakeTarget):
            assert self.target.drafts == []
        else:
            assert [path for path in self.target_folder.rglob("*") if path.is_file()] == []
            assert list(self.target_folder.glob("*/*")) == []

    @property
    def target_folder(self) -> Path:
        return self.folder / "target"

    def assert_copied(self, snapshot: str | None) -> None:
        """The snapshot holds all disks as they were at one and the same moment."""
        assert snapshot is not None
        moments = self.qemu.moments
        assert len({writes for writes, _ in moments.values()}) == 1
        found = {disk: content for (id_, disk), content in self.fake_target.contents.items() if id_ == snapshot}
        assert found.keys() == moments.keys()
        for disk, (_, content) in moments.items():
            assert found[disk] == content


def make_world(
    folder: Path,
    *,
    disks: dict[str, int] | None = None,
    target: Target | None = None,
    quota: int = 1 << 30,
    discard_source: bool = True,
    running: bool = True,
) -> World:
    """A VM with disks of the given sizes."""
    sizes = disks or {"vda": 2 * MIB, "vdb": MIB}
    contents = {disk: pattern(disk, size) for disk, size in sizes.items()}
    qemu = FakeQemu(contents, discard_source=discard_source, running=running)
    (folder / "fleecing").mkdir(exist_ok=True)
    storages = {"local": DirectoryStorage("local", folder / "fleecing", quota_bytes=quota, min_free=0)}
    return World(
        folder=folder,
        qemu=qemu,
        target=target or FakeTarget("main"),
        storages=storages,
        controller=Controller(storages, MemoryLedger(), max_runs=None, target_max_runs={"main": None}),
        host=FakeHost({SOCKET: qemu}),
        first=contents,
    )


def open_descriptors() -> list[str]:
    """What this process has open: files, folders, sockets and pipes, by kind where they have no name."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            link = str(entry.readlink())
        except FileNotFoundError:  # the one that listed the folder
            continue
        found.append(link if link.startswith("/") else link.partition(":")[0])
    return sorted(found)


async def settled(is_so: Callable[[], bool]) -> None:
    """Give what ends in the background (threads, closing handles, jobs) time: a probe waits 10 s for its space."""
    for _ in range(6000):
        if is_so():
            return
        await asyncio.sleep(0.005)


def failed_with(result: RunResult) -> str:
    """The code of a failed run's error; fails for a run that did not fail, and for bugs."""
    assert result.error is not None, result
    assert result.outcome is Outcome.FAILED
    assert result.snapshot is None
    assert result.error.code != "bug", result.error
    return result.error.code
