"""Making a repository, and getting into one: passwords, and the key that each of them opens. All of it blocks."""

import contextlib
import hashlib
import os
import pwd
import socket
from dataclasses import dataclass
from datetime import UTC, datetime

from orchestrator.errors import TargetError
from orchestrator.target.restic import config, crypto, keys
from orchestrator.target.restic.backend.base import CONFIG, Backend, File, Kind
from orchestrator.target.restic.config import RepositoryConfig
from orchestrator.target.restic.crypto import Cost, Key
from orchestrator.target.restic.errors import Damaged, FileExists, FileMissing, NoRepository
from orchestrator.target.restic.keys import KeyInfo, Origin


@dataclass(frozen=True, slots=True)
class Opened:
    """What opens all else. `key_file` is the id of the key file that the password opened."""

    key: Key
    config: RepositoryConfig
    key_file: bytes


def this_host() -> str:
    """Return the name of this host as locks and keys have it."""
    return socket.gethostname()


def this_user() -> str:
    """Return who we are as locks and keys have it."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def create(backend: Backend, password: str, *, cost: Cost | None = None) -> Opened:
    """Make a repository. TargetError's code is "repository-exists" if there is one."""
    exists = TargetError(
        f"there is a repository at {backend.place} already",
        hint="if it is yours, it can be backed up to as it is; else give the target another place",
        code="repository-exists",
    )
    try:
        backend.read(CONFIG)
    except FileMissing:
        pass
    else:
        raise exists
    backend.create()
    made, key = config.generate(), crypto.generate()
    key_file = add_password(backend, key, password, cost=cost)
    try:
        backend.save(CONFIG, config.seal(made, key), replace=False)
    except FileExists:
        backend.remove(File(Kind.KEYS, key_file))
        raise exists from None
    return Opened(key, made, key_file)


def open_with(backend: Backend, password: str) -> Opened:
    """Open a repository, trying all keys. Raises NoRepository, WrongPassword, Damaged, BackendError."""
    stored = read_config(backend)
    files = [listed.file for listed in backend.list(Kind.KEYS)]
    key_file, key = keys.unlock(password, ((file.path, file.identity, backend.read(file)) for file in files))
    return Opened(key, config.open_sealed(stored, key), key_file)


def check_same(backend: Backend, opened: Opened) -> None:
    """Raise Damaged if the config is not what it was: a repository made anew has another key, too.

    Raises NoRepository, BackendError.
    """
    try:
        same = config.open_sealed(read_config(backend), opened.key) == opened.config
    except Damaged:
        same = False
    if not same:
        raise Damaged(config.FILE, "it is not that of the repository that was opened: was one made anew there?")


def read_config(backend: Backend) -> bytes:
    """Return the file `config`. Raises NoRepository, BackendError."""
    try:
        return backend.read(CONFIG)
    except FileMissing:
        raise NoRepository(
            f"there is no repository at {backend.place}",
            hint="check that it is mounted; `vmfleece target init` makes one",
        ) from None


def add_password(backend: Backend, key: Key, password: str, *, cost: Cost | None = None) -> bytes:
    """Have another password open the repository, too; return its key file's id."""
    origin = Origin(datetime.now(UTC), this_user(), this_host())
    content = keys.make(password, key, origin, cost=cost)
    identity = hashlib.sha256(content).digest()
    backend.save(File(Kind.KEYS, identity), content)
    return identity


def list_keys(backend: Backend, opened: Opened) -> list[KeyInfo]:
    """Return the keys that there are, oldest first, but for those whose files are damaged."""
    found = []
    for listed in backend.list(Kind.KEYS):
        with contextlib.suppress(FileMissing, Damaged):
            origin = keys.parse(backend.read(listed.file), file=listed.file.path).origin
            current = listed.file.identity == opened.key_file
            name = listed.file.identity.hex()
            found.append(KeyInfo(name, origin.username, origin.hostname, origin.created, current))
    return sorted(found, key=lambda key: (key.created, key.id))


def remove_password(backend: Backend, opened: Opened, key_file: bytes) -> None:
    """Have a password open it no more. TargetError's code is "key-in-use" for the one that it is open with.

    So it is for the last one: nobody could open the repository any more.
    """
    if key_file == opened.key_file:
        raise TargetError(
            "the key that the repository is open with cannot be removed",
            hint="use another password first (password_file of the target)",
            code="key-in-use",
        )
    if not any(listed.file.identity != key_file for listed in backend.list(Kind.KEYS)):
        raise TargetError(
            "the last key cannot be removed: nobody could open the repository any more",
            hint="add another one first",
            code="key-in-use",
        )
    backend.remove(File(Kind.KEYS, key_file))
