"""Two guests that write all the time, and a vmfleece that backs them up all the time.

The first one's fleecing images and its target have file systems of their own, which faults are done to; the second
one, its neighbour, must not notice. Both monitors are reached through proxies.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from orchestrator.admission.ledger.sqlite import SqliteLedger
from orchestrator.fleecing import bitmaps
from orchestrator.state.catalogue import Catalogue
from orchestrator.target.restic.backend.directory import DirectoryBackend
from orchestrator.target.restic.repository import Repository
from tests.faults.daemon import Daemon
from tests.faults.places import FaultyDisk, small
from tests.guest.leftovers import leftovers
from tests.guest.versions import qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.host import PASSWORD, VM, Host
from tests.qemu.proxy import Proxy

NEIGHBOUR = "web02"
DISKS = [DiskSpec("vda", 16 * MIB, iothread=True), DiskSpec("vdb", 8 * MIB, format="raw", iothread=True)]
REGION_BYTES = 6 * MIB
WRITES_PER_SECOND = 200
CBW_TIMEOUT_SECONDS = 4
ALWAYS, NEVER = "*:*:0/1", "2099-01-01 00:00:00"
"""Calendars: a run is due whenever there is none; none ever is."""
DAEMON = 'log_level = "debug"'
STORAGE_MIB, TARGET_MIB, REPOSITORY_MIB = 80, 400, 4000
"""The last one is for hundreds of backups of which nothing is reclaimed; it takes what is written only."""
MORE = """
[storage.apart]
path = "{folder}/apart/fleecing"
quota = "1GiB"
min_free = "0"
[target.apart]
path = "{folder}/apart/backups"
[job.first]
schedule = "{schedule}"
vms = ["{vm}"]
target = "{target}"
fleecing = "enabled=1,storage=local"
bwlimit = "12288"
cbw_timeout = "{timeout}s"
full_every = {full_every}
retries = 0
prune_backups = "keep-last=2"
[job.second]
schedule = "{schedule}"
vms = ["{neighbour}"]
target = "apart"
fleecing = "enabled=1,storage=apart"
bwlimit = "12288"
cbw_timeout = "{timeout}s"
full_every = 10
retries = 0
prune_backups = "keep-last=2"
"""


@dataclass(slots=True)
class Machine:
    """One of the two VMs, and what is known of it."""

    name: str
    version: str
    target: str
    guest: GuestVm
    proxy: Proxy
    storage: Path
    restarted_after: str | None = None
    """The newest snapshot when its QEMU was started anew: what builds on that, or an older one, cannot be."""
    records: int = 0
    """So many were on all its disks when the daemon was started."""
    stalls_seen: int = 0
    errors_seen: int = 0
    stopped_seconds: float = 0.0
    """For how long its QEMU was stopped since the guest was looked at, because it was wanted so."""
    durations: list[float] = field(default_factory=list)

    async def is_paused(self) -> bool:
        return self.guest.alive() and not (await self.guest.execute("query-status"))["running"]

    async def count_records(self) -> int:
        """So many, of this start of the guest, are on all its disks."""
        return await self.guest.writes() // len(self.guest.disks) - 2


class Bed:
    """All of it, for the block. `version`: the first guest's QEMU."""

    def __init__(self, folder: Path, *, version: str, repository: bool) -> None:
        self.folder = folder
        self.daemon: Daemon | None = None
        self.machines: list[Machine] = []
        self.orphans: set[int] = set()
        """What daemons that were killed had started."""
        self.damaged = False
        """Whether the next daemon must find that its journal is."""
        self.disk: FaultyDisk
        self._repository = repository
        self._versions = (version, "10.0" if version == "7.2" else "7.2")
        self._lives = 0
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            enter = stack.enter_context
            self.folder.mkdir(parents=True, exist_ok=True)
            guests = []
            for name, version in zip((VM, NEIGHBOUR), self._versions, strict=True):
                workload = Workload("sequence", rate=WRITES_PER_SECOND, region_bytes=REGION_BYTES)
                guest = GuestVm(self.folder / name, DISKS, workload, qemu=qemu(version), memory_mib=192)
                guests.append(await stack.enter_async_context(guest))
            place = enter(small(self.folder / "storage", STORAGE_MIB))
            size_mib = REPOSITORY_MIB if self._repository else TARGET_MIB
            self.disk = enter(FaultyDisk(self.folder / "disk", self.folder / "target", size_mib))
            proxies = [
                enter(Proxy(self.folder / f"{name}.qmp", guest.product_socket))
                for name, guest in zip((VM, NEIGHBOUR), guests, strict=True)
            ]
            self.host = Host(
                self.folder,
                guests[0],
                others={NEIGHBOUR: guests[1]},
                storage=place / "fleecing",
                target=self.disk.path / "backups",
                min_free="0",
                socket=proxies[0].path,
                sockets={NEIGHBOUR: proxies[1].path},
                repository=self._repository,
                repository_path=self.disk.path / "repository",
                daemon=DAEMON,
                more=self._jobs(ALWAYS),
            )
            self._always = self.host.config.read_text()
            target = "repo" if self._repository else "main"
            self.machines = [
                Machine(VM, self._versions[0], target, guests[0], proxies[0], self.host.storage),
                Machine(
                    NEIGHBOUR,
                    self._versions[1],
                    "apart",
                    guests[1],
                    proxies[1],
                    self.folder / "apart" / "fleecing",
                ),
            ]
            if self._repository:
                await self.host.make_repository()
            (self.folder / "apart").mkdir()
            stack.push_async_callback(self._end_daemon)
            for guest in guests:
                await guest.wait_ready()
                await guest.wait_writes(100)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    def _jobs(self, schedule: str) -> str:
        return MORE.format(
            folder=self.folder,
            schedule=schedule,
            vm=VM,
            neighbour=NEIGHBOUR,
            target="repo" if self._repository else "main",
            full_every=0 if self._repository else 10,
            timeout=CBW_TIMEOUT_SECONDS,
        )

    async def start(self, *, idle: bool = False) -> Daemon:
        """Start the daemon anew; `idle`: no job of its is ever due."""
        assert self.daemon_is_dead
        self.host.config.write_text(self._always.replace(ALWAYS, NEVER) if idle else self._always)
        self._lives += 1
        self.daemon = await Daemon.start(self.host.config, self.folder / f"daemon-{self._lives}.log")
        return self.daemon

    @property
    def daemon_is_dead(self) -> bool:
        return self.daemon is None or not self.daemon.alive

    async def stop(self) -> None:
        """SIGTERM to the daemon, which has to end well."""
        assert self.daemon is not None
        code = await self.daemon.stop()
        assert code == 0, f"exit code {code} after SIGTERM: {self.daemon.tail()}"

    async def boot_again(self, machine: Machine) -> None:
        """Start a guest anew whose QEMU was lost, or is worth nothing any more."""
        await machine.guest.kill()
        listed = await self.listed(machine)
        machine.restarted_after = listed[-1] if listed else None
        machine.stalls_seen = machine.errors_seen = 0
        await machine.guest.start()
        await machine.guest.wait_ready()
        await machine.guest.wait_writes(100)

    async def _end_daemon(self) -> None:
        if self.daemon is not None and self.daemon.alive:
            self.daemon.kill()
            await self.daemon.ended()

    @property
    def state(self) -> Path:
        return self.folder / "state"

    # --- what is there ---

    def dead_runs(self) -> set[str]:
        """The runs that are not this daemon's."""
        assert self.daemon is not None
        alive = {line["run"] for line in self.daemon.of("run.started")}
        return Catalogue(self.state).runs() - alive

    async def of_dead_runs(self) -> list[str]:
        """What is left of them, but on targets, while others may be under way."""
        dead = self.dead_runs()
        found = [f"ledger: {run}" for run in await self._holders() if run in dead]
        for machine in self.machines:
            if machine.guest.alive():
                found += [
                    f"{machine.name}: {line}"
                    for line in await leftovers(machine.guest)
                    if any(f"vmf-{run}-" in line for run in dead)
                ]
        return found

    async def anything(self) -> list[str]:
        """What is left of anything, now that nothing is under way."""
        found = [f"ledger: {run}" for run in await self._holders()]
        for machine in self.machines:
            found += [f"{machine.name}: {line}" for line in await leftovers(machine.guest)]
            found += [f"{machine.name} holds {path}" for path in self._held(machine)]
            found += [f"{machine.name}: {line}" for line in await self._bitmaps(machine)]
            if machine.storage.exists():
                found += [f"{path} is there" for path in machine.storage.iterdir()]
        for place in (self.host.target, self.folder / "apart" / "backups"):
            found += [f"{path} is there" for path in place.rglob("*.partial*")]
        if self._repository:
            repository = await Repository.open(DirectoryBackend(self.host.repository), PASSWORD)
            await repository.remove_stale_locks()  # as the next draft does: those of dead movers stay until then
            locks = self.host.repository / "locks"
            found += [f"{path} is there" for path in locks.iterdir()]
        return found

    async def _holders(self) -> list[str]:
        ledger = SqliteLedger.path(self.state)
        if not ledger.exists():
            return []
        opened = SqliteLedger(ledger)
        try:
            return [holding.owner.run for holding in await opened.holdings()]
        finally:
            await opened.close()

    def _held(self, machine: Machine) -> Sequence[str]:
        """Files of ours that its QEMU has open."""
        found = []
        ours = (machine.storage, self.disk.path, self.folder / "apart")
        for link in Path(f"/proc/{machine.guest.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                path = str(link.readlink())
                found += [path for folder in ours if path.startswith(f"{folder}/")]
        return found

    async def _bitmaps(self, machine: Machine) -> Sequence[str]:
        """Those that are not since a listed snapshot, one a disk, or do not record.

        While none is listed, all are left alone: the target may only not be mounted.
        """
        listed = {bitmaps.name_of(machine.target, one) for one in await self.listed(machine)}
        if not listed:
            return []
        found = []
        for entry in await machine.guest.execute("query-block"):
            inserted = entry.get("inserted")
            ours = bitmaps.of_node(inserted.get("dirty-bitmaps", [])) if inserted else []
            wrong = [one.name for one in ours if one.name not in listed or one.busy or not one.recording]
            lost = [one.name for one in ours if one.inconsistent]
            found += [f"bitmap {name}, of snapshots {sorted(listed)}" for name in wrong if name not in lost]
            if len(ours) > 1:
                found.append(f"bitmaps {[one.name for one in ours]} on one disk")
        return found

    async def listed(self, machine: Machine) -> list[str]:
        """Its snapshots, oldest first."""
        return [one.id for one in await self.host.snapshots(machine.target) if one.vm == machine.name]
