"""Damaging a file of SQLite's, as a torn write or a bad disk does."""

from pathlib import Path

from tests.faults.plan import Damage

GARBAGE = bytes(range(1, 256)) * 64


def damage(path: Path, how: Damage) -> None:
    """Do it to the file, or to its write-ahead log."""
    match how:
        case Damage.GARBAGE:
            with path.open("ab") as file:
                file.write(GARBAGE)
        case Damage.OVERWRITTEN:
            half = path.stat().st_size // 2
            with path.open("r+b") as file:
                file.seek(half)
                file.write((GARBAGE * (half // len(GARBAGE) + 1))[:half])
        case Damage.TRUNCATED:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2 + 100)
        case Damage.EMPTY:
            path.write_bytes(b"")
        case Damage.LOG:
            with path.with_name(f"{path.name}-wal").open("ab") as file:
                file.write(GARBAGE)
