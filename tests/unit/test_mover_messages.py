"""An error that a mover tells of is the error that it was."""

import json

import pytest

from orchestrator.errors import NbdError, TargetError
from orchestrator.target.base import ParentUnusable
from orchestrator.target.mover import messages
from orchestrator.target.mover.messages import Lines
from orchestrator.target.restic import config, crypto, errors
from orchestrator.target.restic.access import Opened

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TargetError)]
OWN_WORDS = {errors.Damaged: errors.Damaged("what", "why"), errors.OtherVersion: errors.OtherVersion(3, 2)}


@pytest.mark.parametrize("kind", [ParentUnusable, *KINDS], ids=lambda kind: kind.__name__)
def test_an_error_keeps_its_class_and_what_it_says(kind: type[TargetError]) -> None:
    error = OWN_WORDS[kind] if kind in OWN_WORDS else kind("what", hint="why", code="special")
    told = messages.to_error(json.loads(json.dumps(messages.of_error(error))))
    assert (type(told), told.code, told.message, told.hint) == (kind, error.code, error.message, error.hint)


def test_what_the_run_does_not_know_is_an_error_of_the_target() -> None:
    for error, code in ((NbdError("gone"), "nbd"), (KeyError("vda"), "bug")):
        told = messages.to_error(messages.of_error(error))
        assert (type(told), told.code) == (TargetError, code)
    assert "KeyError: 'vda'" in str(told)


def test_what_opens_a_repository_is_the_same_on_the_other_side() -> None:
    opened = Opened(crypto.generate(), config.generate(), b"k" * 32)
    told = messages.to_opened(json.loads(json.dumps(messages.of_opened(opened))))
    assert (told.config, told.key_file) == (opened.config, opened.key_file)
    for part in ("encrypt", "mac_k", "mac_r"):
        assert getattr(told.key, part) == getattr(opened.key, part)


def test_lines_come_in_any_pieces() -> None:
    sent = b"".join(messages.encode({"number": number, "text": "ä\n"}) for number in range(3))
    lines = Lines()
    got = [message for at in range(0, len(sent), 5) for message in lines.feed(sent[at : at + 5])]
    assert got == [{"number": number, "text": "ä\n"} for number in range(3)]
