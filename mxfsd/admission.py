"""Which volume is on a device, also where a reservation shuts out every host that is not registered, as this one is.

A host that wants to mount has to know that before it joins: the volume's uuid names the run directory, in which another
daemon of this host may be at work. So it is let in for one read, with a key that it takes back at once.
"""

import errno
import os
import secrets

from mxfs_proto.errors import IoFailure
from mxfsd.io.lockspace import Lockspace


def volume_of(device: str, pr_device: str | None = None) -> bytes:
    """Return the uuid of the volume on *device*. Raises MediaError (ForeignRecord: none is there), IoFailure.

    *pr_device*: where its reservations are, if not there.
    """
    try:
        return _read(device)
    except IoFailure as error:
        # EBADE is what the block layer makes of RESERVATION CONFLICT. A device that this host uses is not to be let in
        # again: it was fenced, and what it had under way would pass.
        if error.errno != errno.EBADE or not unused(device):
            raise
    return _read_registered(device, pr_device or device)


def unused(device: str) -> bool:
    """Whether nothing on this host has the device mounted or open exclusively, so that no old I/O is under way."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError:
        return False
    os.close(fd)
    return True


def _read(device: str) -> bytes:
    lockspace = Lockspace.open(device, readonly=True)
    try:
        return lockspace.volume
    finally:
        lockspace.close()


def _read_registered(device: str, pr_device: str) -> bytes:
    # Only a mount that was refused needs these, and each import makes a mount slower.
    from mxfsd.pr.keys import PREFIX, RANDOM_BITS
    from mxfsd.pr.probe import open_reservations

    probe = open_reservations(pr_device)
    if probe.reservations is None:
        raise IoFailure(f"{device} is reserved by another host, and {probe.reason}", errno.EBADE)
    reservations = probe.reservations
    try:
        reservations.register(PREFIX << 48 | secrets.randbits(RANDOM_BITS) or 1, replace=True)
        try:
            return _read(device)
        finally:
            reservations.unregister()
    finally:
        reservations.close()
