"""The channel through libfuse: pyfuse3's session and loop."""

import asyncio
import errno
from collections.abc import Iterable

import pyfuse3
import pyfuse3.asyncio

from mxfs_fuse.kernel import fuse_device_fd
from mxfs_fuse.operations import Operations

_MAX_TASKS = 1 << 20
"""Upcalls served at once: one that waits for a lock must never keep the one out that the lock's holder needs."""


class LibfuseChannel:
    """pyfuse3 (see `mxfs_fuse.channel.Channel`)."""

    limits_background = True
    wants_passthrough = False
    has_passthrough = False

    def mount(self, operations: Operations, mountpoint: str, options: Iterable[str]) -> int:
        """Mount; return the descriptor of /dev/fuse. Raises OSError, RuntimeError."""
        pyfuse3.asyncio.enable()
        pyfuse3.init(operations, mountpoint, {"subtype=mxfs", *options})
        return fuse_device_fd()

    async def serve(self) -> None:
        """Answer requests until the mount is gone, or terminate() is called."""
        await pyfuse3.main(max_tasks=_MAX_TASKS)

    def terminate(self) -> None:
        """End serve(). May be repeated."""
        try:
            pyfuse3.terminate()
        except asyncio.InvalidStateError:
            pass  # pyfuse3 ends waits that have ended

    def open_backing(self, fd: int) -> int:
        """libfuse's Python binding has none."""
        raise OSError(errno.EOPNOTSUPP, "no passthrough with pyfuse3")

    def close_backing(self, backing_id: int) -> None:
        """There is none."""

    def name_long_waits(self) -> None:
        """Nothing: libfuse does not say what waits."""

    def close(self) -> None:
        """Unmount where it is still mounted."""
        pyfuse3.close(unmount=True)
