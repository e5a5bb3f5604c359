"""A run with the real target and real images: what is on disk afterwards is what the guest had."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from orchestrator.model import Compression, Fleecing
from orchestrator.run.restore import restore
from orchestrator.target.images.target import ImagesTarget
from tests.component.world import MIB, make_world


@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize("enabled", [True, False], ids=["fleecing", "direct"])
async def test_the_snapshot_is_what_the_disks_were(
    tmp_path: Path, before: list[str], enabled: bool, compression: Compression
) -> None:
    target = ImagesTarget("main", tmp_path / "target", compression=compression)
    world = make_world(tmp_path, target=target, disks={"vda": MIB, "vdb": 512 << 10})
    world.qemu.pace = 1
    world.qemu.during_copy = lambda job: world.qemu.guest_writes("vda", job.position * 4096, b"new")
    result = await world.back_up(fleecing=Fleecing(enabled=enabled, storage="local"))
    assert result.error is None, result.error
    (snapshot,) = await target.snapshots()
    assert snapshot.id == result.snapshot
    for disk, content in world.first.items():
        stored = snapshot.disk(disk)
        assert stored.size_bytes == len(content)
        image = tmp_path / "target" / snapshot.id / f"{disk}.qcow2"
        assert stored.sha256 == hashlib.sha256(image.read_bytes()).hexdigest()
        restored = await restore(target, snapshot, disk, to=tmp_path / f"{disk}.raw", image_format="raw")
        assert restored.path.read_bytes() == content
    for image in (tmp_path / "target").rglob("*.qcow2"):
        subprocess.run(["qemu-img", "check", "-q", image], check=True)  # noqa: ASYNC221
    await world.assert_nothing_is_left(before)
