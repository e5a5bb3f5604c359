"""The completion scripts, sourced in real shells: what a key completes to."""

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli import arguments, completion

CONFIG = """\
[daemon]
state_dir = "/x"

[storage.local]
path = "/y"

[target.main]  # the first
path = "/z"
[target.bucket]
url = "s3://x"

[vm.web01]
qmp = "/a"
  [vm."web.02"]
qmp = "/b"
[vm.db01]
qmp = "/c"

[job.nightly]
vms = ["*"]
[job.nightly.fleecing]
enabled = true
"""

LINES = {
    "vmfleece sta": {"status"},
    "vmfleece job ": {"list", "run"},
    "vmfleece target key re": {"remove"},
    "vmfleece backup --cons": {"--consistency"},
    "vmfleece backup --consistency fr": {"freeze"},
    "vmfleece restore x --format q": {"qcow2"},
    "vmfleece completion f": {"fish"},
    "vmfleece backup --target ": {"main", "bucket"},
    "vmfleece backup web": {"web01", "web.02"},
    "vmfleece backup --full web01 d": {"db01"},
    "vmfleece vm show d": {"db01"},
    "vmfleece job run ": {"nightly"},
    "vmfleece prune --job n": {"nightly"},
    "vmfleece target show b": {"bucket"},
    "vmfleece snapshot show db": {"db01@latest"},
}
"""What is typed, and what it may become."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "vmfleece.toml"
    path.write_text(CONFIG)
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "VMFLEECE_CONFIG": str(path),
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }


def script(shell: str, folder: Path) -> Path:
    path = folder / f"vmfleece.{shell}"
    path.write_text(completion.script(arguments.make_parser(), shell))
    return path


def by_bash(line: str, folder: Path, environment: dict[str, str]) -> set[str]:
    ask = r"""
        source "$1"; shift
        function_name=$(complete -p vmfleece | sed 's/.* -F \([^ ]*\) .*/\1/')
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
        $function_name vmfleece "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}" 2>/dev/null
        printf '%s\n' "${COMPREPLY[@]}"
    """
    words = line.split(" ")
    done = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", ask, "bash", script("bash", folder), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert not done.stderr
    return {found.strip() for found in done.stdout.splitlines() if found}


def by_fish(line: str, folder: Path, environment: dict[str, str]) -> set[str]:
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source {script('fish', folder)}; complete -C '{line}'"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert not done.stderr
    return {found.split("\t")[0] for found in done.stdout.splitlines()}


def by_zsh(line: str, folder: Path, environment: dict[str, str]) -> set[str]:
    """Type it, have all that it may become inserted at once, and read what then stands there."""
    (folder / "_vmfleece").write_text(script("zsh", folder).read_text())
    (folder / ".zshrc").write_text(
        f"fpath=({folder} $fpath); autoload -U compinit; compinit -u -d {folder}/dump\n"
        'show() { print -r -- "<${BUFFER}>" > $HOME/shown; BUFFER=exit; zle accept-line }\n'
        "zle -N show; bindkey '^T' show; zle -C every complete-word _every; bindkey '^I' every\n"
        "_every() { _main_complete; compstate[insert]=all }\n"
        "PROMPT='ready> '\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover
        os.execvpe("zsh", ["zsh", "-d", "-i"], environment)  # noqa: S606
    try:
        _read_until(terminal, rb"ready> ")
        os.write(terminal, line.encode() + b"\t\x14")
        shown = folder / "shown"
        end = time.monotonic() + 60
        while not (shown.exists() and shown.read_text().endswith("\n")):
            assert time.monotonic() < end
            if select.select([terminal], [], [], 0.05)[0]:
                os.read(terminal, 4096)
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
    found = re.fullmatch(r"<(.*)>\n", shown.read_text(), re.DOTALL)
    assert found
    return set(found[1].removeprefix(line.rpartition(" ")[0]).split())


def _read_until(terminal: int, wanted: bytes) -> None:
    seen = b""
    end = time.monotonic() + 60
    while not re.search(wanted, seen):
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096)


SHELLS: dict[str, Callable[[str, Path, dict[str, str]], set[str]]] = {
    "bash": by_bash,
    "zsh": by_zsh,
    "fish": by_fish,
}


def test_there_is_a_test_for_each_shell() -> None:
    assert set(SHELLS) == set(arguments.SHELLS)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("shell", SHELLS)
def test_what_a_line_may_become(shell: str, line: str, tmp_path: Path, environment: dict[str, str]) -> None:
    assert SHELLS[shell](line, tmp_path, environment) == LINES[line]
