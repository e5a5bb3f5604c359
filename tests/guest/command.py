"""The QEMU command line of a guest: functions of its specification."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.guest.build import GuestFiles
from tests.guest.spec import DiskSpec

# QEMU 10.0 loses the interrupt of a write that completes in an iothread while the VM is paused,
# in about 1 of 100 pauses under load; with event_idx nothing that the guest does brings it back.
# Without it, and with a read of each disk every so often, the guest goes on.
IOTHREAD_OPTIONS = "event_idx=off"
NUDGE_MS = 50


def nudge_ms(disks: Sequence[DiskSpec]) -> int:
    """Return how often the guest must read its disks to survive pauses; 0: it need not."""
    return NUDGE_MS if any(disk.iothread for disk in disks) else 0


def boot_arguments(files: GuestFiles, kernel_arguments: str, serial: Path) -> list[str]:
    """Return the arguments that boot the guest with its console in a file, paused at first."""
    # The kernel keeps quiet but for a panic, or its lines would run into the guest's. On a busy host it would take
    # an emulated timer that comes late for a broken one, and panic: no_timer_check.
    kernel = f"console=ttyS0 loglevel=1 panic=-1 no_timer_check {kernel_arguments}"
    arguments = ["-S", "-no-reboot", "-nodefaults", "-display", "none", "-serial", f"file:{serial}"]
    arguments += ["-kernel", str(files.kernel), "-initrd", str(files.initramfs)]
    return [*arguments, "-append", kernel]


def monitor_arguments(name: str, socket: Path) -> list[str]:
    """Return the arguments for a QMP server."""
    server = f"socket,id=qmp-{name},path={socket},server=on,wait=off"
    return ["-chardev", server, "-mon", f"chardev=qmp-{name},mode=control"]


def agent_arguments(agent: Path, shell: Path) -> list[str]:
    """Return the arguments for the guest agent's port, and for the serial line that a shell reads."""
    return [
        *("-device", "virtio-serial-pci,id=vser0"),
        *("-chardev", f"socket,id=qga0,path={agent},server=on,wait=off"),
        *("-device", "virtserialport,bus=vser0.0,chardev=qga0,name=org.qemu.guest_agent.0"),
        *("-serial", f"unix:{shell},server=on,wait=off"),
    ]


def machine_type(disks: Sequence[DiskSpec]) -> str:
    """Return q35, or pc where the guest must see IDE disks: its kernel has no AHCI driver."""
    return "pc" if any(disk.bus == "ide" for disk in disks) else "q35"


def disk_arguments(disks: Sequence[DiskSpec], images: dict[str, Path]) -> list[str]:
    """Return the QEMU arguments for all disks and what they hang on."""
    arguments = _controllers(disks)
    for disk in disks:
        if disk.style == "blockdev":
            arguments += ["-blockdev", json.dumps(_blockdev(disk, images[disk.id]))]
        else:
            arguments += ["-drive", _drive(disk, images[disk.id])]
        if disk.style == "drive-if":
            arguments += ["-global", f"virtio-blk-device.serial={disk.id}"]
        else:
            arguments += ["-device", _device(disk)]
    return arguments


def _controllers(disks: Sequence[DiskSpec]) -> list[str]:
    arguments: list[str] = []
    for disk in disks:
        if disk.iothread and disk.bus == "virtio-blk":
            arguments += ["-object", f"iothread,id=iothread-{disk.id}"]
        if disk.bytes_per_second:
            arguments += ["-object", f"throttle-group,id={_limit(disk)},x-bps-total={disk.bytes_per_second}"]
    scsi = {disk.iothread for disk in disks if disk.bus == "virtio-scsi"}
    if False in scsi:
        arguments += ["-device", "virtio-scsi-pci,id=scsi0"]
    if True in scsi:
        controller = f"virtio-scsi-pci,id=scsi-io,{IOTHREAD_OPTIONS}"
        arguments += ["-object", "iothread,id=iothread-scsi"]
        arguments += ["-device", f"{controller},iothread=iothread-scsi"]
    return arguments


def _blockdev(disk: DiskSpec, image: Path) -> dict[str, Any]:
    file: dict[str, Any] = {
        "driver": "file",
        "node-name": f"file-{disk.id}",
        "filename": str(image),
        "read-only": disk.readonly,
    }
    if disk.write_error_at_bytes is not None:
        rule = {
            "event": "none",
            "iotype": "write",
            "errno": 5,
            "sector": disk.write_error_at_bytes // 512,
        }
        fault = {"driver": "blkdebug", "node-name": f"fault-{disk.id}", "inject-error": [rule]}
        file = {**fault, "image": file}
    if disk.bytes_per_second:
        file = {
            "driver": "throttle",
            "node-name": f"slow-{disk.id}",
            "throttle-group": _limit(disk),
            "file": file,
        }
    return {
        "driver": disk.format,
        "node-name": f"drive-{disk.id}",
        "read-only": disk.readonly,
        "file": file,
    }


def _limit(disk: DiskSpec) -> str:
    return f"limit-{disk.id}"


def _drive(disk: DiskSpec, image: Path) -> str:
    interface = "virtio" if disk.style == "drive-if" else "none"
    options = [f"if={interface}", f"file={str(image).replace(',', ',,')}", f"format={disk.format}"]
    if disk.with_id or disk.style == "drive":
        options.append(f"id=drive-{disk.id}")
    if disk.readonly:
        options.append("readonly=on")
    return ",".join(options)


def _device(disk: DiskSpec) -> str:
    kind = {
        "virtio-blk": "virtio-blk-pci",
        "virtio-scsi": f"scsi-hd,bus={'scsi-io' if disk.iothread else 'scsi0'}.0",
        "nvme": "nvme",
        "ide": "ide-hd",
    }[disk.bus]
    options = [kind, f"drive=drive-{disk.id}", f"serial={disk.id}"]
    if disk.with_id:
        options.append(f"id=disk-{disk.id}")
    if disk.iothread and disk.bus == "virtio-blk":
        options += [f"iothread=iothread-{disk.id}", IOTHREAD_OPTIONS]
    return ",".join(options)
