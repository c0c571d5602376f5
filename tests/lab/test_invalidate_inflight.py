"""Reads and writes in flight on one node while another writes the same files: no deadlock, no illegal content.

Every file is an array of 16-byte cells, each written by one writer only, with a growing number and its complement.
Cells of different writers share pages, so a write that loses the neighbour's update (a page written back whole from
an old copy) shows as a number that went back. A reader notes the last number that was completely written before it
began and the last that was begun when it ended: what it reads must lie between the two.
"""

import faulthandler
import os
import random
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from labkit import Lab, kernel_wait

CELL = struct.Struct("<QQ")
MASK = (1 << 64) - 1
CELLS = 3 * 4096 // CELL.size + 40  # three pages and a part of one
ROUNDS = int(os.environ.get("MXFS_INFLIGHT_ROUNDS", "10000"))
STALL_S = 45.0


@dataclass
class Shared:
    """What the threads know together: cells' numbers begun and done, rounds, the first violation found."""

    begun: list[list[int]]
    done: list[list[int]]
    rounds: int = 0
    progress: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    wrong: list[str] = field(default_factory=list)

    def fail(self, text: str) -> None:
        self.wrong.append(text)
        self.stop.set()


@dataclass
class Target:
    """One file as one node's threads use it: a kept descriptor, or None to open it anew each time.

    ``parity`` is that of the cells which this node writes.
    """

    index: int
    path: Path
    fd: int | None
    writable: bool
    parity: int

    def use(self, action: Callable[[int], None]) -> None:
        if self.fd is not None:
            action(self.fd)
            return
        fd = os.open(self.path, os.O_RDWR if self.writable else os.O_RDONLY)
        try:
            action(fd)
        finally:
            os.close(fd)


def write_cell(shared: Shared, target: Target, cell: int) -> None:
    """Write the next number into one cell: a part of a page."""
    number = shared.begun[target.index][cell] + 1
    shared.begun[target.index][cell] = number
    payload = CELL.pack(number, number ^ MASK)

    def put(fd: int) -> None:
        if os.pwrite(fd, payload, cell * CELL.size) != CELL.size:
            shared.fail("short write")

    target.use(put)
    shared.done[target.index][cell] = number
    shared.progress += 1


def read_cells(shared: Shared, target: Target, first: int, count: int) -> None:
    """Read some cells and judge each."""
    low = shared.done[target.index][first : first + count]
    raw: list[bytes] = []
    target.use(lambda fd: raw.append(os.pread(fd, count * CELL.size, first * CELL.size)))
    high = shared.begun[target.index][first : first + count]
    shared.progress += 1
    if len(raw[0]) != count * CELL.size:
        shared.fail(f"{target.path}: short read of {len(raw[0])} bytes at cell {first}")
        return
    for i, (number, check) in enumerate(CELL.iter_unpack(raw[0])):
        if number ^ MASK != check:
            # Linux copies out of a cached page without a lock: a cell read while its own node writes it may tear.
            if (first + i) % 2 != target.parity:
                shared.fail(f"{target.path} cell {first + i}: torn, though another node wrote it")
        elif not low[i] <= number <= high[i]:
            shared.fail(f"{target.path} cell {first + i}: read {number}, legal is {low[i]} to {high[i]}")


def watched(shared: Shared, threads: list[threading.Thread]) -> None:
    """Wait for the rounds to end; when nothing moves for STALL_S, dump every stack and give up."""
    last, since = -1, time.monotonic()
    while not shared.stop.wait(0.05):
        if shared.progress != last:
            last, since = shared.progress, time.monotonic()
        elif time.monotonic() - since > STALL_S:
            faulthandler.dump_traceback(all_threads=True)
            waits = {t.name: kernel_wait(t) for t in threads if t.is_alive()}
            shared.fail(f"no operation ended for {STALL_S:.0f} s in round {shared.rounds}: deadlock; {waits}")
    for thread in threads:
        thread.join(STALL_S)
        if thread.is_alive():
            shared.wrong.append(f"{thread.name} hangs in {kernel_wait(thread)}")


class Case:
    """Four files, each met differently by the node with the many threads and by the one that writes against it."""

    NAMES = ("cached-rw", "cached-ro", "direct", "reopened")

    def __init__(self, maker: Path, busy: Path, writer: Path) -> None:
        for name in self.NAMES:
            (maker / name).write_bytes(CELL.pack(0, MASK) * CELLS)
        self.shared = Shared([[0] * CELLS for _ in self.NAMES], [[0] * CELLS for _ in self.NAMES])
        self.fds: list[int] = []
        self.mine: list[Target] = []
        self.theirs: list[Target] = []
        # Who opens first decides who is cached, so this order is the case.
        self._keep(self.mine, 0, busy, os.O_RDWR, 1)
        self._keep(self.mine, 1, busy, os.O_RDONLY, 1)
        for index in range(3):
            self._keep(self.theirs, index, writer, os.O_RDWR, 0)
        self._keep(self.mine, 2, busy, os.O_RDWR, 1)
        self.mine.append(Target(3, busy / self.NAMES[3], None, True, 1))
        self.theirs.append(Target(3, writer / self.NAMES[3], None, True, 0))

    def _keep(self, side: list[Target], index: int, folder: Path, flags: int, parity: int) -> None:
        path = folder / self.NAMES[index]
        self.fds.append(os.open(path, flags))
        side.append(Target(index, path, self.fds[-1], flags != os.O_RDONLY, parity))

    def read_on(self, number: int) -> None:
        """A reader on the busy node."""
        rng = random.Random(number)
        while not self.shared.stop.is_set():
            first = rng.randrange(CELLS - 1)
            read_cells(self.shared, rng.choice(self.mine), first, rng.randrange(1, CELLS - first + 1))

    def write_here(self, number: int) -> None:
        """A writer on the busy node; two share out its odd cells, so that each cell has one writer."""
        rng = random.Random(100 + number)
        targets = [target for target in self.mine if target.writable]
        while not self.shared.stop.is_set():
            write_cell(self.shared, rng.choice(targets), rng.randrange(CELLS // 8) * 8 + 1 + 4 * number)

    def write_there(self) -> None:
        """The writer on the other node: it counts the rounds."""
        rng = random.Random(200)
        for self.shared.rounds in range(1, ROUNDS + 1):
            if self.shared.stop.is_set():
                return
            write_cell(self.shared, rng.choice(self.theirs), rng.randrange(CELLS // 2) * 2)
            if self.shared.rounds % 10 == 0:
                read_cells(self.shared, rng.choice(self.theirs), 0, CELLS)
        self.shared.stop.set()

    def threads(self) -> list[threading.Thread]:
        """Daemon threads, not started: one that is stuck in the kernel must not keep the test run from ending."""

        def guarded(body: Callable[..., None], *args: int) -> None:
            try:
                body(*args)
            except OSError as failed:
                self.shared.fail(f"{threading.current_thread().name}: {failed}")

        jobs: list[tuple[Callable[..., None], tuple[int, ...]]] = [(self.write_there, ())]
        jobs += [(self.read_on, (i,)) for i in range(3)]
        jobs += [(self.write_here, (i,)) for i in range(2)]
        return [
            threading.Thread(target=guarded, args=(body, *args), name=f"{body.__name__} {args}", daemon=True)
            for body, args in jobs
        ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("near_home", [True, False], ids=["reads-on-home", "reads-away-from-home"])
def test_no_deadlock_and_no_illegal_content(lab: Lab, work: dict[str, Path], near_home: bool) -> None:
    home, others = lab.home(), lab.others()
    busy, writer = (home, others[0]) if near_home else (others[0], others[1])
    case = Case(work[home], work[busy], work[writer])
    threads = case.threads()
    try:
        for thread in threads:
            thread.start()
        watched(case.shared, threads)
    finally:
        if not any(thread.is_alive() for thread in threads):
            for fd in case.fds:
                os.close(fd)
    assert not case.shared.wrong, case.shared.wrong
    assert case.shared.rounds == ROUNDS
    for index, name in enumerate(case.NAMES):
        expected = b"".join(CELL.pack(number, number ^ MASK) for number in case.shared.done[index])
        for node in lab.names:
            assert (work[node] / name).read_bytes() == expected, f"{name} on {node} in the end"


def test_the_judge_sees_a_value_that_went_back(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(CELL.pack(1, 1 ^ MASK) + CELL.pack(5, 4))
    shared = Shared([[3, 5]], [[2, 5]])
    read_cells(shared, Target(0, path, None, False, 1), 0, 1)
    assert shared.wrong == [f"{path} cell 0: read 1, legal is 2 to 3"]
    read_cells(shared, Target(0, path, None, False, 1), 1, 1)
    assert len(shared.wrong) == 1, "a cell of the reader's own node may tear"
    read_cells(shared, Target(0, path, None, False, 0), 1, 1)
    assert "torn" in shared.wrong[1]
