"""Giving a lock up: upcalls meanwhile, passes of invalidation, the release. The kernel's page cache is a model."""

import asyncio
import errno
import os
import random
import stat
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_fuse import locks
from mxfs_fuse.fileio import FileIO
from mxfs_fuse.locks import PAGE
from mxfs_fuse.nodes import Handle, Node
from mxfs_fuse.operations import Operations
from mxfs_fuse.state import State
from mxfs_proto.frames import Frame, FrameType
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Attr, Fid, Grant, Op, Request, pack_reply, unpack_request
from mxfs_proto.records import LockBast, LockGrant, LockRelease, LockReq, Record

INO = 77
FH: Any = 1


class PageCache:
    """The kernel's side of one file. A READ has its folio locked until it is answered, and an invalidation waits for
    locked folios. ``hold`` keeps every pass from ending."""

    has_epoch = False

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._locked: dict[int, int] = {}
        self.cached: set[int] = set()
        self.passes = 0
        self.running = 0
        self.held = False
        self.answer = 0

    def needs_read(self, page: int) -> bool:
        """Whether a thread that wants this page sends a READ now: it is not there, and nobody is reading it."""
        with self._changed:
            return page not in self.cached and page not in self._locked.values()

    def begin_read(self, serial: int, page: int) -> None:
        with self._changed:
            self._locked[serial] = page

    def end_read(self, serial: int) -> None:
        with self._changed:
            self.cached.add(self._locked.pop(serial))
            self._changed.notify_all()

    def hold(self, held: bool) -> None:
        with self._changed:
            self.held = held
            self._changed.notify_all()

    def inval_attributes(self, nodeid: int) -> int:
        return self.inval_pages(nodeid, -1, 0)

    def inval_pages(self, nodeid: int, offset: int, length: int) -> int:
        assert nodeid == INO

        def inside(page: int) -> bool:
            return page * PAGE >= offset and (length == 0 or page * PAGE < offset + length)

        with self._changed:
            self.running += 1
            self.passes += 1
            assert self._changed.wait_for(
                lambda: not self.held and not any(inside(page) for page in self._locked.values()), 20
            ), "an invalidation waits for ever"
            self.cached = {page for page in self.cached if not inside(page)}
            self.running -= 1
        return self.answer


class Rig:
    """A mount that is not the home, with one open file under PR, and its channels to the daemon."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.released_with: list[set[int]] = []
        self.shipped: list[tuple[int, Request]] = []
        self.delays: random.Random | None = None
        self.state = State(Fid(128, 1), 1000, False, self._record)
        self.state.link.attach(self)  # type: ignore[arg-type]
        self.state.link.resume(1)
        self.state.open_gate()
        self.kernel = PageCache()
        self.locks = self.state.locks
        self.locks.kernel = self.kernel  # type: ignore[assignment]
        self.io = FileIO(self.state)
        self.node = self.state.known(Fid(INO, 1))
        self.node.opens_r = 1
        self.node.may_have_pages = True
        self.io.handles[FH] = Handle(self.node, os.O_RDONLY, False, False, False, privileged=False)
        self.seq = 0
        self.serial = 0
        self.grant(LockMode.PR)

    def _record(self, record: Record) -> None:
        self.records.append(record)
        if isinstance(record, LockRelease):
            self.released_with.append(set(self.kernel.cached))

    def send(self, kind: FrameType, parts: list[bytes], *, epoch: int, session: int, seq: int) -> None:
        """OperationLink sends here."""
        self.shipped.append((seq, unpack_request(b"".join(parts))))
        if self.delays is not None:
            asyncio.get_running_loop().call_later(self.delays.choice((0, 0, 0.001, 0.005)), self.answer, seq)

    def answer(self, seq: int) -> None:
        payload = b"".join(pack_reply(Op.READ, [], [b"x" * PAGE]))
        self.state.link.on_reply(Frame(FrameType.OP_REPLY, 1, self.state.link.session, seq, payload))

    def grant(self, mode: LockMode) -> None:
        self.seq += 1
        self.locks.on_record(LockGrant(0, INO, mode, self.seq, LockFlag.NONE))

    def bast(self, mode: LockMode = LockMode.EX) -> None:
        self.locks.on_record(LockBast(INO, self.seq, mode, LockFlag.NONE))

    async def read(self, page: int) -> None:
        """One READ of the kernel's."""
        self.serial += 1
        serial = self.serial
        self.kernel.begin_read(serial, page)
        await self.io.read(FH, page * PAGE, PAGE)
        self.kernel.end_read(serial)

    def start_read(self, page: int) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self.read(page))

    @property
    def releases(self) -> list[LockRelease]:
        return [record for record in self.records if isinstance(record, LockRelease)]

    async def until(self, what: Any) -> None:
        """Go on until *what*() is true; the event loop and the threads run meanwhile."""
        async with asyncio.timeout(20):
            while not what():
                await asyncio.sleep(0)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    try:
        yield rig
    finally:
        rig.kernel.hold(False)
        for task in list(rig.locks._tasks):
            await asyncio.wait([task])
        rig.locks.close()


def slow_to_be_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_STUCK_S", 30)


# -- names and attributes ----------------------------------------------------------------------------------------


class Entries(PageCache):
    """A kernel that keeps names by epoch."""

    has_epoch = True

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0

    def inc_epoch(self) -> int:
        self.epoch += 1
        return 0


@pytest.mark.parametrize(("mode", "epochs"), [(stat.S_IFREG, 0), (stat.S_IFLNK, 0), (stat.S_IFDIR, 1), (None, 1)])
async def test_names_go_with_the_lock_of_a_directory(rig: Rig, mode: int | None, epochs: int) -> None:
    """And with that of what nobody has said what it is."""
    kernel = Entries()
    rig.locks.kernel = kernel  # type: ignore[assignment]
    rig.node.may_have_pages = False
    if mode is not None:
        parent = rig.state.known(rig.state.root)
        Operations(rig.state)._looked_up(attributes(mode), parent)
    rig.bast()
    await rig.until(lambda: rig.releases)
    assert (kernel.passes, kernel.epoch) == (1, epochs)


def attributes(mode: int = stat.S_IFREG, size: int = 1) -> Attr:
    return Attr(INO, 1, mode | 0o644, 1, 0, 0, 0, size, 8, 0, 0, 0)


def knows(rig: Rig) -> Node:
    """Have attributes, a name, and that there is no capability, under the present lock."""
    node = rig.node
    node.attr, node.attr_seq = attributes(), rig.seq
    node.names, node.names_seq = {b"name": None}, rig.seq
    node.no_capability_seq = rig.seq
    return node


@pytest.mark.parametrize("way", ["record", "reply"])
async def test_what_is_known_stays_known_where_more_is_granted(rig: Rig, way: str) -> None:
    node = knows(rig)
    if way == "record":
        rig.grant(LockMode.EX)
    else:
        rig.seq += 1
        rig.state._adopt([Grant(INO, LockMode.EX, rig.seq)])
    assert rig.state.attr_holds(node)
    assert node.names_seq == node.no_capability_seq == rig.state.locks.seq(INO) == rig.seq


async def test_nothing_stays_known_over_a_change_of_home(rig: Rig) -> None:
    """What was written and not durable is sent to the next home anew, which changes times."""
    node = knows(rig)
    rig.seq += 1
    rig.locks.on_record(LockGrant(0, INO, LockMode.PR, rig.seq, LockFlag.RECLAIM))
    assert not rig.state.attr_holds(node)


async def test_nothing_stays_known_of_a_lock_that_is_on_its_way_out(rig: Rig) -> None:
    node = knows(rig)
    rig.kernel.hold(True)
    rig.bast()
    rig.grant(LockMode.PR)
    assert not rig.state.attr_holds(node)
    rig.kernel.hold(False)


async def test_what_was_known_under_an_older_lock_stays_unknown(rig: Rig) -> None:
    node = knows(rig)
    node.attr_seq = node.names_seq = node.no_capability_seq = rig.seq - 1
    rig.grant(LockMode.EX)
    assert not rig.state.attr_holds(node)
    assert node.names_seq == node.no_capability_seq == rig.seq - 2


# -- one case at a time ------------------------------------------------------------------------------------------


async def test_reads_wait_for_the_pass_and_then_for_a_new_lock(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_to_be_stuck(monkeypatch)
    rig.kernel.cached = {1, 5}
    rig.kernel.hold(True)
    rig.bast()
    await rig.until(lambda: rig.kernel.running)
    read = rig.start_read(5)
    for _ in range(20):
        await asyncio.sleep(0)
    assert (rig.shipped, rig.releases) == ([], [])
    waiting = rig.node.in_flight
    assert list(waiting.values()) == [(5 * PAGE, 6 * PAGE)]
    rig.kernel._locked.clear()  # its folio was behind the pass already
    rig.kernel.hold(False)
    await rig.until(lambda: rig.releases)
    assert rig.releases == [LockRelease(INO, 1, LockMode.NL, 1, 0)]
    await rig.until(lambda: any(isinstance(record, LockReq) for record in rig.records))
    assert rig.shipped == [], "what comes under no lock is not read"
    rig.kernel.begin_read(rig.serial, 5)
    (ask,) = [record for record in rig.records if isinstance(record, LockReq)]
    rig.locks.on_record(LockGrant(ask.req_id, INO, LockMode.PR, 9, LockFlag.NONE))
    await rig.until(lambda: rig.shipped)
    rig.answer(rig.shipped[0][0])
    await read


async def test_reads_are_answered_when_the_pass_is_stuck_on_them(rig: Rig) -> None:
    rig.kernel.hold(True)
    rig.bast()
    await rig.until(lambda: rig.kernel.running)
    read = rig.start_read(3)
    await rig.until(lambda: rig.shipped)
    rig.kernel.hold(False)  # now only the folio of that READ is in the way
    assert rig.releases == []
    rig.answer(rig.shipped[0][0])
    await read
    await rig.until(lambda: rig.releases)
    assert rig.kernel.passes == 2, "its folio was filled during the first"
    assert rig.released_with == [set()]


async def test_a_read_still_on_its_way_when_a_pass_ends_needs_another(rig: Rig) -> None:
    """The pass was slow for another reason, so that it ends before the READ is answered."""
    rig.kernel.hold(True)
    rig.bast()
    await rig.until(lambda: rig.kernel.running)
    read = rig.start_read(3)
    await rig.until(lambda: rig.shipped)
    rig.kernel._locked.clear()
    rig.kernel.hold(False)
    await rig.until(lambda: not rig.kernel.running)
    for _ in range(200):
        await asyncio.sleep(0)
    assert rig.releases == [], "what it brings would be cached without a lock"
    rig.kernel.begin_read(rig.serial, 3)
    rig.answer(rig.shipped[0][0])
    await read
    await rig.until(lambda: rig.releases)
    assert rig.released_with == [set()]


async def test_none_begins_between_the_last_pass_and_the_release(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    syncing = threading.Event()

    def sync() -> None:
        syncing.set()
        assert go.wait(20)

    monkeypatch.setattr(rig.locks, "_sync", lambda ino: sync)
    rig.kernel.hold(True)
    rig.bast()
    await rig.until(lambda: rig.node.revocation is not None and rig.node.revocation.serve)
    rig.kernel.hold(False)
    await rig.until(syncing.is_set)
    read = rig.start_read(3)
    for _ in range(200):
        await asyncio.sleep(0)
    assert (rig.shipped, rig.releases) == ([], [])
    go.set()
    await rig.until(lambda: rig.releases)
    assert rig.released_with == [set()]
    read.cancel()


async def test_a_drop_leaves_out_a_read_that_the_home_did_not_answer(rig: Rig) -> None:
    """The home died with it. What the next home answers first came without a lock: it is asked again under one."""
    rig.kernel.cached = {1, 5}
    read = rig.start_read(3)
    await rig.until(lambda: rig.shipped)
    rig.state.close_gate()
    rig.locks.cache.drop_all()
    async with asyncio.timeout(10):
        await rig.locks.drop_pages_of(rig.node)
    assert rig.kernel.cached == set()
    rig.answer(rig.shipped[0][0])
    await asyncio.sleep(0.01)
    assert not read.done() and rig.kernel.cached == set(), "it came when there was no lock any more"
    rig.state.open_gate()
    rig.grant(LockMode.PR)
    await rig.until(lambda: len(rig.shipped) == 2)
    rig.answer(rig.shipped[1][0])
    await read
    assert rig.kernel.cached == {3}, "under a lock it is kept"


class ManyFiles:
    """The kernel's side of many files: a pass through a *stuck* one waits, one of *failing* fails."""

    has_epoch = False

    def __init__(self, inos: list[int], stuck: set[int], failing: set[int]) -> None:
        self.cached = set(inos)
        self.stuck = {ino: threading.Event() for ino in stuck}
        self.failing = failing
        self.passes: list[int] = []

    def inval_pages(self, nodeid: int, offset: int, length: int) -> int:
        self.passes.append(nodeid)
        # What an upcall has locked it leaves out when that is known: not by ranges that go around it.
        if nodeid in self.stuck and (offset, length) == (0, 0):
            assert self.stuck[nodeid].wait(20)
        if nodeid in self.failing:
            return errno.ENOMEM
        self.cached.discard(nodeid)
        return 0


async def test_many_files_are_dropped_once_each(rig: Rig) -> None:
    nodes = [Node(Fid(1000 + number, 1)) for number in range(300)]
    kernel = ManyFiles([node.fid.ino for node in nodes], set(), set())
    rig.locks.kernel = kernel  # type: ignore[assignment]
    await rig.locks.drop_pages_of_many(nodes)
    assert kernel.cached == set() and all(node.first_write for node in nodes)
    await rig.locks.drop_pages_of_many([])


async def test_a_file_that_an_upcall_holds_does_not_stop_the_others(rig: Rig) -> None:
    """Its page is left out once the upcall is known of; what lies behind it is dropped without waiting."""
    nodes = [Node(Fid(1000 + number, 1)) for number in range(50)]
    kernel = ManyFiles([node.fid.ino for node in nodes], {1010, 1049}, set())
    rig.locks.kernel = kernel  # type: ignore[assignment]
    work = asyncio.ensure_future(rig.locks.drop_pages_of_many(nodes))
    await rig.until(lambda: kernel.cached == {1010, 1049})
    await asyncio.sleep(0.05)
    assert not work.done(), "what a pass waits for is not dropped"
    nodes[10].came(1, 0, 4096)
    nodes[49].came(2, 0, 4096)
    async with asyncio.timeout(10):
        await work
    assert kernel.cached == set()
    for event in kernel.stuck.values():
        event.set()


async def test_what_the_kernel_did_not_drop_is_told_and_the_others_are_dropped(rig: Rig, log_guard: list[str]) -> None:
    nodes = [Node(Fid(1000 + number, 1)) for number in range(50)]
    kernel = ManyFiles([node.fid.ino for node in nodes], set(), {1010})
    rig.locks.kernel = kernel  # type: ignore[assignment]
    with pytest.raises(OSError, match="invalidating kernel caches"):
        await rig.locks.drop_pages_of_many(nodes)
    assert kernel.cached == {1010}
    assert log_guard
    log_guard.clear()


async def test_what_cannot_be_made_durable_keeps_the_lock(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, log_guard: list[str]
) -> None:
    def sync() -> None:
        raise OSError(errno.EIO, "no disk")

    monkeypatch.setattr(rig.locks, "_sync", lambda ino: sync)
    rig.bast()
    await rig.until(lambda: not rig.locks._tasks)
    assert rig.releases == []
    assert any("could not be given up" in line for line in log_guard)
    log_guard.clear()


@pytest.mark.parametrize("pages", [True, False])
async def test_what_the_kernel_did_not_drop_keeps_the_lock(rig: Rig, log_guard: list[str], pages: bool) -> None:
    rig.node.may_have_pages = pages
    rig.kernel.answer = errno.ENOMEM
    rig.bast()
    await rig.until(lambda: not rig.locks._tasks)
    assert rig.releases == []
    assert log_guard
    log_guard.clear()


async def test_an_unmounted_kernel_caches_nothing(rig: Rig) -> None:
    rig.kernel.answer = errno.ENOTCONN
    rig.bast()
    await rig.until(lambda: rig.releases)


async def test_what_the_target_covers_is_not_invalidated(rig: Rig) -> None:
    rig.grant(LockMode.EX)
    rig.kernel.cached = {1, 2}
    rig.bast(LockMode.PR)
    await rig.until(lambda: rig.releases)
    assert rig.releases == [LockRelease(INO, 2, LockMode.PR, 1, 0)]
    assert (rig.kernel.passes, rig.kernel.cached) == (0, {1, 2})


async def test_a_file_without_pages_loses_its_attributes(rig: Rig) -> None:
    rig.node.may_have_pages = False
    rig.bast()
    await rig.until(lambda: rig.releases)
    assert rig.kernel.passes == 1
    assert rig.node.attr is None


# -- many at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
async def test_nothing_is_cached_at_a_release_whatever_is_read(rig: Rig, seed: int) -> None:
    """Threads that read for ever: the passes end all the same, and leave no page behind."""
    chance = random.Random(seed)
    rig.delays = random.Random(seed + 1000)
    threads = 6
    stop = False

    async def thread() -> None:
        while not stop:
            page = chance.randrange(8)
            if rig.kernel.needs_read(page):
                await rig.read(page)
            await asyncio.sleep(chance.choice((0, 0, 0.001)))

    tasks = [asyncio.get_running_loop().create_task(thread()) for _ in range(threads)]
    for _ in range(3):
        await asyncio.sleep(chance.choice((0, 0.002, 0.01)))
        before = rig.kernel.passes
        count = len(rig.releases)
        rig.bast()
        await rig.until(lambda count=count: len(rig.releases) > count)
        # At most nine ranges a pass; one that is stuck lets the threads go on, so on a busy machine there are more.
        assert rig.kernel.passes - before <= 9 * 2 * (threads + 2)
        rig.grant(LockMode.PR)
    stop = True
    for record in rig.records:
        if isinstance(record, LockReq):
            rig.locks.on_record(LockGrant(record.req_id, INO, LockMode.PR, rig.seq, LockFlag.NONE))
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks)
    assert rig.released_with == [set()] * 3


# -- ranges ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 40 * 1024), st.integers(1, 20000)), max_size=6))
def test_gaps_are_the_pages_that_no_upcall_has(rows: list[tuple[int, int]]) -> None:
    in_flight = {n: (start, start + size) for n, (start, size) in enumerate(rows)}
    touched = {page for start, end in in_flight.values() for page in range(start // PAGE, (end - 1) // PAGE + 1)}
    gaps = locks._gaps(in_flight)
    assert [length for _, length in gaps].index(0) == len(gaps) - 1, "only the last goes to the end"
    covered: set[int] = set()
    for offset, length in gaps:
        assert offset % PAGE == 0 and length % PAGE == 0
        pages = set(range(offset // PAGE, (offset + length) // PAGE if length else 100))
        assert not pages & covered
        covered |= pages
    assert covered == set(range(100)) - touched


def test_a_node_is_known_by_its_generation() -> None:
    state = State(Fid(128, 1), 1000, False, lambda record: None)
    first = state.known(Fid(5, 1))
    first.nlookup = 3
    assert state.known(Fid(5, 1)) is first
    second = state.known(Fid(5, 2))
    assert isinstance(second, Node) and second is not first
    assert second.nlookup == 3
    state.locks.close()
