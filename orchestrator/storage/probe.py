"""What a folder's file system can do for fleecing images: tried out, because neither its type nor statfs tells.

A probe occupies at most 1 MiB, in a file without a name, so nothing is left whatever dies. What fails for a reason
of the moment, such as a full file system, is raised and never taken for something that the file system lacks.
"""

import contextlib
import ctypes
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.storage import nameless
from orchestrator.storage.base import Feature, Lack
from orchestrator.units import GIB, MIB

SPAN_BYTES = MIB
LONG_BYTES = 64 * GIB
NEXT_TO_NOTHING_BYTES = SPAN_BYTES // 2
FULL = (errno.ENOSPC, errno.EDQUOT)
MOMENTARY = (*FULL, errno.EIO, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
COUNTING_SECONDS = 10.0
"""ZFS counts what a file occupies when it closes a transaction group, every five seconds."""

LACKS = (
    Lack(
        Feature.NAMELESS_FILES,
        required=False,
        consequence="files without a name: images are created and unlinked at once instead",
    ),
    Lack(
        Feature.SPARSE_FILES,
        required=True,
        consequence="sparse files: an image could not be made as long as it may become without occupying that",
    ),
    Lack(
        Feature.HOLE_PUNCHING,
        required=False,
        consequence="hole punching: space of copied data is given back only when the disk is done",
    ),
    Lack(
        Feature.DESCRIPTOR_PASSING,
        required=True,
        consequence="descriptor passing: QEMU and qemu-img could not be given an image without a name",
    ),
)


def find_lacks(folder: Path) -> tuple[Lack, ...]:
    """Try everything out in a folder. Blocks, for 10 s if space is not given back. Raises OSError."""
    lacking = set()
    descriptor = nameless.open_nameless(folder)
    if descriptor is None:
        lacking.add(Feature.NAMELESS_FILES)
        descriptor = nameless.open_unlinked(folder, "vmf-probe")
    try:
        if not _works(_is_sparse, descriptor):
            lacking.add(Feature.SPARSE_FILES)
        elif not _works(_gives_back_holes, descriptor):  # its hole is far out, in a sparse file
            lacking.add(Feature.HOLE_PUNCHING)
        if not _works(_can_be_passed, descriptor):
            lacking.add(Feature.DESCRIPTOR_PASSING)
    finally:
        os.close(descriptor)
    return tuple(lack for lack in LACKS if lack.feature in lacking)


def keeps_punched_extents(folder: Path) -> bool:
    """Whether a hole frees space only once the whole extent around it is punched, though st_blocks says otherwise.

    So it is on btrfs, where the host's cache makes large extents of small writes: an image that was filled,
    punched and filled again occupied nearly twice its length. What is written past the cache is an extent for each
    write, and those go as they are punched. Nothing but the file system's type tells. Raises OSError.
    """
    status = ctypes.create_string_buffer(256)
    if _statfs(os.fsencode(folder), status) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(folder))
    return ctypes.c_long.from_buffer(status).value == _BTRFS


def _works(check: Callable[[int], bool], descriptor: int) -> bool:
    try:
        return check(descriptor)
    except OSError as error:
        if error.errno in MOMENTARY:
            raise
        return False


def _is_sparse(descriptor: int) -> bool:
    # exFAT and others allocate what they lengthen: first no more than may be occupied.
    for length in (SPAN_BYTES, LONG_BYTES):
        os.ftruncate(descriptor, length)
        if nameless.occupied_bytes(descriptor) > NEXT_TO_NOTHING_BYTES:
            return False
    return True


def _gives_back_holes(descriptor: int) -> bool:
    offset = LONG_BYTES // 2
    _write(descriptor, os.urandom(SPAN_BYTES), offset)  # random: nothing that a file system could compress
    os.fsync(descriptor)
    # Relative, because tmpfs may occupy a huge page; not only, because ZFS may not have counted the data yet.
    enough = max(nameless.occupied_bytes(descriptor) - SPAN_BYTES // 2, NEXT_TO_NOTHING_BYTES)
    _punch(descriptor, offset, SPAN_BYTES)
    deadline = time.monotonic() + COUNTING_SECONDS
    while nameless.occupied_bytes(descriptor) > enough:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _can_be_passed(descriptor: int) -> bool:
    """Whether qemu-img can open the file once more and write it, and QEMU read and write what it was passed."""
    made, overwritten = b"qemu-img", b"qemu"
    # O_CREAT: QEMU opens what it makes an image of with it (qemu_create in util/osdep.c).
    again = os.open(f"/dev/fd/{descriptor}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, nameless.PRIVATE)
    try:
        _write(again, made, 0)
    finally:
        os.close(again)
    with _passed(descriptor) as theirs:
        read = os.pread(theirs, len(made), 0)
        _write(theirs, overwritten, 0)
    return read == made and os.pread(descriptor, len(overwritten), 0) == overwritten


@contextlib.contextmanager
def _passed(descriptor: int) -> Iterator[int]:
    """The same file as a receiver of the descriptor has it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"\0"], [descriptor])
        _, [received], _, _ = socket.recv_fds(theirs, 1, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        yield received
    finally:
        os.close(received)


def _write(descriptor: int, content: bytes, offset: int) -> None:
    # A file system that fills up writes a part first, and says why only when asked to go on.
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)


_BTRFS = 0x9123683E  # BTRFS_SUPER_MAGIC in linux/magic.h
_statfs = ctypes.CDLL(None, use_errno=True).statfs  # its f_type comes first
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _punch(descriptor: int, offset: int, length: int) -> None:
    """What QEMU discards with (handle_aiocb_discard in block/file-posix.c); Python itself has no call for it."""
    if _fallocate(descriptor, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
