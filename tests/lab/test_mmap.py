"""Memory maps, private and shared, within the documented limit.

The limit: a descriptor opened while another node had the file open (one of the two for writing) is uncached, so
its pages cannot be shared with a map: MAP_SHARED on it fails with ENODEV. MAP_PRIVATE always works. A descriptor
that was opened cached keeps its right to map for its life.
"""

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from labkit import Lab

from mxfsd import procs

PAIRS = [("n1", "n2"), ("n2", "n1"), ("n2", "n3")]
SIZE = 4 * 4096
Work = dict[str, Path]


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open *path* for the length of a with block."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(params=PAIRS, ids=lambda pair: "-".join(pair))
def pair(request: pytest.FixtureRequest, work: Work) -> tuple[Path, Path]:
    """The same file of SIZE bytes 'a', as two nodes see it."""
    mine, theirs = (work[node] / "f" for node in request.param)
    mine.write_bytes(b"a" * SIZE)
    return mine, theirs


def test_shared_stores_reach_another_node_after_msync(pair: tuple[Path, Path]) -> None:
    mine, theirs = pair
    with opened(mine, os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as area:
        for turn in range(50):
            at = turn * 321 % (SIZE - 10)
            area[at : at + 10] = b"%010d" % turn
            area.flush()
            with opened(theirs, os.O_RDONLY) as other:
                assert os.pread(other, 10, at) == b"%010d" % turn
        expected = bytes(area)
    assert theirs.read_bytes() == expected


def test_shared_stores_reach_another_node_after_close_without_msync(pair: tuple[Path, Path]) -> None:
    mine, theirs = pair
    with opened(mine, os.O_RDWR) as fd:
        with mmap.mmap(fd, SIZE) as area:
            area[5000:5005] = b"store"
    assert theirs.read_bytes()[4999:5006] == b"astorea"


def test_a_map_outlives_its_descriptor(pair: tuple[Path, Path]) -> None:
    mine, theirs = pair
    with opened(mine, os.O_RDWR) as fd:
        area = mmap.mmap(fd, SIZE)  # mmap duplicates the descriptor, so close the duplicate's twin only
    try:
        area[0:5] = b"later"
        area.flush()
        assert theirs.read_bytes()[:6] == b"latera"
    finally:
        area.close()


@pytest.mark.needs_lab
def test_stores_without_msync_are_seen_within_the_limit(lab: Lab, work: Work) -> None:
    """Of a map on the home, through descriptors that stay open on another node."""
    home, other = lab.home(), lab.others()[0]
    settings = [Path(f"/proc/sys/vm/dirty_{name}_centisecs").read_text() for name in ("expire", "writeback")]
    limit_s = sum(map(int, settings)) / 100 + 10  # and what a busy machine adds
    (work[home] / "f").write_bytes(b"a" * SIZE)
    with opened(work[home] / "f", os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as area:
        with opened(work[other] / "f", os.O_RDONLY) as reader:
            area[5000:5005] = b"store"
            assert procs.wait_until(lambda: os.pread(reader, 7, 4999) == b"astorea", limit_s)
            os.pwrite(fd, b"written", 100)
            assert os.pread(reader, 7, 100) == b"written"


def test_shared_map_and_write_agree_on_one_node(pair: tuple[Path, Path]) -> None:
    mine, theirs = pair
    with opened(mine, os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as area:
        os.pwrite(fd, b"written", 4090)
        assert area[4090:4097] == b"written"
        area[0:6] = b"stored"
        assert os.pread(fd, 7, 0) == b"storeda"
        area.flush()
        assert theirs.read_bytes()[:7] == b"storeda"


def test_read_only_shared_map_follows_another_nodes_writes(pair: tuple[Path, Path]) -> None:
    """The map was made before the conflict: its pages are invalidated and read again, each time."""
    mine, theirs = pair
    with opened(mine, os.O_RDONLY) as fd:
        with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as area:
            assert area[:] == b"a" * SIZE
            with opened(theirs, os.O_RDWR) as other:
                for turn in range(200):
                    at = turn * 777 % (SIZE - 10)
                    os.pwrite(other, b"%010d" % turn, at)
                    assert area[at : at + 10] == b"%010d" % turn


def test_private_map_sees_the_file_and_keeps_its_own_stores(pair: tuple[Path, Path]) -> None:
    mine, theirs = pair
    with opened(mine, os.O_RDONLY) as fd, mmap.mmap(fd, SIZE, access=mmap.ACCESS_COPY) as area:
        area[0:3] = b"own"
        assert area[:4] == b"owna"
    assert mine.read_bytes() == b"a" * SIZE
    assert theirs.read_bytes() == b"a" * SIZE
    with opened(theirs, os.O_RDWR) as other:
        os.pwrite(other, b"new", 0)
        # A new private map, also one of an uncached descriptor, starts from the newest content.
        with opened(mine, os.O_RDONLY) as fd, mmap.mmap(fd, SIZE, access=mmap.ACCESS_COPY) as area:
            assert area[:4] == b"newa"


def test_shared_map_of_a_file_open_for_writing_elsewhere_is_refused(lab: Lab, pair: tuple[Path, Path]) -> None:
    """The documented limit, exactly: ENODEV for MAP_SHARED on the later descriptor; the earlier one still maps."""
    mine, theirs = pair
    with opened(theirs, os.O_RDWR) as first, opened(mine, os.O_RDWR) as second:
        if lab.native:
            mmap.mmap(second, SIZE).close()
        else:
            with pytest.raises(OSError) as caught:
                mmap.mmap(second, SIZE)
            assert caught.value.errno == errno.ENODEV
        with mmap.mmap(second, SIZE, access=mmap.ACCESS_COPY) as private:
            assert private[:1] == b"a"
        with mmap.mmap(first, SIZE) as area:
            area[0:5] = b"first"
            area.flush()
            assert os.pread(second, 6, 0) == b"firsta"
    # The conflict over, a new descriptor may map again.
    with opened(mine, os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as area:
        area[0:5] = b"again"
    assert theirs.read_bytes()[:6] == b"againa"


def test_shared_map_of_a_file_open_for_reading_elsewhere(lab: Lab, pair: tuple[Path, Path]) -> None:
    """A writer that opens while another node reads is uncached, so it may not map either; the reader's map stays."""
    mine, theirs = pair
    with opened(theirs, os.O_RDONLY) as reader, opened(mine, os.O_RDWR) as writer:
        if not lab.native:
            with pytest.raises(OSError) as caught:
                mmap.mmap(writer, SIZE)
            assert caught.value.errno == errno.ENODEV
        os.pwrite(writer, b"changed", 0)
        with mmap.mmap(reader, SIZE, prot=mmap.PROT_READ) as area:
            assert area[:8] == b"changeda"


def test_readers_on_several_nodes_may_all_map(work: Work) -> None:
    (work["n1"] / "f").write_bytes(b"program" * 3000)
    fds = [os.open(folder / "f", os.O_RDONLY) for folder in work.values()]
    try:
        for fd in fds:
            with mmap.mmap(fd, 21_000, prot=mmap.PROT_READ) as area:
                assert area[:] == b"program" * 3000
    finally:
        for fd in fds:
            os.close(fd)


def test_a_program_made_on_one_node_runs_on_another(work: Work) -> None:
    """The loader maps executables private: copy one in, run it elsewhere, replace it, run it again."""
    for maker, runner in PAIRS:
        made, seen = work[maker] / "program", work[runner] / "program"
        for source, expected in (("/bin/true", 0), ("/bin/false", 1)):
            made.write_bytes(Path(source).read_bytes())
            made.chmod(0o755)
            assert os.spawnv(os.P_WAIT, seen, [str(seen)]) == expected
            made.unlink()
