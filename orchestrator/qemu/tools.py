"""QEMU's and libnbd's command-line tools: creating, converting and hashing images.

QEMU's format drivers are the reference for what an image holds; nothing here interprets one itself.
Errors are ToolError; cancellation ends the tool.
"""

import asyncio
import contextlib
import functools
import hashlib
import io
import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from orchestrator import aio
from orchestrator.errors import ToolError
from orchestrator.qemu import reading

CONVERT_REQUESTS = 16
"""Side by side; the most that qemu-img takes."""
_MAY_READ = "see that the file is complete, and that this user may read it"


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


async def convert(
    source: Path | str, source_format: str, to: Path, to_format: str, *, into_existing: bool
) -> None:
    """Copy an image's content, or what an NBD server has (by its URI), into another image, out of order.

    `into_existing`: a block device, which is not created, and gets zeroes written where a file gets holes.
    """
    argv = ["qemu-img", "convert", "-m", str(CONVERT_REQUESTS), "-W", "-f", source_format, "-O", to_format]
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


async def difference(
    path: Path, image_format: str, other: Path | str, other_format: str, *, size_bytes: int
) -> str:
    """What an image's content, or what an NBD server has (by its URI), is not as the other's, for people; or "".

    Both have `size_bytes`; only of a block device the rest is not looked at. Takes as long as reading what is not
    zero of both.
    """
    given = str(path)
    if await asyncio.to_thread(path.is_block_device):
        device = {"driver": "host_device", "filename": given}
        given = "json:" + json.dumps({"driver": "raw", "size": size_bytes, "file": device})
    elif (found_bytes := await virtual_size(path, image_format)) != size_bytes:
        return f"it has {found_bytes} bytes instead of {size_bytes}"
    argv = ["qemu-img", "compare", "-U", "-f", image_format, "-F", other_format, given, str(other)]
    finished = await _run(argv, fine=(0, 1))
    return finished.stdout.decode(errors="replace").strip() if finished.returncode else ""


async def check(path: Path) -> None:
    """See that a qcow2 image's own tables are consistent. Clusters that nobody uses are no error."""
    await _run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], fine=(0, 3))


async def virtual_size(path: Path, image_format: str) -> int:
    """The size in bytes that a guest sees. For a block device: its own size."""
    finished = await _run(["qemu-img", "info", "-U", "-f", image_format, "--output=json", str(path)])
    return int(json.loads(finished.stdout)["virtual-size"])


async def sha256(path: Path, image_format: str) -> str:
    """The SHA-256 of an image's whole content, in hex: zeroes count, so it takes as long as the disk is large."""
    digest = hashlib.sha256()
    await read_back(path, image_format, digest.update)
    return digest.hexdigest()


async def read_back(path: Path, image_format: str, update: reading.Update) -> None:
    """Have `update` take an image's content.

    nbdcopy starts qemu-nbd on a private socket, reads through it and writes the content to a pipe.
    """
    server = ["qemu-nbd", "--read-only", f"--format={image_format}", str(path)]
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
            end,
        )
    except BaseException as error:
        os.close(read_end)
        if isinstance(error, FileNotFoundError):
            raise missing("nbdcopy") from error
        raise
    finally:
        os.close(write_end)
    try:
        feeding = functools.partial(_feed, update=update)
        await aio.in_thread(feeding, read_end, end=lambda: _kill_group(process.pid))
    finally:
        _, stderr = await aio.finish(process.communicate())
    if process.returncode != 0:
        said = stderr.decode(errors="replace").strip()
        raise ToolError(f"cannot read back {path}: {said}", hint=_MAY_READ)


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


def _feed(descriptor: int, update: reading.Update) -> None:
    with io.FileIO(descriptor) as pipe:
        reading.feed(pipe, update)


def _kill_group(leader: int) -> None:
    # Killed alone before it has connected, nbdcopy would leave qemu-nbd waiting for ever, with our pipes open.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


async def end(process: asyncio.subprocess.Process) -> None:
    """End a tool that leads a process group, with all that it started, and wait for it."""
    _kill_group(process.pid)
    await process.communicate()


async def _run(argv: list[str], *, pass_fds: tuple[int, ...] = (), fine: tuple[int, ...] = (0,)) -> aio.Finished:
    try:
        finished = await aio.run_process(argv, pass_fds=pass_fds)
    except FileNotFoundError as error:
        raise missing(argv[0]) from error
    if finished.returncode not in fine:
        raise ToolError(
            f"{argv[0]} {argv[1]} failed: {finished.stderr}",
            hint="see that the images it names are there and may be read, and that there is room",
        )
    return finished


def missing(program: str) -> ToolError:
    """The error that a tool is not there."""
    return ToolError(
        f"{program} is not installed",
        hint="install QEMU's tools and libnbd's: apt-get install qemu-utils libnbd-bin",
        code="tool-missing",
    )
