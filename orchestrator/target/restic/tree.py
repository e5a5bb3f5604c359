"""Trees: what a folder holds, as JSON that is to the byte what Go's encoder makes of restic's structure. Pure.

A tree's id is the hash of its JSON, and some of restic's commands (`rewrite`) compare what they would write with
what is there. So: no spaces, restic's order of fields, Go's escapes, one newline at the end, names sorted by
their bytes. Names are as strconv.Quote has them, without the quotes. Ours are ASCII, so only quotes and
backslashes differ.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orchestrator.target.restic import fields
from orchestrator.target.restic.errors import Damaged
from orchestrator.target.restic.fields import ID_BYTES, UINT64, Fields

_GO_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


@dataclass(frozen=True, slots=True)
class FileContent:
    """How long a file is, and the ids of its chunks in their order."""

    size_bytes: int
    chunks: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class FileNode:
    """A regular file, of root's and readable to nobody else."""

    name: str
    content: FileContent
    modified: datetime


@dataclass(frozen=True, slots=True)
class Node:
    """What is read of an entry: of files their content, of folders their subtree, of others neither."""

    name: str
    kind: str
    content: FileContent
    subtree: bytes | None


def quote(name: str) -> str:
    """Return a file's name as a tree has it. Raises ValueError for names that we do not write."""
    if not name or name in (".", "..") or not name.isascii() or not name.isprintable() or "/" in name:
        raise ValueError(f"no name for a file in a snapshot: {name!r}")
    return name.replace("\\", "\\\\").replace('"', '\\"')


def encode(files: Iterable[FileNode]) -> bytes:
    """Return a tree's JSON. Raises ValueError for names and times that cannot be in one, or a name twice."""
    by_name = sorted(files, key=lambda file: file.name)
    names = [file.name for file in by_name]
    if len(set(names)) != len(names):
        raise ValueError(f"a name twice: {names}")
    return b'{"nodes":[' + b",".join(_encode_node(file) for file in by_name) + b"]}\n"


def decode(text: bytes, *, file: str) -> list[Node]:
    """Return a tree's entries. Raises Damaged. What restic wrote of other kinds and fields is allowed."""
    nodes = [_decode_node(node) for node in fields.parse(text, file=file).objects("nodes")]
    names = [node.name for node in nodes]
    if len(set(names)) != len(names):
        raise Damaged(file, "it has a name twice")
    return nodes


def _encode_node(node: FileNode) -> bytes:
    when = fields.write_time(node.modified)
    head: Mapping[str, Any] = {
        "name": quote(node.name),
        "type": "file",
        "mode": 0o600,
        "mtime": when,
        "atime": when,
        "ctime": when,
        "uid": 0,
        "gid": 0,
        "user": "root",
        "group": "root",
        **({"size": node.content.size_bytes} if node.content.size_bytes else {}),
        "links": 1,
    }
    opened = json.dumps(head, separators=(",", ":")).translate(_GO_ESCAPES).removesuffix("}").encode()
    chunks = b"".join(node.content.chunks).hex(",", ID_BYTES).replace(",", '","').encode()
    return b"".join((opened, b',"content":[', b'"' + chunks + b'"' if chunks else b"", b"]}"))


def _decode_node(node: Fields) -> Node:
    kind = node.text("type")
    subtree = node.identity("subtree") if node.has("subtree") else None
    if kind == "dir" and subtree is None:
        raise Damaged(node.file, "a folder in it has no subtree")
    content = FileContent(node.integer("size", 0, largest=UINT64), node.identities("content"))
    return Node(node.text("name"), kind, content, subtree)
