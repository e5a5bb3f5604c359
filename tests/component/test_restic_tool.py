"""What restic does, and how it ends, by a stand-in for it that says and does what a test wants."""

import asyncio
import os
from pathlib import Path

import pytest

from orchestrator.errors import TargetError, VmfleeceError
from orchestrator.target.repository import restic_tool

SAYS = 'echo "$*|$RESTIC_REPOSITORY|$RESTIC_PASSWORD_FILE|$RESTIC_PASSWORD|$RESTIC_COMPRESSION"; '


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("RESTIC_PASSWORD", "hidden")
    monkeypatch.setenv("RESTIC_COMPRESSION", "off")
    return tmp_path


def restic(folder: Path, script: str) -> None:
    (folder / "restic").write_text(f"#!/bin/bash\n{script}\n")
    (folder / "restic").chmod(0o755)


async def prune(folder: Path) -> list[str]:
    lines: list[str] = []
    await restic_tool.prune("s3:http://host/bucket", folder / "password", on_line=lines.append)
    return lines


async def test_it_learns_all_by_its_environment_and_nothing_of_others(folder: Path) -> None:
    restic(folder, SAYS)
    assert await prune(folder) == [f"--no-cache prune|s3:http://host/bucket|{folder}/password||"]
    lines: list[str] = []
    for read_data in (False, True):
        await restic_tool.check("/r", folder / "password", read_data=read_data, on_line=lines.append)
    assert [line.partition("|")[0] for line in lines] == ["--no-cache check", "--no-cache check --read-data"]


async def test_the_region_has_the_name_that_it_knows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-1")
    restic(folder, "echo $AWS_DEFAULT_REGION")
    assert await prune(folder) == ["eu-1"]


async def test_all_that_it_prints_is_passed_on(folder: Path) -> None:
    restic(folder, "printf 'one\\n\\n  two\\n'; printf '%100000d\\n' 3; printf '\\377\\n' >&2; printf end")
    lines = await prune(folder)
    assert sorted(map(len, lines)) == [1, 3, 3, 5, 100000]


@pytest.mark.parametrize(
    ("script", "code", "exit_code", "said"),
    [
        ("echo words >&2; exit 10", "no-repository", 10, "words"),
        ("echo words >&2; exit 11", "repository-locked", 11, "words"),
        ("echo words >&2; exit 12", "wrong-password", 12, "words"),
        ("echo words >&2; exit 1", "restic-failed", 1, "failed with exit code 1: words"),
        (
            "for n in $(seq 20); do echo $n >&2; done; exit 3",
            "restic-failed",
            1,
            "3: 13; 14; 15; 16; 17; 18; 19; 20",
        ),
        ("kill -9 $$", "restic-failed", 1, "failed with exit code -9"),
        ("echo 'wrong password or no key found' >&2; exit 3", "restic-failed", 1, "failed with exit code 3"),
    ],
)
async def test_what_it_exits_with(folder: Path, script: str, code: str, exit_code: int, said: str) -> None:
    restic(folder, script)
    with pytest.raises(TargetError, match=said) as caught:
        await prune(folder)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert "s3:http://host/bucket" in caught.value.message


async def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(VmfleeceError, match="restic is not installed") as caught:
        await prune(folder)
    assert caught.value.code == "tool-missing"


async def cancelled(folder: Path, script: str) -> int:
    """Cancel it once it has written a file with its process id, which is returned."""
    restic(folder, script + " echo $$ >$0.part; mv $0.part $0.pid; while :; do sleep 0.05; done")
    task = asyncio.ensure_future(prune(folder))
    pid = folder / "restic.pid"
    while not pid.exists():
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return int(pid.read_text())


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


async def test_cancelling_lets_it_take_its_lock_away(folder: Path) -> None:
    pid = await cancelled(folder, "trap 'rm lock; exit 130' INT; cd ${0%/*}; touch lock;")
    assert gone(pid)
    assert not (folder / "lock").exists()


async def test_it_is_killed_if_it_does_not_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restic_tool, "END_SECONDS", 0.3)
    assert gone(await cancelled(folder, "trap '' INT;"))


async def test_an_error_of_who_takes_the_lines_ends_it_too(folder: Path) -> None:
    def full(_line: str) -> None:
        raise OSError("no space")

    restic(folder, "echo $$ >$0.pid; trap 'exit 130' INT; echo line; while :; do sleep 0.05; done")
    with pytest.raises(OSError, match="no space"):
        await restic_tool.prune("/r", folder / "password", on_line=full)
    assert gone(int((folder / "restic.pid").read_text()))
