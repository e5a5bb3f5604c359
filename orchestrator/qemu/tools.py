"""QEMU's and libnbd's command-line tools: creating, converting and hashing images.

QEMU's format drivers are the reference for what an image holds; nothing here interprets one itself.
Errors are ToolError; cancellation ends the tool.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from orchestrator import aio
from orchestrator.errors import ToolError

PIPE_READ_BYTES = 1 << 20


async def create_qcow2(descriptor: int, size_bytes: int, *, options: str = "", backing: str | None = None) -> None:
    """Make an open empty file a qcow2 image of a virtual size.

    `backing` is a qcow2 image, by a path from where the file will be; whether it is there is not looked at.
    """
    argv = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if backing is not None:
        argv += ["-u", "-b", backing, "-F", "qcow2"]
    if options:
        argv += ["-o", options]
    await _run([*argv, f"/dev/fd/{descriptor}", str(size_bytes)], pass_fds=(descriptor,))


async def convert(source: Path, source_format: str, to: Path, to_format: str, *, into_existing: bool) -> None:
    """Copy an image's content into another one. `into_existing`: a block device, which is not created."""
    argv = ["qemu-img", "convert", "-f", source_format, "-O", to_format]
    if into_existing:
        argv.append("-n")
    await _run([*argv, str(source), str(to)])


async def allocated(descriptor: int) -> list[tuple[int, int]]:
    """The parts of an open qcow2 image's content that are in it, by offset and length in bytes.

    Somebody else may be writing it: it may then be unreadable for a moment.
    """
    argv = ["qemu-img", "map", "-U", "-f", "qcow2", "--output=json", f"/dev/fd/{descriptor}"]
    finished = await _run(argv, pass_fds=(descriptor,))
    return [(piece["start"], piece["length"]) for piece in json.loads(finished.stdout) if piece["data"]]


async def flatten(source: Path, descriptor: int, *, compress: bool) -> None:
    """Copy a qcow2 image's content, with all that it builds on, into an open empty file: one that stands alone."""
    argv = ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2"]
    if compress:
        argv += ["-c", "-o", "compression_type=zstd"]
    await _run([*argv, str(source), f"/dev/fd/{descriptor}"], pass_fds=(descriptor,))


async def virtual_size(path: Path, image_format: str) -> int:
    """The size in bytes that a guest sees. For a block device: its own size."""
    finished = await _run(["qemu-img", "info", "-U", "-f", image_format, "--output=json", str(path)])
    return int(json.loads(finished.stdout)["virtual-size"])


async def sha256(path: Path, image_format: str, *, size_bytes: int | None = None) -> str:
    """The SHA-256 of an image's whole content, in hex; of its first `size_bytes` if given.

    nbdcopy starts qemu-nbd on a private socket, reads through it and writes the content to a pipe.
    """
    server = ["qemu-nbd", "--read-only", *_image_options(path, image_format, size_bytes)]
    read_end, write_end = os.pipe()
    try:
        process = await aio.acquire(
            asyncio.create_subprocess_exec(
                *("nbdcopy", "--", "[", *server, "]", "-"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # a process group of their own, which can be killed as one
            ),
            _end,
        )
    except BaseException as error:
        os.close(read_end)
        if isinstance(error, FileNotFoundError):
            raise _missing("nbdcopy") from error
        raise
    finally:
        os.close(write_end)
    try:
        digest = await aio.in_thread(_hash_pipe, read_end, end=lambda: _kill_group(process.pid))
    finally:
        _, stderr = await aio.finish(process.communicate())
    if process.returncode != 0:
        raise ToolError(
            f"cannot read back {path}: {stderr.decode(errors='replace').strip()}",
            hint="is the file complete, and may this user read it?",
        )
    return digest


def _image_options(path: Path, image_format: str, size_bytes: int | None) -> list[str]:
    if size_bytes is None:
        return [f"--format={image_format}", str(path)]
    options = {"driver": "raw", "size": size_bytes, "file": {"driver": "host_device", "filename": str(path)}}
    return ["json:" + json.dumps(options)]


def write_back(paths: Iterable[str]) -> None:
    """Have the host write what it caches of images, as far as we can open them. Blocks.

    Twice: what a guest writes during the first time is little.
    """
    for path in [*paths] * 2:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)


def _hash_pipe(descriptor: int) -> str:
    digest = hashlib.sha256()
    with open(descriptor, "rb", buffering=0) as pipe:
        while chunk := pipe.read(PIPE_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _kill_group(leader: int) -> None:
    # Killed alone before it has connected, nbdcopy would leave qemu-nbd waiting for ever, with our pipes open.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


async def _end(process: asyncio.subprocess.Process) -> None:
    _kill_group(process.pid)
    await process.communicate()


async def _run(argv: list[str], *, pass_fds: tuple[int, ...] = ()) -> aio.Finished:
    try:
        finished = await aio.run_process(argv, pass_fds=pass_fds)
    except FileNotFoundError as error:
        raise _missing(argv[0]) from error
    if finished.returncode != 0:
        raise ToolError(f"{argv[0]} {argv[1]} failed: {finished.stderr}")
    return finished


def _missing(program: str) -> ToolError:
    return ToolError(
        f"{program} is not installed",
        hint="install QEMU's tools and libnbd's: apt-get install qemu-utils libnbd-bin",
        code="tool-missing",
    )
