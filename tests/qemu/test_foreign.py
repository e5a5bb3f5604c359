"""What others have in a QEMU, on a storage or a target, under names nearly like ours: nobody touches it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.guest.versions import QEMUS, qemu
from tests.guest.vm import MIB, DiskSpec, GuestVm, Workload
from tests.qemu.host import Host, assert_succeeded

pytestmark = pytest.mark.asyncio(loop_scope="module")

DISKS = [DiskSpec("vda", 12 * MIB), DiskSpec("vdb", 12 * MIB, format="raw")]
BITMAPS = (
    "vmfleece:other:web01/20250101T000000Z",  # another host's target
    "vmfleece-of-mine",
    "vmf-bitmap",
)
NODES = ("vmf-backup", "vmf-deadbeef-0-target", "vmfleece")
FILES = ("vmf-deadbeef-0.qcow2", "vmfleece.img")
FOLDERS = ("web01/holiday.partial", "web99/20250101T000000Z", "vmf-deadbeef")


async def seen(host: Host) -> dict[str, Any]:
    """All that could be touched."""
    vm = host.vm
    return {
        "nodes": sorted(one["node-name"] for one in await vm.execute("query-named-block-nodes")),
        "on": await vm.current_nodes(),
        "bitmaps": sorted(
            (one["inserted"]["node-name"], bitmap["name"], bitmap["recording"])
            for one in await vm.execute("query-block")
            for bitmap in one["inserted"].get("dirty-bitmaps", [])
            if "name" in bitmap  # the job's has none
        ),
        "jobs": [(one["id"], one["status"]) for one in await vm.execute("query-jobs")],
        "descriptors": await vm.execute("query-fdsets"),
        "files": sorted(
            str(path) for place in (host.storage, host.target) for path in place.rglob("*") if path.is_dir()
        )
        + [str(path) for path in host.storage.rglob("*")],
    }


@pytest.mark.parametrize("version", QEMUS)
async def test_cleanup_touches_nothing_of_others(tmp_path: Path, version: str) -> None:
    async with GuestVm(tmp_path / "vm", DISKS, Workload("random", rate=200), qemu=qemu(version)) as vm:
        await vm.wait_ready()
        host = Host(tmp_path, vm)
        assert_succeeded(await host.back_up())
        await theirs(host)
        before = await seen(host)
        for options in (("--dry-run",), ()):
            told = await host.run("cleanup", "--json", *options)
            assert told.code == 0, told
            repairs = json.loads(told.out)["repairs"]
            assert {one["act"] for one in repairs} == {"nothing"}
            assert {one["subject"] for one in repairs} == {"backup", "deadbeef", "theirs"}
            assert await seen(host) == before
        await vm.assert_healthy()
        await vm.wait_writes(50)
        await vm.execute("block-job-cancel", {"device": "vmf-theirs", "force": True})


async def theirs(host: Host) -> None:
    """Put everything in place."""
    vm = host.vm
    for name in NODES:
        await vm.execute("blockdev-add", {"driver": "null-co", "node-name": name, "size": 12 * MIB})
    for name in BITMAPS:
        await vm.execute("block-dirty-bitmap-add", {"node": "drive-vda", "name": name})
    # Their own filter, put in as QEMU 7.2 can do it while its guest stands still.
    await vm.pause()
    filter_ = {"driver": "copy-before-write", "node-name": "vmf-theirs", "file": "drive-vdb", "target": NODES[0]}
    await vm.execute("blockdev-add", filter_)
    drive = {"path": "/machine/peripheral/disk-vdb", "property": "drive"}
    await vm.execute("qom-set", {**drive, "value": "vmf-theirs"})
    await vm.resume()
    job = {"job-id": "vmf-theirs", "device": "drive-vda", "target": NODES[1], "sync": "full", "speed": 1}
    await vm.execute("blockdev-backup", job)
    for name in FILES:
        (host.storage / name).write_bytes(b"theirs")
    for name in FOLDERS:
        (host.target / name).mkdir(parents=True)
        (host.target / name / "disk.qcow2").write_bytes(b"theirs")
