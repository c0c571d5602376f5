"""Runs the ioctls of `mxfs_proto.ioctls` on the lower mount."""

import fcntl

from mxfs_proto.ioctls import RESULT_BYTES

_LONG = 8
"""The kernel may fill a long where the command's type is one, though it means an int (ioctl_iflags(2))."""


def run(fd: int, command: int, given: bytes) -> bytes:
    """Run one that check() has let through on the object open at *fd*; return what it gives back. Raises OSError."""
    size = RESULT_BYTES[command]
    buffer = bytearray(given.ljust(max(_LONG, size), b"\0"))
    fcntl.ioctl(fd, command, buffer)
    return bytes(buffer[:size])
