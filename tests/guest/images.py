"""Disk images seen from outside: made, turned into raw, compared byte for byte."""

import asyncio
import mmap
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BLOCK = 64 * 1024


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether two raw images are the same; a block is 64 KiB, the shorter one ends with zeros."""

    first_difference: int | None
    differing_blocks: int
    sizes_bytes: tuple[int, int]

    @property
    def identical(self) -> bool:
        """Same size, same bytes."""
        return self.first_difference is None and self.sizes_bytes[0] == self.sizes_bytes[1]


async def run_tool(*command: str, deadline_seconds: float = 120.0) -> str:
    """Run qemu-img or the like. Raises RuntimeError with its output, TimeoutError after killing it.

    A cancelled call kills the tool too.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(deadline_seconds):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = output.decode(errors="replace")
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed ({process.returncode}): {text.strip()}")
    return text


async def create(path: Path, format_: str, size_bytes: int, *, qemu_img: str = "qemu-img") -> None:
    """Create an empty image."""
    await run_tool(qemu_img, "create", "-q", "-f", format_, str(path), str(size_bytes))


async def to_raw(
    path: Path, format_: str, dest: Path, *, in_use: bool = False, qemu_img: str = "qemu-img"
) -> None:
    """Convert an image to a sparse raw file.

    in_use: QEMU holds the image open. That is right only while nobody writes and QEMU has flushed
    its metadata, so after `stop`.
    """
    share = ("-U",) if in_use else ()
    await run_tool(qemu_img, "convert", *share, "-f", format_, "-O", "raw", str(path), str(dest))


def fill(path: Path, size_bytes: int, *, seed: int = 1, used_percent: int = 100) -> None:
    """Write a raw image of half-compressible content; the rest of it are holes in between."""
    rng = random.Random(seed)  # noqa: S311  (test data)
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for offset in range(0, size_bytes, BLOCK):
            length = min(BLOCK, size_bytes - offset)
            if rng.randrange(100) < used_percent:
                half = rng.randbytes((length + 1) // 2)
                file.seek(offset)
                file.write((half + b"vmf " * (length // 8 + 1))[:length])


def compare(raw_a: Path, raw_b: Path) -> Comparison:
    """Compare two raw images."""
    sizes = (raw_a.stat().st_size, raw_b.stat().st_size)
    first: int | None = None
    blocks = 0
    with _mapped(raw_a) as a, _mapped(raw_b) as b:
        for offset in range(0, max(sizes), BLOCK):
            length = min(BLOCK, max(sizes) - offset)
            left = a[offset : offset + length].ljust(length, b"\0")
            right = b[offset : offset + length].ljust(length, b"\0")
            if left == right:
                continue
            blocks += 1
            if first is None:
                pairs = enumerate(zip(left, right, strict=True))
                first = offset + next(at for at, (x, y) in pairs if x != y)
    return Comparison(first_difference=first, differing_blocks=blocks, sizes_bytes=sizes)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    if path.stat().st_size == 0:  # cannot be mapped
        yield b""
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield mapped
