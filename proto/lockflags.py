"""Flags of a lock message; one set of bits for requests, grants, BASTs and open reports."""

from enum import IntFlag


class LockFlag(IntFlag):
    """Bits of the u32 FLAGS attribute. A bit means nothing in a message that its comment does not name."""

    NONE = 0
    NOQUEUE = 1  # request: answer DENY(EAGAIN) instead of waiting
    OPEN = 2  # request: this is an open; the counts in it are registered
    ALT_UNCACHED = 4  # request: if a holder keeps its lock, grant mode NL instead of waiting
    MAY_KEEP = 8  # BAST: a holder with a cached writable descriptor may go down to PW only
    OTHER_OPEN = 16  # grant: another node has the file open
    OTHER_WRITER = 32  # grant: another node has the file open for writing
    RECLAIM = 64  # request: held before the home changed
    UNASKED = 128  # grant: nobody asked; the holder's lock was raised by the master
    KERNEL_WRITER = 256  # open report of the home's FUSE layer: the kernel may write the file without asking anybody
