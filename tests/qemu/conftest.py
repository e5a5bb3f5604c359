"""Fixtures for tests on real QEMU."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SmallFileSystem = Callable[[str, int], Path]


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[SmallFileSystem]:
    """Yield a function that mounts a file system of so many MiB under a name; called again, it resizes it."""
    if os.geteuid() != 0:
        pytest.fail("needs root: mounts a small file system")
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
