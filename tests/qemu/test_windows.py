"""Full copies by windows, on real QEMU under load: what a finished window held is given back; nothing is lost."""

import asyncio
from pathlib import Path

import pytest

from orchestrator.fleecing import boundary
from orchestrator.fleecing.boundary import Window
from orchestrator.model import Discard, Phase
from orchestrator.run.windows import WindowCopy
from tests.guest.versions import qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.hooks import At
from tests.qemu.host import FLEECED, SLOWLY, Host, assert_succeeded

WINDOW = 8 * MIB
A_FEW = 4 * 64 * 1024
"""A copy-before-write that is in flight when its range is discarded may leave its cluster behind."""


class Watched:
    """Notes after each discard which windows of its disk are done, and what each one holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[tuple[frozenset[int], dict[int, int]]] = []
        real = WindowCopy._take_away

        async def take_away(copy: WindowCopy, window: Window, *, discard: bool) -> None:
            await real(copy, window, discard=discard)
            done = copy._boundary.done | {window.number}
            self.held.append((done, dict(await copy._means.held_bytes())))

        monkeypatch.setattr(WindowCopy, "_take_away", take_away)
        monkeypatch.setattr(boundary, "WINDOW_BYTES", WINDOW)

    def assert_given_back(self) -> None:
        for done, held in self.held:
            assert all(held.get(number, 0) <= A_FEW for number in done), (done, held)
        assert any(held for _, held in self.held), "nothing was held at any time: the guest wrote too little"


@pytest.mark.parametrize(
    ("version", "iothread"),
    [
        pytest.param("7.2", False, id="7.2"),
        pytest.param("7.2", True, id="7.2, iothreads"),
        pytest.param("10.0", True, id="10.0, iothreads"),  # and later ones, which take the same way
    ],
)
async def test_windows_of_two_disks_under_load(
    version: str, iothread: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    disks = [
        DiskSpec("vda", 4 * WINDOW, iothread=iothread),
        DiskSpec("vdb", 2 * WINDOW - MIB + 512, format="raw", iothread=iothread),
    ]
    async with GuestVm(
        tmp_path / "vm", disks, Workload("random", region_bytes=2 * WINDOW), qemu=qemu(version)
    ) as vm:
        await vm.wait_ready()
        await vm.wait_writes(200)
        jobs_may_start = asyncio.Event()
        host = Host(tmp_path, vm, connect=At("blockdev-backup", jobs_may_start.wait))
        await vm.pause()
        async with host.backing_up(FLEECED, bwlimit=32 * SLOWLY, discard=Discard.WINDOW) as under_way:
            await under_way.until(lambda: under_way.phase is Phase.COPYING, "the point in time")
            moment = await host.copies()
            await vm.resume()
            await vm.wait_writes(200)
            jobs_may_start.set()
        assert_succeeded(under_way.result)
        assert len(watched.held) == 4 + 2
        watched.assert_given_back()
        await host.assert_restores(moment)
        await host.assert_as_before()
