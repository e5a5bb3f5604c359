"""Lines of runs: as the published schema says, as the journal wants them, and as the documented jq reads them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from orchestrator import log
from orchestrator.model import Outcome
from tests import log_schema
from tests.component.fake_blocks import CLUSTER
from tests.component.world import MIB, World

ROOT = Path(__file__).parents[2]
Make = Callable[..., World]


@pytest.fixture
async def lines(make: Make, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What two runs write: one that succeeds while its guest writes, and one whose target is full."""
    capfd.readouterr()
    log.configure(log_format="json", level="debug")
    world = make(disks={"vda": 2 * MIB, "vdb": MIB})
    world.qemu.during_copy = lambda _job: world.qemu.guest_writes("vda", CLUSTER + 100, b"new")
    assert (await world.back_up()).outcome is Outcome.SUCCEEDED
    world.qemu.target_error = "No space left on device"
    assert (await world.back_up(run="0badf00d")).outcome is Outcome.FAILED
    return capfd.readouterr().err.splitlines()


def test_the_published_schema_is_the_events_list() -> None:
    assert log_schema.PATH.read_text() == log_schema.text(), "python -m tests.log_schema"
    Draft202012Validator.check_schema(log_schema.schema())


async def test_every_line_of_runs_is_as_the_schema_says(lines: list[str]) -> None:
    documents = [json.loads(line) for line in lines]
    events = [document["event"] for document in documents]
    assert {"run.started", "run.phase", "disk.copied", "snapshot.committed"} <= set(events)
    assert events.count("run.finished") == 2
    validator = Draft202012Validator(log_schema.schema(), format_checker=Draft202012Validator.FORMAT_CHECKER)
    for document in documents:
        validator.validate(document)


CHANGES: dict[str, dict[str, Any]] = {
    "no such event": {"event": "run.ended"},
    "not its level": {"level": "debug"},
    "a key too many": {"colour": "red"},
    "a key's type": {"duration_seconds": "long"},
    "an outcome": {"outcome": "fine"},
    "a disk": {"disks": [{"disk": "vda"}]},
    "an error": {"error": "full"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_the_schema_refuses_what_is_not_so(lines: list[str], change: dict[str, Any]) -> None:
    (first, _) = [json.loads(line) for line in lines if '"run.finished"' in line]
    validator = Draft202012Validator(log_schema.schema())
    assert validator.is_valid(first)
    assert not validator.is_valid(first | change)


def examples() -> list[str]:
    """The commands of docs/events.md that read a log with jq."""
    blocks = re.findall(
        r"^```\n(journalctl.*?)^```", (ROOT / "docs" / "events.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 2
    assert all(len(block.splitlines()) <= 11 for block in blocks)
    return [block.partition("|")[2] for block in blocks]


def test_the_documented_reports(lines: list[str]) -> None:
    failed, night = (
        subprocess.run(
            ["sh", "-c", example], input="\n".join(lines), capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for example in examples()
    )
    assert [line.split("\t")[1:3] for line in failed] == [["web01", "target-full"]]
    first, second, last = (line.split("\t") for line in night)
    assert first[1:7] == ["web01", "nightly", "main", "succeeded", "full", "3 MiB"]
    assert first[-1].startswith("web01/")
    assert (second[4], second[-1]) == ("failed", "target-full")
    assert last[:4] == ["last", "web01", "failed", "target-full"]
    assert last[4]


# Priorities --------------------------------------------------------------------------------------------------

WRITES = """
import sys, structlog
from orchestrator import log
log.configure(log_format=sys.argv[1], level="debug")
logger = structlog.get_logger()
logger.debug("a.said"); logger.info("b.said"); logger.warning("c.said")
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("d.said")
"""


def written(log_format: str, *, journal: bool) -> list[str]:
    """By a process whose standard error is what $JOURNAL_STREAM names, or is not, if that was inherited."""
    read, write = os.pipe()
    found = os.fstat(write)
    with os.fdopen(read) as stream:
        subprocess.run(
            [sys.executable, "-c", WRITES, log_format],
            stderr=write,
            check=True,
            env=os.environ | {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + (0 if journal else 1)}"},
            cwd=ROOT,
        )
        os.close(write)
        return stream.read().splitlines()


def test_in_the_journal_each_line_has_its_priority() -> None:
    lines = written("json", journal=True)
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>"]
    assert [json.loads(line[3:])["event"] for line in lines] == ["a.said", "b.said", "c.said", "d.said"]
    # A traceback has many lines, and each is an entry of its own.
    console = written("console", journal=True)
    assert [line[:3] for line in console[:3]] == ["<7>", "<6>", "<4>"]
    assert len(console) > 5
    assert {line[:3] for line in console[3:]} == {"<3>"}


def test_elsewhere_lines_are_json_and_nothing_else() -> None:
    assert [json.loads(line)["level"] for line in written("json", journal=False)] == [
        "debug",
        "info",
        "warning",
        "error",
    ]
