"""The systemd unit and what is installed with it, as systemd's own tools see them."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "systemd" / "vmfleece.service"
MOST_EXPOSURE = 3.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root folder with what `make install-service` puts into it, and the accounts that systemd itself makes."""
    installed = subprocess.run(
        ["make", "--silent", "--directory", str(ROOT), "install-service"],
        env=os.environ | {"DESTDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert installed.returncode == 0, installed.stderr
    return tmp_path


def test_the_unit_is_exposed_little() -> None:
    threshold = f"--threshold={MOST_EXPOSURE * 10:.0f}"
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", threshold, str(UNIT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout.splitlines()[-1]
    assert "Overall exposure level" in done.stdout


def test_systemd_finds_nothing_wrong_with_the_unit(root: Path, tmp_path: Path) -> None:
    unit = tmp_path / "vmfleece.service"
    text = (root / "etc/systemd/system/vmfleece.service").read_text()
    assert "ExecStart=/usr/bin/vmfleece daemon" in text
    unit.write_text(text.replace("/usr/bin/vmfleece", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if "vmfleece.service" in line]
    assert (done.returncode, said) == (0, [])


def test_the_group_of_the_unit_is_made(root: Path) -> None:
    done = subprocess.run(
        ["systemd-sysusers", f"--root={root}", "vmfleece.conf"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "vmfleece" in [line.split(":")[0] for line in (root / "etc/group").read_text().splitlines()]
    assert "\nGroup=vmfleece\n" in UNIT.read_text()


def test_the_folder_of_the_configuration_is_made(root: Path) -> None:
    done = subprocess.run(
        ["systemd-tmpfiles", "--create", f"--root={root}", "vmfleece.conf"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (root / "etc/vmfleece").is_dir()


def test_the_readme_puts_the_command_where_the_unit_looks_for_it(root: Path) -> None:
    (started,) = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
    assert started == "ExecStart=/usr/bin/vmfleece daemon"
    assert "ln -s /opt/vmfleece/bin/vmfleece /usr/bin/`" in (ROOT / "README.md").read_text()
    assert not (root / "usr/bin").exists()  # it takes root's own installation, and nothing of a clone
