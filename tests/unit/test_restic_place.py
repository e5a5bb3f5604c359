"""Where a repository lies, by the environment; and that no secret is told."""

import subprocess
import sys

import pytest

from orchestrator.errors import TargetError
from orchestrator.target.restic import place
from orchestrator.target.restic.backend import objects
from orchestrator.target.restic.backend.base import PATIENCE
from orchestrator.target.restic.backend.directory import DirectoryBackend

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAKEY",
    "AWS_SECRET_ACCESS_KEY": "hush-hush",
    "AWS_SESSION_TOKEN": "token-token",
}
NAMES = (*SECRETS, "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    for name, value in (SECRETS | more).items():
        monkeypatch.setenv(name, value)


def test_a_path_needs_no_environment() -> None:
    backend = place.backend_at("/srv/backup")
    assert isinstance(backend, DirectoryBackend)
    assert backend.place == place.restic_name("/srv/backup") == "/srv/backup"


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_keys_that_are_missing_are_named_and_no_others_told(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    set_all(monkeypatch, **{missing: ""})
    with pytest.raises(TargetError, match=f"s3://bucket/prefix: {missing} not set") as failed:
        place.backend_at("s3://bucket/prefix")
    assert failed.value.code == "target-keys"
    assert not any(secret in str(failed.value) for secret in SECRETS.values())


def test_what_the_environment_says_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr(objects, "s3", lambda *names, **options: seen.update(options, names=names))
    set_all(monkeypatch, AWS_ENDPOINT_URL="http://127.0.0.1:9000", AWS_DEFAULT_REGION="eu-1")
    place.backend_at("s3://bucket/pre/fix/")
    assert seen == {
        "names": ("bucket", "pre/fix"),
        "access_key": "AKIAKEY",
        "secret_key": "hush-hush",
        "session_token": "token-token",
        "endpoint": "http://127.0.0.1:9000",
        "region": "eu-1",
        "patience": PATIENCE,
    }
    set_all(monkeypatch, AWS_REGION="eu-2", AWS_SESSION_TOKEN="", AWS_ENDPOINT_URL="")
    place.backend_at("s3://bucket")
    assert (seen["names"], seen["region"]) == (("bucket", ""), "eu-2")
    assert (seen["session_token"], seen["endpoint"]) == (None, None)


def test_no_secret_is_in_a_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch)
    backend = place.backend_at("s3://bucket/prefix")
    told = repr(backend) + str(backend) + backend.place
    assert not any(secret in told for secret in SECRETS.values())


@pytest.mark.parametrize("wrong", ["relative", "", "s3://", "s3:///prefix", "rest:http://host/", "s3:bucket"])
def test_what_is_no_place(wrong: str) -> None:
    for ask in (place.backend_at, place.restic_name):
        with pytest.raises(TargetError, match="absolute path or s3://") as failed:
            ask(wrong)
        assert failed.value.code == "target-place"


@pytest.mark.parametrize(
    "wrong", ["nonsense", "http://[::", "ftp://host/", "https://AKIAKEY:hush-hush@host", "http://"]
)
def test_what_is_no_server(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    set_all(monkeypatch, AWS_ENDPOINT_URL=wrong)
    for ask in (place.backend_at, place.restic_name):
        with pytest.raises(TargetError, match="AWS_ENDPOINT_URL") as failed:
            ask("s3://bucket/prefix")
        assert failed.value.code == "target-keys"
        assert "hush" not in str(failed.value)


@pytest.mark.parametrize(
    ("where", "endpoint", "name"),
    [
        ("s3://bucket/prefix", "", "s3:https://s3.amazonaws.com/bucket/prefix"),
        ("s3://bucket", "", "s3:https://s3.amazonaws.com/bucket"),
        ("s3://bucket/pre/fix/", "http://127.0.0.1:9000/", "s3:http://127.0.0.1:9000/bucket/pre/fix"),
        ("s3://bucket/prefix", "https://[::1]:9000", "s3:https://[::1]:9000/bucket/prefix"),
    ],
)
def test_what_restic_calls_it(monkeypatch: pytest.MonkeyPatch, where: str, endpoint: str, name: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert place.restic_name(where) == name


def test_what_buckets_need_is_not_loaded_for_a_folder() -> None:
    code = (
        "import sys; import orchestrator.target.mover.worker as worker; worker.backend_at('/srv/backup');"
        " sys.exit('obstore' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
