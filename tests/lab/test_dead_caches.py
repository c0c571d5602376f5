"""What a node caches ends with its lease: of a node that is cut off, of a FUSE layer that is dead or stuck."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from labkit import Lab, running_lab

from mxfsd import procs, rundir
from mxfsd.core.timeouts import Timeouts
from mxfsd.io.clock import now_ms

pytestmark = [pytest.mark.needs_lab, pytest.mark.timeout(240)]
T = Timeouts.named("fast")
OLD, NEW = b"old data" * 4096, b"NEW DATA" * 4096

READER = """
import mmap, os, struct, sys, time
path, marks, what = sys.argv[1:]
fd = os.open(path, os.O_RDONLY)
os.read(fd, 1 << 20)
mapped = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
with open(marks, "r+b") as file:
    mark = mmap.mmap(file.fileno(), 4096)
while True:
    if what == "map":
        data = mapped[20000:20003]
    elif what == "read":
        data = os.pread(fd, 3, 20000)
    else:
        os.stat(path)
        data = b"old"
    if data == b"dat":
        data = b"old"
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 10**6
    if data == b"old":
        struct.pack_into("=Q", mark, 0, now)
    else:
        struct.pack_into("=Q", mark, 8, now)
"""


class Reader:
    """A process that reads a file again and again, and notes when it saw the old and the new contents last (now_ms)."""

    def __init__(self, path: Path, marks: Path, what: str) -> None:
        self._marks = marks
        marks.write_bytes(bytes(4096))
        command = [sys.executable, "-c", READER, str(path), str(marks), what]
        self._errors = marks.with_suffix(".err")
        with open(self._errors, "wb") as errors:
            self.process = subprocess.Popen(command, stderr=errors)

    def _mark(self, at: int) -> int:
        return int.from_bytes(self._marks.read_bytes()[at : at + 8], sys.byteorder)

    @property
    def old_ms(self) -> int:
        return self._mark(0)

    @property
    def new_ms(self) -> int:
        return self._mark(8)

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def end(self) -> None:
        """Kill it; where it hangs in the mount that takes the end of the mount."""
        self.process.kill()


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A cluster for each test: a node dies in it."""
    with running_lab() as cluster:
        yield cluster


@contextmanager
def readers(lab: Lab, tmp_path: Path) -> Iterator[tuple[str, dict[str, Reader]]]:
    """A client node on which the file "f" is read in three ways, by the kernel's caches alone."""
    home = lab.home()
    victim = lab.others()[0]
    (lab[home] / "f").write_bytes(OLD)
    with ExitStack() as ends:
        found = {}
        for what in ("map", "read", "stat"):
            found[what] = Reader(lab[victim] / "f", tmp_path / what, what)
            ends.callback(found[what].process.wait, 20)
            ends.callback(found[what].end)
        assert procs.wait_until(lambda: all(reader.old_ms for reader in found.values()), 20)
        ends.callback(give_up, lab, victim)
        yield victim, found


def give_up(lab: Lab, name: str) -> None:
    """End a node whatever its state is: what hangs in its mount ends with it."""
    with suppress(Exception):
        lab._mxfs(["lab", "kill", str(lab.folder), name])


def processes(lab: Lab, name: str) -> dict[str, int]:
    """Return the pids of the node's processes."""
    (folder,) = (lab.folder / ".lab" / name / "run").glob("*-*-*")
    found = {what: rundir.recall(folder, what) for what in (rundir.DAEMON, rundir.FUSE, rundir.HEARTBEAT)}
    return {what: process.pid for what, process in found.items() if process is not None}


def change(lab: Lab) -> int:
    """Change the file on another node; return when that was done."""
    fd = os.open(lab[lab.home()] / "f", os.O_WRONLY)
    os.pwrite(fd, NEW, 0)
    os.fsync(fd)
    os.close(fd)
    return now_ms()


def check_nothing_old(found: dict[str, Reader], changed_ms: int) -> None:
    """Nobody has seen the old contents after the change was done, nor will."""
    time.sleep(0.5)
    for what, reader in found.items():
        if what != "stat":
            assert reader.old_ms <= changed_ms, f"{what}: old contents {reader.old_ms - changed_ms} ms after the change"


@pytest.mark.parametrize("who", ["fuse", "fuse and daemon"])
def test_fuse_layer_is_killed(lab: Lab, tmp_path: Path, who: str) -> None:
    """Mappings of a mount that nobody serves any more must not be read as if nothing had happened."""
    with readers(lab, tmp_path) as (victim, found):
        pids = processes(lab, victim)
        dead = [pids[rundir.FUSE]] + ([pids[rundir.DAEMON]] if "daemon" in who else [])
        for pid in dead:
            os.kill(pid, signal.SIGSTOP)
        for pid in dead:
            os.kill(pid, signal.SIGKILL)
        check_nothing_old(found, change(lab))
        assert found["map"].process.wait(10) == -signal.SIGBUS
        assert found["read"].process.wait(10) == found["stat"].process.wait(10) == 1
        assert os.strerror(errno.ENOTCONN) in found["read"].errors
        assert found["map"].new_ms == found["read"].new_ms == 0


def test_fuse_layer_is_stuck_on_a_node_that_is_cut_off(lab: Lab, tmp_path: Path) -> None:
    """It cannot drop its caches itself; the heartbeat process does, by the end of the lease."""
    with readers(lab, tmp_path) as (victim, found):
        pids = processes(lab, victim)
        os.kill(pids[rundir.FUSE], signal.SIGSTOP)
        lab._mxfs(["lab", "partition", str(lab.folder), victim])
        cut_ms = now_ms()
        try:
            check_nothing_old(found, change(lab))
            assert found["map"].old_ms <= cut_ms + T.lease_ms
        finally:
            os.kill(pids[rundir.FUSE], signal.SIGCONT)


def test_node_is_cut_off(lab: Lab, tmp_path: Path) -> None:
    """A live FUSE layer drops pages before its lease ends; the kernel's timeouts of attributes end before it too."""
    with readers(lab, tmp_path) as (victim, found):
        lab._mxfs(["lab", "partition", str(lab.folder), victim])
        cut_ms = now_ms()
        changed = threading.Thread(target=change, args=(lab,))
        changed.start()
        for what in found:
            assert procs.wait_until(lambda what=what: now_ms() - found[what].old_ms > T.lease_ms, 20)  # type: ignore[misc]
            assert found[what].old_ms <= cut_ms + T.lease_ms, what
        assert all(reader.process.poll() is None for reader in found.values()), "an error instead of a wait"
        changed.join(60)
        assert not changed.is_alive()
