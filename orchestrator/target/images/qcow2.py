"""What a qcow2 image's header says of how it is made (QEMU: docs/interop/qcow2.rst)."""

import os
import struct
from pathlib import Path

_HEADER = struct.Struct(">4sIQI")
"""Magic, version, offset and length of the backing file's name."""
_MAGIC = b"QFI\xfb"
_LONGEST_BACKING_NAME_BYTES = 1023
_COMPRESSION_TYPE = struct.Struct(">4s68xQ24xB")
"""Magic, incompatible features, and, if the one of this bit is on, how clusters are compressed."""
_HAS_COMPRESSION_TYPE = 1 << 3
_ZSTD = 1


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


def is_zstd(image: Path) -> bool:
    """Whether it was made for clusters compressed with zstd. Raises OSError."""
    with image.open("rb") as file:
        header = file.read(_COMPRESSION_TYPE.size)
    if len(header) < _COMPRESSION_TYPE.size:
        return False
    magic, features, compression = _COMPRESSION_TYPE.unpack(header)
    return magic == _MAGIC and bool(features & _HAS_COMPRESSION_TYPE) and compression == _ZSTD
