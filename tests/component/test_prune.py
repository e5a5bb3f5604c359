"""Retention as it reaches the user: the commands that prune, protect and forget, and what a job's end calls."""

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from orchestrator import aio
from orchestrator.causes import CODES
from orchestrator.cli.main import main
from orchestrator.errors import TargetError
from orchestrator.model import Disk, Keep, MergeProgress
from orchestrator.run.prune import prune
from orchestrator.state import lock
from orchestrator.target.base import Snapshot, SnapshotDisk
from orchestrator.target.images import manifest
from orchestrator.target.images.target import ImagesTarget
from orchestrator.units import format_size
from tests.component.fake_target import FakeTarget

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]

MIB = 1 << 20
CLUSTER = 64 << 10
STAMP = "%Y%m%dT%H%M%SZ"
CONFIG = """\
[daemon]
state_dir = "{0}/state"

[target.main]
path = "{0}/backup"

[vm.web01]
qmp = "{0}/web01.qmp"

[vm.db01]
qmp = "{0}/db01.qmp"

[job.nightly]
vms = ["*"]
target = "main"
prune_backups = "keep-last=2"

[job.manual]
vms = ["web01"]
target = "main"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "vmfleece.toml"
    path.write_text(CONFIG.format(tmp_path))
    return path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Call the command in this process, with that configuration."""

    def called(*arguments: str) -> Done:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--config", str(config)])
        output = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(arguments, ended.value.code, output.out, output.err)

    monkeypatch.setenv("NO_COLOR", "1")
    umask = os.umask(0o022)
    yield called
    os.umask(umask)
    structlog.reset_defaults()


def night(day: int, vm: str = "web01", *, target: str = "main", parent: Snapshot | None = None) -> Snapshot:
    """A snapshot as a run on that day of November would have made it."""
    created = datetime(2026, 11, day, 12, 30, tzinfo=UTC)
    one = SnapshotDisk("vda", 64 * MIB, "0" * 64, MIB, parent.id if parent else None)
    kind = "incremental" if parent else "full"
    return Snapshot(f"{vm}/{created.strftime(STAMP)}", target, vm, created, kind, (one,), {"run": "0a1b2c3d"})


def make(root: Path, *snapshots: Snapshot) -> None:
    """Put snapshots on a target; what is in their images does not matter here."""
    for snapshot in snapshots:
        folder = root / snapshot.id
        folder.mkdir(parents=True)
        (folder / manifest.NAME).write_bytes(manifest.encode(snapshot))
        (folder / "vda.qcow2").write_bytes(b"QFI\xfb")


def nights(first: int, last: int, vm: str = "web01") -> list[Snapshot]:
    return [night(day, vm) for day in range(first, last + 1)]


def left(root: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(root)) for path in root.glob(f"*/*/{manifest.NAME}"))


def ids(*snapshots: Snapshot) -> list[str]:
    return [snapshot.id for snapshot in snapshots]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "backup"


def table(done: Done) -> list[list[str]]:
    """The rows of a printed table, by columns; without the heading and what is said after it."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("web01/", "db01/"))]
    return [[cell for cell in line.split("  ") if cell] for line in lines]


# --- vmfleece prune ---


def test_what_retention_does_not_keep_is_removed_and_each_reason_is_said(run: Run, root: Path) -> None:
    full = night(18)
    chain = [full, night(19, parent=full), night(20)]
    make(root, *nights(15, 17), *chain, *nights(21, 23, "db01"), night(1, "gone"))
    done = run("prune")
    assert (done.returncode, done.stderr) == (0, "")
    assert [[cell.strip() for cell in row] for row in table(done)] == [
        ["web01/20261115T123000Z", "remove", "no rule keeps it", "main"],
        ["web01/20261116T123000Z", "remove", "no rule keeps it", "main"],
        ["web01/20261117T123000Z", "remove", "no rule keeps it", "main"],
        ["web01/20261118T123000Z", "keep", "needed by web01/20261119T123000Z", "main"],
        ["web01/20261119T123000Z", "keep", "last 2", "main"],
        ["web01/20261120T123000Z", "keep", "last 1", "main"],
        ["db01/20261121T123000Z", "remove", "no rule keeps it", "main"],
        ["db01/20261122T123000Z", "keep", "last 2", "main"],
        ["db01/20261123T123000Z", "keep", "last 1", "main"],
    ]
    assert done.stdout.splitlines()[-1] == "5 kept, 4 removed, 4.0 MiB freed"
    assert left(root) == ids(*nights(22, 23, "db01"), night(1, "gone"), *chain)
    again = run("prune")
    assert again.stdout.splitlines()[-1] == "5 kept, 0 removed, 0 B freed"


def test_a_whole_chain_goes_from_its_end(run: Run, root: Path) -> None:
    first = night(1)
    second = night(2, parent=first)
    make(root, first, second, night(3, parent=second), *nights(4, 5))
    done = run("prune")
    assert (done.returncode, done.stderr) == (0, "")
    assert left(root) == ids(*nights(4, 5))


def test_a_dry_run_says_the_same_and_removes_nothing_also_beside_the_daemon(
    run: Run, root: Path, tmp_path: Path
) -> None:
    make(root, *nights(15, 18))
    dry = run("prune", "--dry-run")
    assert left(root) == ids(*nights(15, 18))
    assert dry.stdout.splitlines()[-1] == "2 kept, 2 would be removed, 2.0 MiB would be freed"
    assert not (tmp_path / "state").exists()
    with lock.owned(tmp_path / "state"):
        assert run("prune", "--dry-run").stdout == dry.stdout
    done = run("prune")
    assert table(done) == table(dry)


def test_it_is_data_too(run: Run, root: Path) -> None:
    make(root, *nights(15, 17))
    expected = [
        {
            "snapshot": one.id,
            "vm": "web01",
            "target": "main",
            "keep": bool(reason),
            "fate": "keep" if reason else "remove",
            "reasons": [reason or "no rule keeps it"],
            "removed": False,
            "merged": False,
            "stored_bytes": MIB,
            "grown_bytes": 0,
            "error": None,
        }
        for one, reason in zip(nights(15, 17), ("", "last 2", "last 1"), strict=True)
    ]
    would_be = {"dry_run": True, "snapshots": expected, "reclaimed": []}
    assert json.loads(run("prune", "--dry-run", "--json").stdout) == would_be
    expected[0]["removed"] = True
    assert json.loads(run("prune", "--json").stdout) == would_be | {"dry_run": False}


def append(config: Path, text: str) -> None:
    config.write_text(config.read_text() + text.format(config.parent))


def test_what_one_of_two_jobs_keeps_is_not_removed_for_the_other(run: Run, config: Path, root: Path) -> None:
    append(config, '[job.weekly]\nvms = ["web*"]\ntarget = "main"\nprune_backups = "keep-weekly=2"\n')
    make(root, *nights(10, 20), *nights(10, 20, "db01"))
    for arguments in (("--job", "nightly"), ("--job", "weekly")):
        assert run("prune", "--vm", "web01", *arguments).returncode == 0
        assert left(root) == ids(*nights(10, 20, "db01"), night(15), night(19), night(20))
    assert run("prune").returncode == 0
    assert left(root) == ids(*nights(19, 20, "db01"), night(15), night(19), night(20))


def test_it_can_be_narrowed_to_a_target_a_vm_or_a_job(run: Run, config: Path, root: Path, tmp_path: Path) -> None:
    append(
        config,
        '[target.other]\npath = "{0}/other"\n'
        '[job.other]\nvms = ["db01"]\ntarget = "other"\nprune_backups = "keep-last=1"\n',
    )
    other = tmp_path / "other"
    make(root, *nights(1, 3), *nights(1, 3, "db01"))
    make(other, *nights(1, 3), *nights(1, 3, "db01"))
    run("prune", "--target", "other")
    assert left(other) == ids(night(3, "db01"), *nights(1, 3))
    assert len(left(root)) == 6
    run("prune", "--vm", "db01")
    assert left(root) == ids(*nights(2, 3, "db01"), *nights(1, 3))
    run("prune", "--job", "nightly")
    assert left(root) == ids(*nights(2, 3, "db01"), *nights(2, 3))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune", "--target", "mian"], ("no target 'mian'", "name one of: main")),
        (["prune", "--vm", "web*"], ("no VM 'web*'", "name one of: web01, db01")),
        (["prune", "--job", "x"], ("no job 'x'", "name one of: nightly, manual")),
        (["prune", "--job", "manual"], ("has prune_backups and backs that up", "everything is kept")),
        (["snapshot", "forget", "web01@latest", "--target", "mian"], ("no target 'mian'",)),
        (["snapshot", "protect", "web01@latest", "--target", "mian"], ("no target 'mian'",)),
        (["snapshot", "forget"], ()),
    ],
)
def test_usage(run: Run, root: Path, tmp_path: Path, arguments: list[str], said: tuple[str, ...]) -> None:
    make(root, *nights(1, 4))
    done = run(*arguments)
    assert done.returncode == 2
    for text in said:
        assert text in done.stderr
    assert left(root) == ids(*nights(1, 4))
    assert not (tmp_path / "state").exists()


def test_without_retention_everything_is_kept(run: Run, config: Path, root: Path) -> None:
    config.write_text(config.read_text().replace('prune_backups = "keep-last=2"\n', ""))
    make(root, *nights(1, 4))
    done = run("prune")
    assert done.returncode == 2
    assert "has prune_backups: everything is kept\n" in done.stderr
    assert left(root) == ids(*nights(1, 4))


def test_it_does_not_run_beside_a_command_that_backs_up(run: Run, root: Path, tmp_path: Path) -> None:
    make(root, *nights(1, 4))
    with lock.owned(tmp_path / "state"):
        done = run("prune")
    assert done.returncode == 11
    assert f"process {os.getpid()}, since " in done.stderr
    assert "do:  wait until it has ended" in done.stderr
    assert left(root) == ids(*nights(1, 4))


def test_what_cannot_be_removed_fails_and_does_not_save_the_others(run: Run, root: Path) -> None:
    first = night(2)
    second = night(3, parent=first)
    make(root, night(1), first, second, *nights(4, 5))
    (root / f"{second.id}.removed").write_text("in the way")
    done = run("prune", "--json")
    assert done.returncode == 1
    rows = {row["snapshot"]: row for row in json.loads(done.stdout)["snapshots"]}
    assert rows[night(1).id]["removed"]
    assert rows[second.id]["error"]["code"] == "target-unwritable"
    assert not rows[second.id]["keep"]
    assert not rows[second.id]["removed"]
    assert (rows[first.id]["keep"], rows[first.id]["error"]) == (True, None)
    assert rows[first.id]["reasons"] == [f"snapshot {first.id} is needed by {second.id}"]
    assert "removal.failed" in done.stderr
    done = run("prune")
    assert done.returncode == 1
    assert [row[1].strip() for row in table(done)] == ["keep", "failed", "keep", "keep"]
    assert "Not a directory" in done.stdout
    assert left(root) == ids(first, second, *nights(4, 5))


def test_a_snapshot_that_cannot_be_read_is_said_and_left_alone(run: Run, root: Path) -> None:
    make(root, *nights(1, 3))
    (root / night(3).id / manifest.NAME).write_text("{")
    done = run("prune")
    assert done.returncode == 0
    assert "snapshot.unreadable" in done.stderr
    assert left(root) == ids(*nights(1, 3))


# --- vmfleece prune --merge ---


async def real_chain(root: Path, length: int) -> list[Snapshot]:
    """A night's full snapshot and incremental ones; each has a cluster of its own number more."""
    target = ImagesTarget("main", root)
    await target.prepare()
    disk = Disk("vda", "node", "/machine/peripheral/vda", MIB, "raw", None)
    made: list[Snapshot] = []
    for day in range(1, length + 1):
        draft = await target.begin("web01", datetime(2026, 11, day, 12, 30, tzinfo=UTC))
        sink = await draft.add_disk(disk, compressible=True, parent=made[-1].id if made else None)
        image = {"driver": "file", "filename": f"/dev/fd/{sink.descriptor}"}
        options = "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": image})
        argv = ["qemu-io", options, "-c", f"write -q -P {day} {day * CLUSTER} {CLUSTER}"]
        await aio.run_process(argv, pass_fds=[sink.descriptor])
        await draft.seal(disk)
        made.append(await draft.commit({"kind": "incremental" if made else "full", "run": "0a1b2c3d"}))
    return made


def content_of(day: int) -> bytes:
    numbers = bytes(range(day + 1)).ljust(MIB // CLUSTER, b"\0")
    return b"".join(bytes([number]) * CLUSTER for number in numbers)


def test_old_ends_of_chains_are_merged_so_that_they_go(run: Run, root: Path, tmp_path: Path) -> None:
    made = asyncio.run(real_chain(root, 5))
    assert run("prune").stdout.splitlines()[-1] == "5 kept, 0 removed, 0 B freed"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    dry = run("prune", "--merge", "--dry-run")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert [[cell.strip() for cell in row[1:3]] for row in table(dry)] == [
        *([["remove", f"no rule keeps it, would be merged into {made[3].id}"]] * 3),
        ["merge", f"last 2, needed by {made[4].id}, would be made to stand alone"],
        ["keep", "last 1"],
    ]
    stored = sum(one.stored_bytes for one in made)
    most = format_size(stored - sum(one.stored_bytes for one in made[3:]))
    assert dry.stdout.splitlines()[-1] == (
        f"2 kept, 1 of them would be merged, 3 would be removed, at most {most} would be freed"
    )
    done = run("prune", "--merge")
    assert (done.returncode, done.stderr) == (0, "")
    assert [[cell.strip() for cell in row[1:3]] for row in table(done)] == [
        *([["remove", f"no rule keeps it, merged into {made[3].id}"]] * 3),
        ["merge", f"last 2, needed by {made[4].id}, made to stand alone"],
        ["keep", "last 1"],
    ]
    freed = stored - sum(one.stored_bytes for one in asyncio.run(ImagesTarget("main", root).snapshots()))
    assert 0 < freed < stored - made[4].stored_bytes
    assert done.stdout.splitlines()[-1] == f"2 kept, 1 of them merged, 3 removed, {format_size(freed)} freed"
    assert left(root) == ids(*made[3:])
    for day, one in ((4, made[3]), (5, made[4])):
        out = tmp_path / f"{day}.raw"
        assert run("restore", one.id, "--disk", "vda", "--to", str(out)).returncode == 0
        assert out.read_bytes() == content_of(day)
    again = run("prune", "--merge")
    assert again.stdout.splitlines()[-1] == "2 kept, 0 removed, 0 B freed"


def test_what_was_merged_is_data_too(run: Run, root: Path) -> None:
    asyncio.run(real_chain(root, 3))
    for dry_run in (True, False):
        done = run("prune", "--merge", "--json", *(["--dry-run"] if dry_run else []))
        rows = json.loads(done.stdout)["snapshots"]
        assert [row["keep"] for row in rows] == [False, True, True]
        assert [row["merged"] for row in rows] == [False, not dry_run, False]
        assert [row["removed"] for row in rows] == [not dry_run, False, False]


def test_how_far_a_merge_is_is_shown(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.cli.work.LINE_SECONDS", 0)
    made = asyncio.run(real_chain(root, 3))
    lines = run("prune", "--merge").stdout.splitlines()
    said = [line for line in lines if line.startswith(f"{made[1].id}: merging: ")]
    assert said
    assert all(line.endswith("of 2.0 MiB)") for line in said)  # written, and read back
    assert lines[-1].startswith("2 kept, 1 of them merged")


async def test_a_merge_tells_how_far_it_is_until_all_is_written_and_read_back(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await real_chain(root, 3)
    monkeypatch.setattr("orchestrator.target.images.merging.POLL_SECONDS", 0)
    told: list[MergeProgress] = []
    await prune(ImagesTarget("main", root), "web01", KEEP_LAST, merge=True, on_merge=told.append)
    assert {(one.vm, one.target, one.snapshot, one.size_bytes) for one in told} == {
        ("web01", "main", made[2].id, 2 * MIB)
    }
    done = [one.done_bytes for one in told]
    assert done == sorted(done)
    assert done[0] == 0
    assert MIB < done[-1] <= 2 * MIB


def test_a_damaged_chain_is_not_merged_and_says_so(run: Run, root: Path) -> None:
    made = asyncio.run(real_chain(root, 4))
    (root / made[1].id / "vda.qcow2").write_bytes(b"QFI\xfb")
    there = left(root)
    done = run("prune", "--merge")
    assert done.returncode == 1
    assert [row[1].strip() for row in table(done)] == ["keep", "keep", "failed", "keep"]
    assert f"in snapshot {made[1].id} is damaged" in done.stdout
    assert "merge.failed" in done.stderr
    assert "4 kept, 0 removed, 0 B freed" in done.stdout
    assert left(root) == there
    rows = json.loads(run("prune", "--merge", "--json").stdout)["snapshots"]
    assert [row["error"]["code"] if row["error"] else None for row in rows] == [None, None, "content-wrong", None]


# --- vmfleece snapshot protect, forget, list ---


def test_a_protected_snapshot_is_kept_shown_and_not_counted(run: Run, root: Path) -> None:
    make(root, *nights(1, 4))
    first, third = night(1), night(3)
    for one in (first, third):
        assert run("snapshot", "protect", one.id).stdout == f"{one.id}: protected\n"
    done = run("prune")
    assert {row[0]: row[2].strip() for row in table(done)} == {
        first.id: "protected",
        night(2).id: "last 2",
        third.id: "protected",
        night(4).id: "last 1",
    }
    listed = json.loads(run("snapshot", "list", "--json").stdout)["snapshots"]
    assert [one["protected"] for one in listed] == [True, False, True, False]
    assert [row[4].strip() for row in table(run("snapshot", "list"))] == ["yes", "-", "yes", "-"]
    assert "protected: it is kept" in run("snapshot", "show", first.id).stdout
    assert (
        run("snapshot", "protect", "web01@2026-11-01", "--off").stdout == f"{first.id}: not protected any more\n"
    )
    assert json.loads(run("snapshot", "protect", third.id, "--off", "--json").stdout)["protected"] is False
    assert run("prune").returncode == 0
    assert left(root) == ids(*nights(3, 4))


def test_the_list_shows_what_a_snapshot_is_based_on(run: Run, root: Path) -> None:
    make(root, night(1), night(2, parent=night(1)))
    rows = [[cell.strip() for cell in row] for row in table(run("snapshot", "list"))]
    assert [row[2:4] for row in rows] == [["full", "-"], ["incremental", "20261101T123000Z"]]
    shown = [run("snapshot", "show", night(day).id).stdout for day in (1, 2)]
    assert [night(1).id in text for text in shown] == [True, True]
    assert ["of its image, not of its content" in text for text in shown] == [False, True]
    listed = json.loads(run("snapshot", "list", "--json").stdout)["snapshots"]
    assert [one["disks"][0]["parent"] for one in listed] == [None, night(1).id]


def test_what_is_named_is_forgotten_the_end_of_a_chain_first(run: Run, root: Path, tmp_path: Path) -> None:
    first = night(1)
    make(root, first, night(2, parent=first), night(3))
    with lock.owned(tmp_path / "state"):  # the target itself knows what must stay
        done = run("snapshot", "forget", first.id, "web01@2026-11-02", night(2).id)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(f"{one.id}: removed, 1.0 MiB freed\n" for one in (night(2), first))
    assert left(root) == ids(night(3))


def test_what_is_protected_or_needed_is_not_forgotten(run: Run, root: Path) -> None:
    first = night(1)
    make(root, first, night(2, parent=first), *nights(3, 4))
    run("snapshot", "protect", night(3).id)
    done = run("snapshot", "forget", first.id)
    assert done.returncode == 1
    assert done.stderr == (
        f"vmfleece: snapshot {first.id} is needed by {night(2).id}\n"
        f"  why: {CODES['needed'].why}\n"
        "  do:  remove what builds on it first\n"
    )
    done = run("snapshot", "forget", night(3).id, night(4).id)
    assert done.returncode == 3
    assert f"vmfleece: snapshot {night(3).id} is protected\n" in done.stderr
    assert f"snapshot protect {night(3).id} --off" in done.stderr
    done = run("snapshot", "forget", night(3).id, "--json")
    assert done.returncode == 1
    (row,) = json.loads(done.stdout)["forgotten"]
    assert (row["snapshot"], row["error"]["code"]) == (night(3).id, "protected")
    assert left(root) == ids(*nights(1, 3))


def test_a_name_that_means_nothing_forgets_nothing(run: Run, root: Path) -> None:
    make(root, *nights(1, 2))
    done = run("snapshot", "forget", night(1).id, night(9).id)
    assert done.returncode == 1
    assert f"no snapshot '{night(9).id}'" in done.stderr
    assert left(root) == ids(*nights(1, 2))


def test_one_that_is_on_two_targets_must_be_told_which(run: Run, config: Path, root: Path, tmp_path: Path) -> None:
    append(config, '[target.other]\npath = "{0}/other"\n')
    make(root, night(1))
    make(tmp_path / "other", night(1))
    for action in ("forget", "protect"):
        done = run("snapshot", action, "web01@latest")
        assert done.returncode == 2
        assert "give --target: main, other" in done.stderr
    assert run("snapshot", "forget", "web01@latest", "--target", "other").returncode == 0
    assert (left(root), left(tmp_path / "other")) == (ids(night(1)), [])


# --- what a job's end calls ---


@pytest.fixture
def target() -> FakeTarget:
    structlog.reset_defaults()
    return FakeTarget("main")


KEEP_LAST = (Keep(last=1),)


async def test_what_was_done_is_logged(target: FakeTarget) -> None:
    target.listed = [*nights(1, 3), night(4, "db01")]
    with capture_logs() as lines:
        result = await prune(target, "web01", KEEP_LAST)
    assert target.listed == [night(3), night(4, "db01")]
    assert [(one.snapshot, one.keep) for one in result.snapshots] == [
        (night(1), False),
        (night(2), False),
        (night(3), True),
    ]
    of_vm: dict[str, Any] = {"vm": "web01", "target": "main", "log_level": "info"}
    assert lines == [
        of_vm | {"event": "snapshot.removed", "snapshot": night(2).id, "stored_bytes": MIB},
        of_vm | {"event": "snapshot.removed", "snapshot": night(1).id, "stored_bytes": MIB},
        of_vm | {"event": "prune.finished", "kept": 1, "removed": 2, "failed": []},
    ]


@pytest.mark.parametrize(("keeps", "dry_run"), [((), False), (KEEP_LAST, True)])
async def test_where_nothing_is_to_be_done_nothing_is_logged(
    target: FakeTarget, keeps: tuple[Keep, ...], dry_run: bool
) -> None:
    target.listed = nights(1, 3)
    with capture_logs() as lines:
        result = await prune(target, "web01", keeps, dry_run=dry_run)
    assert target.listed == nights(1, 3)
    assert [one.keep for one in result.snapshots] == [not keeps, not keeps, True]
    assert lines == []


async def test_what_is_protected_or_built_on_meanwhile_stays_without_failing(target: FakeTarget) -> None:
    target.listed = nights(1, 4)

    def meanwhile(step: str) -> None:
        if step == "remove" and len(target.listed) == 4:
            target.listed = [night(1), replace(night(2), protected=True), night(3), night(5, parent=night(3))]

    target.before = meanwhile
    result = await prune(target, "web01", KEEP_LAST)
    assert [(one.snapshot.id, one.keep, one.error) for one in result.snapshots] == [
        (night(1).id, False, None),
        (night(2).id, True, None),
        (night(3).id, True, None),
        (night(4).id, True, None),
    ]
    assert night(1) not in target.listed


async def test_a_chain_goes_even_if_the_clock_was_set_back_amid_it(target: FakeTarget) -> None:
    middle = replace(night(3, parent=night(9)), created=datetime(2026, 11, 3, tzinfo=UTC))
    end = night(2, parent=middle)
    target.listed = [end, middle, night(9), night(10)]
    result = await prune(target, "web01", KEEP_LAST)
    assert target.listed == [night(10)]
    assert [one.removed for one in result.snapshots] == [True, True, True, False]


async def test_one_that_fails_is_in_the_result_and_in_the_log(target: FakeTarget) -> None:
    target.listed = nights(1, 3)

    def broken(step: str) -> None:
        if step == "remove" and night(2) in target.listed:
            target.listed.remove(night(2))
            raise TargetError("target main: Input/output error", hint="look", code="target-unwritable")

    target.before = broken
    with capture_logs() as lines:
        result = await prune(target, "web01", KEEP_LAST)
    assert [one.error.code if one.error else None for one in result.snapshots] == [None, "target-unwritable", None]
    assert [line["event"] for line in lines] == ["removal.failed", "snapshot.removed", "prune.finished"]
    assert (lines[0]["code"], lines[0]["snapshot"]) == ("target-unwritable", night(2).id)
    assert lines[-1]["failed"] == [night(2).id]


def chained(first: int, last: int) -> list[Snapshot]:
    made = [night(first)]
    for day in range(first + 1, last + 1):
        made.append(night(day, parent=made[-1]))
    return made


async def test_merging_is_logged_and_frees_what_was_only_needed(target: FakeTarget) -> None:
    target.listed = chained(1, 4)
    with capture_logs() as lines:
        result = await prune(target, "web01", KEEP_LAST, merge=True)
    assert [one.id for one in target.listed] == [night(4).id]
    assert target.listed[0].parents == ()
    assert [(one.keep, one.merged, one.reasons) for one in result.snapshots] == [
        *([(False, False, ("no rule keeps it", f"merged into {night(4).id}"))] * 3),
        (True, True, ("last 1", "made to stand alone")),
    ]
    assert [line["event"] for line in lines] == [
        "merge.started",
        "snapshot.merged",
        *["snapshot.removed"] * 3,
        "prune.finished",
    ]
    of_one: dict[str, Any] = {"vm": "web01", "target": "main", "log_level": "info", "snapshot": night(4).id}
    assert lines[0] == of_one | {"event": "merge.started", "older": ids(*nights(1, 3))}
    assert lines[1] == of_one | {"event": "snapshot.merged"}


async def test_what_is_in_use_is_merged_another_time_without_failing(target: FakeTarget) -> None:
    target.listed = chained(1, 3)

    def in_use(step: str) -> None:
        if step == "merge":
            raise TargetError("snapshot 3 is being restored", code="needed")

    target.before = in_use
    with capture_logs() as lines:
        result = await prune(target, "web01", KEEP_LAST, merge=True)
    assert target.listed == chained(1, 3)
    assert [(one.keep, one.merged, one.error) for one in result.snapshots] == [(True, False, None)] * 3
    assert result.snapshots[2].reasons == ("last 1", "snapshot 3 is being restored")
    assert [line["event"] for line in lines] == ["merge.started", "prune.finished"]


async def test_one_that_cannot_be_merged_does_not_save_the_other_chains(target: FakeTarget) -> None:
    target.listed = [*chained(1, 3), *chained(4, 6)]
    target.listed[2] = replace(target.listed[2], protected=True)
    merging = iter([True, False])

    def full(step: str) -> None:
        if step == "merge" and next(merging):
            raise TargetError("target main: no space", hint="free some", code="target-full")

    target.before = full
    with capture_logs() as lines:
        result = await prune(target, "web01", KEEP_LAST, merge=True)
    assert [one.id for one in target.listed] == ids(*nights(1, 3), night(6))
    assert [(one.keep, one.merged, bool(one.error)) for one in result.snapshots] == [
        *([(True, False, False)] * 2),
        (True, False, True),
        *([(False, False, False)] * 2),
        (True, True, False),
    ]
    assert [line["event"] for line in lines][:4] == [
        "merge.started",
        "merge.failed",
        "merge.started",
        "snapshot.merged",
    ]
    assert (lines[1]["code"], lines[-1]["failed"]) == ("target-full", [night(3).id])


async def test_what_was_protected_or_built_on_while_it_was_merged_stays(target: FakeTarget) -> None:
    target.listed = chained(1, 4)

    def meanwhile(step: str) -> None:
        if step == "merge":
            target.listed[0] = replace(target.listed[0], protected=True)
            target.listed.append(night(5, parent=target.listed[1]))

    target.before = meanwhile
    result = await prune(target, "web01", KEEP_LAST, merge=True)
    assert [one.snapshot.id for one in result.snapshots if one.removed] == ids(*nights(3, 4))
    assert [one.id for one in target.listed] == ids(*nights(1, 2), night(5))


async def test_cancelled_it_leaves_the_rest(target: FakeTarget) -> None:
    target.listed = nights(1, 5)
    task = asyncio.create_task(prune(target, "web01", KEEP_LAST))
    while len(target.listed) == 5:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert target.listed == [*nights(1, 3), night(5)]
