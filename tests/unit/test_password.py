import os
from pathlib import Path

import pytest

from orchestrator.errors import TargetError
from orchestrator.target.repository.password import password_path, read_password


def written(tmp_path: Path, content: bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "main.password"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"hidden", "hidden"),
        (b"hidden\n", "hidden"),
        (b"hidden\r\n\n", "hidden"),
        (b" two words \n", "two words"),
        (b"\xef\xbb\xbfh\xc3\xafdden\n", "h\u00efdden"),
    ],
)
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_a_password_is_read_as_restic_reads_it(tmp_path: Path, content: bytes, password: str, mode: int) -> None:
    assert read_password("main", written(tmp_path, content, mode)) == password


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        (b"", 0o600, "is empty"),
        (b" \n\n", 0o600, "is empty"),
        (b"hidden\nhidden\n", 0o600, "has more than one line"),
        (b"hidden\xff", 0o600, "is not UTF-8"),
        (b"hidden", 0o604, "can be read by others"),
        (b"hidden", 0o644, "can be read by others"),
    ],
)
def test_what_no_password_can_be_in(tmp_path: Path, content: bytes, mode: int, problem: str) -> None:
    path = written(tmp_path, content, mode)
    with pytest.raises(TargetError, match=f"the password file of target main {problem}: {path}") as caught:
        read_password("main", path)
    assert caught.value.code == "password-file"
    assert caught.value.hint
    assert "hidden" not in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "loop").symlink_to("loop")
    for name, problem in (
        ("absent", "is not there"),
        (".", "is no regular file"),
        ("pipe", "is no regular file"),
        ("loop", "cannot be read"),
    ):
        with pytest.raises(TargetError, match=f"the password file of target main {problem}") as caught:
            read_password("main", tmp_path / name)
        assert caught.value.code == "password-file"


def test_without_a_file_it_is_the_credential_of_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(TargetError, match="has no password_file") as caught:
        read_password("main", None)
    assert caught.value.code == "password-file"
    assert "target.main.password_file" in caught.value.hint
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    path = written(tmp_path, b"hidden\n")
    assert password_path("main", None) == path
    assert read_password("main", None) == "hidden"
    assert password_path("main", Path("/elsewhere")) == Path("/elsewhere")
