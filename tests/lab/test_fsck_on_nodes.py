"""``mxfs fsck`` on the disk of real nodes: refused while one has it; the log is kept; what it repaired mounts."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from labkit import Lab, must, run

pytestmark = pytest.mark.needs_lab
LAB_NODES = 2
FIRST_INODES = 4096
"""Where the first inode B+tree of a new XFS of 4 KiB blocks has its root."""


@contextmanager
def another_host(lab: Lab) -> Iterator[str]:
    """The disk as a host sees it that has nothing mounted."""
    device = must(["losetup", "--find", "--show", "--direct-io=on", lab.folder / "disk.img"]).stdout.strip()
    try:
        yield device
    finally:
        must(["losetup", "--detach", device])


def fsck(device: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "mxfsd.cli.mxfs", "fsck", device, *options])


def test_fsck(lab: Lab) -> None:
    other = lab.others()[0]
    (lab[other] / "file").write_text("kept")
    home = lab.home()
    with another_host(lab) as device:
        for options in ((), ("-n",)):
            done = fsck(device, *options)
            assert (done.returncode, done.stdout) == (8, "")
            assert "in use by node 'n" in done.stderr
    lab.stop(other)
    for name in range(200):
        (lab[home] / f"new-{name}").write_text("x")
    os.sync()
    lab.kill(home)
    with another_host(lab) as device:
        done = fsck(device)
        assert done.returncode == 4, done.stdout + done.stderr
        assert f"node {home!r}, the home, is dead" in done.stdout
        assert "XFS: dirty log" in done.stdout
    # As it says: mount once.
    lab.start(other)
    assert (lab[other] / "new-199").read_text() == "x"
    lab.stop(other)
    with another_host(lab) as device:
        done = fsck(device, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["xfs"] == "clean"
        with open(device, "r+b", buffering=0) as disk:
            disk.seek(FIRST_INODES)
            disk.write(b"\xa5" * 4096)
            os.fsync(disk.fileno())
        assert fsck(device, "-n").returncode == 4
        done = fsck(device)
        assert done.returncode == 1, done.stdout + done.stderr
        assert fsck(device, "-n").returncode == 0
    lab.start(home)
    lab.start(other)
    assert lab.home() == home
    # Without its inodes' index xfs_repair finds the files, some of them without their names.
    kept = [lab[other] / "file", *(lab[other] / "lost+found").glob("*")]
    assert any(path.is_file() and path.read_text() == "kept" for path in kept)
