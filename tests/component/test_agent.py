"""The guest agent's traps: whatever it does, nothing stays frozen, and no answer is taken for another one's."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from orchestrator.errors import AgentError
from orchestrator.qemu import agent
from tests.component.fake_agent import FakeAgent

FREEZE, THAW = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "web01.qga"


@pytest.fixture
async def fake(path: Path) -> AsyncIterator[FakeAgent]:
    async with FakeAgent().serving(path) as made:
        yield made


async def test_what_was_left_unread_is_not_taken_for_an_answer(fake: FakeAgent, path: Path) -> None:
    for _ in range(3):
        fake.unread = b'{"return": 7, "id": 1}\nnot even JSON\n\xff{"return": 5}\n'
        async with agent.connected(path, vm="web01") as guest:
            assert await guest.freeze() == 2
            assert fake.frozen == 2
            assert await guest.thaw() == 0  # the second one's answer: it was sure to be the last
            assert fake.frozen == 0


async def test_a_freeze_that_takes_too_long_is_thawed_whenever_it_is_done(fake: FakeAgent, path: Path) -> None:
    fake.held_seconds = {FREEZE: 0.3}
    async with agent.connected(path, vm="web01") as guest:
        with pytest.raises(AgentError, match="did not answer guest-fsfreeze-freeze") as silent:
            await guest.freeze(deadline_seconds=0.1)
        assert silent.value.code == "agent-silent"
        assert fake.done[-4:] == ["freeze", "thaw", "sync-delimited", "thaw"]
        assert fake.frozen == 0


async def test_a_freeze_whose_connection_is_closed_is_thawed_by_the_next_one(fake: FakeAgent, path: Path) -> None:
    fake.held_seconds = {FREEZE: 0.2}
    async with agent.connected(path, vm="web01") as guest:
        freezing = asyncio.create_task(guest.freeze())
        await asyncio.sleep(0.05)
        freezing.cancel()
        await asyncio.wait([freezing])
    async with agent.connected(path, vm="web01") as guest:
        await guest.thaw()
    assert fake.frozen == 0
    assert fake.done.index("freeze") < len(fake.done) - 1


async def test_a_refusal_says_why_and_leaves_nothing_frozen(fake: FakeAgent, path: Path) -> None:
    fake.errors = {FREEZE: "hook script failed"}
    async with agent.connected(path, vm="web01") as guest:
        with pytest.raises(AgentError, match="VM web01: its guest agent refused guest-fsfreeze-freeze: hook"):
            await guest.freeze()
    assert fake.done[-1] == "thaw"


async def test_freezing_nothing_is_no_success(fake: FakeAgent, path: Path) -> None:
    fake.file_systems = 0
    async with agent.connected(path, vm="web01") as guest:
        with pytest.raises(AgentError, match="froze no file system"):
            await guest.freeze()


async def test_a_thaw_that_fails_is_told(fake: FakeAgent, path: Path) -> None:
    async with agent.connected(path, vm="web01") as guest:
        await guest.freeze()
        fake.errors = {THAW: "no"}
        with pytest.raises(AgentError, match="refused guest-fsfreeze-thaw: no"):
            await guest.thaw()
        fake.errors, fake.mute = {}, True
        with pytest.raises(AgentError, match="did not answer"):
            await guest.thaw(deadline_seconds=0.1)
    assert fake.frozen == 0  # it was carried out all the same


@pytest.mark.parametrize("there", [True, False])
async def test_an_agent_that_is_not_there_is_said_so_soon(
    path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """QEMU takes what is said to it, and nobody answers; or there is no such socket."""
    monkeypatch.setattr(agent, "SYNC_SECONDS", 0.1)
    fake = FakeAgent()
    fake.mute = True
    async with fake.serving(path) if there else FakeAgent().serving(path.with_name("other")):
        with pytest.raises(AgentError) as absent:
            async with agent.connected(path, vm="web01"):
                raise AssertionError
    assert absent.value.code == ("agent-silent" if there else "agent-absent")


async def test_an_agent_that_goes_away_is_told(path: Path) -> None:
    async with FakeAgent().serving(path) as fake, agent.connected(path, vm="web01") as guest:
        assert fake._writer is not None
        fake._writer.close()
        with pytest.raises(AgentError) as gone:
            await guest.thaw()
    assert gone.value.code == "agent-gone"
