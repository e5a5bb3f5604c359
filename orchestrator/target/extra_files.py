"""Small files of the host that belong to a VM, as a snapshot keeps them: a list in JSON. Pure.

Shape: `[{"path", "mode", "sha256", "content"}]`, where `content` is base64 and `mode` as chmod takes it.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import TargetError

NAME = "extra_files"


@dataclass(frozen=True, slots=True)
class ExtraFile:
    """A file: its absolute path on the host that it came from, its permissions, what it held."""

    path: str
    mode: int
    content: bytes = field(repr=False)

    def described(self) -> dict[str, Any]:
        """What is told of it where its content is not."""
        return {"path": self.path, "size_bytes": len(self.content)}


def encode(files: Iterable[ExtraFile]) -> list[dict[str, Any]]:
    """As JSON has them."""
    return [
        {
            "path": one.path,
            "mode": one.mode,
            "sha256": hashlib.sha256(one.content).hexdigest(),
            "content": base64.b64encode(one.content).decode(),
        }
        for one in files
    ]


def decode(document: Any, *, snapshot: str) -> list[ExtraFile]:
    """The files of a list. TargetError's code is "content-wrong" if it is damaged."""
    try:
        files = [(ExtraFile(one["path"], one["mode"], base64.b64decode(one["content"])), one) for one in document]
        for file, one in files:
            if hashlib.sha256(file.content).hexdigest() != one["sha256"]:
                raise ValueError(f"{file.path} is not as it was")
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise TargetError(
            f"the extra files of snapshot {snapshot} are damaged: {error}",
            hint="its disks can be restored one by one all the same: --disk",
            code="content-wrong",
        ) from error
    return [file for file, _ in files]
