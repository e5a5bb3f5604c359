"""`manifest.json` of a snapshot folder: what is in it, when and how it was made.

Read back as written; unknown keys are kept for a later version's sake. Shape: docs/images-target.md.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.errors import TargetError
from orchestrator.target.base import HashOf, Snapshot, SnapshotDisk

NAME = "manifest.json"
VERSION = 2
_READS = (1, 2)
"""The first hashed the content of disks that stand alone."""


def encode(snapshot: Snapshot) -> bytes:
    """The file's content."""
    document = {
        "version": VERSION,
        "snapshot": snapshot.id,
        "vm": snapshot.vm,
        "created": snapshot.created.isoformat(),
        "kind": snapshot.kind,
        "disks": [
            {
                "disk": disk.disk,
                "file": disk_file(disk.disk),
                "format": "qcow2",
                "size_bytes": disk.size_bytes,
                "stored_bytes": disk.stored_bytes,
                "sha256": disk.sha256,
                "sha256_of": disk.sha256_of,
                "parent": disk.parent,
            }
            for disk in snapshot.disks
        ],
        "details": snapshot.details,
    }
    return (json.dumps(document, indent=2) + "\n").encode()


def rewritten(path: Path, snapshot: Snapshot) -> bytes:
    """The file's content with what is said of the snapshot now; what else is in it is kept. Raises OSError."""
    old, new = json.loads(path.read_bytes()), json.loads(encode(snapshot))
    new["disks"] = [before | now for before, now in zip(old["disks"], new["disks"], strict=True)]
    return (json.dumps(old | new, indent=2) + "\n").encode()


def read(path: Path, *, target: str) -> Snapshot:
    """The snapshot that a manifest describes. Raises TargetError if it cannot be read, or is of a later version.

    Or if it is in another folder than its own.
    """
    try:
        document: Any = json.loads(path.read_bytes())
        if document["version"] not in _READS:
            raise TargetError(
                f"{path} is of version {document['version']}; this vmfleece reads 1 and 2",
                hint="use the vmfleece that wrote it, or a newer one",
                code="manifest-version",
            )
        place = f"{path.parent.parent.name}/{path.parent.name}"
        if document["snapshot"] != place:  # its id is where it is extracted from, and what is removed
            raise TargetError(
                f"{path} is of snapshot {document['snapshot']}, not {place}",
                hint="move its folder back: it was renamed or copied",
                code="manifest-misplaced",
            )
        return Snapshot(
            id=document["snapshot"],
            target=target,
            vm=document["vm"],
            created=datetime.fromisoformat(document["created"]),
            kind=document["kind"],
            disks=tuple(
                SnapshotDisk(
                    disk["disk"],
                    disk["size_bytes"],
                    disk["sha256"],
                    disk["stored_bytes"],
                    disk.get("parent"),
                    _hash_of(disk),
                )
                for disk in document["disks"]
            ),
            details=document["details"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"cannot read {path}: {type(error).__name__}: {error}",
            hint="restore another snapshot; this one's qcow2 files can still be read with qemu-img",
            code="manifest-unreadable",
        ) from error


def _hash_of(disk: dict[str, Any]) -> HashOf:
    if "sha256_of" in disk:
        return HashOf(disk["sha256_of"])
    return HashOf.FILE if disk.get("parent") else HashOf.CONTENT


def disk_file(disk: str) -> str:
    """The name of a disk's image in the snapshot's folder."""
    return f"{disk}.qcow2"


def backing_name(disk: str, parent: str) -> str:
    """What a disk's image gives as its backing file: relative, so that a VM's folder can be moved."""
    return f"../{parent.rpartition('/')[2]}/{disk_file(disk)}"
