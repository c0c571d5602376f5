"""The list of cached inodes, and when a mount's caches are ended for a FUSE layer that does not do it itself."""

import os
import subprocess
import sys
from collections.abc import Iterator
from struct import pack, unpack_from

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto.errors import MediaError, MisuseError
from mxfsd.caches import CacheGuard
from mxfsd.io.cachelist import CacheList, is_dropped, read_list

MARGIN, SLACK = 60, 125


# -- the list ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12) | st.integers(1, 2**64 - 1)), max_size=60))
def test_list_is_a_set(steps: list[tuple[bool, int]]) -> None:
    model: set[int] = set()
    listed = CacheList()
    for add, nodeid in steps:
        (listed.add if add else listed.remove)(nodeid)
        (model.add if add else model.discard)(nodeid)
        found = read_list(listed.fd)
        assert sorted(found) == sorted(model)
        assert len(listed) == len(model)
    listed.close()


def test_list_grows() -> None:
    listed = CacheList()
    for nodeid in range(1, 20_001):
        listed.add(nodeid)
    assert read_list(listed.fd) == list(range(1, 20_001))
    assert not is_dropped(listed.fd)
    listed.set_dropped(True)
    assert is_dropped(listed.fd)
    listed.set_dropped(False)
    assert not is_dropped(listed.fd)
    listed.close()
    listed.close()


@pytest.mark.parametrize("data", [b"", b"MXFSpage", pack("=8sQQ", b"elsewhat", 0, 0), pack("=8sQQ", b"MXFSpage", 0, 1)])
def test_what_is_no_list_is_refused(data: bytes) -> None:
    """Nothing, a piece, another magic, fewer ids than it says."""
    fd = os.memfd_create("test")
    os.write(fd, data)
    with pytest.raises(MediaError):
        read_list(fd)
    os.close(fd)


# -- the guard, with a pipe for /dev/fuse ------------------------------------------------------------------------------


class Stage:
    """A guard on a clock of the test's, watching a real process; /dev/fuse and ``abort`` are pipes."""

    def __init__(self) -> None:
        self.now = 10_000
        self.guard = CacheGuard(MARGIN, SLACK, lambda: self.now)
        self.listed = CacheList()
        self.server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.fuse, fuse = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
        self.abort, abort = os.pipe2(os.O_NONBLOCK)
        os.set_blocking(fuse, True)
        self._given = fuse
        self.guard.watch(self.server.pid, [fuse, os.dup(self.listed.fd), abort])
        self.guard.tell(self.now + 2000)

    def at(self, ms: int) -> None:
        """Look at the time *ms* before the lease ends."""
        self.now = self.guard.until_ms - ms
        self.guard.check()
        if self.guard._work is not None:
            self.guard._work.join(0.2)

    def invalidated(self) -> list[int]:
        """What the kernel was told: node ids (0: all entries)."""
        found = []
        while True:
            try:
                message = os.read(self.fuse, 4096)
            except BlockingIOError:
                return found
            found.append(unpack_from("=Q", message, 16)[0] if len(message) > 16 else 0)

    def aborted(self) -> bool:
        try:
            return os.read(self.abort, 16) == b"1"
        except BlockingIOError:
            return False


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    made.listed.add(7)
    made.listed.add(9)
    yield made
    made.server.kill()
    made.server.wait()


def test_a_live_fuse_layer_drops_its_caches_itself(stage: Stage) -> None:
    stage.at(MARGIN + 1)
    stage.listed.set_dropped(True)
    stage.at(MARGIN)
    stage.at(-10_000)
    assert stage.invalidated() == []
    assert stage.guard.settled
    assert not stage.aborted()


def test_one_that_hears_of_the_next_lease_before_we_do_is_left_alone(stage: Stage) -> None:
    stage.listed.set_dropped(True)
    stage.at(MARGIN + 1)
    assert stage.guard.settled
    stage.at(MARGIN)
    stage.listed.set_dropped(False)
    stage.at(MARGIN - 1)
    assert stage.invalidated() == []
    stage.guard.tell(stage.now + 2000)
    stage.at(MARGIN)  # the next lease has an end too
    assert stage.invalidated() == [0, 7, 9, 0]


def test_what_was_dropped_before_a_renewal_counts_for_the_old_lease_only(stage: Stage) -> None:
    stage.listed.set_dropped(True)
    stage.guard.tell(stage.now + 4000)
    stage.at(1000)
    stage.listed.set_dropped(False)
    stage.at(MARGIN)
    assert stage.invalidated() == [0, 7, 9, 0]


def test_a_stuck_one_is_helped_before_the_lease_ends(stage: Stage) -> None:
    stage.at(MARGIN + 1)
    assert stage.invalidated() == []
    assert not stage.guard.settled
    assert stage.guard.due_ms == stage.guard.until_ms - MARGIN
    stage.at(MARGIN)
    assert stage.invalidated() == [0, 7, 9, 0]
    assert stage.guard.settled
    stage.at(-10_000)
    assert not stage.aborted(), "everything was dropped: when it goes on, so may its mount"


def test_each_lease_has_its_end(stage: Stage) -> None:
    stage.at(MARGIN)
    assert stage.invalidated() == [0, 7, 9, 0]
    stage.guard.tell(stage.now + 2000)
    assert not stage.guard.settled
    stage.at(MARGIN + 1)
    assert stage.invalidated() == []
    stage.at(MARGIN)
    assert stage.invalidated() == [0, 7, 9, 0]


def test_what_hangs_is_aborted(stage: Stage) -> None:
    """The pipe is full: as an invalidation that waits for a folio."""
    os.set_blocking(stage._given, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(stage._given, b"x")
    os.set_blocking(stage._given, True)
    stage.at(MARGIN)
    stage.at(-SLACK + 1)
    assert not stage.aborted()
    stage.at(-SLACK)
    assert stage.aborted()
    stage.at(-SLACK - 1000)
    assert not stage.aborted(), "once is enough"
    stage.invalidated()  # empties the pipe: both threads go on
    assert stage.guard._work is not None
    stage.guard._work.join(10)
    assert stage.guard.settled


def test_a_dead_one_ends_at_once(stage: Stage) -> None:
    """Its main thread is a zombie: that is enough, as other threads may never end."""
    stage.guard.check()
    assert not stage.aborted()
    stage.server.kill()
    os.waitid(os.P_PID, stage.server.pid, os.WEXITED | os.WNOWAIT)
    stage.guard.check()
    assert stage.guard._work is not None
    stage.guard._work.join(10)
    assert stage.aborted()
    assert stage.invalidated() == [0, 7, 9, 0]
    assert stage.guard.settled
    assert stage.guard.due_ms is None
    assert stage.guard.pidfd == -1


def test_settle_waits_for_the_work(stage: Stage) -> None:
    stage.server.kill()
    os.waitid(os.P_PID, stage.server.pid, os.WEXITED | os.WNOWAIT)
    stage.now = stage.guard.until_ms
    assert stage.guard.settle()
    assert stage.invalidated() == [0, 7, 9, 0]


def test_nothing_watched_is_settled(stage: Stage) -> None:
    guard = CacheGuard(MARGIN, SLACK, lambda: 0)
    assert guard.settled
    assert guard.settle()
    assert guard.due_ms is None
    guard.check()
    with pytest.raises(MisuseError, match="already"):
        stage.guard.watch(1, [os.dup(1), os.dup(1), os.dup(1)])
    with pytest.raises(MisuseError, match="missing"):
        guard.watch(1, [os.dup(1)])
