"""The home's XFS grows to the room that it has since ``mxfs grow`` moved the lockspace behind it."""

import fcntl
import struct
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from mxfsd.io.lockspace import Lockspace

log = structlog.get_logger(__name__)

# <xfs/xfs_fs.h>; the first geometry call is known to every kernel, and has what is asked for here.
_XFS_IOC_FSGEOMETRY_V1 = 0x80705864
_XFS_IOC_FSGROWFSDATA = 0x4010586E
_GEOMETRY = struct.Struct("=8IQ72x")
"""struct xfs_fsop_geom_v1: blocksize and six others, imaxpct, datablocks, and what is not asked for."""
_GROW = struct.Struct("=QI4x")
"""struct xfs_growfs_data: newblocks, imaxpct."""
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878


def size_of(mount_fd: int) -> tuple[int, int, int]:
    """Return block size, blocks of data and imaxpct of a mounted XFS. Raises OSError."""
    fields = _GEOMETRY.unpack(fcntl.ioctl(mount_fd, _XFS_IOC_FSGEOMETRY_V1, bytes(_GEOMETRY.size)))
    return fields[0], fields[8], fields[7]


def grow_lower(mount_fd: int, lockspace: "Lockspace") -> bool:
    """Grow a mounted XFS up to what the header says. Return whether it grew; a failure is logged, and changes nothing.

    It is frozen once: its superblock on the disk then has the new size, so that a host which sees an older size of the
    device never takes what lies behind the old end for a lockspace.
    """
    try:
        block, before, imaxpct = size_of(mount_fd)
        wanted = lockspace.header.xfs_bytes // block
        if before >= wanted or not lockspace.settled:
            return False
        fcntl.ioctl(mount_fd, _XFS_IOC_FSGROWFSDATA, _GROW.pack(wanted, imaxpct))
        after = size_of(mount_fd)[1]
        if after == before:
            return False  # what is left is too little for another allocation group
        fcntl.ioctl(mount_fd, _FIFREEZE, bytes(4))
        fcntl.ioctl(mount_fd, _FITHAW, bytes(4))
    except OSError as exc:
        log.warning("the XFS could not be grown", reason=str(exc))
        return False
    log.info("the XFS has grown", before=before * block, now=after * block)
    return True
