"""The pictures of the status page in docs/, of made-up VMs: `python -m tests.browser.pictures docs`."""

import asyncio
import math
import random
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from playwright.async_api import async_playwright

from orchestrator.config import Address
from orchestrator.model import DiskProgress, ErrorReport, GuestWrites, RunState
from orchestrator.service.api import server
from orchestrator.service.api.base import RunsQuery, Service
from orchestrator.service.documents import (
    GoodRun,
    History,
    JobProtection,
    Protected,
    Protection,
    RunFailure,
    Runs,
    RunSummary,
    StorageHistory,
    VmProtection,
)
from orchestrator.service.status import RunStatus, Status, StorageStatus, WaitingStatus
from orchestrator.units import GIB
from tests.browser.chromium import launched
from tests.component.answers import Recorded, settings
from tests.component.http import free_port

NOW = datetime.now(UTC)
TURN = NOW - timedelta(minutes=34)
FULL = ErrorReport(
    "target-full",
    "disk scsi1: the target is full",
    "free some space there: vmfleece prune --dry-run says what retention would remove",
)
SHUT = ErrorReport(
    "vm-unreachable",
    "VM mail02: cannot connect to /run/qemu/mail02.qmp: Connection refused",
    "is it running? Each VM needs a monitor of its own",
)


def _ago(**how_long: float) -> str:
    return (NOW - timedelta(**how_long)).isoformat()


def _id(*of: object) -> str:
    return f"{random.Random(str(of)).getrandbits(32):08x}"  # noqa: S311  looks like one


def _vm(name: str, state: Protected, *, hours: float = 0, failure: ErrorReport | None = None) -> VmProtection:
    began = NOW - timedelta(hours=hours)
    good = GoodRun(_id(name), "nightly", began.isoformat(), f"{name}/{began:%Y%m%dT%H%M%SZ}") if hours else None
    missed = TURN.isoformat() if state in (Protected.OVERDUE, Protected.DUE) else None
    nightly = JobProtection("nightly", state, good.started if good else None, missed, _ago(hours=-23.4))
    return VmProtection(
        name,
        state,
        good,
        () if state is Protected.UNSCHEDULED else (nightly,),
        failure and RunFailure(_id(name, 1), "nightly", _ago(minutes=21), "failed", failure),
    )


VMS = (
    _vm("db02", Protected.OVERDUE, hours=24.5, failure=FULL),
    _vm("mail02", Protected.OVERDUE, hours=48.6, failure=SHUT),
    _vm("build03", Protected.NEVER),
    _vm("db01", Protected.DUE, hours=24.4),
    _vm("files01", Protected.DUE, hours=24.4),
    _vm("web03", Protected.DUE, hours=24.3),
    _vm("lab", Protected.UNSCHEDULED, hours=200),
    *(
        _vm(name, Protected.PROTECTED, hours=0.2 + 0.03 * len(name))
        for name in ("mail01", "ns1", "ns2", "web01", "web02")
    ),
)


def _disk(name: str, gib: float, share: float, strip: str, *, held: tuple[float, float] = (0, 0)) -> DiskProgress:
    """`held` is what its fleecing image holds, and its grant, in GiB."""
    sizes = (int(one * GIB) for one in (gib, gib * share, *held))
    return DiskProgress(name, *sizes, incremental=gib < 50, strip=strip)


def _run(vm: str, *disks: DiskProgress) -> RunStatus:
    def total(key: str) -> int:
        return sum(getattr(disk, key) for disk in disks)

    keys = ("size_bytes", "copied_bytes", "fleecing_bytes", "grant_bytes")
    recent_ms = tuple(0.35 + 0.2 * math.sin(second / 3) ** 2 + 0.73 * (second == 41) for second in range(60))
    return RunStatus(
        *(vm, _id(vm, "now"), "nightly", "main", "copying", _ago(minutes=12), *map(total, keys), disks),
        guest_writes=GuestWrites(280_317, 0.442, 1.284, None, 0.391),
        recent_write_ms=recent_ms,
    )


def _status() -> Status:
    windows = (
        "#" * 7 + "ooo" + "#" * 9 + ">>" + "." * 5 + "##" + "oooo" + "." * 12 + "##" + "." * 9 + "o" + "." * 8
    )
    return Status(
        4711,
        _ago(days=12),
        storages=(
            StorageStatus(
                "local",
                "/var/lib/vmfleece/fleecing",
                200 * GIB,
                61 * GIB,
                0,
                23 * GIB,
                48 * GIB,
                512 * GIB,
                90 * GIB,
                2,
                2,
            ),
        ),
        runs=(
            _run(
                "db01",
                _disk("scsi0", 64, 1.0, "#" * 64),
                _disk("scsi1", 512, 0.31, windows, held=(17.5, 44)),
            ),
            _run("files01", _disk("vda", 41, 0.66, "#" * 42 + ">" + "." * 21, held=(5.5, 17))),
        ),
        queue=(
            WaitingStatus(
                "web03",
                _id("web03"),
                "nightly",
                "main",
                50,
                _ago(minutes=11),
                (
                    "storage local: all of its 2 runs at a time are under way",
                    "target main: 2 runs at a time are under way",
                ),
            ),
        ),
    )


class Made(Recorded):
    """Answers with what is made up here."""

    async def protection(self) -> Protection:
        return Protection(datetime.now(UTC).isoformat(), VMS)

    def storage_history(self) -> History:
        points = 300
        at = tuple(int(NOW.timestamp()) - 160 * (points - number) for number in range(points))
        waves = [max(0.0, math.sin(number / 46 - 4) * 24) + (number > 292) * 20 for number in range(points)]
        granted = tuple(int((24 if wave else 0) + wave * 1.6) * GIB for wave in waves)
        used = tuple(int((wave * (0.8 + 0.2 * math.sin(number / 3))) * GIB) for number, wave in enumerate(waves))
        return History(160, at, (StorageHistory("local", granted, used),))

    async def runs(self, query: RunsQuery) -> Runs:
        del query
        found = []
        for number, vm in enumerate(("ns2", "web02", "mail02", "web01", "db02", "mail01", "ns1")):
            error = {"mail02": SHUT, "db02": FULL}.get(vm)
            began = NOW - timedelta(minutes=14 + 2 * number)
            found.append(
                RunSummary(
                    _id(vm),
                    vm,
                    "nightly",
                    RunState.FAILED if error else RunState.SUCCEEDED,
                    began.isoformat(),
                    duration_seconds=2.3 if error else 71.0 + 19 * number,
                    snapshot=None if error else f"{vm}/{began:%Y%m%dT%H%M%SZ}",
                    kind="incremental",
                    copied_bytes=0 if error else (number + 1) * GIB // 2,
                    error=error,
                )
            )
        return Runs(tuple(found))


WHOLE = "--whole" in sys.argv
PICTURES = {
    "page-light": ("light", 1240, 1640),
    "page-dark": ("dark", 1240, 1640),
    "page-phone": ("light", 390, 1780),
}


async def main(folder: Path) -> None:
    """Take all of them."""
    with tempfile.TemporaryDirectory(prefix="vmf") as run_dir:
        listen = Address("127.0.0.1", free_port())
        made = Made(_status, Service.DAEMON)
        async with (
            server.served(settings(Path(run_dir) / "run", listen=listen), made),
            async_playwright() as playwright,
            launched(playwright) as browser,
        ):
            for name, (scheme, width, height) in PICTURES.items():
                page = await browser.new_page(
                    reduced_motion="reduce", color_scheme=scheme, viewport={"width": width, "height": height}
                )
                await page.goto(f"http://{listen}/")
                await page.wait_for_selector("#past tr")
                await page.wait_for_selector("#connection[data-state=live]")
                await page.screenshot(path=folder / f"{name}.png", full_page=WHOLE)
                await page.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
