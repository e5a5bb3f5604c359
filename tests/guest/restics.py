"""restic itself, of Debian 12 (0.14) and of Debian 13 (0.18), as a user runs it."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.target.restic.crypto import Cost

CACHE = Path(os.environ.get("VMFLEECE_TESTS_CACHE") or "/var/cache/vmfleece-tests")
CHEAP = Cost(16, 1, 1)
"""What opens a repository in no time. With what vmfleece and restic take by themselves, that is half a second."""
RESTICS = {"0.14": "restic", "0.18": str(CACHE / "restic-0.18" / "restic")}


@dataclass(frozen=True)
class Restic:
    """One of them, and a repository."""

    repository: Path
    password: str
    version: str = "0.14"

    def started(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """A command under way, whose output can be read."""
        return subprocess.Popen(
            self._command(*arguments),
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments: str, code: int = 0, stdin: bytes = b"", **environment: str) -> bytes:
        """Its output. It must exit with `code`."""
        done = subprocess.run(
            self._command(*arguments),
            env=self._environment | environment,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}: {done.stdout[-2000:].decode()}"
        return done.stdout

    def _command(self, *arguments: str) -> list[str]:
        return [RESTICS[self.version], "--no-cache", "--repo", str(self.repository), *arguments]

    @property
    def _environment(self) -> dict[str, str]:
        return os.environ | {"RESTIC_PASSWORD": self.password}

    def snapshots(self, *arguments: str) -> list[dict[str, Any]]:
        """What it lists."""
        return json.loads(self.run("snapshots", "--json", *arguments)) or []

    def check(self) -> None:
        """All of the repository is there and right, or AssertionError."""
        assert b"no errors were found" in self.run("check", "--read-data")
