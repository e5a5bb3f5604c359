"""When retention removes snapshots: each VM alone, those that are backed up last."""

import asyncio
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from orchestrator import config
from orchestrator.admission.controller import Controller
from orchestrator.admission.ledger.memory import MemoryLedger
from orchestrator.errors import TargetError
from orchestrator.qemu.builds import Builds
from orchestrator.run.backup import Means
from orchestrator.service import drivers
from orchestrator.service.in_force import InForce, Setup
from orchestrator.service.pruning import Pruning
from orchestrator.state.journal import Journal
from orchestrator.target.base import Snapshot
from tests.component.fake_target import FakeTarget

VMS = ("db01", "web01", "web02")
CONFIG = """
[daemon]
state_dir = "{folder}/state"
run_dir = "{folder}/run"
[storage.local]
path = "{folder}/fleecing"
quota = "1GiB"
[target.main]
path = "{folder}/backups"
[vm.db01]
qmp = "/run/qemu/db01.qmp"
[vm.web01]
qmp = "/run/qemu/web01.qmp"
[vm.web02]
qmp = "/run/qemu/web02.qmp"
[job.nightly]
vms = ["web*"]
target = "main"
prune_backups = "keep-last=1"
"""


@pytest.fixture
def target() -> FakeTarget:
    """Two snapshots of each VM."""
    structlog.reset_defaults()
    target = FakeTarget("main")
    for number in range(2):
        created = datetime(2026, 11, 22, tzinfo=UTC) + timedelta(days=number)
        target.listed += [Snapshot(f"{vm}/{number}", "main", vm, created, "full", (), {}) for vm in VMS]
    return target


class Bed:
    """What prunes, and the VMs' locks."""

    def __init__(self, folder: Path, target: FakeTarget) -> None:
        path = folder / "vmfleece.toml"
        path.write_text(CONFIG.format(folder=folder))
        loaded, controller = config.load(path), Controller({}, MemoryLedger(), max_runs=None, target_max_runs={})
        storages = drivers.storages(loaded)
        means = Means(
            storages=drivers.storages_for_plans(loaded, storages, lambda _vm: []),
            targets={"main": target},
            controller=controller,
            is_ours=lambda _run: True,
            journal=Journal(folder),
            builds=Builds(),
        )
        self.setup = Setup(loaded, storages, means)
        self.in_force = InForce(self.setup, controller)
        self.locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.pruning = Pruning(self.in_force, self.locks.__getitem__, lambda _progress: None)


@pytest.fixture
def bed(tmp_path: Path, target: FakeTarget) -> Bed:
    return Bed(tmp_path, target)


def ids(target: FakeTarget) -> set[str]:
    return {snapshot.id for snapshot in target.listed}


async def test_a_vm_that_is_backed_up_comes_last_and_is_waited_for(bed: Bed, target: FakeTarget) -> None:
    pairs = [("main", "web01"), ("main", "web02")]
    with capture_logs() as lines:
        async with bed.locks["web01"]:
            pruning = asyncio.create_task(bed.pruning.carry_out(pairs, bed.setup, merge=False, dry_run=False))
            async with asyncio.timeout(5):
                while not any(line["event"] == "prune.waiting" for line in lines):
                    await asyncio.sleep(0)
            assert ids(target) == {"db01/0", "db01/1", "web01/0", "web01/1", "web02/1"}
            assert bed.in_force.busy  # no folder is exchanged meanwhile
        results = await pruning
    assert [result.vm for result in results] == ["web02", "web01"]
    assert [line["vm"] for line in lines if line["event"] == "prune.waiting"] == ["web01"]
    assert ids(target) == {"db01/0", "db01/1", "web01/1", "web02/1"}
    assert not bed.in_force.busy


async def test_a_dry_run_waits_for_nobody_and_removes_nothing(bed: Bed, target: FakeTarget) -> None:
    before = ids(target)
    async with bed.locks["web01"], asyncio.timeout(5):
        (result,) = await bed.pruning.carry_out([("main", "web01")], bed.setup, merge=False, dry_run=True)
    assert [one.removed for one in result.snapshots] == [True, False]
    assert ids(target) == before


async def test_after_a_run_only_its_vm_is_pruned_and_none_that_no_job_prunes(bed: Bed, target: FakeTarget) -> None:
    await bed.pruning.after_run("main", "web02", merge=False)
    await bed.pruning.after_run("main", "db01", merge=False)
    await bed.pruning.after_run("gone", "web01", merge=False)  # the target is not configured any more
    assert ids(target) == {"db01/0", "db01/1", "web01/0", "web01/1", "web02/1"}


async def test_what_fails_after_a_run_is_logged_only(
    bed: Bed, target: FakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(_vm: str | None = None) -> list[Snapshot]:
        raise TargetError("main cannot be reached", code="target-gone")

    monkeypatch.setattr(target, "snapshots", unreachable)
    with capture_logs() as lines:
        await bed.pruning.after_run("main", "web01", merge=False)
    (line,) = lines
    assert "main cannot be reached" in line.pop("error")
    assert line == {"event": "prune.failed", "log_level": "warning", "vm": "web01", "target": "main"}
    with pytest.raises(TargetError):  # who asked for it is told
        await bed.pruning.carry_out([("main", "web01")], bed.setup, merge=False, dry_run=False)
    assert not bed.in_force.busy
    assert not bed.locks["web01"].locked()
