"""File locks of three nodes and their home, over channels that overtake each other: no order of messages lets two nodes
hold what conflicts, and every wait ends."""

import asyncio
import errno
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mxfs_fuse import filelocks
from mxfs_fuse import locks as locks_module
from mxfs_fuse.filelocks import FileLocks
from mxfs_fuse.state import State
from mxfs_proto.filelocks import LAST, READ, UNLOCK, WRITE, Held, resource_of
from mxfs_proto.frames import Frame, FrameType
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Fid
from mxfs_proto.records import LockRecord, Record
from mxfsd import homerole
from mxfsd.core.sessions import SessionTable
from mxfsd.core.timeouts import Timeouts
from mxfsd.homerole import HomeRole

HOME, EPOCH = 1, 7
NODES = (HOME, 2, 3)
INOS = (131, 132, 133, 134, 135)


class NoLower:
    """File locks never touch the lower mount."""

    root = Fid(128, 1)

    def is_shut_down(self) -> bool:
        return False

    def forget(self, ino: int) -> None:
        """No descriptor was kept."""


class Cluster:
    """The home and three FUSE layers. Each channel keeps its order; how long a message takes is random."""

    def __init__(self, seed: int, lapses: bool = False) -> None:
        self.random = random.Random(seed)
        self.lapses = lapses
        self.weakening: dict[tuple[int, int], int] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.queues: dict[tuple[int, str], asyncio.Queue[Callable[[], None]]] = {}
        lower: Any = NoLower()
        self.role = HomeRole(
            HOME,
            EPOCH,
            lower,
            Timeouts.named("fast"),
            SessionTable(),
            True,
            self.to_node,
            self.reply,
            lambda _node: None,
        )
        self.role.grace_over()
        self.states: dict[int, State] = {}
        self.locks: dict[int, FileLocks] = {}
        for node in NODES:
            state = State(Fid(128, 1), 1000, False, self.sender(node))
            state.lease_until_ms = 1 << 62
            self.states[node] = state
            self.locks[node] = FileLocks(state)
            state.link.attach(Wire(self, node))  # type: ignore[arg-type]
            state.link.resume(EPOCH)
            state.open_gate()
        self.states[HOME].lower = lower
        self.states[HOME].locks.cache.set_implicit(True)

    def put(self, channel: tuple[int, str], work: Callable[[], None]) -> None:
        if channel not in self.queues:
            self.queues[channel] = asyncio.Queue()
            self.tasks.append(asyncio.get_running_loop().create_task(self.pump(self.queues[channel])))
        self.queues[channel].put_nowait(work)

    async def pump(self, queue: asyncio.Queue[Callable[[], None]]) -> None:
        while True:
            work = await queue.get()
            for _ in range(self.random.choice((0, 1, 2, 20))):
                await asyncio.sleep(0)
            work()
            self.check()

    def sender(self, node: int) -> Callable[[Record], None]:
        def send(record: Record) -> None:
            assert isinstance(record, LockRecord)
            self.put((node, "records up"), lambda: self.role.on_lock(node, record))

        return send

    def to_node(self, node: int, record: LockRecord) -> None:
        self.put((node, "records down"), lambda: self.states[node].locks.on_record(record))

    def reply(self, node: int, kind: FrameType, parts: list[bytes], session: int, seq: int) -> None:
        frame = Frame(kind, EPOCH, session, seq, b"".join(parts))
        self.put((node, "operations down"), lambda: self.states[node].link.on_reply(frame))

    def check(self) -> None:
        """No two owners, of whatever nodes, hold what conflicts. Who is asking to have a WRITE lock weakened no longer
        relies on it: it may be gone before the answer comes."""
        for ino in INOS:
            held = [
                (node, lock)
                for node in NODES
                for lock in self.locks[node].mine.locks_of(ino, 0)
                if not (lock.type == WRITE and self.weakening.get((node, lock.owner)) == ino)
            ]
            for at, (node, lock) in enumerate(held):
                for other, second in held[at + 1 :]:
                    if (node, lock.owner) == (other, second.owner) or lock.flock != second.flock:
                        continue
                    meet = lock.start <= second.end and second.start <= lock.end
                    assert not (meet and WRITE in (lock.type, second.type)), (node, lock, other, second)

    async def tick(self) -> None:
        """What is repeated when nothing came of it: BASTs, requests, and locks that the kernel forgot."""
        while True:
            await asyncio.sleep(0.005)
            self.role.tick()
            for state in self.states.values():
                state.locks.tick()

    def lapse(self, node: int) -> None:
        """The lease of a node ends and is given again: it holds no lock of the master any more, and says nothing."""
        self.states[node].locks.cache.drop_all()


class Wire:
    """The end of a node's operations."""

    def __init__(self, cluster: Cluster, node: int) -> None:
        self.cluster = cluster
        self.node = node

    def send(self, kind: FrameType, parts: list[bytes], *, epoch: int, session: int, seq: int) -> None:
        frame = Frame(kind, epoch, session, seq, b"".join(parts))
        self.cluster.put((self.node, "operations up"), lambda: self.cluster.role.on_operation(self.node, frame))


async def application(cluster: Cluster, node: int, owner: int, steps: int) -> None:
    """Lock and unlock at random; a deadlock, as a program should, by giving everything up."""
    rng, locks = cluster.random, cluster.locks[node]

    async def let_go() -> None:
        for ino in INOS:
            await locks.closed(ino, owner)
            await locks.released(ino, owner, owner, True)

    for _ in range(steps):
        start, end = sorted((rng.randrange(4), rng.randrange(4)))
        flock = rng.random() < 0.2
        lock = Held(owner, start, end, 1, rng.choice((READ, WRITE, WRITE, UNLOCK)), False)
        if flock:
            lock = lock._replace(start=0, end=LAST, flock=True)
        if cluster.lapses and node != HOME and rng.random() < 0.1:
            cluster.lapse(node)
        ino = rng.choice(INOS)
        if lock.type == READ:
            cluster.weakening[node, owner] = ino
        try:
            await locks.lock(ino, owner, lock, not flock and rng.random() < 0.6)
        except OSError as exc:
            assert exc.errno in (errno.EAGAIN, errno.EDEADLK)
            if exc.errno == errno.EDEADLK:
                await let_go()
        finally:
            cluster.weakening.pop((node, owner), None)
        cluster.check()
        if rng.random() < 0.2:
            await let_go()
    await let_go()


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(bounded())


SEEDS = int(os.environ.get("MXFS_LOCK_SEEDS", "6"))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time goes 200 times as fast: what is repeated after seconds is so after milliseconds."""
    for module in (filelocks, homerole, locks_module):
        monkeypatch.setattr(module, "now_ms", lambda: int(time.monotonic() * 200_000))
    monkeypatch.setattr(filelocks, "_ASK_AGAIN_S", 0.02)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("lapses", [False, True])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_order_of_messages_grants_what_conflicts(seed: int, lapses: bool) -> None:
    async def work() -> None:
        cluster = Cluster(seed, lapses)
        cluster.role.service.now = homerole.now_ms
        cluster.tasks.append(asyncio.get_running_loop().create_task(cluster.tick()))
        owners = [(node, owner) for node in NODES for owner in (1, 2)]
        apps = [asyncio.create_task(application(cluster, *who, 60)) for who in owners]
        await asyncio.gather(*apps)
        for task in cluster.tasks:
            if task.done():
                task.result()  # what a channel found
        assert sum(locks.decided_here for locks in cluster.locks.values()) > 0
        assert sum(locks.shipped for locks in cluster.locks.values()) > 0
        for task in cluster.tasks:
            task.cancel()
        for state in cluster.states.values():
            state.locks.close()

    run(work)


@pytest.mark.parametrize("lapses", [False, True])
def test_what_a_node_decided_alone_is_told_before_another_asks(lapses: bool) -> None:
    """Also where its lease has lapsed, and it has no lock of the master any more when it is called back."""

    async def work() -> None:
        cluster = Cluster(0)
        mine, other = cluster.locks[2], cluster.locks[3]
        await mine.lock(131, 1, Held(1, 0, 0, 1, WRITE, False), False)
        shipped = mine.shipped
        await mine.lock(131, 1, Held(1, 5, 9, 1, WRITE, False), False)
        assert (mine.shipped, mine.decided_here) == (shipped, 1)
        if lapses:
            cluster.lapse(2)
        with pytest.raises(BlockingIOError):
            await other.lock(131, 1, Held(1, 7, 7, 1, READ, False), False)
        await other.lock(131, 1, Held(1, 1, 4, 1, READ, False), False)
        cluster.check()
        for task in cluster.tasks:
            task.cancel()
        for state in cluster.states.values():
            state.locks.close()

    run(work)


def test_what_the_homes_own_layer_holds_is_known_when_the_others_have_let_go() -> None:
    """It has no lock of the master just then, and the home no pin any more: what it names is its own all the same."""

    async def work() -> None:
        cluster = Cluster(0)
        cluster.role.master._linger_ms = 60_000
        mine, other, tables = cluster.locks[HOME], cluster.locks[2], cluster.role.service.file_locks
        await mine.lock(131, 1, Held(1, 0, 0, 1, WRITE, False), False)
        for kind in (WRITE, UNLOCK):
            await other.lock(131, 1, Held(1, 5, 9, 1, kind, False), False)
        resource = resource_of(131)
        assert not tables._pins and cluster.role.master.mode_of(HOME, resource) is LockMode.NL
        assert tables.reclaim(HOME, 131, mine.mine.locks_of(131, 0))
        assert not tables.reclaim(3, 131, [Held(1, 20, 20, 1, WRITE, False)])
        for task in cluster.tasks:
            task.cancel()
        for state in cluster.states.values():
            state.locks.close()

    run(work)
