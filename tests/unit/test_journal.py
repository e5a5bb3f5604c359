"""A journal that was damaged: what can be read of it is kept, and what is entered from then on is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from structlog.testing import LogCapture
from structlog.typing import EventDict

from orchestrator.state.journal import Act, Intent, Journal
from tests.faults.damage import damage
from tests.faults.plan import Damage


@pytest.fixture
def logged() -> Iterator[list[EventDict]]:
    before = structlog.get_config()
    captured = LogCapture()
    structlog.configure(processors=[captured])
    yield captured.entries
    structlog.configure(**before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def intents(tmp_path: Path) -> list[Intent]:
    journal = Journal(tmp_path)
    journal.settled(journal.intend(Act.FREEZE, vm="web09", run="00000000", subject="/run/web09.qga"))
    return [
        journal.intend(Act.FREEZE, vm="web01", run="1a2b3c4d", subject="/run/web01.qga"),
        journal.intend(Act.PAUSE, vm="web02", run="5e6f7a8b", subject="12:34 /run/web02.qmp"),
    ]


@pytest.mark.parametrize("how", [Damage.GARBAGE, Damage.LOG, Damage.OVERWRITTEN])
def test_entries_outlive_a_damaged_end(path: Path, intents: list[Intent], how: Damage) -> None:
    damage(path, how)
    again = Journal(path.parent)
    assert again.open() == intents
    new = again.intend(Act.FREEZE, vm="web03", run="9c0d1e2f", subject="/run/web03.qga")
    assert again.open() == [*intents, new]
    assert not again.lost
    again.settled(intents[0])
    assert Journal(path.parent).open() == [intents[1], new]


def test_what_was_damaged_is_set_aside_and_named(
    path: Path, intents: list[Intent], logged: list[EventDict]
) -> None:
    damage(path, Damage.OVERWRITTEN)
    damaged = path.read_bytes()
    Journal(path.parent).intend(Act.FREEZE, vm="web03", run="9c0d1e2f", subject="/run/web03.qga")
    (line,) = logged
    assert (line["event"], line["kept"], line["log_level"]) == ("journal.damaged", len(intents), "error")
    assert str(path) in line["error"]
    assert Path(line["path"]).read_bytes() == damaged
    assert Path(line["path"]) == path.with_name("journal.sqlite.damaged")
    assert Path(line["path"]).stat().st_mode & 0o777 == path.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("intents")
@pytest.mark.parametrize("content", [None, b"no database", b"SQLite format 3\0" + bytes(range(256)) * 40])
def test_a_journal_that_cannot_be_read_at_all_is_begun_anew(
    path: Path, logged: list[EventDict], content: bytes | None
) -> None:
    if content is None:
        damage(path, Damage.TRUNCATED)
    else:
        path.write_bytes(content)
    journal = Journal(path.parent)
    assert journal.open() == []
    assert journal.lost
    (line,) = logged
    assert (line["event"], line["kept"]) == ("journal.damaged", None)
    new = journal.intend(Act.PAUSE, vm="web01", run="9c0d1e2f", subject="1:2 /run/web01.qmp")
    assert Journal(path.parent).open() == [new]
    assert len(logged) == 1


def test_entries_that_say_nothing_are_not_kept(path: Path, intents: list[Intent]) -> None:
    journal = Journal(path.parent)
    with journal._database.transaction() as connection:
        connection.execute("UPDATE intents SET act = 'frieze' WHERE id = ?", (intents[0].id,))
    damage(path, Damage.OVERWRITTEN)
    journal.intend(Act.FREEZE, vm="web03", run="9c0d1e2f", subject="/run/web03.qga")
    assert [one.vm for one in journal.open()] == ["web02", "web03"]
