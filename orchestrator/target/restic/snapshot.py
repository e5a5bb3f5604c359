"""Snapshot files: which tree was backed up when, of which host, under which tags. Pure.

A snapshot's id is the hash of its file, and `restic tag`, `rewrite` and `copy` write another file: what a
snapshot is known by must be in its tags or its content.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from orchestrator.target.restic import envelope, fields
from orchestrator.target.restic.crypto import Key

_NOTE = "vmfleece"


@dataclass(frozen=True, slots=True)
class ResticSnapshot:
    """A snapshot. `identity` is None before it is saved.

    `paths` should be the same for all snapshots of a VM: `restic forget` groups by host and paths. `original` is
    the first id of one that was changed since. `summary` is what restic 0.17 and later show (`Summary`). `note` is
    our own JSON, which restic neither reads nor keeps where it writes a snapshot anew.
    """

    time: datetime
    tree: bytes
    hostname: str
    paths: tuple[str, ...]
    tags: tuple[str, ...] = ()
    username: str = "root"
    parent: bytes | None = None
    original: bytes | None = None
    program_version: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    note: Mapping[str, Any] = field(default_factory=dict)
    identity: bytes | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """What a backup did, as restic says it: files, chunks, and bytes before and after compressing."""

    started: datetime
    ended: datetime
    files_new: int
    files_changed: int
    data_blobs: int
    tree_blobs: int
    added_bytes: int
    added_packed_bytes: int
    total_files: int
    total_bytes: int

    def document(self) -> dict[str, Any]:
        """Return it as it is in the snapshot's file."""
        return {
            "backup_start": fields.write_time(self.started),
            "backup_end": fields.write_time(self.ended),
            "files_new": self.files_new,
            "files_changed": self.files_changed,
            "files_unmodified": 0,
            "dirs_new": 0,
            "dirs_changed": 0,
            "dirs_unmodified": 0,
            "data_blobs": self.data_blobs,
            "tree_blobs": self.tree_blobs,
            "data_added": self.added_bytes,
            "data_added_packed": self.added_packed_bytes,
            "total_files_processed": self.total_files,
            "total_bytes_processed": self.total_bytes,
        }


def seal(snapshot: ResticSnapshot, key: Key) -> bytes:
    """Return a snapshot's file. Raises ValueError for a time without a zone."""
    document: dict[str, Any] = {"time": fields.write_time(snapshot.time)}
    if snapshot.parent is not None:
        document["parent"] = snapshot.parent.hex()
    document |= {
        "tree": snapshot.tree.hex(),
        "paths": list(snapshot.paths),
        "hostname": snapshot.hostname,
        "username": snapshot.username,
    }
    if snapshot.tags:
        document["tags"] = list(snapshot.tags)
    if snapshot.original is not None:
        document["original"] = snapshot.original.hex()
    if snapshot.program_version:
        document["program_version"] = snapshot.program_version
    if snapshot.summary:
        document["summary"] = dict(snapshot.summary)
    if snapshot.note:
        document[_NOTE] = dict(snapshot.note)
    return envelope.seal(key, document)


def open_sealed(stored: bytes, key: Key, *, identity: bytes, file: str) -> ResticSnapshot:
    """Read a snapshot's file. Raises Damaged."""
    envelope.check_name(stored, identity=identity, file=file)
    document = envelope.open_sealed(key, stored, file=file)
    return ResticSnapshot(
        time=document.time("time"),
        tree=document.identity("tree"),
        hostname=document.text("hostname", ""),
        paths=document.texts("paths"),
        tags=document.texts("tags"),
        username=document.text("username", ""),
        parent=document.identity("parent") if document.has("parent") else None,
        original=document.identity("original") if document.has("original") else None,
        program_version=document.text("program_version", ""),
        summary=document.mapping("summary"),
        note=document.mapping(_NOTE),
        identity=identity,
    )
