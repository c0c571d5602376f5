"""Fixtures: a tgtd of their own for the tests of reservations, and real devices where some are named.

MXFS_TEST_PR_DEVICES=/dev/sda,/dev/sdb,/dev/sdc (three devices that are the same disk over different I_T nexuses, whose
content and reservations are destroyed) adds a run through SG_IO: for virtual machines whose kernel has SCSI.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prkit import DEVICES, SgDisk, TestDisk, TgtDisk
from tgt import Tgt

IMAGE_BYTES = 16 << 20


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A loop device with nothing on it."""
    image = tmp_path / "loop.img"
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES)
    made = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True)
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@pytest.fixture
def tgt(tmp_path: Path) -> Iterator[Tgt]:
    """A tgtd for one test."""
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES)
    running = Tgt(image)
    yield running
    running.close()


@pytest.fixture
def tgt_disk(tgt: Tgt) -> TgtDisk:
    """Its logical unit."""
    return TgtDisk(tgt)


@pytest.fixture(params=["tgt", "sg"] if DEVICES else ["tgt"])
def disk(request: pytest.FixtureRequest) -> Iterator[TestDisk]:
    """A disk without registrations, on each transport that this machine has been given."""
    if request.param == "tgt":
        yield TgtDisk(request.getfixturevalue("tgt"))
        return
    devices = SgDisk()
    yield devices
    devices.close()
