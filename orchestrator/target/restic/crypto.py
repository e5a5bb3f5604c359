"""Sealing: AES-256 in counter mode, then Poly1305-AES over the ciphertext. Pure.

What is sealed is `nonce (16) || ciphertext || tag (16)`. The tag is Poly1305 of the ciphertext with the one-time
key `r || AES-128_k(nonce)`. One nonce is never used twice with one key: each is 16 random bytes.
No secret is in a repr or an error.
"""

import hashlib
import os
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB
from cryptography.hazmat.primitives.poly1305 import Poly1305

from orchestrator.target.restic.errors import Damaged

NONCE_BYTES = 16
TAG_BYTES = 16
OVERHEAD_BYTES = NONCE_BYTES + TAG_BYTES
SALT_BYTES = 64
_SPARE_BYTES = 15
"""What update_into wants to have beside what it writes: a block of the cipher, but one byte."""
_MEMORY_BYTES = 1 << 30
_WORK = 1 << 26
"""About 15 seconds; restic's own keys take half of one."""


class Key:
    """Seals and opens. May be used by several threads at once."""

    __slots__ = ("encrypt", "mac_k", "mac_r")

    def __init__(self, *, encrypt: bytes, mac_k: bytes, mac_r: bytes) -> None:
        """Lengths in bytes: 32, 16, 16. Raises ValueError."""
        if (len(encrypt), len(mac_k), len(mac_r)) != (32, 16, 16):
            raise ValueError("a key has 32, 16 and 16 bytes")
        self.encrypt, self.mac_k, self.mac_r = encrypt, mac_k, mac_r

    def __repr__(self) -> str:
        return "<Key>"

    def __reduce__(self) -> str:
        raise TypeError("a key is not to be written anywhere")

    def seal(self, plain: bytes | bytearray | memoryview) -> bytearray:
        """Return `plain`, encrypted and authenticated; 32 bytes longer."""
        nonce = os.urandom(NONCE_BYTES)
        sealed = bytearray(OVERHEAD_BYTES + len(plain) + _SPARE_BYTES)
        sealed[:NONCE_BYTES] = nonce
        # In place: joining the parts costs more time than all of the encryption.
        with memoryview(sealed) as view:
            end = NONCE_BYTES + Cipher(AES(self.encrypt), CTR(nonce)).encryptor().update_into(
                plain, view[NONCE_BYTES:]
            )
            view[end : end + TAG_BYTES] = Poly1305.generate_tag(self._one_time(nonce), view[NONCE_BYTES:end])
        del sealed[end + TAG_BYTES :]
        return sealed

    def open(self, sealed: bytes | bytearray | memoryview, *, file: str) -> bytes:
        """Return what was sealed. Raises Damaged that names `file`, also for another key's seal."""
        if len(sealed) < OVERHEAD_BYTES:
            raise Damaged(file, f"{len(sealed)} bytes where at least {OVERHEAD_BYTES} are sealed")
        view = memoryview(sealed)
        nonce, ciphertext, tag = bytes(view[:NONCE_BYTES]), view[NONCE_BYTES:-TAG_BYTES], view[-TAG_BYTES:]
        try:
            Poly1305.verify_tag(self._one_time(nonce), ciphertext, bytes(tag))
        except InvalidSignature:
            raise Damaged(file, "its authentication code does not match") from None
        return Cipher(AES(self.encrypt), CTR(nonce)).decryptor().update(ciphertext)

    def _one_time(self, nonce: bytes) -> bytes:
        masked = Cipher(AES(self.mac_k), ECB()).encryptor().update(nonce)  # noqa: S305  Poly1305-AES is one block
        return self.mac_r + masked


def generate() -> Key:
    """Return a new random key."""
    return Key(encrypt=os.urandom(32), mac_k=os.urandom(16), mac_r=os.urandom(16))


@dataclass(frozen=True, slots=True)
class Cost:
    """What scrypt costs: `128 * n * r` bytes of memory, and time in proportion to `n * r * p`."""

    n: int = 32768
    r: int = 8
    p: int = 8

    def problem(self) -> str:
        """Why these are no parameters to derive a key with, or "". They may be an attacker's."""
        if self.n < 2 or self.n & (self.n - 1):
            return f"scrypt's N is {self.n}, which is no power of two"
        if self.r < 1 or self.p < 1:
            return f"scrypt's r and p are {self.r} and {self.p}"
        if 128 * self.n * self.r > _MEMORY_BYTES or self.n * self.r * self.p > _WORK:
            return f"scrypt's N, r and p are {self.n}, {self.r} and {self.p}: too expensive"
        return ""


def derive(password: str, salt: bytes, cost: Cost) -> Key:
    """Return the key that a password and a salt of 64 bytes give; blocks for about half a second.

    Raises ValueError for parameters that `Cost.problem` objects to.
    """
    if cost.problem() or len(salt) != SALT_BYTES:
        raise ValueError(cost.problem() or f"a salt of {len(salt)} bytes")
    derived = hashlib.scrypt(
        password.encode(), salt=salt, n=cost.n, r=cost.r, p=cost.p, maxmem=2 * _MEMORY_BYTES - 1, dklen=64
    )
    return Key(encrypt=derived[:32], mac_k=derived[32:48], mac_r=derived[48:])
