"""The disk grows: first under live nodes, whom that must not touch; then mxfs grow gives the volume the new room."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from labkit import Lab, must, run, running_lab

from mxfsd import info, procs, rundir
from mxfsd.lab import disk

pytestmark = pytest.mark.needs_lab
MIB = 1 << 20
FIRST, GROWN = 512 * MIB, 1024 * MIB


def size(folder: Path) -> int:
    """Bytes of the file system, as a node sees them."""
    found = os.statvfs(folder)
    return found.f_blocks * found.f_frsize


def digest(folder: Path) -> dict[str, str]:
    """What is in the files of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def grow(loop: str) -> "subprocess.CompletedProcess[str]":
    """Type the command."""
    return run([sys.executable, "-m", "mxfsd.cli.mxfs", "grow", loop])


@pytest.mark.timeout(240)
def test_a_volume_grows_with_its_disk() -> None:
    with running_lab(2, f"{FIRST // MIB}M", "default") as lab:
        _grow_under(lab)
        home, other = lab.home(), lab.others()[0]
        files = digest(lab[other] / "files")
        assert len(files) == 20
        image = lab.folder / "disk.img"
        lab.stop(other)
        lab.stop(home)
        loop = disk.attach(image)
        try:
            done = grow(loop)
            assert done.returncode == 0, done.stderr
            assert f"room for an XFS of {GROWN // MIB - 16} MiB (it had {FIRST // MIB - 16} MiB)" in done.stdout
        finally:
            disk.detach(loop, image)
        assert info.info(str(image))["lockspace_offset"] == GROWN - 16 * MIB
        # The one that did not do it mounts first.
        lab.start(other)
        lab.start(home)
        for name in (home, other):
            assert size(lab[name]) > 900 * MIB
            assert digest(lab[name] / "files") == files
        # More than there was room for, then a takeover: the next home finds the XFS as large.
        for number in range(10):
            (lab[home] / f"big{number}").write_bytes(os.urandom(MIB) * 60)
        lab.move_home(home)
        lab.kill(home)
        assert size(lab[other]) > 900 * MIB
        assert digest(lab[other] / "files") == files


def _grow_under(lab: Lab) -> None:
    """The nodes see the disk grow; their daemons are killed, and find the lockspace where it was."""
    image = lab.folder / "disk.img"
    (lab["n1"] / "files").mkdir()
    for number in range(20):
        (lab[f"n{1 + number % 2}"] / f"files/f{number}").write_bytes(os.urandom(MIB + number))
    size_before = size(lab["n1"])
    os.truncate(image, GROWN)
    loops = disk.loops_of(image)
    assert len(loops) == 2
    for loop in loops:
        must(["losetup", "--set-capacity", loop])
    refused = grow(loops[0])
    assert refused.returncode == 1 and " is mounted at " in refused.stderr, refused.stderr
    files = digest(lab["n1"] / "files")
    for name in lab.names:
        run_dir = next((lab.folder / ".lab" / name / "run").glob("*-*-*"))
        before = rundir.recall(run_dir, rundir.DAEMON)
        lab.crash(name, "daemon")
        # A name made on a home in the moment in which its XFS goes down may fail (docs/restart.md): not asked for here.
        assert procs.wait_until(lambda: rundir.recall(run_dir, rundir.DAEMON) not in (before, None), 30)  # noqa: B023
        (lab[name] / f"after-{name}").write_text(name)
    for name in lab.names:
        assert digest(lab[name] / "files") == files
        assert size(lab[name]) == size_before
