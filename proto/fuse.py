"""The kernel's FUSE protocol as the channel speaks it: requests and replies on /dev/fuse (<linux/fuse.h>, fuse(4)).

Host byte order, native alignment is spelled out. Each layout is named after the kernel's struct. What a request carries
behind its struct (names, data) is told at `REQUESTS`.
"""

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

from mxfs_proto.errors import PeerError

MAJOR: Final = 7
MINOR_MIN: Final = 31
"""The oldest minor version that is spoken (Linux 5.4)."""
MINOR: Final = 40
"""The newest one whose additions are known here."""
MAX_WRITE: Final = 1 << 20
"""Bytes of data in a READ or WRITE at most."""
BUFFER_BYTES: Final = MAX_WRITE + (64 << 10)
"""What a request fits into: the kernel wants room for its header beside max_write."""


class Opcode(IntEnum):
    """What a request asks for (enum fuse_opcode)."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    TMPFILE = 51
    STATX = 52


class InitFlag(IntFlag):
    """What kernel and server agree upon in INIT (FUSE_ASYNC_READ and so on)."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    FLOCK_LOCKS = 1 << 10
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    MAX_PAGES = 1 << 22
    HANDLE_KILLPRIV_V2 = 1 << 28
    INIT_EXT = 1 << 30
    """The upper 32 flags are in INIT_IN's and INIT_OUT's flags2."""
    PASSTHROUGH = 1 << 37


class OpenFlag(IntFlag):
    """How the kernel treats an open file (FOPEN_DIRECT_IO and so on)."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    PASSTHROUGH = 1 << 7
    """Reads, writes and mappings go to the file of OPEN_OUT's backing_id; with DIRECT_IO mappings only. No other flag
    of these may stand beside (FOPEN_PASSTHROUGH_MASK in the kernel's fs/fuse/iomode.c)."""


class SetAttr(IntFlag):
    """Which fields of SETATTR are meant (FATTR_MODE and so on)."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    KILL_SUIDGID = 1 << 11


FSYNC_DATASYNC: Final = 1 << 0
WRITE_KILL_SUIDGID: Final = 1 << 2
RELEASE_FLOCK_UNLOCK: Final = 1 << 1
LK_FLOCK: Final = 1 << 0
STATX_BASIC_STATS: Final = 0x7FF
STATX_BTIME: Final = 0x800

IN_HEADER: Final = Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""
OUT_HEADER: Final = Struct("=IiQ")
"""len, error (0 or a negative errno), unique."""
INIT_IN: Final = Struct("=IIII")
"""major, minor, max_readahead, flags (a newer kernel sends more behind)."""
INIT_IN_EXT: Final = Struct("=IIIII")
"""The same and flags2, where flags have INIT_EXT."""
INIT_OUT: Final = Struct("=IIIIHHIIHHIIH22x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment, flags2, max_stack_depth, request_timeout."""
ENTRY_OUT: Final = Struct("=QQQQIIQQQQQQIIIIIIIIII")
"""nodeid, generation, entry_valid, attr_valid (s), their ns; then ATTR."""
ATTR: Final = Struct("=QQQQQQIIIIIIIIII")
"""ino, size, blocks, atime, mtime, ctime (s), their ns, mode, nlink, uid, gid, rdev, blksize, flags."""
ATTR_OUT_HEAD: Final = Struct("=QII")
"""attr_valid (s), its ns, padding; ATTR follows."""
OPEN_OUT: Final = Struct("=QIi")
"""fh, open_flags, backing_id (with OpenFlag.PASSTHROUGH)."""
BACKING_MAP: Final = Struct("=iIQ")
"""fd, flags, padding (struct fuse_backing_map): the argument of IOC_BACKING_OPEN."""
BACKING_ID: Final = Struct("=I")
"""The argument of IOC_BACKING_CLOSE."""
IOC_BACKING_OPEN: Final = 0x4010E501
"""FUSE_DEV_IOC_BACKING_OPEN, _IOW(229, 1, struct fuse_backing_map): returns a backing id, 1 or more."""
IOC_BACKING_CLOSE: Final = 0x4004E502
"""FUSE_DEV_IOC_BACKING_CLOSE, _IOW(229, 2, uint32_t)."""
STACK_DEPTH: Final = 1
"""max_stack_depth with PASSTHROUGH: the lower file system is none that is stacked itself."""
WRITE_OUT: Final = Struct("=II")
"""size, padding."""
STATFS_OUT: Final = Struct("=QQQQQIIII24x")
"""blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding."""
GETXATTR_OUT: Final = Struct("=II")
"""size, padding."""
LK: Final = Struct("=QQII")
"""start, end, type, pid (struct fuse_file_lock)."""
LSEEK_OUT: Final = Struct("=Q")
IOCTL_OUT: Final = Struct("=iIII")
"""result, flags, in_iovs, out_iovs; what the ioctl gives back follows."""
STATX_OUT: Final = Struct("=QII16xIIQIIIHxxQQQQqIxxxxqIxxxxqIxxxxqIxxxxIIII112x")
"""attr_valid (s), its ns, flags; struct fuse_statx: mask, blksize, attributes, nlink, uid, gid, mode, ino, size,
blocks, attributes_mask; atime, btime, ctime, mtime (s, ns each); rdev and dev (major, minor each)."""
DIRENT: Final = Struct("=QQII")
"""ino, off, namelen, type; the name follows, and zeros up to a multiple of 8."""

FORGET_IN: Final = Struct("=Q")
GETATTR_IN: Final = Struct("=IIQ")
SETATTR_IN: Final = Struct("=IIQQQQQQIIIIIIII")
"""valid, padding, fh, size, lock_owner, atime, mtime, ctime (s), their ns, mode, unused, uid, gid, unused."""
MKNOD_IN: Final = Struct("=IIII")
"""mode, rdev, umask, padding."""
MKDIR_IN: Final = Struct("=II")
"""mode, umask."""
RENAME_IN: Final = Struct("=Q")
RENAME2_IN: Final = Struct("=QII")
"""newdir, flags, padding."""
LINK_IN: Final = Struct("=Q")
OPEN_IN: Final = Struct("=II")
"""flags, open_flags."""
CREATE_IN: Final = Struct("=IIII")
"""flags, mode, umask, open_flags."""
READ_IN: Final = Struct("=QQIIQII")
"""fh, offset, size, read_flags, lock_owner, flags, padding."""
WRITE_IN: Final = Struct("=QQIIQII")
"""fh, offset, size, write_flags, lock_owner, flags, padding."""
RELEASE_IN: Final = Struct("=QIIQ")
"""fh, flags, release_flags, lock_owner."""
FLUSH_IN: Final = Struct("=QIIQ")
"""fh, unused, padding, lock_owner."""
FSYNC_IN: Final = Struct("=QII")
"""fh, fsync_flags, padding."""
SETXATTR_IN: Final = Struct("=II")
"""size, flags."""
GETXATTR_IN: Final = Struct("=II")
"""size, padding."""
LK_IN: Final = Struct("=QQQQIIII")
"""fh, owner, then LK, lk_flags, padding."""
INTERRUPT_IN: Final = Struct("=Q")
FALLOCATE_IN: Final = Struct("=QQQII")
"""fh, offset, length, mode, padding."""
LSEEK_IN: Final = Struct("=QQII")
"""fh, offset, whence, padding."""
COPY_FILE_RANGE_IN: Final = Struct("=QQQQQQQ")
"""fh_in, off_in, nodeid_out, fh_out, off_out, len, flags."""
IOCTL_IN: Final = Struct("=QIIQII")
"""fh, flags, cmd, arg, in_size, out_size; what the ioctl is given follows."""
STATX_IN: Final = Struct("=IIQII")
"""getattr_flags, reserved, fh, sx_flags, sx_mask."""
BATCH_FORGET_IN: Final = Struct("=II")
"""count, padding; FORGET_ONE follow."""
FORGET_ONE: Final = Struct("=QQ")
"""nodeid, nlookup."""
_NOTHING: Final = Struct("=")

REQUESTS: Final[dict[Opcode, tuple[Struct, int]]] = {
    Opcode.LOOKUP: (_NOTHING, 1),
    Opcode.FORGET: (FORGET_IN, 0),
    Opcode.GETATTR: (GETATTR_IN, 0),
    Opcode.SETATTR: (SETATTR_IN, 0),
    Opcode.READLINK: (_NOTHING, 0),
    Opcode.SYMLINK: (_NOTHING, 2),
    Opcode.MKNOD: (MKNOD_IN, 1),
    Opcode.MKDIR: (MKDIR_IN, 1),
    Opcode.UNLINK: (_NOTHING, 1),
    Opcode.RMDIR: (_NOTHING, 1),
    Opcode.RENAME: (RENAME_IN, 2),
    Opcode.LINK: (LINK_IN, 1),
    Opcode.OPEN: (OPEN_IN, 0),
    Opcode.READ: (READ_IN, 0),
    Opcode.WRITE: (WRITE_IN, 0),
    Opcode.STATFS: (_NOTHING, 0),
    Opcode.RELEASE: (RELEASE_IN, 0),
    Opcode.FSYNC: (FSYNC_IN, 0),
    Opcode.SETXATTR: (SETXATTR_IN, 1),
    Opcode.GETXATTR: (GETXATTR_IN, 1),
    Opcode.LISTXATTR: (GETXATTR_IN, 0),
    Opcode.REMOVEXATTR: (_NOTHING, 1),
    Opcode.FLUSH: (FLUSH_IN, 0),
    Opcode.OPENDIR: (OPEN_IN, 0),
    Opcode.READDIR: (READ_IN, 0),
    Opcode.RELEASEDIR: (RELEASE_IN, 0),
    Opcode.FSYNCDIR: (FSYNC_IN, 0),
    Opcode.GETLK: (LK_IN, 0),
    Opcode.SETLK: (LK_IN, 0),
    Opcode.SETLKW: (LK_IN, 0),
    Opcode.ACCESS: (OPEN_IN, 0),
    Opcode.CREATE: (CREATE_IN, 1),
    Opcode.INTERRUPT: (INTERRUPT_IN, 0),
    Opcode.DESTROY: (_NOTHING, 0),
    Opcode.IOCTL: (IOCTL_IN, 0),
    Opcode.BATCH_FORGET: (BATCH_FORGET_IN, 0),
    Opcode.FALLOCATE: (FALLOCATE_IN, 0),
    Opcode.READDIRPLUS: (READ_IN, 0),
    Opcode.RENAME2: (RENAME2_IN, 2),
    Opcode.LSEEK: (LSEEK_IN, 0),
    Opcode.COPY_FILE_RANGE: (COPY_FILE_RANGE_IN, 0),
    Opcode.TMPFILE: (CREATE_IN, 1),
    Opcode.STATX: (STATX_IN, 0),
}
"""The struct of each request, and how many names (bytes ended by a zero byte) follow it. Behind them: the data of
WRITE, SETXATTR and IOCTL, the entries of BATCH_FORGET."""

for _struct, _size in (
    (IN_HEADER, 40), (OUT_HEADER, 16), (INIT_OUT, 64), (ENTRY_OUT, 128), (ATTR, 88), (ATTR_OUT_HEAD, 16),
    (OPEN_OUT, 16), (STATFS_OUT, 80), (LK, 24), (DIRENT, 24), (GETATTR_IN, 16), (SETATTR_IN, 88), (READ_IN, 40),
    (WRITE_IN, 40), (RELEASE_IN, 24), (FLUSH_IN, 24), (FSYNC_IN, 16), (LK_IN, 48), (CREATE_IN, 16), (MKNOD_IN, 16),
    (FALLOCATE_IN, 32), (LSEEK_IN, 24), (COPY_FILE_RANGE_IN, 56), (IOCTL_IN, 32), (IOCTL_OUT, 16), (STATX_IN, 24),
    (STATX_OUT, 288), (BACKING_MAP, 16), (INIT_IN_EXT, 20),
):  # fmt: skip
    assert _struct.size == _size, (_struct.format, _struct.size, _size)


class UnknownRequest(PeerError):
    """An opcode that is not spoken here: it is answered ENOSYS."""


def split_names(data: memoryview, count: int) -> tuple[list[bytes], memoryview]:
    """Return *count* names at the beginning of *data*, and what is behind them. Raises PeerError."""
    names = []
    raw = bytes(data) if count else b""
    at = 0
    for _ in range(count):
        end = raw.find(b"\0", at)
        if end < 0:
            raise PeerError("a FUSE request with a name that has no end")
        names.append(raw[at:end])
        at = end + 1
    return names, data[at:]


def unpack_request(opcode: int, body: memoryview) -> tuple[tuple[int, ...], list[bytes], memoryview]:
    """Take the body of a request apart: the fields of its struct, its names, and the data behind them.

    Raises UnknownRequest, PeerError.
    """
    shape = REQUESTS.get(opcode)  # type: ignore[call-overload]  # (an IntEnum is equal to its number)
    if shape is None:
        raise UnknownRequest(f"FUSE opcode {opcode}")
    struct, count = shape
    if len(body) < struct.size:
        raise PeerError(f"FUSE opcode {opcode} of {len(body)} bytes is cut short")
    names, rest = split_names(body[struct.size :], count)
    return struct.unpack_from(body), names, rest
