"""A bucket of an object store, S3 before all.

An object is there as a whole once it is put, and nothing is left of one that was not. What a store answers too
late or refuses for now is tried again by the library, as it was configured, before it becomes an error here.
The library's stores in memory and in a folder are for tests: what they save does not survive power loss.
"""

import contextlib
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import obstore
from obstore import exceptions
from obstore.store import S3Store

from orchestrator.target.restic.backend.base import PATIENCE, Backend, Content, File, Kind, Stored, file_of
from orchestrator.target.restic.errors import BackendError, FileExists, FileMissing, Unreachable

if TYPE_CHECKING:
    from obstore.store import ObjectStore, S3Config  # stubs' only

_REQUEST_TIMEOUT = timedelta(minutes=5)
"""Of one request: a pack of 64 MiB at 250 KiB/s."""


class ObjectsBackend(Backend):
    """See the contract. `store` must start where the repository does."""

    def __init__(self, place: str, store: "ObjectStore") -> None:
        self.place = place
        self._store = store

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.place}>"

    def create(self) -> None:
        pass

    def save(self, file: File, content: Content, *, replace: bool = True) -> None:
        with self._explained(file.path):
            # In one request: parts that were put before we died would be listed by nobody, and cost money.
            mode: Literal["overwrite", "create"] = "overwrite" if replace else "create"
            obstore.put(self._store, file.path, content, mode=mode, use_multipart=False)

    def read(self, file: File, *, offset: int = 0, length: int | None = None) -> bytes:
        with self._explained(file.path):
            if length is None and offset == 0:
                return bytes(obstore.get(self._store, file.path).bytes())
            if length:
                with contextlib.suppress(exceptions.GenericError):  # what it says of a range beyond the end
                    return bytes(obstore.get_range(self._store, file.path, start=offset, end=offset + length))
            size = obstore.head(self._store, file.path)["size"]
            end = size if length is None else min(size, offset + length)
            return bytes(obstore.get_range(self._store, file.path, start=offset, end=end)) if offset < end else b""

    def list(self, kind: Kind) -> Iterable[Stored]:
        found: list[Stored] = []
        with self._explained(kind):
            for page in obstore.list(self._store, f"{kind}/", chunk_size=1000):
                for item in page:
                    file = file_of(kind, item["path"].rpartition("/")[2])
                    if file is not None and file.path == item["path"]:
                        found.append(Stored(file, item["size"]))
        return found

    def remove(self, file: File) -> None:
        with contextlib.suppress(FileMissing), self._explained(file.path):
            obstore.delete(self._store, file.path)

    def clean(self) -> int:
        return 0

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        """Turn what the library raises into a BackendError, without its texts: they may hold whole requests."""
        try:
            yield
        except FileNotFoundError:
            raise FileMissing(f"there is no {path} in {self.place}") from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            raise FileExists(f"{path} in {self.place} is there already") from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError):
            raise BackendError(
                f"{self.place} refused access to {path}", hint="check the keys, and what they are allowed"
            ) from None
        except (exceptions.BaseError, OSError) as error:
            problem = f"{self.place} failed at {path}: {type(error).__name__}"
            raise Unreachable(problem, hint="check that the server is there, and the bucket") from None


def s3(
    bucket: str,
    prefix: str,
    *,
    access_key: str,
    secret_key: str,
    session_token: str | None = None,
    endpoint: str | None = None,
    region: str = "us-east-1",
    patience: timedelta = PATIENCE,
) -> ObjectsBackend:
    """A bucket of S3's, or of a server that speaks as S3 does at `endpoint`. Does not connect yet.

    What fails and may be repeated is, for as long as `patience`.
    """
    configured: S3Config = {
        "region": region,
        "access_key_id": access_key,
        "secret_access_key": secret_key,
    }
    if session_token:
        configured["session_token"] = session_token
    if endpoint:
        configured["endpoint"] = endpoint
    store = S3Store(
        bucket,
        prefix=prefix or None,
        config=configured,
        client_options={
            "timeout": _REQUEST_TIMEOUT,
            "allow_http": bool(endpoint and endpoint.startswith("http:")),
        },
        retry_config={"max_retries": 10, "retry_timeout": patience},
    )
    return ObjectsBackend(f"s3://{bucket}/{prefix}", store)
