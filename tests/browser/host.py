"""A host of 200 VMs with a history, served as the daemon serves it: fake QEMUs behind the real engine and API."""

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from orchestrator.model import ErrorReport, Kind, Outcome, RunResult
from orchestrator.service.engine import Engine
from orchestrator.state.catalogue import Catalogue
from tests.component import logs
from tests.component.fake_qemu import FakeQemu
from tests.component.http import Caller, free_port, over_socket
from tests.component.test_admission import opened
from tests.component.world import MIB, World, make_world, pattern

VMS = tuple(f"vm{number:03d}" for number in range(1, 200))
"""Beside web01."""
OVERDUE, NEVER = "vm017", "vm018"
MARKUP = '<img src="x" onerror="document.title=1"><script>document.title=2</script><b>&amp;'
FAILURE = ErrorReport("target-full", f"disk {MARKUP}: the target is full", f"free {MARKUP} there")


def schedule() -> str:
    """A daily one whose turn does not come while a test runs."""
    return f"*-*-* {(datetime.now(UTC).hour + 12) % 24:02d}:00:00 UTC"


def more(folder: Path) -> str:
    """What is configured beside web01."""
    vms = "".join(f'[vm.{vm}]\nqmp = "{folder}/{vm}.qmp"\n' for vm in VMS)
    return f"""
[job.daily]
schedule = "{schedule()}"
vms = ["*"]
target = "main"
fleecing = "enabled=1,storage=local"
{vms}"""


def enter_history(folder: Path) -> None:
    """All VMs were backed up just now, but for one two days ago, whose last run failed, and one never."""
    (folder / "state").mkdir(exist_ok=True)
    catalogue = Catalogue(folder / "state")
    now = datetime.now(UTC)
    for number, vm in enumerate(("web01", *VMS)):
        if vm == NEVER:
            continue
        started = now - (timedelta(days=2) if vm == OVERDUE else timedelta(seconds=number))
        _enter(catalogue, f"{number:08x}", vm, started)
    _enter(catalogue, "ffffffff", OVERDUE, now, FAILURE)


def _enter(catalogue: Catalogue, run: str, vm: str, started: datetime, error: ErrorReport | None = None) -> None:
    catalogue.begin(run, vm, "daily", started)
    snapshot = None if error else f"{vm}/{started:%Y%m%dT%H%M%SZ}"
    outcome = Outcome.FAILED if error else Outcome.SUCCEEDED
    catalogue.finish(RunResult(vm, run, outcome, snapshot, Kind.FULL, "", started, 61.5, None, (), error=error))


@contextlib.asynccontextmanager
async def served(folder: Path, *, discard_source: bool = True) -> AsyncIterator[tuple[World, Engine, Caller, int]]:
    """The VMs, the engine, who asks it, and its port. The copies of web01's disk go on by `step` only."""
    world = make_world(folder, disks={"vda": 4 * MIB}, discard_source=discard_source)
    world.qemu.automatic = False
    for vm in VMS:
        world.host.qemus[folder / f"{vm}.qmp"] = FakeQemu({"vda": pattern("vda", 128 * 1024)})
    enter_history(folder)
    port = free_port()
    with logs.told():
        async with (
            opened(world, supervise=True, more=more(folder), daemon=f'listen = "127.0.0.1:{port}"') as engine,
            over_socket(folder / "run/api.sock") as call,
        ):
            yield world, engine, call, port
