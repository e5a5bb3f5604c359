"""Disks that restic itself backed up, in chunks of its own lengths, read by others' tools through us."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.aio import run_process
from orchestrator.errors import TargetError
from orchestrator.nbd.protocol import Allocation
from orchestrator.target.repository import contents
from orchestrator.target.restic.pack import CHUNK_BYTES, BlobKind
from orchestrator.target.restic.repository import Repository
from orchestrator.target.restic.tree import FileContent
from orchestrator.units import MIB
from tests.peer.test_restic_repository import Restic, disk, reopened, restic

__all__ = ["restic"]  # fixtures

HOLE = int(Allocation.HOLE | Allocation.ZERO)
DISK = disk(5, 30 * MIB + 512)


@pytest.fixture(params=["auto", "off"])
async def written(
    restic: Restic, tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[Restic, Repository, FileContent]:
    source = tmp_path / "source"
    source.mkdir()
    (source / "vda.raw").write_bytes(DISK)
    restic.run("init", "--repository-version", "2")
    restic.run("backup", "--compression", request.param, "vda.raw", cwd=source)
    repository = await reopened(restic)
    (made,) = (await repository.snapshots()).snapshots
    content = (await repository.files(made))["vda.raw"]
    assert not repository.on_grid(content, CHUNK_BYTES)
    return restic, repository, content


Written = tuple[Restic, Repository, FileContent]


async def run(*argv: str | Path, fails: bool = False) -> str:
    done = await run_process([str(part) for part in argv])
    assert bool(done.returncode) is fails, f"{argv}: {done.stdout.decode()} {done.stderr}"
    return done.stdout.decode() + done.stderr


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_it_is_extracted(written: Written, tmp_path: Path, image_format: str) -> None:
    _, repository, content = written
    out = tmp_path / "out"
    await contents.extract(repository, content, name="vda", to=out, image_format=image_format)
    (tmp_path / "vda.raw").write_bytes(DISK)
    await run("qemu-img", "compare", "-f", "raw", "-F", image_format, tmp_path / "vda.raw", out)
    assert out.stat().st_blocks * 512 < 22 * MIB


async def test_it_is_exported(written: Written, tmp_path: Path) -> None:
    _, repository, content = written
    (tmp_path / "vda.raw").write_bytes(DISK)
    (tmp_path / "s").mkdir(mode=0o700)
    async with contents.exported(repository, {"vda": content}, tmp_path / "s") as uris:
        uri = uris["vda"]
        await run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, tmp_path / "vda.raw")
        await run("nbdcopy", "--request-size=65536", uri, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == DISK
        pieces = json.loads(await run("nbdinfo", "--map", "--json", uri))
        holes = sum(piece["length"] for piece in pieces if piece["type"] == HOLE)
        assert 8 * MIB < holes < 22 * MIB, "its chunks of zeroes are known"
        async with contents.exported(repository, {"again": content}, tmp_path):
            await run("nbdinfo", uri)


async def test_it_is_verified_and_damage_is_found(written: Written, tmp_path: Path) -> None:
    restic, repository, content = written
    found = await contents.verify(repository, {"vda": content}, share=1.0)
    assert found.problems == ()
    # In its first chunk, which is random: one of zeroes is restored without being read.
    (place,) = repository._index.find(BlobKind.DATA, content.chunks[0])
    name = place.pack.hex()
    path = restic.folder / "data" / name[:2] / name
    path.chmod(0o600)
    with path.open("r+b") as pack:
        pack.seek(place.entry.offset + 1000)
        pack.write(b"damage")
    found = await contents.verify(repository, {"vda": content}, share=1.0)
    assert [one for one in found.problems if name in one] == list(found.problems) != []
    for image_format in ("raw", "qcow2"):
        with pytest.raises(TargetError, match=name) as wrong:
            await contents.extract(repository, content, name="vda", to=tmp_path / "out", image_format=image_format)
        assert wrong.value.code == "content-wrong"


def vmfleece(config: Path, *arguments: str | Path, code: int = 0) -> str:
    argv = [sys.executable, "-m", "orchestrator", *map(str, arguments), "--config", str(config)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout + (done.stderr if code else "")


def test_what_restic_backed_up_is_restored_from_the_command_line(restic: Restic, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "images").mkdir(parents=True)
    out.mkdir()
    disks = {"web01.raw": DISK, "db01.raw": DISK[: 5 * MIB]}
    for name, content in disks.items():
        (source / "images" / name).write_bytes(content)
    restic.run("init", "--repository-version", "2")
    restic.run("backup", "images", cwd=source)
    (made,) = restic.json("snapshots")
    (tmp_path / "password").write_text(restic.password)
    (tmp_path / "password").chmod(0o600)
    config = tmp_path / "vmfleece.toml"
    config.write_text(
        f'[daemon]\nstate_dir = "{tmp_path}/state"\n[target.offsite]\ndriver = "restic"\n'
        f'path = "{restic.folder}"\npassword_file = "{tmp_path}/password"\n'
    )
    name = made["id"][:8]
    vmfleece(config, "restore", name, "--disk", "images/web01.raw", "--to", out / "one.raw")
    assert (out / "one.raw").read_bytes() == DISK
    vmfleece(config, "restore", name, "--all", "--to", out)
    assert {path.name for path in out.iterdir()} == {"one.raw", "images_web01.raw.raw", "images_db01.raw.raw"}
    for disk_name, content in disks.items():
        assert (out / f"images_{disk_name}.raw").read_bytes() == content
    assert "fine" in vmfleece(config, "verify", name)
    assert "images/db01.raw" in vmfleece(config, "snapshot", "show", name)
    assert "no snapshot '88888888'" in vmfleece(config, "verify", "88888888", code=1)


async def test_one_file_is_taken_out_of_a_file_system_in_it(restic: Restic, tmp_path: Path) -> None:
    """As an administrator does who wants nothing else: the export as a file, and e2fsprogs."""
    source, tree, view = (tmp_path / name for name in ("source", "tree", "view"))
    for folder in (source, tree, view, tmp_path / "s"):
        folder.mkdir(mode=0o700)
    (tree / "precious").write_bytes(DISK[: 5 * MIB])
    (tree / "other").write_bytes(DISK)
    await run("mkfs.ext4", "-q", "-d", tree, source / "vda.raw", "64M")
    restic.run("init", "--repository-version", "2")
    restic.run("backup", "vda.raw", cwd=source)
    repository = await reopened(restic)
    (made,) = (await repository.snapshots()).snapshots
    content = (await repository.files(made))["vda.raw"]
    async with contents.exported(repository, {"vda": content}, tmp_path / "s") as uris:
        server = await asyncio.create_subprocess_exec("nbdfuse", view / "disk", uris["vda"])
        try:
            async with asyncio.timeout(20):
                while not await asyncio.to_thread((view / "disk").exists):
                    await asyncio.sleep(0.01)
            await run("debugfs", "-R", f"dump /precious {tmp_path}/precious", view / "disk")
        finally:
            await run("umount", "--lazy", view)
            await server.wait()
    assert (tmp_path / "precious").read_bytes() == DISK[: 5 * MIB]
