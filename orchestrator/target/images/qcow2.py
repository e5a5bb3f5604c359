"""What a qcow2 image's header says of the image that it builds on (QEMU: docs/interop/qcow2.rst)."""

import os
import struct
from pathlib import Path

_HEADER = struct.Struct(">4sIQI")
"""Magic, version, offset and length of the backing file's name."""
_MAGIC = b"QFI\xfb"
_LONGEST_BACKING_NAME_BYTES = 1023


def backing_name(image: Path) -> str:
    """The backing file's name as it is written there; empty if there is none, or no header. Raises OSError."""
    with image.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return ""
        magic, _version, offset, length = _HEADER.unpack(header)
        if magic != _MAGIC or length > _LONGEST_BACKING_NAME_BYTES or offset > os.fstat(file.fileno()).st_size:
            return ""
        file.seek(offset)
        return os.fsdecode(file.read(length))
