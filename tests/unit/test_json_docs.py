"""docs/json.md names every command that prints JSON, and every key of what is made from a class."""

import argparse
import re
from dataclasses import fields
from pathlib import Path

from orchestrator.cli.arguments import make_parser
from orchestrator.model import DiskResult, ErrorReport, GuestWrites, RunResult
from orchestrator.run.restore import Restored
from orchestrator.service import documents, status
from orchestrator.target.base import Snapshot, SnapshotDisk
from orchestrator.target.restic.keys import KeyInfo

TEXT = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
CLASSES = (
    RunResult,
    DiskResult,
    GuestWrites,
    ErrorReport,
    documents.RunSummary,
    documents.RunDetails,
    documents.VmSummary,
    documents.VmDisk,
    documents.VmDetails,
    documents.PlannedDisk,
    documents.Features,
    documents.JobSummary,
    documents.TargetSummary,
    documents.PrunedSnapshot,
    documents.RepairSummary,
    status.Status,
    status.StorageStatus,
    status.RunStatus,
    status.WaitingStatus,
    status.ConfigStatus,
    Snapshot,
    SnapshotDisk,
    Restored,
    KeyInfo,
)


def rows() -> dict[str, set[str]]:
    """The tables' first cells, and all that is written as code in their second."""
    found = re.findall(r"^\| `([^`]+)` \| ([^|]*(?:\\\|[^|]*)*)\|", TEXT, re.MULTILINE)
    assert len(found) == len(dict(found))
    return {name: set(re.findall(r"`([^`]+)`", keys)) for name, keys in found}


def commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    below = [one for group in parser._actions if isinstance(group.choices, dict) for one in group.choices.values()]
    return [leaf for one in below for leaf in commands(one)] or [parser]


def test_every_command_that_prints_json_is_there() -> None:
    printing = {
        one.prog
        for one in commands(make_parser())
        if any("--json" in action.option_strings for action in one._actions)
    }
    named = {f"vmfleece {one}" for name in rows() if not name[0].isupper() for one in name.split(", ")}
    assert named == printing


def test_every_key_of_a_class_is_there() -> None:
    documented = rows()
    assert {one.__name__ for one in CLASSES} == {name for name in documented if name[0].isupper()}
    for one in CLASSES:
        assert documented[one.__name__] == {field.name for field in fields(one)}, one.__name__
