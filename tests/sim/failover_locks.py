"""File locks in the failover simulator: the real `FileLocks` of each node and the real `FileLockOps` of each home.

Both are coroutines. `Loop` stands in for what they use of asyncio: what they wait for is a Future of the simulator, so
that `drive` runs them as any other task. Everything that is random here comes from a generator of its own.
"""

import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any

from failover_engine import Steps
from simcheck import Broken
from simnode import Future

from mxfs_fuse import filelocks
from mxfs_fuse.filelocks import FileLocks
from mxfs_proto.filelocks import LAST, READ, UNLOCK, WRITE, Held, is_resource, pack_held, resource_of, unpack_held
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Op
from mxfs_proto.records import CacheInval, LockDeny
from mxfsd.lockops import FileLockOps

if TYPE_CHECKING:
    from failover import World
    from failover_client import Fuse
    from failover_home import Home

NL = LockMode.NL
INOS = (1001, 1002, 1003, 1004, 1005)
PHASE_MS = 300
"""So long a node has a favourite file, about which it may decide alone."""
SPAN = 6
RETRY_MS = 1000


class Waits:
    """Awaits a Future of the simulator, or sleeps for milliseconds."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield self.what)


def drive(work: Awaitable[Any]) -> Steps:
    """Run a coroutine as a task of the simulator."""
    return (yield from work.__await__())


class Background:
    """A coroutine as a task that may fail (with OSError), or never begin."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._steps: Generator[Any, Any, Any] | None = None

    def send(self, value: Any) -> Any:
        if self._steps is None:
            self._steps = self._work.__await__()
        try:
            return self._steps.send(value)
        except OSError:
            raise StopIteration from None

    def close(self) -> None:
        self._work.close()


class Turn:
    """asyncio.Lock."""

    def __init__(self) -> None:
        self._held = False
        self._queue: deque[Future] = deque()

    async def __aenter__(self) -> None:
        if self._held:
            future = Future()
            self._queue.append(future)
            await Waits(future)
        self._held = True

    async def __aexit__(self, *_exc: object) -> None:
        if self._queue:
            self._queue.popleft().set(True)  # it is theirs from now on
        else:
            self._held = False


class Event:
    """asyncio.Event. What wait() returns is for wait_for() alone."""

    def __init__(self) -> None:
        self._set = False
        self._waiting: list[Future] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.set(True)

    def clear(self) -> None:
        self._set = False

    def wait(self) -> Future:
        future = Future()
        if self._set:
            future.set(True)
        else:
            self._waiting.append(future)
        return future


class Loop:
    """What `mxfs_fuse.filelocks` uses of asyncio, in one world."""

    Lock = Turn
    Event = Event

    def __init__(self, world: "World") -> None:
        self._engine = world.engine

    @staticmethod
    def shield(work: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
        return work  # nothing is cancelled here

    async def wait_for(self, future: Future, timeout: float) -> None:
        self._engine.at(int(timeout * 1000), future.set, False)
        if not await Waits(future):
            raise TimeoutError


def enter(world: "World") -> None:
    """From now on the real code runs in this world."""
    filelocks.asyncio = Loop(world)  # type: ignore[attr-defined]
    filelocks.now_ms = lambda: world.engine.now  # type: ignore[attr-defined]


def leave() -> None:
    """It runs in asyncio again."""
    import asyncio

    from mxfsd.io.clock import now_ms

    filelocks.asyncio = asyncio  # type: ignore[attr-defined]
    filelocks.now_ms = now_ms  # type: ignore[attr-defined]


# -- a node ------------------------------------------------------------------------------------------------------------


class State:
    """What `FileLocks` asks of its mount (mxfs_fuse.state.State)."""

    def __init__(self, fuse: "Fuse") -> None:
        self._fuse = fuse
        self.locks = self
        self.link = self
        self.cache = fuse.cache
        self.run = fuse.run
        self.nodes: dict[int, Any] = {}
        self.file_locks: Any = None
        self.forgotten: Any = None
        self.frozen = False
        """From the reclaims to the home that serves."""

    @property
    def lower(self) -> object | None:
        return self if self._fuse.home_here else None

    @property
    def lease_until_ms(self) -> int:
        return 1 << 62 if self._fuse.trusts() else 0

    @property
    def gate(self) -> object | None:
        return None if self._fuse.trusts() and not self.frozen else self

    async def pass_gate(self) -> None:
        while self.gate is not None:
            await Waits(5)

    def mode(self, resource: int) -> LockMode:
        return self._fuse.cache.mode(resource)

    async def ship(self, op: Op, _uid: int, _gid: int, values: Any, want_lock: bool) -> tuple[Any, Any]:
        assert want_lock
        fuse = self._fuse
        if fuse.node.fuse is not fuse:
            await Waits(Future())  # its process is dead
        (kind, answer), grants = await Waits(fuse.ship(0, ("lk", op, *values)))
        if kind == "error":
            raise OSError(answer, "of the home")
        return grants, answer


class Locks(FileLocks):
    """The file locks of one FUSE layer."""

    def __init__(self, fuse: "Fuse") -> None:
        self.fuse = fuse
        self.state = State(fuse)
        super().__init__(self.state)  # type: ignore[arg-type]

    def _spawn(self, work: Awaitable[None]) -> None:
        self.fuse.world.engine.spawn(Background(work), self.fuse.fuse_proc)  # type: ignore[arg-type]

    def _decide(self, ino: int, here: Any, lock: Held, wait_id: int) -> Any:
        self.fuse.world.claims.counts["decided alone"] += 1
        return super()._decide(ino, here, lock, wait_id)

    def _stop_waiting(self, ino: int, wait_id: int) -> None:
        if self.fuse.node.fuse is self.fuse:
            super()._stop_waiting(ino, wait_id)

    def _lost(self, ino: int) -> None:
        if self.fuse.serial not in self.fuse.world.claims.out:
            raise Broken(f"node {self.fuse.number} loses its file locks of {ino} and was never put out")
        self.mine.drop(ino, 0)


class Claims:
    """What applications believe to have locked, byte by byte: kept without help of the code under test."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, int, int, bool], list[str]] = {}
        """Inode, FUSE layer, owner, flock: a letter a byte."""
        self.out: set[int] = set()
        """FUSE layers that were put out: what they believe is worth nothing."""
        self.counts = {"locked": 0, "refused": 0, "deadlocks": 0, "reclaimed": 0, "decided alone": 0}

    def gone(self, fuse: int) -> None:
        """A FUSE layer is dead, or was put out."""
        self.out.add(fuse)
        self.held = {who: row for who, row in self.held.items() if who[1] != fuse}

    def less(self, who: tuple[int, int, int, bool], lock: Held) -> None:
        """A call begins: what it takes away, or weakens, is no longer relied upon."""
        row = self.held.get(who)
        if row is not None:
            for at in range(lock.start, min(lock.end + 1, SPAN)):
                if lock.type == UNLOCK or (lock.flock and row[at] != "rw"[lock.type]):
                    row[at] = ""
                elif lock.type == READ and row[at] == "w":
                    row[at] = "r"

    def more(self, who: tuple[int, int, int, bool], lock: Held) -> None:
        """A lock was granted. Raises Broken where somebody else has what conflicts."""
        if who[1] in self.out:
            return
        self.counts["locked"] += 1
        for other, row in self.held.items():
            if other[0] != who[0] or other == who or other[3] != lock.flock:
                continue
            for at in range(lock.start, min(lock.end + 1, SPAN)):
                if row[at] == "w" or (row[at] and lock.type == WRITE):
                    raise Broken(f"fuse {who[1]} is granted {lock} of {who[0]} that fuse {other[1]} has: {row}")
        row = self.held.setdefault(who, [""] * SPAN)
        row[lock.start : min(lock.end + 1, SPAN)] = ["rw"[lock.type]] * (min(lock.end + 1, SPAN) - lock.start)


def application(fuse: "Fuse", owner: int) -> Steps:
    """One process that locks and unlocks until the world has had enough, and lets go of everything then."""
    world, locks = fuse.world, fuse.locks
    rng = random.Random(world.seed * 1009 + fuse.serial * 31 + owner)
    name = f"locks of {owner}"
    while world.engine.now < world.busy_ms:
        yield rng.choice((2, 10, 40, 120))
        favourite = INOS[(fuse.number + world.engine.now // PHASE_MS) % len(INOS)]
        ino = favourite if rng.random() < 0.7 else rng.choice(INOS)
        flock = rng.random() < 0.25
        start = rng.randrange(SPAN)
        lock = Held(owner, start, rng.randrange(start, SPAN), 1, rng.choice((READ, WRITE, WRITE, UNLOCK)), False)
        if flock:
            lock = lock._replace(start=0, end=LAST, flock=True)
        who = (ino, fuse.serial, owner, flock)
        fuse.busy[-owner] = f"{name}: {lock} of {ino}"
        world.claims.less(who, lock)
        # Nobody sees a deadlock in which a flock has a part (flock(2)): who waits for one has nothing else.
        mine = [key for key, row in world.claims.held.items() if key[1:3] == who[1:3] and any(row)]
        sleep = rng.random() < 0.6 and not (mine if flock else any(key[3] for key in mine))
        try:
            yield from drive(locks.lock(ino, owner, lock, sleep))
        except OSError as exc:
            world.claims.counts["deadlocks" if exc.errno == 35 else "refused"] += 1
            if exc.errno == 35:
                yield from let_go(fuse, owner)
        else:
            if lock.type != UNLOCK:
                world.claims.more(who, lock)
        if rng.random() < 0.25:
            yield from let_go(fuse, owner)
        fuse.busy.pop(-owner, None)
    fuse.busy[-owner] = f"{name}: the last unlocks"
    yield from let_go(fuse, owner)
    fuse.busy.pop(-owner, None)


def let_go(fuse: "Fuse", owner: int) -> Steps:
    """The process closes its files."""
    for ino in INOS:
        for flock in (False, True):
            fuse.world.claims.less((ino, fuse.serial, owner, flock), Held(owner, 0, LAST, 1, UNLOCK, flock))
        yield from drive(fuse.locks.closed(ino, owner))
        yield from drive(fuse.locks.released(ino, owner, owner, True))


def bast_first(fuse: "Fuse", resource: int) -> bool:
    """Whether something must be told before this BAST is answered (mxfs_fuse.locks.LockClient._on_file_lock)."""
    return is_resource(resource) and fuse.cache.data_mode(resource) is NL and bool(fuse.locks.must_tell(resource))


# -- the home ----------------------------------------------------------------------------------------------------------


class Service:
    """What `FileLockOps` asks of the home's service."""

    def __init__(self, home: "Home") -> None:
        self._home = home

    def now(self) -> int:
        return self._home.world.engine.now

    def release_pin(self, op_id: int, resource: int) -> None:
        self._home.run(self._home.master.op_release(self.now(), op_id, resource))


class Context:
    """One operation on file locks (mxfsd.home._Context)."""

    def __init__(self, home: "Home", slot: int) -> None:
        self.home = home
        self.node = slot
        self.want_lock = True
        self.executed = False
        self.held: list[tuple[int, int]] = []
        self.grants: list[tuple[int, int, int]] = []

    async def lock(self, *wants: tuple[int, LockMode]) -> None:
        home = self.home
        for resource, mode in wants:
            op_id = home.op_ids = home.op_ids + 1
            future = home.ops[op_id] = Future()
            self.held.append((op_id, resource))
            home.run(home.master.op_request(home.world.engine.now, self.node, op_id, resource, mode))
            if not await Waits(future):
                raise OSError(107, "its node is gone, or the home is over")

    def grant(self, resource: int, mode: LockMode) -> None:
        got, seq = self.home.master.grant_with_op(self.home.world.engine.now, self.node, resource, mode)
        if got is not NL:
            self.grants.append((resource, int(got), seq))


class HomeLocks(FileLockOps):
    """The file locks of the volume at one home."""

    def __init__(self, home: "Home") -> None:
        super().__init__(Service(home), home.master)  # type: ignore[arg-type]
        self.on_wake = lambda slot, ino, wait_id: home.tell_locks(slot, "wake", ino, wait_id)
        self._run: dict[Op, Callable[..., Any]] = self.handlers()

    def execute(self, home: "Home", slot: int, op: Op, values: tuple[Any, ...]) -> Steps:
        """Run one operation. Return its reply and grants, or None where it is not answered."""
        context = Context(home, slot)
        reply: Any = None
        try:
            reply = ("ok", (yield from drive(self._run[op](context, *values))))
        except OSError as exc:
            if exc.errno != 107:
                reply = ("error", exc.errno)
        for op_id, resource in context.held:
            home.ops.pop(op_id, None)
            home.run(home.master.op_release(home.world.engine.now, op_id, resource))
        return (reply, tuple(context.grants)) if reply is not None else None

    def name(self, home: "Home", slot: int, tables: list[tuple[int, bytes]]) -> None:
        """RECLAIM_LOCKS."""
        for ino, blob in tables:
            home.world.claims.counts["reclaimed"] += 1
            if not self.reclaim(slot, ino, unpack_held(blob)):
                home.tell_locks(slot, "denied", ino, 0)


def tables_of(locks: Locks) -> list[tuple[int, bytes]]:
    """What a node names to the next home."""
    return [(ino, pack_held(held)) for ino, held in locks.reclaim()]


def record_of(what: str, ino: int, wait_id: int) -> Any:
    """A record of the home as the node takes it."""
    resource = resource_of(ino)
    return CacheInval(resource, wait_id, 0) if what == "wake" else LockDeny(0, resource, 16)
