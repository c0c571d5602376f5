"""``mxfs evict``: an operator puts a node out; what it refuses."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from labkit import Lab, run

from mxfsd import info, procs

pytestmark = pytest.mark.needs_lab
Work = dict[str, Path]


def evict(lab: Lab, here: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Type the command on node *here*."""
    run_dir = lab.folder / ".lab" / here / "run"
    return run([sys.executable, "-m", "mxfsd.cli.mxfs", "evict", *words, "--run-dir", run_dir])


def slots(lab: Lab) -> dict[str, tuple[int, int]]:
    """Slot and incarnation of each node, as the disk has them."""
    return {
        slot["node"]: (slot["slot"], slot["incarnation"]) for slot in info.info(str(lab.folder / "disk.img"))["slots"]
    }


@pytest.fixture
def unchanged(lab: Lab) -> Iterator[None]:
    """A refusal changes nothing."""
    before = slots(lab)
    yield
    assert slots(lab) == before
    for name in lab.names:
        (lab[name] / f"alive-{name}").write_text(name)


@pytest.mark.parametrize("where", ["home", "client"])
def test_a_node_is_put_out(lab: Lab, work: Work, where: str) -> None:
    """From the home, and from another client. Its programs get EIO, its locks go to others, a new mount serves."""
    victim, other = lab.others()
    here = lab.home() if where == "home" else other
    (work[victim] / "held").write_text("by the victim")
    held = os.open(work[victim] / "held", os.O_RDWR)
    slot, incarnation = slots(lab)[victim]
    try:
        done = evict(lab, here, victim)
        assert done.returncode == 0, done.stderr
        assert f"{victim} (slot {slot}, incarnation {incarnation}) is put out" in done.stdout
        assert victim not in slots(lab)
        (work[other] / "held").write_text("by another")
        assert (work[lab.home()] / "held").read_text() == "by another"
        with pytest.raises(OSError) as error:
            os.pwrite(held, b"late", 0)
            os.fsync(held)
        assert error.value.errno in (errno.EIO, errno.ENOTCONN)
    finally:
        try:
            os.close(held)
        except OSError:
            pass  # close(2) tells of the lost write, too
    assert (work[other] / "held").read_text() == "by another"
    subprocess.run(["umount", "-l", lab[victim]], check=False)
    lab.ended(victim)
    lab.start(victim)
    assert (work[victim] / "held").read_text() == "by another"
    assert slots(lab)[victim][1] > incarnation


@pytest.mark.usefixtures("unchanged")
def test_refusals(lab: Lab) -> None:
    home, other = lab.home(), lab.others()[0]
    for here, words, reason in (
        (home, ["n9"], "no node that takes part 'n9' in this volume"),
        (other, [other], f"{other} is the node you are on"),
        (home, [home], f"{home} is the node you are on"),
        (other, [home], f"{home} is the home: move it first"),
        (home, [other, "--volume", "/nowhere"], "/nowhere: no such volume is mounted here"),
    ):
        done = evict(lab, here, *words)
        assert done.returncode == 1 and done.stdout == ""
        assert reason in done.stderr and len(done.stderr.splitlines()) == 1
    done = run([sys.executable, "-m", "mxfsd.cli.mxfs", "evict", other, "--run-dir", lab.folder / "nothing"])
    assert done.returncode == 1 and "no volume is mounted here" in done.stderr


@pytest.mark.usefixtures("unchanged")
def test_a_user_who_is_not_root_is_refused(lab: Lab) -> None:
    other = lab.others()[0]
    folder = next((lab.folder / ".lab" / lab.home() / "run").glob("*-*-*"))
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('control.sock')"
    user = ["setpriv", "--reuid=65534", "--clear-groups"]
    done = subprocess.run([*user, sys.executable, "-c", connect], capture_output=True, cwd=folder)
    assert done.returncode != 0 and b"PermissionError" in done.stderr
    assert procs.wait_until(lambda: other in slots(lab), 1)
