"""The fields of the XFS superblock that MXFS reads (never writes).

Source: XFS Algorithms and Data Structures, "Superblocks"; ``struct xfs_dsb``, big-endian, at byte 0 of the device.
"""

import struct
from dataclasses import dataclass

from mxfs_proto.errors import MediaError

XFS_MAGIC = b"XFSB"
_LABEL_AT, _LABEL_BYTES = 108, 12
_HEAD = struct.Struct(">4sIQ16x16s")
_MIN_BYTES = _LABEL_AT + _LABEL_BYTES


class NotXfs(MediaError):
    """The device does not begin with an XFS superblock."""


@dataclass(frozen=True, slots=True)
class XfsSuper:
    """Size in bytes, uuid (16 bytes) and label of an XFS file system."""

    size: int
    uuid: bytes
    label: str

    @classmethod
    def decode(cls, data: bytes) -> "XfsSuper":
        """Return what the first sector says. Raises NotXfs."""
        if len(data) < _MIN_BYTES or data[:4] != XFS_MAGIC:
            raise NotXfs("no XFS file system")
        _, block, blocks, uuid = _HEAD.unpack_from(data)
        if block & (block - 1) or not 512 <= block <= 65536:
            raise NotXfs(f"XFS superblock with a block size of {block}")
        label = data[_LABEL_AT:_MIN_BYTES].rstrip(b"\0").decode(errors="replace")
        return cls(block * blocks, uuid, label)
