"""Fixtures for tests on real QEMU."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from structlog.testing import LogCapture
from structlog.typing import EventDict

SmallFileSystem = Callable[[str, int], Path]
MIB = 1 << 20
LONG = ("test_chain", "test_quota", "test_repository", "test_shared_storage", "test_versions")
"""Files that take a minute or more, beside the tests of faults: at the end, each would run alone (`make test`)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let long files come first."""
    items.sort(key=lambda item: item.path.parent.name != "faults" and item.path.stem not in LONG)


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[SmallFileSystem]:
    """Yield a function that mounts a file system of so many MiB under a name; called again, it resizes it."""
    _need_root()
    mounted: list[Path] = []

    def mount(name: str, size_mib: int) -> Path:
        path = tmp_path / name
        options = f"size={size_mib}m,mode=700"
        if path in mounted:
            options = f"remount,{options}"
        else:
            path.mkdir()
            mounted.append(path)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "vmfleece-test", str(path)], check=True)
        return path

    yield mount
    # Lazily: a guest that still holds a file there has failed its test already.
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory, for what is large: a slow disk would hold up all that is flushed to it."""
    _need_root()
    path = tmp_path_factory.mktemp("memory")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8g,mode=700", "vmfleece-test", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def folder(memory: Path) -> Iterator[Path]:
    """A folder of the test's own, in memory."""
    with tempfile.TemporaryDirectory(dir=memory, prefix="") as path:
        yield Path(path)


@pytest.fixture
def ext4_file_system(folder: Path) -> Iterator[SmallFileSystem]:
    """Yield a function that mounts an ext4 of so many MiB under a name, on a file."""
    _need_root()
    mounted: list[Path] = []
    make = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "mkfs.ext4"

    def mount(name: str, size_mib: int) -> Path:
        path, backing = folder / name, folder / f"{name}.ext4"
        path.mkdir()
        with backing.open("wb") as file:
            file.truncate(size_mib * MIB)
        # Nothing is kept for root, so what is not used is what vmfleece sees as free.
        subprocess.run([make, "-q", "-m", "0", str(backing)], check=True)
        subprocess.run(["mount", "-o", "loop", "-t", "ext4", str(backing), str(path)], check=True)
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def log_lines() -> Iterator[list[EventDict]]:
    """What the product in this process logs meanwhile, with the names that a run binds."""
    before = structlog.get_config()
    captured = LogCapture()
    # Whatever level other tests have left behind.
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, captured],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
    )
    yield captured.entries
    structlog.configure(**before)


def _need_root() -> None:
    if os.geteuid() != 0:
        pytest.fail("needs root: mounts file systems")
