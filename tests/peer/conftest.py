"""What the tests beside restic share."""

import subprocess
from pathlib import Path

import pytest

from tests.guest.restics import RESTICS


@pytest.fixture(scope="session", params=RESTICS)
def version(request: pytest.FixtureRequest) -> str:
    if request.param == "0.18":
        script = Path(__file__).with_name("restics.sh")
        made = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=False, timeout=300)
        assert made.returncode == 0, f"there is no restic 0.18 on this machine: {made.stderr}"
    said = subprocess.run([RESTICS[request.param], "version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"restic {request.param}."), said
    return str(request.param)
