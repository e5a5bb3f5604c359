"""How long work is shown: a bar on a terminal, lines elsewhere if it takes long, nothing for programs."""

import io
import re

import pytest

from orchestrator.cli import work
from orchestrator.cli.work import Work
from orchestrator.units import MIB


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def do(*, shown: bool = True) -> None:
    with Work(4 * MIB, shown=shown) as one:
        one.begin("web01/[bold]", before_bytes=0)
        one.done(MIB)
        one.begin("db01", before_bytes=2 * MIB)
        one.done(9 * MIB)


def test_long_work_prints_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(work, "LINE_SECONDS", 0)
    do()
    assert capsys.readouterr().out.splitlines() == [
        "web01/[bold]: 0% (0 B of 4.0 MiB)",
        "web01/[bold]: 25% (1.0 MiB of 4.0 MiB)",
        "db01: 50% (2.0 MiB of 4.0 MiB)",
        "db01: 100% (4.0 MiB of 4.0 MiB)",
    ]


def test_short_work_prints_nothing_and_json_never_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    do()
    monkeypatch.setattr(work, "LINE_SECONDS", 0)
    do(shown=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("plain", [False, True], ids=["colours", "NO_COLOR"])
def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    do()
    shown = terminal.getvalue()
    assert "db01" in shown
    assert "100%" in shown
    assert (re.search(r"\x1b\[(\d+;)*3\d", shown) is None) is plain
