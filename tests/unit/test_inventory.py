"""Disks in the shapes in which real QEMUs describe them (query-block of 7.2 and 10.0)."""

import json
from typing import Any

import pytest

from orchestrator.model import Disk
from orchestrator.qemu.inventory import disks

SIZE = 10 << 30


def device(
    qdev: str | None,
    node: str | None = "drive-vda",
    *,
    drive: str = "",
    filename: str = "/images/vda.qcow2",
    driver: str = "qcow2",
    removable: bool = False,
    read_only: bool = False,
) -> dict[str, Any]:
    """One entry of query-block. `qdev` None: no guest device; `node` None: no medium."""
    found: dict[str, Any] = {"io-status": "ok", "device": drive, "locked": False, "type": "unknown"}
    found["removable"] = removable
    if qdev is not None:
        found["qdev"] = qdev
    if node is not None:
        found["inserted"] = {
            "node-name": node,
            "drv": driver,
            "ro": read_only,
            "file": filename,
            "image": {"virtual-size": SIZE, "filename": filename, "format": driver, "actual-size": 200704},
        }
    return found


def one(entry: dict[str, Any]) -> Disk:
    (found,) = disks([entry])
    return found


@pytest.mark.parametrize(
    ("entry", "name", "path"),
    [
        pytest.param(
            device("/machine/peripheral/vda/virtio-backend"), "vda", "/machine/peripheral/vda", id="virtio-blk"
        ),
        pytest.param(
            device("/machine/peripheral/virtio-disk0/virtio-backend", "libvirt-2-format"),
            "virtio-disk0",
            "/machine/peripheral/virtio-disk0",
            id="libvirt",
        ),
        pytest.param(device("scsi0"), "scsi0", "/machine/peripheral/scsi0", id="scsi-hd"),
        pytest.param(device("ide0", drive="ide0-hd0"), "ide0", "/machine/peripheral/ide0", id="ide"),
        pytest.param(device("nvme0"), "nvme0", "/machine/peripheral/nvme0", id="nvme, bare id"),
        pytest.param(
            device("/machine/peripheral-anon/device[3]/virtio-backend", drive="virtio0"),
            "virtio0",
            "/machine/peripheral-anon/device[3]",
            id="no id, but a drive's",
        ),
        pytest.param(
            device("/machine/peripheral-anon/device[3]/virtio-backend", "#block142"),
            "device3",
            "/machine/peripheral-anon/device[3]",
            id="no id at all",
        ),
        pytest.param(
            device("/machine/system.flash0", drive="pflash0", driver="raw"),
            "pflash0",
            "/machine/system.flash0",
            id="EFI variables",
        ),
        pytest.param(
            device("/machine/system.flash1", driver="raw"), "system.flash1", "/machine/system.flash1", id="pflash"
        ),
        pytest.param(
            device("/machine/unattached/device[22]", drive="ide0-hd0"),
            "ide0-hd0",
            "/machine/unattached/device[22]",
            id="-hda",
        ),
    ],
)
def test_devices_have_a_name_and_a_place_for_their_drive(entry: dict[str, Any], name: str, path: str) -> None:
    found = one(entry)
    assert (found.id, found.device_path) == (name, path)
    assert found.node == entry["inserted"]["node-name"]
    assert found.size_bytes == SIZE
    assert found.node_driver == entry["inserted"]["drv"]
    assert found.image == "/images/vda.qcow2"
    assert (found.read_only, found.removable, found.empty) == (False, False, False)


def test_what_cannot_be_backed_up_is_listed_with_its_reason() -> None:
    empty = one(device("ide2-cd0", None, removable=True))
    assert empty == Disk("ide2-cd0", "", "/machine/peripheral/ide2-cd0", 0, "", None, removable=True, empty=True)
    medium = one(device("cd0", filename="/iso/debian.iso", driver="raw", removable=True, read_only=True))
    assert (medium.removable, medium.read_only, medium.empty) == (True, True, False)


def test_a_drive_that_no_device_uses_is_no_disk_and_the_order_is_qemus() -> None:
    reply = [device("vdb"), device(None, drive="none0"), device("", drive="floppy0"), device("vda")]
    assert [disk.id for disk in disks(reply)] == ["vdb", "vda"]


def nested(*drivers: str, **last: Any) -> str:
    """json: with one driver in another, the innermost with `last`."""
    options: dict[str, Any] = {"driver": drivers[-1]} | last
    for driver in reversed(drivers[:-1]):
        options = {"driver": driver, "file": options}
    return "json:" + json.dumps(options)


@pytest.mark.parametrize(
    ("filename", "image"),
    [
        ("/images/a b.qcow2", "/images/a b.qcow2"),
        ("images/vda.qcow2", None),
        ("nbd+unix:///export?socket=/run/nbd.sock", None),
        ("", None),
        (nested("qcow2", "file", filename="/images/vda.qcow2"), "/images/vda.qcow2"),
        (nested("throttle", "copy-on-read", "qcow2", "host_device", filename="/dev/vg/vda"), "/dev/vg/vda"),
        (nested("qcow2", "file", filename=nested("raw", "file", filename="/inner")), "/inner"),
        (nested("qcow2", "file", filename="vda.qcow2"), None),
        (nested("raw", "nbd", server={"type": "unix", "path": "/run/nbd.sock"}), None),
        ('json:{"driver": "qcow2", "file": "a-node-name"}', None),
        (
            'json:{"driver": "qcow2", "backing": {"driver": "qcow2", "file": {"dri...',
            None,
        ),  # QEMU cuts at PATH_MAX
    ],
)
def test_the_local_image_is_found_below_all_drivers(filename: str, image: str | None) -> None:
    assert one(device("vda", filename=filename)).image == image
