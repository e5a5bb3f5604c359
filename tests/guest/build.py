"""Builds the guest's kernel and initramfs, once, into `.cache/guest/` of the project.

Kernel, modules and busybox are Debian's own packages, downloaded with apt and unpacked, never
installed: no root is needed. Two stages, each cached under a hash of its inputs: `linux-…` (the
packages' files that are used) and `initramfs-…` (those plus init.sh and the compiled writer.c),
so that a change of the writer downloads nothing. Concurrent builders are safe: each builds in a
folder of its own and renames it; who comes second throws his away.

There are two initramfs: the small one, and `agent-…`, more than twice as large, which has Debian's
qemu-guest-agent with its libraries and the compiled files.c besides.
"""

import contextlib
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / ".cache" / "guest"

META_PACKAGE = "linux-image-cloud-amd64"
PACKAGES = (
    "busybox-static",
    "qemu-guest-agent",
    "libc6",
    "libglib2.0-0",
    "libnuma1",
    "libpcre2-8-0",
    "libudev1",
    "liburing2",
)
# In loading order. ext4 and nvme are built into this kernel; AHCI and USB are absent from it.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "scsi_common",
    "scsi_mod",
    "virtio_scsi",
    "sd_mod",
    "libata",
    "ata_piix",
    "virtio_console",
)
AGENT = "qemu-ga"
LOADER = "ld-linux-x86-64.so.2"
LIBRARIES = (
    "libc.so.6",
    "libglib-2.0.so.0",
    "libgmodule-2.0.so.0",
    "libm.so.6",
    "libnuma.so.1",
    "libpcre2-8.so.0",
    "libudev.so.1",
    "liburing.so.2",
)
COMPILER_FLAGS = ("-static", "-O2", "-Wall", "-Wextra", "-Werror", "-s", "-pthread")


class BuildError(Exception):
    """The guest cannot be built on this machine; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """What `qemu -kernel … -initrd …` needs."""

    kernel: Path
    initramfs: Path


def ensure(*, agent: bool = False) -> GuestFiles:
    """Return kernel and initramfs, building what the cache lacks (10 s the first time).

    Raises BuildError when a package or the compiler cannot be had.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    linux = _cached("linux", _hash(META_PACKAGE, *PACKAGES, *MODULES, AGENT, LOADER, *LIBRARIES), _fetch_linux)
    sources = [(HERE / name).read_text() for name in ("init.sh", "writer.c", "files.c", "build.py")]
    name = "agent" if agent else "initramfs"
    ready = _cached(name, _hash(linux.name, *sources), lambda into: _initramfs(linux, into, agent=agent))
    return GuestFiles(kernel=linux / "vmlinuz", initramfs=ready / "initramfs.gz")


def _hash(*inputs: str) -> str:
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]


def _cached(name: str, key: str, build: Callable[[Path], None]) -> Path:
    done = CACHE / f"{name}-{key}"
    if done.is_dir():
        return done
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=f"building-{name}-") as folder:
        result = Path(folder) / "result"
        result.mkdir()
        build(result)
        with contextlib.suppress(OSError):  # somebody else was faster: same content
            result.rename(done)
    if not done.is_dir():
        raise BuildError(f"{done} could not be put in place")
    return done


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=300).stdout
    except FileNotFoundError as error:
        raise BuildError(f"{command[0]} is missing: run tests/guest/install.sh once") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{' '.join(command)}: {error.stderr.strip()[-800:]}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{' '.join(command)} did not end within 300 s") from error


def _download(into: Path) -> None:
    listing = _run("apt-cache", "depends", META_PACKAGE)
    versioned = re.search(r"Depends: (linux-image-\d\S+-cloud-amd64)", listing)
    if versioned is None:
        raise BuildError(f"apt knows no {META_PACKAGE}: this needs Debian 12")
    # The sandbox user cannot write into a cache inside somebody's home.
    sandbox = ("-o", f"APT::Sandbox::User={'root' if os.getuid() == 0 else ''}")
    _run("apt-get", *sandbox, "download", versioned[1], *PACKAGES, cwd=into)


def _fetch_linux(into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-packages-") as folder:
        packages = Path(folder)
        try:
            _download(packages)
        except BuildError:
            if os.getuid() != 0:
                raise
            _run("apt-get", "update", "-qq")
            _download(packages)
        root = packages / "root"
        for package in packages.glob("*.deb"):
            _run("dpkg", "-x", str(package), str(root))
        shutil.copy(next(root.glob("boot/vmlinuz-*")), into / "vmlinuz")
        shutil.copy(root / "bin" / "busybox", into)
        shutil.copy(root / "usr" / "sbin" / AGENT, into)
        for library in (LOADER, *LIBRARIES):
            shutil.copy(next(root.rglob(f"x86_64-linux-gnu/{library}")), into)
        tree = next(root.glob("lib/modules/*"))
        for module in MODULES:
            found = next(tree.rglob(f"{module}.ko"), None)
            if found is None:
                raise BuildError(f"{tree.name} has no module {module}.ko")
            shutil.copy(found, into / found.name)


def _initramfs(linux: Path, into: Path, *, agent: bool) -> None:
    root = into / "root"
    for folder in ("bin", "modules", "proc", "sys", "dev", "run", "mnt", "lib", "lib64"):
        (root / folder).mkdir(parents=True)
    shutil.copy(HERE / "init.sh", root / "init")
    shutil.copy(linux / "busybox", root / "bin" / "busybox")
    for module in MODULES:
        shutil.copy(linux / f"{module}.ko", root / "modules")
    (root / "modules" / "order").write_text("".join(f"{module}\n" for module in MODULES))
    for program in ("writer", "files") if agent else ("writer",):
        _run("gcc", *COMPILER_FLAGS, "-o", str(root / "bin" / program), str(HERE / f"{program}.c"))
    if agent:
        shutil.copy(linux / AGENT, root / "bin")
        shutil.copy(linux / LOADER, root / "lib64")
        for library in LIBRARIES:
            shutil.copy(linux / library, root / "lib")
    for executable in (root / "init", root / "bin" / "busybox"):
        executable.chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = subprocess.run(
        ("cpio", "-o", "-H", "newc", "-R", "0:0", "--quiet"),
        cwd=root,
        input=names.encode(),
        check=True,
        capture_output=True,
    ).stdout
    (into / "initramfs.gz").write_bytes(gzip.compress(archive, 6))
    shutil.rmtree(root)


if __name__ == "__main__":
    print(ensure())  # noqa: T201  (python -m tests.guest.build)
