"""The token that by TCP whoever changes something must have: one line of a file, or systemd's credential."""

from pathlib import Path

from orchestrator.errors import VmfleeceError
from orchestrator.secret import credential, read_line

CREDENTIAL = "api.token"
LEAST_LETTERS = 16


class TokenUnusable(VmfleeceError):
    """There is a token file that cannot be used."""

    code = "token-file"


def read_token(token_file: Path | None) -> str | None:
    """Return the token, or None if none is configured. Blocks. Raises TokenUnusable."""
    path = token_file or credential(CREDENTIAL)
    if path is None:
        return None
    token = read_line(path, _unusable, missing=f"make one: (umask 077; openssl rand -hex 32 > {path})")
    if len(token) < LEAST_LETTERS or not token.isascii():
        raise _unusable(f"is no good token: {path}", f"at least {LEAST_LETTERS} letters and digits, at random")
    return token


def _unusable(problem: str, hint: str) -> TokenUnusable:
    return TokenUnusable(f"the token file {problem}", hint=hint)
