"""Whether raw images of several disks show one moment of the guest's sequence writer.

The guest writes record 1 to the first disk, then to the second one and so on, then record 2, and
waits for each write (writer.c). So at any moment there is a number m for each disk such that

- every slot of the disk holds the newest of its records up to m, or zeros if it has none;
- only the slot of record m + 1 may be torn, and only if all earlier disks hold that record: one
  write is under way at a time;
- m does not grow from disk to disk, and the first disk is ahead of the last by 1 at most.

Anything else is no moment that ever was: lost or stale clusters, disks from different moments,
disks mixed up. The record format is mirrored here, and only here, from writer.c.
"""

import mmap
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import shake_128
from itertools import pairwise
from pathlib import Path

RECORD = 4096
STRIDE = 7919
MAGIC = b"VMFSEQ01"
HEADER = struct.Struct("<8sQQIIQQQII")
CRC_AT = 56
ZEROS = bytes(RECORD)
PROBLEMS_MAX = 20
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """A record's header."""

    run: int
    seq: int
    disk: int
    disks: int
    slot: int
    slots: int
    ns: int = 0


@dataclass(frozen=True, slots=True)
class SequenceVerdict:
    """last: the newest number on each disk. problems: the first ones of each disk."""

    ok: bool
    last: list[int]
    problems: list[str]


@dataclass(frozen=True, slots=True)
class _Disk:
    last: int
    torn: bool
    problems: list[str]


def slots_of(size_bytes: int, region_bytes: int = 0) -> int:
    """Return how many slots the writer uses on a disk."""
    usable = min(size_bytes, region_bytes) if region_bytes else size_bytes
    slots = usable // RECORD
    return slots - 1 if slots and slots % STRIDE == 0 else slots


def slot_of(seq: int, slots: int) -> int:
    """Return where a record goes."""
    return (seq - 1) * STRIDE % slots


def newest(slot: int, slots: int, last: int) -> int:
    """Return the newest number up to `last` that goes to a slot, 0 if there is none."""
    first = slot * pow(STRIDE, -1, slots) % slots + 1 if slots > 1 else 1
    return first + (last - first) // slots * slots if first <= last else 0


def pack(record: Record) -> bytes:
    """Return a record as written; its body depends on run, number and disk."""
    seed = f"{record.run} {record.seq} {record.disk}".encode()
    body = shake_128(seed).digest(RECORD - HEADER.size)
    head = (record.run, record.seq, record.disk, record.disks, record.slot, record.slots, record.ns)
    crc = zlib.crc32(HEADER.pack(MAGIC, *head, 0, 0) + body)
    return HEADER.pack(MAGIC, *head, crc, 0) + body


def unpack(block: bytes) -> Record | None:
    """Return the record in a block of 4 KiB, None if it holds no valid one."""
    if not block.startswith(MAGIC):
        return None
    _, *head, crc, _ = HEADER.unpack_from(block)
    computed = zlib.crc32(block[:CRC_AT])
    computed = zlib.crc32(block[CRC_AT + 4 :], zlib.crc32(bytes(4), computed))
    return Record(*head) if computed == crc else None


def check(images: Sequence[Path], *, run: int, region_bytes: int = 0, at_least: int = 1) -> SequenceVerdict:
    """Check raw images, in writing order, against the rule.

    run: the VM's (`GuestVm.run`). region_bytes: the workload's. at_least: a number known to have
    been on all disks at that moment, so that an empty or old state is no success.
    """
    disks = []
    for number, image in enumerate(images):
        with image.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            disks.append(_check_disk(data, number, len(images), run, region_bytes))
    last = [disk.last for disk in disks]
    problems = [problem for disk in disks for problem in disk.problems]
    if any(later > earlier for earlier, later in pairwise(last)):
        problems.append(f"a later disk is ahead of an earlier one: {last}")
    if last[0] - last[-1] > 1:
        problems.append(f"the disks are from different moments: {last}")
    if last[-1] < at_least:
        problems.append(f"record {at_least} is not on all disks: {last}")
    for number, disk in enumerate(disks):
        if disk.torn and (last[:number] != [disk.last + 1] * number or last[-1] > disk.last):
            problems.append(f"disk {number} is torn where no write was under way: {last}")
    return SequenceVerdict(ok=not problems, last=last, problems=problems)


def _check_disk(data: mmap.mmap, number: int, disks: int, run: int, region_bytes: int) -> _Disk:
    slots = slots_of(len(data), region_bytes)
    found: list[Record | None] = []
    problems: list[str] = []
    for slot in range(slots):
        record = unpack(data[slot * RECORD : (slot + 1) * RECORD])
        if record is not None:
            expected = Record(run, record.seq, number, disks, slot, slots, record.ns)
            if record != expected or slot_of(record.seq, slots) != slot:
                problems.append(f"disk {number}, slot {slot}: foreign {record}")
                record = None
        found.append(record)
    last = max((record.seq for record in found if record), default=0)
    torn = False
    for slot, record in enumerate(found):
        seq, wanted = (record.seq if record else 0), newest(slot, slots, last)
        broken = record is None and data[slot * RECORD : (slot + 1) * RECORD] != ZEROS
        if broken and slot == slot_of(last + 1, slots):
            torn = True
        elif seq != wanted or broken:
            what = "nothing valid" if broken else f"record {seq}"
            problems.append(f"disk {number}, slot {slot}: {what} instead of record {wanted}")
    problems += [f"disk {number}: data at {at} behind the slots" for at in _used(data, slots)]
    return _Disk(last=last, torn=torn, problems=problems[:PROBLEMS_MAX])


def _used(data: mmap.mmap, slots: int) -> Iterator[int]:
    for at in range(slots * RECORD, len(data), MIB):
        if data[at : at + MIB].strip(b"\0"):
            yield at
