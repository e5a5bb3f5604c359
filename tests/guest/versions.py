"""The QEMUs that the tests run with: the host's own, and beside it the oldest and the newest one that we support.

qemus.sh unpacks those two. A QEMU that is missing, or is another one than its name says, fails: what was not run
must not look tested.
"""

import functools
import os
import re
import subprocess
from pathlib import Path

CACHE = Path(os.environ.get("VMFLEECE_TESTS_CACHE") or "/var/cache/vmfleece-tests")
PROGRAM = "qemu-system-x86_64"
HOST = (PROGRAM, "tests/guest/install.sh")

QEMUS: dict[str, tuple[str, str]] = {
    "7.2": (str(CACHE / "qemu-7.2" / PROGRAM), "tests/guest/qemus.sh"),
    "10.0": HOST,
    "11.1": (str(CACHE / "qemu-11.1" / PROGRAM), "tests/guest/qemus.sh"),
}
"""By version: the program, and what installs it."""

NEWEST = "11.1"
"""What a backports repository has; it may be newer by now."""


class QemuMissingError(Exception):
    """A QEMU that the tests need is not on this machine; the message says how to get it."""


@functools.cache
def qemu(version: str) -> tuple[str, ...]:
    """Return the command that GuestVm takes as `qemu`. Raises QemuMissingError."""
    program, script = QEMUS[version]
    try:
        said = subprocess.run(
            [program, "--version"], check=True, capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise QemuMissingError(
            f"QEMU {version} does not run as {program} ({error}): run {script} once, as root"
        ) from error
    found = re.search(r"version (\d+)\.(\d+)", said)
    wanted = _numbers(version)
    there = (int(found[1]), int(found[2])) if found else (0, 0)
    if there != wanted and not (version == NEWEST and there > wanted):
        raise QemuMissingError(
            f"{program} is no QEMU {version}: it says {said.splitlines()[:1]};"
            f" {script} installs one where there is none, as root on Debian 12"
        )
    return (program,)


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)
