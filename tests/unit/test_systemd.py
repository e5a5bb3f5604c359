"""sd_notify, against a real socket such as systemd gives."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.service import systemd


@pytest.fixture(params=["path", "abstract"])
def listener(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    name = str(tmp_path / "n") if request.param == "path" else f"@vmfleece-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(name.replace("@", "\0"))
        bound.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield bound


def test_states_go_in_one_message(listener: socket.socket) -> None:
    systemd.notify(READY="1", STATUS="2 jobs, ä")
    assert listener.recv(1000).decode() == "READY=1\nSTATUS=2 jobs, ä"
    systemd.notify(STOPPING="1")
    assert listener.recv(1000) == b"STOPPING=1"


@pytest.mark.parametrize(
    "address", [None, "", "relative", "/nonexistent/socket", "@nobody-listens", "/" + "x" * 200]
)
def test_nobody_has_to_listen(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.notify(READY="1")


async def test_the_watchdog_is_fed_twice_per_interval(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise asyncio.CancelledError

    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await systemd.watchdog()
    assert slept == [15, 15, 15]
    assert [listener.recv(100) for _ in slept] == [b"WATCHDOG=1"] * 3


async def test_without_a_watchdog_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    await asyncio.wait_for(systemd.watchdog(), 5)
