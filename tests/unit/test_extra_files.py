"""Files of the host in a snapshot: kept exactly, and not given back if they are damaged."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as some

from orchestrator.errors import TargetError
from orchestrator.target.extra_files import ExtraFile, decode, encode

FILES = some.builds(ExtraFile, some.text(), some.integers(0, 0o7777), some.binary(max_size=100))


@given(some.lists(FILES))
def test_files_come_back_as_they_were(files: list[ExtraFile]) -> None:
    assert decode(json.loads(json.dumps(encode(files))), snapshot="web01/1") == files


@pytest.mark.parametrize(
    "change",
    [{"content": "AAAA"}, {"content": "!"}, {"content": 7}, {"sha256": "0"}, {"path": None, "sha256": ""}],
)
def test_what_is_damaged_is_not_given_back(change: dict[str, object]) -> None:
    (good,) = encode([ExtraFile("/a", 0o600, b"content")])
    with pytest.raises(TargetError, match="extra files of snapshot web01/1 are damaged") as damaged:
        decode([good | change], snapshot="web01/1")
    assert damaged.value.code == "content-wrong"


def test_what_is_no_list_is_damaged() -> None:
    with pytest.raises(TargetError):
        decode([{}], snapshot="web01/1")
    with pytest.raises(TargetError):
        decode(None, snapshot="web01/1")
