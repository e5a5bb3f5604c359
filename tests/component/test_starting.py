"""A daemon that starts: paused guests go on before most of it is imported, and signals are taken at once."""

import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.service.guests import FIRST_SECONDS
from orchestrator.state.journal import Act, Journal
from tests.component.test_cli import CONFIG, ROOT, command
from tests.component.test_stopping import WITHIN_SECONDS, Bench, events, told, until
from tests.component.test_stopping import bench as bench  # noqa: PLC0414  a fixture

Start = Callable[[], "subprocess.Popen[str]"]

MOMENTS = 6
START_SECONDS = 1.2
"""About how long a daemon takes to be ready; it need not be exact."""
LATER = {"aiohttp", "cryptography", "msgspec", "prometheus_client", "zstandard"}
LATER |= {
    f"orchestrator.{one}" for one in ("admission.controller", "nbd", "run.backup", "service.engine", "target")
}

WHAT_IS_IMPORTED_FOR_GUESTS = """
import json, sys
from orchestrator.cli.main import main
from orchestrator.service import guests

async def put_right(self, vm=None):
    before = sorted(sys.modules)
    import orchestrator.service.daemon
    print(json.dumps([before, sorted(sys.modules)]), flush=True)
    raise SystemExit

guests.Guests.put_right = put_right
main(["daemon", "--config", sys.argv[1]])
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a daemon in a folder of its own, which takes signals when it is returned."""
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:

        def started() -> "subprocess.Popen[str]":
            folder = tmp_path / str(next(numbers))
            folder.mkdir()
            (folder / "vmfleece.toml").write_text(CONFIG.format(folder))
            argv = command("daemon", "--config", folder / "vmfleece.toml")
            process = stack.enter_context(subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            until(lambda: takes_signals(process))
            return process

        yield started


def takes_signals(process: "subprocess.Popen[str]") -> bool:
    """Whether SIGTERM is held, or has a handler: see proc(5)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    masks = [int(mask, 16) for mask in re.findall(r"^Sig(?:Blk|Cgt):\s*(\w+)$", status, re.MULTILINE)]
    assert len(masks) == 2
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


def test_little_is_imported_before_guests_are_put_right(tmp_path: Path) -> None:
    (tmp_path / "vmfleece.toml").write_text(CONFIG.format(tmp_path))
    argv = [sys.executable, "-c", WHAT_IS_IMPORTED_FOR_GUESTS, str(tmp_path / "vmfleece.toml")]
    said = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    before, afterwards = (set(modules) for modules in json.loads(said.stdout))
    assert afterwards >= LATER
    assert LATER & before == set()


def test_told_to_stop_at_any_moment_of_its_start_it_ends_in_order(start: Start) -> None:
    processes = []
    for moment, number in zip(range(MOMENTS), itertools.cycle((signal.SIGTERM, signal.SIGINT)), strict=False):
        process = start()
        time.sleep(moment / MOMENTS * START_SECONDS)
        process.send_signal(number)
        processes.append(process)
    for process in processes:
        said = [line["event"] for line in events(process.communicate(timeout=WITHIN_SECONDS)[1])]
        assert (process.returncode, said[-2:]) == (0, ["daemon.stopping", "daemon.stopped"])


def test_told_to_reload_while_it_starts_it_does_so_once_it_serves(start: Start) -> None:
    process = start()
    process.send_signal(signal.SIGHUP)
    said = [line["event"] for line in told(process, "config.reloaded")]
    assert "daemon.ready" in said
    process.terminate()
    assert process.wait(WITHIN_SECONDS) == 0


def test_guests_go_on_first_and_one_that_does_not_answer_holds_up_nobody(bench: Bench) -> None:
    monitor = bench.folder / "web01.qmp"
    made = monitor.stat()
    paused: dict[str, Any] = {"vm": "web01", "run": "0badcafe"}
    paused["subject"] = f"{made.st_ino}-{made.st_mtime_ns} {monitor}"
    (bench.folder / "state").mkdir()
    journal = Journal(bench.folder / "state")

    bench.ask("stop")
    journal.intend(Act.PAUSE, **paused)
    with bench.running("daemon") as process:
        said = [line["event"] for line in told(process, "daemon.ready")]
        assert said[:2] == ["guest.continued", "repair.done"]
        assert bench.ask("query-status")["running"]
        assert journal.open() == []
        process.terminate()
        assert process.wait(WITHIN_SECONDS) == 0

    bench.ask("stop")
    journal.intend(Act.PAUSE, **paused)
    with bench.running("daemon") as process:
        with bench.hanging():
            assert "guest.continued" not in [line["event"] for line in told(process, "daemon.ready")]
        told(process, "guest.continued")
        assert bench.ask("query-status")["running"]
        process.terminate()
        assert process.wait(WITHIN_SECONDS) == 0
    assert FIRST_SECONDS <= 1  # what all of it waits for a VM that does not answer
