"""File systems that can be made to fail: one that fills up, one on a disk that returns errors, hangs or is slow.

The disk is nbdkit's with its filters `error`, `pause`, `rate` and `delay`, made a file by nbdfuse and a block
device by the kernel. The last one cannot be told anything while it serves: each request takes a while at any time.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

MIB = 1 << 20
READY_SECONDS = 10.0
DELAY = "1ms"
SLOW, UNLIMITED = "16M", "0"
"""Bits per second: what is copied takes seconds then."""


@contextlib.contextmanager
def filled(place: Path) -> Iterator[None]:
    """Be somebody else who leaves no room on a file system, for the block."""
    path = place / "others"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        at, step = 0, 64 * MIB
        while step >= 4096:
            try:
                os.posix_fallocate(descriptor, at, step)
            except OSError:
                step //= 2
            else:
                at += step
        yield
    finally:
        os.close(descriptor)
        path.unlink()


@contextlib.contextmanager
def small(path: Path, size_mib: int) -> Iterator[Path]:
    """A file system of its own, in memory."""
    path.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=700", "vmfleece-test", str(path))
    try:
        yield path
    finally:
        _unmount(path)


class FaultyDisk:
    """An ext4 at `path`, on a disk that fails as told. `folder` is for what it is made of."""

    def __init__(self, folder: Path, path: Path, size_mib: int) -> None:
        self.path = path
        self._folder = folder
        self._size_mib = size_mib
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._folder.mkdir()
        self.path.mkdir()
        disk, file, server = self._folder / "disk", self._folder / "file", self._folder / "nbd"
        with disk.open("wb") as opened:
            opened.truncate(self._size_mib * MIB)
        file.touch()
        _run(_program("mkfs.ext4"), "-q", "-m", "0", str(disk))
        filters = [f"--filter={name}" for name in ("pause", "error", "rate", "delay")]
        told = [f"pause-control={self._pause}", "error=EIO", "error-rate=100%", f"error-file={self._errors}"]
        told += [f"rate-file={self._rate}", f"rdelay={DELAY}", f"wdelay={DELAY}"]
        self._start(
            "nbdkit", "--foreground", "--unix", str(server), *filters, "file", str(disk), *told, ready=server
        )
        pid = self._folder / "pid"
        self._start("nbdfuse", "--pidfile", str(pid), str(file), f"nbd+unix:///?socket={server}", ready=pid)
        self._mount()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._tell(b"r")
        self._errors.unlink(missing_ok=True)
        _unmount(self.path)
        _run("fusermount3", "-u", "-z", str(self._folder / "file"), check=False)
        for process in reversed(self._processes):
            process.terminate()
            process.wait(READY_SECONDS)

    @contextlib.contextmanager
    def returning_errors(self) -> Iterator[None]:
        """Every request fails with EIO for the block."""
        self._errors.touch()
        try:
            yield
        finally:
            self._errors.unlink()

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """No request is answered for the block. Nothing in it may wait for this file system: such a wait cannot
        be ended."""
        self._tell(b"p")
        try:
            yield
        finally:
            self._tell(b"r")

    @contextlib.contextmanager
    def slow(self) -> Iterator[None]:
        """All requests together get few bytes a second for the block."""
        self._rate.write_text(SLOW)
        try:
            yield
        finally:
            self._rate.write_text(UNLIMITED)

    def repair(self) -> None:
        """Check the file system and mount it anew, as an operator does. Nobody may use it."""
        _unmount(self.path)
        _run(_program("e2fsck"), "-f", "-y", str(self._folder / "file"), check=False)
        self._mount()

    @property
    def _pause(self) -> Path:
        return self._folder / "pause"

    @property
    def _errors(self) -> Path:
        return self._folder / "errors"

    @property
    def _rate(self) -> Path:
        return self._folder / "rate"

    def _mount(self) -> None:
        _run("mount", "-o", "loop", "-t", "ext4", str(self._folder / "file"), str(self.path))

    def _start(self, *command: str, ready: Path) -> None:
        process = subprocess.Popen(("setpriv", "--pdeathsig", "KILL", "--", *command))
        self._processes.append(process)
        deadline = time.monotonic() + READY_SECONDS
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{command[0]} does not start: run tests/guest/install.sh once")
            time.sleep(0.02)

    def _tell(self, what: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(READY_SECONDS)
            control.connect(str(self._pause))
            control.sendall(what)
            control.recv(1)


def _program(name: str) -> str:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or name


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def _unmount(path: Path) -> None:
    """What still has a file open there is given a moment."""
    deadline = time.monotonic() + READY_SECONDS
    while subprocess.run(["umount", str(path)], capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            _run("umount", "--lazy", str(path))
            raise AssertionError(f"something still uses {path}")
        time.sleep(0.1)
