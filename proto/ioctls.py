"""The ioctls that files and directories of a volume answer; any other one is ENOTTY.

Sources: <linux/fs.h>, ioctl_iflags(2), ioctl_xfs_fsgetxattr(2), fstrim(8). IMMUTABLE and APPEND are refused: the
kernels of the nodes would not know of them and go on writing.
"""

import errno
from struct import Struct
from typing import Final

GETFLAGS: Final = 0x80086601
SETFLAGS: Final = 0x40086602
FSGETXATTR: Final = 0x801C581F
FSSETXATTR: Final = 0x401C5820
FITRIM: Final = 0xC0185879
SETS: Final = frozenset({SETFLAGS, FSSETXATTR})
"""Those that change an object."""
RESULT_BYTES: Final = {GETFLAGS: 4, SETFLAGS: 0, FSGETXATTR: 28, FSSETXATTR: 0, FITRIM: 24}
_GIVEN_BYTES = {GETFLAGS: 0, SETFLAGS: 4, FSGETXATTR: 0, FSSETXATTR: 28, FITRIM: 24}
_REFUSED = {SETFLAGS: 0x10 | 0x20, FSSETXATTR: 0x08 | 0x10}
"""IMMUTABLE and APPEND, in the first 32 bits of what is given."""
_FLAGS = Struct("=I")


def check(command: int, given: bytes) -> None:
    """Raises OSError: ENOTTY for what is not offered, EINVAL for another size, EOPNOTSUPP for IMMUTABLE and APPEND."""
    if command not in _GIVEN_BYTES:
        raise OSError(errno.ENOTTY, f"ioctl {command:#x}")
    if len(given) != _GIVEN_BYTES[command]:
        raise OSError(errno.EINVAL, f"ioctl {command:#x} with {len(given)} bytes")
    if command in SETS and _FLAGS.unpack_from(given)[0] & _REFUSED[command]:
        raise OSError(errno.EOPNOTSUPP, "immutable and append-only files are not offered")
