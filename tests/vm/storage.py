"""The shared disk: an image behind tgtd(8) in the guests' namespace, and what can be looked at from outside."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from netspace import NetSpace

from mxfsd.lab import target
from mxfsd.lab.target import Target

HOST, PORT = "127.0.0.1", 3260
NAME = target.NAME


class Storage:
    """One target with one unit on an image of *size* bytes in *folder*."""

    def __init__(self, folder: Path, space: NetSpace, size: int) -> None:
        self.image = folder / "disk.img"
        with open(self.image, "wb") as file:
            file.truncate(size)
        # The path of a Unix socket is short.
        self._sockets = tempfile.mkdtemp(prefix="mxfs-vm-")
        self._target = Target(self.image, Path(self._sockets), HOST, PORT, prefix=space.prefix())
        try:
            self._target.start()
        except BaseException:
            self.close()
            raise

    def restart(self) -> None:
        """End tgtd as a loss of power of its memory would, and start it again: sessions and reservations are gone."""
        self._target.kill()
        self._target.start()

    def close(self) -> None:
        """End it."""
        self._target.kill()
        shutil.rmtree(self._sockets, ignore_errors=True)


def check_image(image: Path) -> str:
    """Run xfs_repair -n on an image whose log is clean. AssertionError with its words when it complains."""
    done = _run(["xfs_repair", "-n", "-f", str(image)])
    assert done.returncode == 0, f"xfs_repair -n: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def check_copy(image: Path, folder: Path) -> None:
    """Check what a power failure of everything would leave: replay the log of a copy of *image*, then xfs_repair -n."""
    copy, mountpoint = folder / "copy.img", folder / "copy"
    mountpoint.mkdir(exist_ok=True)
    loop = ""
    try:
        _must(["cp", "--sparse=always", str(image), str(copy)])
        loop = _must(["losetup", "--find", "--show", str(copy)]).strip()
        _must(["mount", "-t", "xfs", loop, str(mountpoint)])
        _must(["umount", str(mountpoint)])
        done = _run(["xfs_repair", "-n", loop])
        assert done.returncode == 0, f"xfs_repair -n: exit {done.returncode}\n{done.stdout}{done.stderr}"
    finally:
        if os.path.ismount(mountpoint):
            _run(["umount", str(mountpoint)])
        if loop:
            _run(["losetup", "--detach", loop])
        copy.unlink(missing_ok=True)


def _run(argv: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)


def _must(argv: list[str]) -> str:
    done = _run(argv)
    assert done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
