"""fallocate, holes, copies within the volume, flags and birth times, on home and node, as native XFS has them."""

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest
from labkit import Lab, errno_of, must

from mxfs_proto.ioctls import FITRIM, FSGETXATTR, FSSETXATTR, GETFLAGS, SETFLAGS
from mxfsd.io import libc
from mxfsd.io.ranges import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE

pytestmark = [
    pytest.mark.needs_lab,
    pytest.mark.needs("native"),
]
Work = dict[str, Path]
BLOCK = 4096
NODUMP = 1 << 6


def shape(path: Path) -> tuple[int, bytes, list[int]]:
    """Size, contents, and where data and holes begin."""
    fd = os.open(path, os.O_RDONLY)
    try:
        places, at, whence = [], 0, os.SEEK_DATA
        while True:
            try:
                at = os.lseek(fd, at, whence)
            except OSError as exc:
                assert exc.errno == errno.ENXIO
                break
            places.append(at)
            whence = os.SEEK_HOLE if whence == os.SEEK_DATA else os.SEEK_DATA
        return os.fstat(fd).st_size, path.read_bytes(), places
    finally:
        os.close(fd)


ROWS = [
    (0, 0, 10 * BLOCK),
    (KEEP_SIZE, 0, 10 * BLOCK),
    (PUNCH_HOLE | KEEP_SIZE, BLOCK, 2 * BLOCK),
    (PUNCH_HOLE | KEEP_SIZE, 100, BLOCK),
    (ZERO_RANGE, 2 * BLOCK + 7, 9 * BLOCK),
    (ZERO_RANGE | KEEP_SIZE, 5, 50),
    (PUNCH_HOLE, 0, BLOCK),  # not without KEEP_SIZE
    (8, 0, BLOCK),  # COLLAPSE_RANGE: the kernel's FUSE client has it not
    (0, 0, 0),
]


@pytest.mark.parametrize("where", ["home", "node"])
@pytest.mark.parametrize("direct", [False, True])
def test_fallocate_is_as_on_native_xfs(lab: Lab, work: Work, native_xfs: Path, where: str, direct: bool) -> None:
    node = lab.at(where)
    other = next(name for name in work if name != node)
    for number, (mode, offset, length) in enumerate(ROWS):
        seen = []
        for path in (native_xfs / f"{where}{direct}{number}", work[node] / f"file{number}"):
            path.write_bytes(bytes(range(1, 250)) * 66)  # four blocks and a bit
            fd = os.open(path, os.O_RDWR | (os.O_APPEND if direct else 0))
            try:
                os.pread(fd, 4 * BLOCK, 0)  # something is cached
                code = errno_of(lambda fd=fd, row=(mode, offset, length): libc.fallocate(fd, *row))
                seen.append((code, os.fstat(fd).st_size, shape(path)))
            finally:
                os.close(fd)
        if mode == 8:
            assert seen[1][0] == errno.EOPNOTSUPP
            continue
        assert seen[1] == seen[0], (mode, offset, length)
        # (What XFS has in its page cache counts as data, also where nothing was written yet.)
        assert shape(work[other] / f"file{number}")[:2] == seen[0][2][:2]


@pytest.mark.parametrize("where", ["home", "node"])
def test_holes_that_another_node_made(lab: Lab, work: Work, where: str) -> None:
    node = lab.at(where)
    other = next(name for name in work if name != node)
    with open(work[node] / "sparse", "wb", buffering=0) as stream:
        os.pwrite(stream.fileno(), b"x" * BLOCK, 64 * BLOCK)
        mine = os.open(work[node] / "sparse", os.O_RDONLY)
        theirs = os.open(work[other] / "sparse", os.O_RDONLY)
        for fd in (mine, theirs):
            assert os.lseek(fd, 0, os.SEEK_DATA) == 64 * BLOCK
            assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
            assert errno_of(lambda fd=fd: os.lseek(fd, 65 * BLOCK, os.SEEK_DATA)) == errno.ENXIO
        os.pwrite(stream.fileno(), b"y", 0)
        assert os.lseek(theirs, 0, os.SEEK_DATA) == 0
        os.close(mine)
        os.close(theirs)


@pytest.mark.parametrize("where", ["home", "node"])
def test_copies_share_blocks_and_show_the_newest_data(lab: Lab, work: Work, where: str) -> None:
    """What another node wrote a moment ago is copied; no block is taken for it."""
    node = lab.at(where)
    other = next(name for name in work if name != node)
    size = 8 << 20
    data = os.urandom(size)
    with open(work[other] / "source", "wb", buffering=0) as stream:
        stream.write(data)
        source = os.open(work[node] / "source", os.O_RDONLY)
        target = os.open(work[node] / "target", os.O_RDWR | os.O_CREAT, 0o644)
        free = os.statvfs(work[node]).f_bfree
        done = 0
        while done < size:
            done += os.copy_file_range(source, target, size - done, done, done)
        assert free - os.statvfs(work[node]).f_bfree < size // BLOCK // 4, "the blocks are shared"
        os.pwrite(stream.fileno(), b"later", 0)
        assert (work[other] / "target").read_bytes() == data
        assert os.copy_file_range(source, target, 5, 0, 100) == 5
        assert (work[other] / "target").read_bytes()[98:107] == data[98:100] + b"later" + data[105:107]
        os.close(source)
        os.close(target)


@pytest.mark.parametrize("where", ["home", "node"])
@pytest.mark.parametrize("kind", ["file", "dir"])
def test_flags(lab: Lab, work: Work, where: str, kind: str) -> None:
    node = lab.at(where)
    other = next(name for name in work if name != node)
    if kind == "file":
        (work[node] / kind).touch()
    else:
        (work[node] / kind).mkdir()
    fds = {name: os.open(work[name] / kind, os.O_RDONLY) for name in (node, other)}

    def flags(fd: int) -> int:
        return int.from_bytes(fcntl.ioctl(fd, GETFLAGS, bytes(8))[:4], "little")

    try:
        assert flags(fds[node]) & NODUMP == 0
        fcntl.ioctl(fds[node], SETFLAGS, (flags(fds[node]) | NODUMP).to_bytes(8, "little"))
        assert all(flags(fd) & NODUMP for fd in fds.values())
        attributes = bytearray(fcntl.ioctl(fds[other], FSGETXATTR, bytes(28)))
        attributes[12:16] = (77).to_bytes(4, "little")  # the project
        fcntl.ioctl(fds[other], FSSETXATTR, bytes(attributes))
        assert fcntl.ioctl(fds[node], FSGETXATTR, bytes(28))[12:16] == (77).to_bytes(4, "little")
        assert errno_of(lambda: fcntl.ioctl(fds[node], SETFLAGS, (0x10).to_bytes(8, "little"))) == errno.EOPNOTSUPP
        assert errno_of(lambda: fcntl.ioctl(fds[node], 0x5401, bytes(60))) == errno.ENOTTY
    finally:
        for fd in fds.values():
            os.close(fd)


@pytest.mark.parametrize("where", ["home", "node"])
def test_trim(lab: Lab, work: Work, where: str) -> None:
    fd = os.open(work[lab.at(where)], os.O_RDONLY)
    try:
        asked = bytes(8) + b"\xff" * 8 + bytes(8)
        trimmed = int.from_bytes(fcntl.ioctl(fd, FITRIM, asked)[8:16], "little")
        assert 0 < trimmed < 2 << 30
    finally:
        os.close(fd)


@pytest.mark.parametrize("where", ["home", "node"])
def test_birth_times(lab: Lab, work: Work, where: str) -> None:
    path = work[lab.at(where)] / "born"
    before = time.time()
    path.touch()
    os.utime(path, (1, 1))
    for node in work:
        born, changed, size = map(int, must(["stat", "-c", "%W %Y %s", work[node] / "born"]).stdout.split())
        assert (changed, size) == (1, 0)
        assert before - 2 <= born <= time.time()


def test_what_was_erased_stays_so_when_the_home_dies(lab: Lab, work: Work) -> None:
    """Also over what the node keeps to write it again: that is older."""
    node, home = lab.others()[0], lab.home()
    path = work[node] / "erased"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.pwrite(fd, b"x" * 4 * BLOCK, 0)
    libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 100, 2 * BLOCK)
    os.pwrite(fd, b"later", 200)
    wanted = bytearray(b"x" * 4 * BLOCK)
    wanted[100 : 100 + 2 * BLOCK] = bytes(2 * BLOCK)
    wanted[200:205] = b"later"
    lab.kill(home)
    assert os.pread(fd, 4 * BLOCK, 0) == wanted
    os.close(fd)
    lab.start(home)
    assert (work[home] / "erased").read_bytes() == wanted
