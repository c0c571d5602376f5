"""The shared disk: an image behind an iSCSI target that the guests' namespace reaches, and how it looks from outside.

The target is tgtd(8), or the kernel's own (LIO) in a guest.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Protocol

from image import CHECKOUT, Boot
from machine import Machine
from netspace import NetSpace

from mxfsd.lab import target
from mxfsd.lab.target import Target
from mxfsd.pr.iscsi import Iscsi

HOST, PORT = "127.0.0.1", 3260
NAME = target.NAME
DISK_BYTES = 1 << 30
_KEPT_BYTES = 16 << 20
_NUMBER = 99


def initiator(name: str) -> str:
    """Return the name that a node has at the target."""
    return f"iqn.2026-11.net.mxfs.vm:{name}"


class SharedDisk(Protocol):
    """One target with one unit, on ``image``."""

    image: Path

    def wait_up(self) -> None:
        """Return when it can be logged in to."""

    def restart(self) -> float:
        """Lose all that is in its memory, and start again: sessions and reservations that it does not keep are gone.

        Return how many seconds it was away.
        """

    def pause(self, *, still: bool) -> None:
        """Stand still, or go on: the image does not change meanwhile, once no node asks for anything."""

    def logs(self) -> str:
        """Return what a failed test's report needs."""

    def close(self) -> None:
        """End it."""


def _sparse(path: Path, size: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    return path


class Lio:
    """LIO in a guest, for *nodes* by name. It keeps registrations that asked for that (APTPL) on a disk of its own."""

    def __init__(self, folder: Path, space: NetSpace, boot: Boot, nodes: list[str]) -> None:
        self.image = _sparse(folder / "disk.img", DISK_BYTES)
        kept = _sparse(folder / "kept.img", _KEPT_BYTES)
        _must(["mke2fs", "-q", "-t", "ext4", str(kept)])
        self._nodes = nodes
        self.machine = Machine(
            *(_NUMBER, folder / "lio", boot, space, 0),
            name="lio",
            disks=(self.image, kept),
            forward=f"tcp:{HOST}:{PORT}-10.0.{_NUMBER}.15:3260",
        )
        self.machine.power_on()

    def _call(self, *words: str) -> None:
        self.machine.channel.must(["sh", f"{CHECKOUT}/tests/vm/guest/target", *words], 60.0)

    def wait_up(self) -> None:
        """See SharedDisk."""
        if self.machine.booted_s == 0.0:
            self.machine.wait_up()
            self._up()

    def _up(self) -> None:
        self._call("up", NAME, str(target.LUN), *map(initiator, self._nodes))

    def restart(self) -> float:
        """See SharedDisk: everything is taken down, the unit too, and made again."""
        began = time.monotonic()
        self._call("down")
        self._up()
        return time.monotonic() - began

    def power_cycle(self) -> None:
        """Cut its power, and boot it again."""
        self.machine.power_off()
        self.machine.power_on()
        self.machine.wait_up()
        self._up()

    def state(self) -> dict[str, str]:
        """Return what the target itself says of the unit's persistent reservation, by the name of the attribute."""
        text = self.machine.channel.must("cd /sys/kernel/config/target/core/iblock_0/disk/pr && grep -H . res_*")
        found: dict[str, str] = {}
        for line in text.splitlines():
            name, _, value = line.partition(":")
            found[name] = f"{found[name]}\n{value}" if name in found else value
        return found

    def registered(self) -> list[str]:
        """Return the keys that the target has, also before any node has spoken to it."""
        return re.findall(r"Key: (0x[0-9a-f]+)", self.state()["res_pr_registered_i_pts"])

    def pause(self, *, still: bool) -> None:
        """See SharedDisk."""
        if still:
            self.machine.pause()
        else:
            self.machine.resume()

    def logs(self) -> str:
        """See SharedDisk."""
        return self.machine.logs()

    def close(self) -> None:
        """See SharedDisk."""
        self.machine.power_off()


class Storage:
    """tgtd, which keeps no registrations, with a unit of *size* bytes."""

    def __init__(self, folder: Path, space: NetSpace, size: int) -> None:
        self.image = _sparse(folder / "disk.img", size)
        # The path of a Unix socket is short.
        self._sockets = tempfile.mkdtemp(prefix="mxfs-vm-")
        self._space = space
        self._target = Target(self.image, Path(self._sockets), HOST, PORT, prefix=space.prefix())
        try:
            self._target.start()
        except BaseException:
            self.close()
            raise

    def wait_up(self) -> None:
        """See SharedDisk: it is."""

    def restart(self) -> float:
        """See SharedDisk."""
        began = time.monotonic()
        self._target.kill()
        self._target.start()
        return time.monotonic() - began

    def strangers(self) -> list[Iscsi]:
        """Log in under names as long as a registration: tgtd puts them where it had those of fenced nodes."""
        at = target.url(HOST, PORT)
        return self._space.call(lambda: [Iscsi(at, initiator=initiator("x" * 18)) for _ in range(20)])

    def pause(self, *, still: bool) -> None:
        """See SharedDisk: it has nothing to do once no node asks for anything."""

    def logs(self) -> str:
        """See SharedDisk: it says nothing."""
        return ""

    def close(self) -> None:
        """See SharedDisk."""
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
