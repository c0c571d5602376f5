"""Channels to the kernel: how the operations of this mount get their requests and give their answers.

``native`` speaks the FUSE protocol on /dev/fuse itself, ``pyfuse3`` leaves that to libfuse. Both run the same
operations.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from mxfs_proto.errors import MisuseError

if TYPE_CHECKING:
    from mxfs_fuse.operations import Operations

NAMES = ("native", "pyfuse3")


class Channel(Protocol):
    """One mount's channel."""

    limits_background: bool
    """Whether the kernel keeps requests back until it is told otherwise (`kernel.unlimit_background`)."""

    wants_passthrough: bool
    """Ask the kernel for passthrough. To be set before mount()."""

    @property
    def has_passthrough(self) -> bool:
        """Whether the kernel reads and writes files by itself that it is told to. Known when the mount answers."""

    def open_backing(self, fd: int) -> int:
        """Return a backing id for the file open at *fd*. Raises OSError."""

    def close_backing(self, backing_id: int) -> None:
        """Give a backing id back. Raises OSError."""

    def mount(self, operations: "Operations", mountpoint: str, options: Iterable[str]) -> int:
        """Mount; return the descriptor of /dev/fuse. Raises OSError, RuntimeError."""

    async def serve(self) -> None:
        """Answer requests until the mount is gone, or terminate() is called."""

    def terminate(self) -> None:
        """End serve(). May be repeated."""

    def name_long_waits(self) -> None:
        """Log requests that have waited for long. Called once a second."""

    def close(self) -> None:
        """Unmount where it is still mounted, and give the descriptor back."""


def make(name: str) -> Channel:
    """Return a new channel. Raises MisuseError for an unknown name."""
    if name == "native":
        from mxfs_fuse.channel.native import NativeChannel

        return NativeChannel()
    if name == "pyfuse3":
        from mxfs_fuse.channel.libfuse import LibfuseChannel

        return LibfuseChannel()
    raise MisuseError(f"channel={name}: there are {' and '.join(NAMES)}")
