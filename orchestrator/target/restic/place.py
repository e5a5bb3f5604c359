"""Where repositories lie: an absolute path, or `s3://BUCKET/PREFIX`, whose server and keys are in the environment.

    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY    as restic and all others have them
    AWS_SESSION_TOKEN                           where the keys are temporary
    AWS_ENDPOINT_URL                            the server, if it is not Amazon's
    AWS_REGION, or AWS_DEFAULT_REGION           us-east-1 otherwise

No secret is in a message or a repr.
"""

import os
import re
from datetime import timedelta
from pathlib import Path

from orchestrator.errors import TargetError
from orchestrator.target.restic.backend.base import PATIENCE, Backend
from orchestrator.target.restic.backend.directory import DirectoryBackend

_S3 = "s3://"
_AMAZON = "https://s3.amazonaws.com"
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?/?|https?://\[[0-9a-fA-F:.]+\](:[0-9]{1,5})?/?")
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def backend_at(place: str, *, patience: timedelta = PATIENCE) -> Backend:
    """Return the place of a repository, without looking whether it is there.

    For as long as `patience` a server is asked again before it is Unreachable. TargetError's code is "target-keys"
    if the environment lacks keys or has a server that cannot be one, "target-place" if `place` is neither.
    """
    if place.startswith("/"):
        return DirectoryBackend(Path(place))
    bucket, prefix = _parts(place)
    missing = [name for name in _KEYS if not os.environ.get(name)]
    if missing:
        raise TargetError(
            f"there are no keys for {place}: {' and '.join(missing)} not set",
            hint="set them in the environment of whoever runs vmfleece, the daemon's too",
            code="target-keys",
        )
    from orchestrator.target.restic.backend import objects  # noqa: PLC0415  its library takes time to load

    access_key, secret_key = (os.environ[name] for name in _KEYS)
    return objects.s3(
        bucket,
        prefix,
        access_key=access_key,
        secret_key=secret_key,
        session_token=os.environ.get("AWS_SESSION_TOKEN") or None,
        endpoint=_endpoint(),
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        patience=patience,
    )


def restic_name(place: str) -> str:
    """Return what restic itself calls a place (RESTIC_REPOSITORY). Raises as `backend_at`, but for keys."""
    if place.startswith("/"):
        return place
    bucket, prefix = _parts(place)
    return f"s3:{(_endpoint() or _AMAZON).rstrip('/')}/{bucket}/{prefix}".rstrip("/")


def _parts(place: str) -> tuple[str, str]:
    bucket, _, prefix = place.removeprefix(_S3).partition("/")
    if not place.startswith(_S3) or not bucket:
        raise TargetError(
            f"{place!r} is no place of a repository",
            hint="it must be an absolute path or s3://BUCKET/PREFIX",
            code="target-place",
        )
    return bucket, prefix.rstrip("/")


def _endpoint() -> str | None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and not _ENDPOINT.fullmatch(endpoint):  # the library panics, and somebody may have put keys there
        raise TargetError(
            "AWS_ENDPOINT_URL in the environment is no server's address",
            hint="it must be as https://HOST or https://HOST:PORT",
            code="target-keys",
        )
    return endpoint or None
