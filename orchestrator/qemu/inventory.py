"""The disks of a VM, read from what QEMU says of itself. Pure.

Source: query-block, whose `qdev` is the device's id or QOM path. The property `drive` is on that object for
scsi-hd, ide-hd and pflash, on its parent for virtio-blk (whose qdev is the `virtio-backend` inside).
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.model import Disk

PERIPHERAL = "/machine/peripheral/"
ANONYMOUS = "/machine/peripheral-anon/"
VIRTIO_BACKEND = "/virtio-backend"
OLD_QCOW2 = "0.10"
"""The version of qcow2 that cannot hold bitmaps."""
FILTERS_OF_JOBS = ("copy-before-write", "mirror_top", "commit_top", "backup-top")


def disks(query_block: Iterable[Mapping[str, Any]]) -> list[Disk]:
    """Every block device with a guest device, in QEMU's order, also CD-ROMs, empty and read-only ones."""
    found = []
    for device in query_block:
        qdev = device.get("qdev")
        if not qdev:  # a drive that no guest device uses
            continue
        found.append(_disk(device, qdev))
    return found


def _disk(device: Mapping[str, Any], qdev: str) -> Disk:
    path = device_path(qdev)
    inserted = device.get("inserted")
    image = inserted["image"] if inserted else {}
    return Disk(
        id=_disk_id(path, device),
        node=inserted["node-name"] if inserted else "",
        device_path=path,
        size_bytes=image.get("virtual-size", 0),
        node_driver=inserted["drv"] if inserted else "",
        image=_image_file(image.get("filename")),
        read_only=bool(inserted and inserted["ro"]),
        removable=device["removable"],
        empty=inserted is None,
        keeps_bitmaps=bool(inserted and inserted["drv"] == "qcow2" and _compat(image) != OLD_QCOW2),
    )


def _compat(image: Mapping[str, Any]) -> str | None:
    """Which qcow2 an image is (ImageInfoSpecificQCow2 in qapi/block-core.json)."""
    compat = image.get("format-specific", {}).get("data", {}).get("compat")
    return str(compat) if compat is not None else None


def bitmaps(query_block: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The dirty bitmaps of each disk's node, by the disk's id, as QEMU describes them."""
    return {
        _disk_id(device_path(device["qdev"]), device): device["inserted"].get("dirty-bitmaps", [])
        for device in query_block
        if device.get("qdev") and device.get("inserted")
    }


def device_path(qdev: str) -> str:
    """Where the property `drive` of a guest device is, of which QEMU says `qdev`."""
    path = qdev if qdev.startswith("/") else PERIPHERAL + qdev
    return path.removesuffix(VIRTIO_BACKEND)


def _disk_id(path: str, device: Mapping[str, Any]) -> str:
    """The device's id; without one the drive's (`virtio0`), else where the device stands in QEMU's tree."""
    if path.startswith(PERIPHERAL):
        return path.removeprefix(PERIPHERAL)
    if device["device"]:
        return str(device["device"])
    return path.rsplit("/", 1)[-1].replace("[", "").replace("]", "")


def _image_file(filename: str | None) -> str | None:
    """The path of a local image; None for what is not a local file.

    QEMU writes a node with options that a plain path cannot say as `json:{…}`.
    """
    if not filename:
        return None
    if filename.startswith("json:"):
        try:
            options: Any = json.loads(filename.removeprefix("json:"))
        except ValueError:
            return None  # QEMU cuts names off at 4095 bytes (block.c, bdrv_refresh_filename)
        while isinstance(options, dict):
            if isinstance(options.get("filename"), str):
                return _image_file(options["filename"])
            options = options.get("file")
        return None
    return filename if filename.startswith("/") else None
