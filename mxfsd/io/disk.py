"""Block I/O on the shared disk that bypasses every cache of this host (O_DIRECT)."""

import fcntl
import mmap
import os
import stat
import struct
from types import TracebackType
from typing import Self

from mxfs_proto.errors import IoFailure, MisuseError

BLKROGET = 0x125E
"""<linux/fs.h>: int, 1 if the device is read-only."""
BLKGETSIZE64 = 0x80081272
"""<linux/fs.h>: u64, size in bytes."""
ALIGN = 4096
SECTOR = 512
MAX_IO = 1 << 20
"""Bytes of one read or write, at most."""


def device_size(fd: int) -> int:
    """Return the size in bytes of a block device or regular file. Raises IoFailure."""
    try:
        status = os.fstat(fd)
        if stat.S_ISBLK(status.st_mode):
            raw = fcntl.ioctl(fd, BLKGETSIZE64, bytes(8))
            return int(struct.unpack("=Q", raw)[0])
    except OSError as error:
        raise IoFailure(f"cannot find out the size: {error.strerror}", error.errno) from error
    return status.st_size


def is_read_only(fd: int) -> bool:
    """Return whether the block device refuses writes (BLKROGET)."""
    return bool(struct.unpack("=i", fcntl.ioctl(fd, BLKROGET, bytes(4)))[0])


def _whole(count: int, wanted: int) -> int:
    """Return how much of a short I/O counts: going on in the middle of a sector would be unaligned."""
    return count if count == wanted else count - count % SECTOR


class Disk:
    """An open device or image file. Offsets and lengths are bytes and multiples of 4096.

    A regular file on a file system without O_DIRECT (some temporary ones) is opened without it.
    """

    def __init__(self, path: str, *, readonly: bool = False, exclusive: bool = False) -> None:
        """Open *path*; *exclusive* is O_EXCL, EBUSY if a block device is mounted. Raises IoFailure."""
        self.path = path
        self.readonly = readonly
        flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | (os.O_EXCL if exclusive else 0)
        try:
            try:
                self.fd = os.open(path, flags | os.O_DIRECT)
            except OSError as error:
                if not os.path.isfile(path):
                    raise error
                self.fd = os.open(path, flags)
        except OSError as error:
            raise IoFailure(f"cannot open {path}: {error.strerror}", error.errno) from error
        # Anonymous mappings are page aligned, which O_DIRECT asks for.
        self._buffer = mmap.mmap(-1, MAX_IO)
        self._view = memoryview(self._buffer)
        try:
            self.size = device_size(self.fd)
        except IoFailure:
            self.close()
            raise

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly *length* bytes (at most 1 MiB). Raises IoFailure, also at the end of the device."""
        self._check(offset, length)
        done = 0
        while done < length:
            try:
                count = os.preadv(self.fd, [self._view[done:length]], offset + done)
            except OSError as error:
                raise IoFailure(f"{self.path}: read at {offset}: {error.strerror}", error.errno) from error
            step = _whole(count, length - done)
            if step == 0:
                raise IoFailure(f"{self.path}: read at {offset}: end of the device after {done} bytes")
            done += step
        return bytes(self._view[:length])

    def write(self, offset: int, data: bytes) -> None:
        """Write all of *data* (at most 1 MiB); it is on the device, not necessarily durable. Raises IoFailure."""
        self._check(offset, len(data))
        if self.readonly:
            raise MisuseError(f"{self.path} is open for reading only")
        length, done = len(data), 0
        self._view[:length] = data
        while done < length:
            try:
                count = os.pwritev(self.fd, [self._view[done:length]], offset + done)
            except OSError as error:
                raise IoFailure(f"{self.path}: write at {offset}: {error.strerror}", error.errno) from error
            step = _whole(count, length - done)
            if step == 0:
                raise IoFailure(f"{self.path}: write at {offset}: nothing was written")
            done += step

    def sync(self) -> None:
        """Make what was written durable (fdatasync flushes the device's cache). Raises IoFailure."""
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise IoFailure(f"{self.path}: flush: {error.strerror}", error.errno) from error

    def close(self) -> None:
        """Close the device; more than once is allowed."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._view.release()
            self._buffer.close()

    def _check(self, offset: int, length: int) -> None:
        if offset % ALIGN or length % ALIGN or not 0 < length <= MAX_IO or offset < 0:
            raise MisuseError(f"{self.path}: I/O of {length} bytes at {offset} is not aligned or too long")
        if self.fd < 0:
            raise MisuseError(f"{self.path} is closed")

    def __enter__(self) -> Self:
        """Return the disk; the end of the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
