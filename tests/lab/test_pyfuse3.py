"""What the channel through libfuse cannot do, exactly: tests of these things need the native one (``needs("native")``).

A test here that fails because something works is good news: docs/limits.md and that marker then say too much.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from labkit import Lab, errno_of, missing_capability, must, running_lab

from mxfs_proto.ioctls import GETFLAGS
from mxfsd.io import libc
from mxfsd.io.ranges import KEEP_SIZE, PUNCH_HOLE

pytestmark = pytest.mark.needs_lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two nodes on this channel, whatever the others are tested on."""
    reason = missing_capability()
    if reason:
        pytest.skip(reason)
    with running_lab(count=2, options="channel=pyfuse3,localflocks") as cluster:
        yield cluster


@pytest.fixture(params=["home", "node"])
def path(request: pytest.FixtureRequest, lab: Lab) -> Path:
    """A file of 64 KiB on the home, and on the other node."""
    found = lab[lab.at(request.param)] / f"file-{request.param}"
    found.write_bytes(b"x" * 65536)
    return found


def test_file_locks_are_those_of_each_node_alone(lab: Lab, path: Path) -> None:
    fds = [os.open(lab[node] / path.name, os.O_RDWR) for node in lab.names]
    try:
        for fd in fds:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.fcntl(fd, fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 10, 0))
    finally:
        for fd in fds:
            os.close(fd)


def test_there_are_no_ranges(path: Path) -> None:
    """The kernel takes lseek's ENOSYS for a file without holes, and copies what copy_file_range should share."""
    with open(path, "r+b", buffering=0) as stream:
        fd = stream.fileno()
        assert errno_of(lambda: libc.fallocate(fd, 0, 0, 1 << 20)) == errno.EOPNOTSUPP
        assert errno_of(lambda: libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, 4096)) == errno.EOPNOTSUPP
        stream.truncate(1 << 20)
        assert (os.lseek(fd, 0, os.SEEK_DATA), os.lseek(fd, 0, os.SEEK_HOLE)) == (0, 1 << 20)
    with open(path, "rb") as source, open(path.with_suffix(".copy"), "wb") as target:
        assert os.copy_file_range(source.fileno(), target.fileno(), 65536, 0, 0) == 65536
    assert path.with_suffix(".copy").read_bytes() == b"x" * 65536


def test_there_are_no_flags_birth_times_and_unnamed_files(path: Path) -> None:
    with open(path, "rb") as stream:
        assert errno_of(lambda: fcntl.ioctl(stream, GETFLAGS, bytes(8))) == errno.ENOTTY
    assert must(["stat", "-c", "%W", path]).stdout.strip() in ("0", "-")
    assert errno_of(lambda: os.open(path.parent, os.O_TMPFILE | os.O_RDWR)) == errno.EOPNOTSUPP
