"""What a snapshot in a repository says of itself: a note in restic's snapshot file, `vm.json` beside the disks.

The note is what a list needs, so that no more than the small snapshot files is read for one. restic leaves it out
where it writes such a file anew (`tag`, `rewrite`, `copy`); `vm.json` holds the same, and more. Pure.
Shapes: docs/repository.md.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.target import extra_files
from orchestrator.target.base import Snapshot, SnapshotDisk
from orchestrator.target.extra_files import ExtraFile
from orchestrator.target.restic.errors import Damaged
from orchestrator.target.restic.snapshot import ResticSnapshot

VERSION = 1
OURS = "vmfleece"
PROTECTED = "protected"
BESIDE = frozenset({"rewrite", "repaired"})
"""restic tags with these what it made of a snapshot that it kept."""
RESTIC_ID = "restic"
"""In the details of a listed snapshot: its id as restic has it, in hex."""


def note(snapshot: Snapshot) -> dict[str, Any]:
    """What goes into restic's snapshot file."""
    return {
        "version": VERSION,
        "snapshot": snapshot.id,
        "kind": snapshot.kind,
        "disks": [
            {
                "disk": disk.disk,
                "file": disk_file(disk.disk),
                "size_bytes": disk.size_bytes,
                "stored_bytes": disk.stored_bytes,
            }
            for disk in snapshot.disks
        ],
        "details": snapshot.details,
    }


def vm_json(snapshot: Snapshot, files: Iterable[ExtraFile]) -> bytes:
    """What goes into `vm.json`."""
    document = {
        "vm": snapshot.vm,
        "created": snapshot.created.isoformat(),
        **note(snapshot),
        extra_files.NAME: extra_files.encode(files),
    }
    return (json.dumps(document, indent=2) + "\n").encode()


def tags(snapshot: Snapshot) -> tuple[str, ...]:
    """What `restic snapshots` shows of it."""
    job = snapshot.details.get("job")
    return (OURS, str(snapshot.kind), *([f"job={job}"] if job else []))


def path(vm: str) -> str:
    """What all of a VM's snapshots give as their path: `restic forget` groups by it."""
    return f"/{vm}"


def may_be_ours(made: ResticSnapshot) -> bool:
    """Whether a snapshot without a note may be one of a VM: what restic wrote anew keeps its host and path."""
    return made.paths == (path(made.hostname),)


def described(made: ResticSnapshot, document: Mapping[str, Any], *, target: str) -> Snapshot:
    """The snapshot that a note or a `vm.json` is of. Raises Damaged."""
    assert made.identity is not None  # noqa: S101  it was read
    try:
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']}, this vmfleece reads {VERSION}")
        return Snapshot(
            id=str(document["snapshot"]),
            target=target,
            vm=made.hostname,
            created=made.time,
            kind=str(document["kind"]),
            disks=tuple(
                SnapshotDisk(str(disk["disk"]), int(disk["size_bytes"]), None, int(disk["stored_bytes"]))
                for disk in document["disks"]
            ),
            details=dict(document["details"]) | {RESTIC_ID: made.identity.hex()},
            protected=PROTECTED in made.tags,
        )
    except (KeyError, TypeError, ValueError) as error:
        what = f"what it says of its VM cannot be understood: {type(error).__name__}: {error}"
        raise Damaged(f"snapshot {made.identity.hex()}", what) from error


def read_vm_json(content: bytes, *, file: str) -> dict[str, Any]:
    """A `vm.json`. Raises Damaged."""
    try:
        document = json.loads(content)
    except ValueError as error:
        raise Damaged(file, str(error)) from error
    if not isinstance(document, dict):
        raise Damaged(file, "it is no object")
    return document


def disk_file(disk: str) -> str:
    """The name of a disk's content in the snapshot."""
    return f"{disk}.raw"
