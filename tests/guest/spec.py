"""What a guest is made of: its disks and its workload.

The three kinds of names differ on purpose, so that a mix-up shows: disk `vda` has the
serial number `vda`, the node (or backend) `drive-vda` and the device `disk-vda`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

MIB = 1 << 20
Bus = Literal["virtio-blk", "virtio-scsi", "nvme", "ide"]
Style = Literal["blockdev", "drive", "drive-if"]


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """A disk of the guest.

    style: `blockdev`: nodes named `drive-ID` and `file-ID`. `drive`: `-drive if=none,id=drive-ID`
    and `-device`; node names are generated. `drive-if`: `-drive if=virtio` alone; one a VM, as its
    serial number can only be set globally.
    with_id: whether the device (for drive-if: the backend) has an id.
    image: an existing image to be used; without it one is created in the VM's folder.
    write_error_at_bytes: each write of that sector fails with EIO (blkdebug; blockdev style only;
    an offset in the image file, so the guest's own only for raw).
    bytes_per_second: what its image can do, for whoever reads and writes it, the guest and jobs (QEMU's throttle
    filter in front of the file; blockdev style only; 0: as much as the machine can).
    """

    id: str
    size_bytes: int = 64 * MIB
    format: Literal["qcow2", "raw"] = "qcow2"
    bus: Bus = "virtio-blk"
    iothread: bool = False
    style: Style = "blockdev"
    with_id: bool = True
    readonly: bool = False
    image: Path | None = None
    write_error_at_bytes: int | None = None
    bytes_per_second: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,20}", self.id):
            raise ValueError(f"{self.id!r} cannot be a serial number on every bus")
        if self.iothread and (self.bus in {"nvme", "ide"} or self.style == "drive-if"):
            raise ValueError(f"{self.id}: {self.bus}, {self.style} takes no iothread")
        if self.style == "drive-if" and self.bus != "virtio-blk":
            raise ValueError(f"{self.id}: drive-if is virtio-blk")
        if self.write_error_at_bytes is not None and self.style != "blockdev":
            raise ValueError(f"{self.id}: errors are injected in blockdev style only")
        if self.bytes_per_second and self.style != "blockdev":
            raise ValueError(f"{self.id}: it is slow in blockdev style only")


@dataclass(frozen=True, slots=True)
class Workload:
    """What the guest writes. Sizes in bytes, rate in writes a second over all disks; 0 = no limit.

    files: synced files on ext4, with which each disk that has no image yet is formatted; needs raw disks and
    GuestVm's `agent`. The rate is files a second on each disk.
    disks: ids in writing order; none: all writable ones in the VM's order.
    block_bytes, skew and sweep concern `random` only; skew: so many percent of the writes go to the last fifth.
    """

    kind: Literal["sequence", "random", "files", "idle"] = "sequence"
    disks: tuple[str, ...] = ()
    rate: int = 0
    block_bytes: int = 64 * 1024
    region_bytes: int = 0
    odirect: bool = True
    skew: int = 0
    sweep: bool = False

    def on(self, disks: Sequence[DiskSpec]) -> "Workload":
        """Return this workload with its disks named."""
        if self.disks or self.kind == "idle":
            return self
        return replace(self, disks=tuple(disk.id for disk in disks if not disk.readonly))

    def kernel_arguments(self, run: int, *, resume: bool) -> str:
        """Return what init.sh and writer.c read."""
        values = {
            "workload": self.kind,
            "disks": ",".join(self.disks),
            "rate": self.rate,
            "blocksize": self.block_bytes,
            "region": self.region_bytes,
            "odirect": int(self.odirect),
            "skew": self.skew,
            "sweep": int(self.sweep),
            "run": run,
            "again": int(resume),  # `resume` is taken: the kernel knows it as its own
        }
        return " ".join(f"{name}={value}" for name, value in values.items())
