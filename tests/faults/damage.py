"""Damaging a file of SQLite's, as a torn write or a bad disk does."""

from pathlib import Path

from tests.faults.plan import Damage

PAGE_BYTES = 4096
GARBAGE = bytes(range(1, 256)) * 33


def damage(path: Path, how: Damage) -> None:
    """Do it to the file, or to its write-ahead log."""
    size_bytes = int.from_bytes(path.read_bytes()[28:32]) * PAGE_BYTES
    match how:
        case Damage.GARBAGE:
            with path.open("ab") as file:
                file.write(GARBAGE)
        case Damage.OVERWRITTEN:
            with path.open("r+b") as file:
                file.seek(max(0, size_bytes - PAGE_BYTES))
                file.write(GARBAGE[:PAGE_BYTES])
        case Damage.TRUNCATED:
            with path.open("r+b") as file:
                file.truncate(size_bytes // 2)
        case Damage.EMPTY:
            path.write_bytes(b"")
        case Damage.LOG:
            with path.with_name(f"{path.name}-wal").open("ab") as file:
                file.write(GARBAGE)
