"""Runs the programs of xfsprogs: mkfs.xfs(8), xfs_repair(8), xfs_logprint(8), xfs_db(8)."""

import ctypes
import os
import shutil
import subprocess

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8


def program(name: str) -> str:
    """Return its path: a user's PATH need not have the system's programs."""
    return shutil.which(name) or f"/usr/sbin/{name}"


def environment() -> dict[str, str]:
    """Return the environment in which it says what is documented, in any locale."""
    return {**os.environ, "LC_ALL": "C"}


def run(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run it to its end, whatever its exit code. Raises OSError: it cannot be run."""
    return subprocess.run(
        [program(name), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=environment(),
        preexec_fn=hide_fuse_mounts,
    )


def hide_fuse_mounts() -> None:
    """Leave the mount namespace and detach all FUSE mounts in the new one; runs in the child before the program.

    They stat every mount of the host, and a volume that is frozen (its home is being recovered, say) answers no stat:
    work on one disk must not wait for another one. What they would find out has been checked by then. A failure is no
    reason to stop: the worst that happens is such a wait.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0 or libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        return
    with open("/proc/self/mountinfo", "rb") as mounts:
        lines = [line.split() for line in mounts]
    for fields in reversed(lines):
        if fields[fields.index(b"-") + 1].startswith(b"fuse"):
            target = fields[4].decode("unicode_escape").encode("latin-1")
            libc.umount2(target, _MNT_DETACH | _UMOUNT_NOFOLLOW)
