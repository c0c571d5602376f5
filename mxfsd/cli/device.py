"""What commands ask about a device before they do anything with it."""

import errno
import os
import stat
import subprocess

from mxfs_proto.errors import MxfsError
from mxfsd.cli.mount import MountError, check_unused
from mxfsd.io.disk import is_read_only

WRITABLE = "make it writable (blockdev --setrw)"

_NOTHING = 2
"""blkid(8)'s exit code where it knows nothing of what is there."""


class Unfit(MxfsError):
    """Why a command does nothing with the device, and what to do about it."""


class NoBlkid(MxfsError):
    """The program is missing."""


def kinds(device: str, *options: str) -> list[str]:
    """Return what blkid(8) takes the contents for: file systems, RAID members, partition tables. Raises NoBlkid."""
    try:
        found = subprocess.run(
            ["blkid", "-p", *options, "-o", "value", "-s", "TYPE", "-s", "PTTYPE", device],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise NoBlkid(f"cannot run blkid to look at {device}: {error.strerror}: install util-linux") from error
    if found.returncode == _NOTHING:
        return []
    return found.stdout.split() or ["something that blkid cannot tell apart"]


def check_device(device: str, verb: str, read_only: str) -> None:
    """Check what can be seen without reading the device. Raises Unfit.

    *verb*: what is to be done with it. *read_only*: what to do about a read-only one, '' where that does not matter.
    """
    try:
        mode = os.stat(device).st_mode
    except OSError as error:
        raise Unfit(f"{device}: {error.strerror}: name an existing block device") from None
    if stat.S_ISREG(mode):
        raise Unfit(f"{device} is a regular file: attach it with losetup and name the loop device")
    if not stat.S_ISBLK(mode):
        raise Unfit(f"{device} is not a block device: name one")
    if os.geteuid() != 0:
        raise Unfit(f"{device}: only root can {verb} a device: use sudo")
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if read_only and is_read_only(fd):
                raise Unfit(f"{device} is read-only: {read_only}")
        finally:
            os.close(fd)
        check_unused(device)
    except MountError as error:
        raise Unfit(f"{device} {error}: unmount it first") from None
    except OSError as error:
        raise Unfit(f"{device}: {error.strerror}: check that the device works") from None


def explain(device: str, error: MxfsError) -> str:
    """Return the one line on an error with the device. EBADE is the block layer's word for RESERVATION CONFLICT."""
    if error.errno != errno.EBADE:
        return str(error)
    return (
        f"{device} is reserved by others and does not let this host read: see who they are with mxfs pr {device}, "
        "unmount the volume there, or mount and unmount it here once if those nodes are dead"
    )
