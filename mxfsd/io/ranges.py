"""Ranges of a regular file: which allocations are done for whom, and copying within one file system.

Sources: fallocate(2), copy_file_range(2).
"""

import errno
import os

KEEP_SIZE = 1
PUNCH_HOLE = 2
ZERO_RANGE = 16
ERASES = PUNCH_HOLE | ZERO_RANGE
"""The modes that take data away."""
COPY_MAX = 64 << 20
"""Bytes that one operation copies at most: who asked for more asks again."""


def check_mode(mode: int) -> None:
    """Raises OSError (EOPNOTSUPP) for what the kernel's FUSE client does not ask for."""
    if mode & ~(KEEP_SIZE | ERASES):
        raise OSError(errno.EOPNOTSUPP, f"fallocate mode {mode:#x}")


def copy(fd: int, offset: int, to_fd: int, to_offset: int, length: int) -> int:
    """Copy a range, by sharing its blocks where XFS can; return the bytes copied (fewer: the source ends there)."""
    left = min(length, COPY_MAX)
    done = 0
    while left:
        step = os.copy_file_range(fd, to_fd, left, offset + done, to_offset + done)
        if not step:
            break
        done += step
        left -= step
    return done
