"""A crash of one node on a machine that goes on: its XFS is shut down without log flush, its processes are killed.

Killing the processes alone would let the kernel unmount XFS cleanly, which is no crash. Everything is stopped before
anything is killed, so that no process of the node sees another one die and says farewell on the disk.
"""

import array
import fcntl
import os
import signal
import stat
from contextlib import suppress

from mxfs_fuse.kernel import open_abort
from mxfs_proto.errors import IoFailure
from mxfsd import mountinfo, procs, spawn

XFS_IOC_GOINGDOWN = 0x8004587D  # _IOR('X', 125, __u32), <xfs/xfs_fs.h>
_NO_LOG_FLUSH = 2
GONE_S = 15.0


def ancestors() -> set[int]:
    """Return this process and those that it descends from: a crash must not end the shell that asked for it."""
    found: set[int] = set()
    pid = os.getpid()
    while pid > 1:
        found.add(pid)
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except OSError:
            break
    return found


def crash(mark: str, mountpoint: str, loop: str) -> None:
    """Crash the node whose processes carry *mark* and whose device is *loop*.

    IoFailure names what is left after GONE_S.
    """
    spared = ancestors()

    def belongs(pid: int) -> bool:
        return procs.has_mark(pid, mark) or procs.holds(pid, mountpoint)

    def found() -> list[int]:
        everyone = {*procs.marked(mark), *procs.holders(mountpoint)}
        return [pid for pid in everyone if pid not in spared and not procs.is_zombie(pid)]

    for pid in found():
        procs.send(pid, signal.SIGSTOP, belongs)
    # Only the daemon and its helpers are looked into: asking for the status of an application's file on the mount
    # would wait for the FUSE server, which is stopped now.
    shut_down_lower([pid for pid in procs.marked(mark) if procs.has_variable(pid, spawn.TOKEN_ENV)], loop)
    abort_mounts(mountpoint)

    def all_killed() -> bool:
        left = found()
        for pid in left:
            procs.send(pid, signal.SIGKILL, belongs)
        return not left

    if not procs.wait_until(all_killed, GONE_S):
        raise IoFailure(f"processes that do not end: {procs.describe(found())}")


def abort_mounts(mountpoint: str) -> None:
    """End the connections of the FUSE mounts at *mountpoint*, and with them what waits for an answer.

    A FUSE server with a thread that waits for a folio of a request which is not answered does not end when it is
    killed, and who made that request does not either.
    """
    for mount in mountinfo.read():
        if mount.mountpoint == mountpoint and mountinfo.is_mxfs(mount):
            with suppress(OSError):  # it ended by itself
                fd = open_abort(mount.device)
                try:
                    os.write(fd, b"1")
                finally:
                    os.close(fd)


def shut_down_lower(pids: list[int], loop: str) -> bool:
    """Shut XFS on *loop* down without log flush, through a descriptor that one of *pids* has of it.

    Only the home has one; return whether there was. Opening /proc/PID/fd/N opens the same file of the same mount
    again, which works though the lower mount is in no namespace.
    """
    try:
        device = os.stat(loop).st_rdev
    except OSError:
        return False
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                if _shut_down_through(f"/proc/{pid}/fd/{name}", device):
                    return True
    return False


def _shut_down_through(path: str, device: int) -> bool:
    try:
        status = os.stat(path)
        if status.st_dev != device or not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
            return False
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.ioctl(fd, XFS_IOC_GOINGDOWN, array.array("I", [_NO_LOG_FLUSH]))
    finally:
        os.close(fd)
    return True
