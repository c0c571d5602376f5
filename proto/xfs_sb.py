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
_REALTIME_AT, _LOG_AT, _VERSION_AT, _IN_PROGRESS_AT, _QUOTA_AT, _INCOMPAT_AT = 16, 48, 100, 126, 176, 216
_VERSION_MASK, _VERSION = 0xF, 5
_NEEDS_REPAIR = 1 << 4
"""XFS_SB_FEAT_INCOMPAT_NEEDSREPAIR."""
_QUOTA_ENFORCED = 0x2 | 0x80 | 0x200
"""XFS_UQUOTA_ENFD, XFS_GQUOTA_ENFD, XFS_PQUOTA_ENFD."""


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


def obstacle(data: bytes) -> str:
    """Return why MXFS cannot carry the XFS with this first sector, and what to do about it; empty where it can."""
    if _field(data, _VERSION_AT, 2) & _VERSION_MASK != _VERSION:
        return "an XFS of format version 4 or older, which new kernels do not mount: copy the files to a new volume"
    if data[_IN_PROGRESS_AT]:
        return "an XFS that mkfs.xfs has not finished: make it anew"
    if not any(XfsSuper.decode(data).uuid):
        return "an XFS without a uuid: give it one with xfs_admin -U generate"
    if _field(data, _LOG_AT, 8) == 0:
        return "an XFS with an external log, which other nodes could not replay: copy the files to a new volume"
    if _field(data, _REALTIME_AT, 8):
        return "an XFS with a realtime device, which MXFS does not know: copy the files to a new volume"
    if _field(data, _INCOMPAT_AT, 4) & _NEEDS_REPAIR:
        return "an XFS that needs xfs_repair: run it"
    return ""


def has_quotas(data: bytes) -> bool:
    """Return whether limits were enforced when the XFS with this first sector was mounted last."""
    return bool(_field(data, _QUOTA_AT, 2) & _QUOTA_ENFORCED)


def _field(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "big")
