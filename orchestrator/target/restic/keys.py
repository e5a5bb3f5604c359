"""Key files: the repository's key, sealed with what a password gives. Pure, but deriving blocks.

A repository has one master key and any number of key files; each opens with a password of its own. So a password
is added or taken away without anything else being written anew.
"""

import base64
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from orchestrator.target.restic import crypto, envelope, fields
from orchestrator.target.restic.crypto import Cost, Key
from orchestrator.target.restic.errors import Damaged, WrongPassword
from orchestrator.target.restic.fields import UINT32


@dataclass(frozen=True, slots=True)
class Origin:
    """Who made a key file, and when: not secret, and not checked by anybody."""

    created: datetime
    username: str
    hostname: str


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key of a repository. `id` is its file's name, `current` whether the repository is open with it."""

    id: str
    username: str
    hostname: str
    created: datetime
    current: bool


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A key file's content. `data` is the sealed master key."""

    file: str
    origin: Origin
    cost: Cost
    salt: bytes
    data: bytes


def make(password: str, master: Key, origin: Origin, *, cost: Cost | None = None) -> bytes:
    """Return a new key file that opens with `password`. Raises ValueError for an empty password; blocks."""
    if not password:
        raise ValueError("an empty password")
    cost, salt = cost or Cost(), os.urandom(crypto.SALT_BYTES)
    sealed = crypto.derive(password, salt, cost).seal(_master_json(master))
    return envelope.dump(
        {
            "created": fields.write_time(origin.created),
            "username": origin.username,
            "hostname": origin.hostname,
            "kdf": "scrypt",
            "N": cost.n,
            "r": cost.r,
            "p": cost.p,
            "salt": base64.b64encode(salt).decode(),
            "data": base64.b64encode(sealed).decode(),
        }
    )


def parse(stored: bytes, *, file: str) -> KeyFile:
    """Read a key file. Raises Damaged, also for parameters that would take all memory or time there is."""
    document = fields.parse(stored, file=file)
    if document.text("kdf") != "scrypt":
        raise Damaged(file, "its key derivation is not scrypt")
    cost = Cost(*(document.integer(name, largest=UINT32) for name in ("N", "r", "p")))
    salt, data = document.binary("salt"), document.binary("data")
    problem = cost.problem()
    if len(salt) != crypto.SALT_BYTES:
        problem = f"its salt has {len(salt)} bytes, not {crypto.SALT_BYTES}"
    if problem:
        raise Damaged(file, problem)
    origin = Origin(document.time("created"), document.text("username", ""), document.text("hostname", ""))
    return KeyFile(file, origin, cost, salt, data)


def unlock(password: str, stored: Iterable[tuple[str, bytes, bytes]]) -> tuple[bytes, Key]:
    """Return the id of the first key file that opens, and the master key; blocks for each that does not.

    `stored`: name, id and content of key files. Raises WrongPassword, or Damaged if none opens and one is damaged.
    """
    damaged, count = None, 0
    for count, (file, identity, content) in enumerate(stored, start=1):  # noqa: B007  how many there were
        try:
            envelope.check_name(content, identity=identity, file=file)
            master = open_with(password, parse(content, file=file))
        except Damaged as error:
            damaged = damaged or error
            continue
        if master is not None:
            return identity, master
    if damaged is not None:
        raise damaged
    raise WrongPassword(
        f"none of the repository's {count} keys opens with the password",
        hint="check the target's password file: its first line, without the end of the line, is the password",
    )


def open_with(password: str, key_file: KeyFile) -> Key | None:
    """Return the master key, or None if the password is another one; blocks. Raises Damaged."""
    user_key = crypto.derive(password, key_file.salt, key_file.cost)
    try:
        plain = user_key.open(key_file.data, file=key_file.file)
    except Damaged:
        return None
    document = fields.parse(plain, file=key_file.file)
    try:
        mac = document.object("mac")
        return Key(encrypt=document.binary("encrypt"), mac_k=mac.binary("k"), mac_r=mac.binary("r"))
    except ValueError:
        raise Damaged(key_file.file, "the key in it has a wrong length") from None


def _master_json(master: Key) -> bytes:
    parts = {"k": master.mac_k, "r": master.mac_r}
    mac = {name: base64.b64encode(value).decode() for name, value in parts.items()}
    return envelope.dump({"mac": mac, "encrypt": base64.b64encode(master.encrypt).decode()})
