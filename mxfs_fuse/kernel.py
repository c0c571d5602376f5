"""Notifications to the kernel's FUSE client, written to /dev/fuse directly (struct fuse_out_header, <linux/fuse.h>).

pyfuse3 holds the GIL where it sends them, and has no FUSE_NOTIFY_INC_EPOCH. A write here releases it, so a
notification that waits for a locked folio stops nobody but its own thread.
"""

import errno
import os
from struct import Struct

from mxfsd.io import libc

_NOTIFY_INVAL_INODE = 2
_NOTIFY_INC_EPOCH = 8
_HEADER = Struct("=IiQ")  # length, notification code, unique = 0
_INVAL_INODE = Struct("=Qqq")  # nodeid, offset (negative: attributes only), length (0: to the end)


def fuse_device_fd() -> int:
    """Return this process's descriptor of /dev/fuse. Raises FileNotFoundError where nothing is mounted yet."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(errno.ENOENT, "no descriptor of /dev/fuse in this process")


def open_abort(device: int) -> int:
    """Open the ``abort`` file of the connection of the FUSE mount whose st_dev is *device*.

    What is written to it ends the connection and all its requests. fusectl is mounted in no namespace for it, so it
    need not be mounted (the kernel's Documentation/filesystems/fuse/fuse.rst). Raises OSError.
    """
    control = libc.mount_virtual("fusectl")
    try:
        return os.open(f"{os.minor(device)}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=control)
    finally:
        os.close(control)


def unlimit_background(device: int) -> None:
    """Have the kernel hand over every request at once, of the FUSE mount whose st_dev is *device*. Raises OSError.

    By default it keeps read-ahead back while 12 such requests are unanswered, with the folios locked that they are to
    fill: a drop of the caches would wait for requests that nobody has heard of yet.
    """
    control = libc.mount_virtual("fusectl")
    try:
        for name in ("max_background", "congestion_threshold"):
            fd = os.open(f"{os.minor(device)}/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=control)
            try:
                os.write(fd, b"65535")
            finally:
                os.close(fd)
    finally:
        os.close(control)


class KernelNotifier:
    """Sends notifications; safe from any thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.has_epoch = self._send(_NOTIFY_INC_EPOCH, b"") == 0
        """Whether the kernel can drop all directory entries at once (Linux 6.16): only then may entries be cached,
        since FUSE_NOTIFY_INVAL_ENTRY takes the directory's lock, which a waiting operation may hold."""

    def _send(self, code: int, body: bytes) -> int:
        """Return 0 or an errno; ENOENT (the kernel has no such inode) counts as done."""
        try:
            os.writev(self._fd, (_HEADER.pack(_HEADER.size + len(body), code, 0), body))
        except OSError as exc:
            return 0 if exc.errno == errno.ENOENT else exc.errno or errno.EIO
        return 0

    def inval_attributes(self, nodeid: int) -> int:
        """Drop cached attributes and ACLs of the inode."""
        return self._send(_NOTIFY_INVAL_INODE, _INVAL_INODE.pack(nodeid, -1, 0))

    def inval_pages(self, nodeid: int, offset: int, length: int) -> int:
        """Drop cached attributes and the pages in [offset, offset + length) (length 0: to the end).

        Waits for folios that a READ or WRITE upcall has locked; dirty ones of a mapping are written first.
        """
        return self._send(_NOTIFY_INVAL_INODE, _INVAL_INODE.pack(nodeid, offset, length))

    def inc_epoch(self) -> int:
        """Make the kernel look up every directory entry again at its next use."""
        return self._send(_NOTIFY_INC_EPOCH, b"")
