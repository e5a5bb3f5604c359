"""The repository's `config`: its version, its id, and the polynomial that restic's own chunker uses. Pure.

The polynomial over GF(2), an integer whose bits are its coefficients, must be irreducible and of degree 53: restic
checks that whenever it opens the repository. Ours do not depend on it, as our chunks have a fixed length.
"""

import os
import secrets
from dataclasses import dataclass

from orchestrator.target.restic import envelope
from orchestrator.target.restic.crypto import Key
from orchestrator.target.restic.errors import Damaged, OtherVersion

FILE = "config"
VERSION = 2
DEGREE = 53


@dataclass(frozen=True, slots=True)
class RepositoryConfig:
    """What a repository says of itself. `identity`: 32 bytes, for caches."""

    version: int
    identity: bytes
    polynomial: int


def generate() -> RepositoryConfig:
    """Return the config of a new repository."""
    while True:
        polynomial = 1 << DEGREE | secrets.randbits(DEGREE) | 1
        if irreducible(polynomial):
            return RepositoryConfig(VERSION, os.urandom(32), polynomial)


def seal(config: RepositoryConfig, key: Key) -> bytes:
    """Return the file; it is never compressed."""
    document = {
        "version": config.version,
        "id": config.identity.hex(),
        "chunker_polynomial": f"{config.polynomial:x}",
    }
    return envelope.seal(key, document, compressed=False)


def open_sealed(stored: bytes, key: Key) -> RepositoryConfig:
    """Read the file. Raises Damaged, and OtherVersion of the format."""
    document = envelope.open_sealed(key, stored, file=FILE)
    version = document.integer("version")
    if version != VERSION:
        raise OtherVersion(version, VERSION)
    try:
        polynomial = int(document.text("chunker_polynomial"), 16)
    except ValueError:
        polynomial = 0
    if polynomial >> DEGREE != 1 or not irreducible(polynomial):
        raise Damaged(FILE, f"its chunker polynomial is not irreducible of degree {DEGREE}")
    return RepositoryConfig(version, document.identity("id"), polynomial)


def irreducible(polynomial: int) -> bool:
    """Whether a polynomial over GF(2) of degree 2 or more has no factors: Ben-Or's test.

    It has one of degree i or less if it has one in common with `x^(2^i) - x`, and the smallest is at most half.
    """
    power = 0b10
    for _ in range((polynomial.bit_length() - 1) // 2):
        power = _remainder(_square(power), polynomial)
        if _common(polynomial, power ^ 0b10) != 1:
            return False
    return True


def _square(polynomial: int) -> int:
    """Squaring over GF(2) puts a zero between all bits."""
    return int(f"{polynomial:b}", 4)


def _remainder(dividend: int, divisor: int) -> int:
    while (shift := dividend.bit_length() - divisor.bit_length()) >= 0:
        dividend ^= divisor << shift
    return dividend


def _common(one: int, other: int) -> int:
    while other:
        one, other = other, _remainder(one, other)
    return one
