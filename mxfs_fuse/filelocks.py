"""File locks on this node: what its processes hold, who of them waits, and who decides (docs/architecture.md).

All that this node holds is in a table of its own, whoever granted it: it is named to the next home, and to the home
when this node may not decide alone any more. Under EX on the inode's file-lock resource this node decides from its
table, without a message; otherwise the home does. One shipped operation of an inode is under way at a time, and nothing
is decided here meanwhile: so the table at the home is this node's, or is replaced before anybody reads it.

What an unlock, or a lock that only weakens, takes away leaves the table before it is sent, and what is granted enters
it after the answer: so the next home is never told of a lock that another node may have by then.
"""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol, TypeVar

import structlog

from mxfs_fuse.callers import interrupt
from mxfs_fuse.state import State
from mxfs_proto.filelocks import LAST, READ, UNLOCK, WRITE, Held, inode_of, is_resource, pack_held, resource_of
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Op
from mxfs_proto.records import CacheInval, LockDeny, Record
from mxfsd.core.filelocks import LockTables, Verdict, weakens
from mxfsd.io.clock import now_ms

log = structlog.get_logger(__name__)

_T = TypeVar("_T")
_HERE = 0
"""The one node of the table of this node."""
_ASK_AGAIN_S = 1.0
"""A waiter asks again after this time: a wake may be lost, and the home may be another one."""
_ROOT = 0


class FileLock(Protocol):
    """A lock as the channel to the kernel says it: the range is inclusive."""

    @property
    def owner(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def type(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def flock(self) -> bool: ...


def held_of(lock: FileLock) -> Held:
    """Return a lock as it travels between nodes. Raises OSError (EINVAL)."""
    if lock.type not in (READ, WRITE, UNLOCK) or not 0 <= lock.start <= lock.end:
        raise OSError(errno.EINVAL, f"a lock that makes no sense: {lock}")
    if lock.flock:
        return Held(lock.owner, 0, LAST, lock.pid, lock.type, True)
    return Held(lock.owner, lock.start, min(lock.end, LAST), lock.pid, lock.type, False)


class _Inode:
    """How this node's locks of one inode stand to what the home knows of them."""

    __slots__ = ("busy", "copied", "turn", "waits_at_home")

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        """Held by the one operation that is on its way to the home."""
        self.busy = 0
        """Operations that are, or want to be, on their way."""
        self.copied = True
        """The home knows what this node holds here."""
        self.waits_at_home: set[int] = set()
        """Waiters of this node that the home knows: as long as there are any, the home decides."""


class FileLocks:
    """The file locks of one mount. All of it belongs to the event loop's thread."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._locks = state.locks
        self.mine = LockTables()
        self._inodes: dict[int, _Inode] = {}
        self._waiting: dict[tuple[int, int], asyncio.Event] = {}
        self._set_by: dict[int, dict[int, set[int]]] = {}
        """Inode, file handle, owners whose POSIX locks were last set through it: those of an open file description go
        when that is released."""
        self._wait_ids = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.decided_here = 0
        self.shipped = 0
        state.locks.file_locks = self
        state.forgotten = self.forgotten

    # -- requests of the kernel ------------------------------------------------------------------------------------

    async def lock(self, ino: int, fh: int, lock: Held, sleep: bool) -> None:
        """Lock or unlock. Raises OSError: EAGAIN, EDEADLK, ENOLCK, EINTR (then nothing is held that was not before)."""
        if lock.type == UNLOCK:
            await self._attempt(ino, lock, 0)
            return
        if not sleep:
            self._check(await self._attempt(ino, lock, 0))
        else:
            await self._wait(ino, lock)
        if not lock.flock:
            handles = self._set_by.setdefault(ino, {})
            for owners in handles.values():
                owners.discard(lock.owner)
            handles.setdefault(fh, set()).add(lock.owner)

    async def get(self, ino: int, lock: Held) -> Held:
        """Return what is in the way of *lock*, or *lock* as UNLOCK. The pid of another node's process is 0."""
        while True:
            await self._gate()
            here = self._here(ino)
            if self._decides(ino, here):
                found = self.mine.test(ino, _HERE, lock)
                return lock._replace(type=UNLOCK) if found is None else found[1]
            kind, start, end, pid, node = await self._ship(ino, here, lambda: self._ask(Op.LK_TEST, ino, *_wire(lock)))
            own = any((held.start, held.pid) == (start, pid) for held in self.mine.locks_of(ino, _HERE))
            return Held(lock.owner, start, end, pid if own else 0, kind, lock.flock)

    async def closed(self, ino: int, owner: int) -> None:
        """A descriptor of the owner was closed: all its POSIX locks of the inode go, if there are any (close(2))."""
        if not self.mine.owned(ino, _HERE, owner, False):
            return
        for owners in self._set_by.get(ino, {}).values():
            owners.discard(owner)
        await self._attempt(ino, Held(owner, 0, LAST, 0, UNLOCK, False), 0)

    async def released(self, ino: int, fh: int, owner: int, flock: bool) -> None:
        """An open file description is gone: its flock, and the locks that belong to it."""
        handles = self._set_by.get(ino)
        owners = handles.pop(fh, set()) if handles is not None else set()
        if handles is not None and not handles:
            del self._set_by[ino]
        for other in owners:
            if self.mine.owned(ino, _HERE, other, False):
                await self._attempt(ino, Held(other, 0, LAST, 0, UNLOCK, False), 0)
        if flock and self.mine.owned(ino, _HERE, owner, True):
            await self._attempt(ino, Held(owner, 0, LAST, 0, UNLOCK, True), 0)

    def forgotten(self, ino: int) -> None:
        """The kernel knows the inode no more: the right to decide goes back, behind what the home must know."""
        here = self._inodes.get(ino)
        if here is None:
            return
        if here.copied and not here.busy:
            self._give_back(ino)
        else:
            self._spawn(self._leave(ino, here))

    async def _leave(self, ino: int, here: _Inode) -> None:
        await self._ship(ino, here, _nothing)
        if here.copied and not here.busy:
            self._give_back(ino)

    def _give_back(self, ino: int) -> None:
        if ino not in self._state.nodes and not self.mine.nodes_of(ino):
            self._inodes.pop(ino, None)
            if self._state.lower is None:
                self._locks.run(self._locks.cache.forget(now_ms(), resource_of(ino)))

    # -- one request -----------------------------------------------------------------------------------------------

    def _here(self, ino: int) -> _Inode:
        here = self._inodes.get(ino)
        if here is None:
            here = self._inodes[ino] = _Inode()
        return here

    async def _gate(self) -> None:
        while self._state.gate is not None:
            await self._state.pass_gate()

    def _decides(self, ino: int, here: _Inode) -> bool:
        """Whether this node decides alone, now."""
        if here.busy or here.waits_at_home:
            return False
        return self._locks.mode(resource_of(ino)) is LockMode.EX and now_ms() < self._state.lease_until_ms

    @staticmethod
    def _check(verdict: Verdict) -> None:
        if verdict is Verdict.GRANTED:
            return
        code = {Verdict.DEADLOCK: errno.EDEADLK, Verdict.FULL: errno.ENOLCK}.get(verdict, errno.EAGAIN)
        raise OSError(code, os.strerror(code))

    async def _attempt(self, ino: int, lock: Held, wait_id: int) -> Verdict:
        """Ask once, whoever decides. Raises OSError."""
        await self._gate()
        here = self._here(ino)
        if self._decides(ino, here):
            verdict = self._decide(ino, here, lock, wait_id)
            if verdict is not None:
                return verdict
        return await self._ship(ino, here, lambda: self._set_at_home(ino, here, lock, wait_id))

    def _decide(self, ino: int, here: _Inode, lock: Held, wait_id: int) -> Verdict | None:
        """Decide here; None where the home has to: whether a POSIX lock waits in a circle is seen only there."""
        before = self.mine.owned(ino, _HERE, lock.owner, lock.flock)
        verdict = self.mine.request(ino, _HERE, lock, wait_id if lock.flock else 0)
        self.decided_here += 1
        if self.mine.owned(ino, _HERE, lock.owner, lock.flock) != before:
            here.copied = False
        self._wake_here()
        return None if verdict is Verdict.BUSY and wait_id else verdict

    async def _ship(self, ino: int, here: _Inode, work: Callable[[], Awaitable[_T]]) -> _T:
        """Run *work*, which ships an operation, in its turn, behind what the home must know first."""
        here.busy += 1
        try:
            async with here.turn:
                while not here.copied:
                    await self._copy(ino, here)
                return await work()
        finally:
            here.busy -= 1

    async def _copy(self, ino: int, here: _Inode) -> None:
        """Tell the home all that this node holds of the inode."""
        here.copied = True  # the next home is told all by reclaim(), this operation is then sent again
        try:
            await self._ask(Op.LK_ADOPT, ino, pack_held(self.mine.locks_of(ino, _HERE)))
        except OSError as exc:
            here.copied = exc.errno == errno.EBUSY
            if exc.errno != errno.EBUSY:
                raise
            self._lost(ino)

    async def _set_at_home(self, ino: int, here: _Inode, lock: Held, wait_id: int) -> Verdict:
        own = self.mine.owned(ino, _HERE, lock.owner, lock.flock)
        if self.mine.is_full(_HERE) and not lock.flock and (lock.type != UNLOCK or not _ends(own, lock)):
            return Verdict.FULL
        if weakens(own, lock):
            self.mine.put(ino, _HERE, lock)
        elif lock.flock and own and own[0].type != lock.type:
            self.mine.put(ino, _HERE, lock._replace(type=UNLOCK))
        if wait_id:
            self.mine.cancel(ino, _HERE, wait_id)
            here.waits_at_home.add(wait_id)
        self._wake_here()
        waits = 0
        try:
            (waits,) = await self._ask(Op.LK_SET, ino, *_wire(lock), wait_id)
        except OSError as exc:
            verdict = {errno.EAGAIN: Verdict.BUSY, errno.EDEADLK: Verdict.DEADLOCK, errno.ENOLCK: Verdict.FULL}.get(
                exc.errno or errno.EIO
            )
            here.waits_at_home.discard(wait_id)
            if verdict is None:
                here.copied = False  # whatever it did: it is told again what this node holds
                raise
            return verdict
        if waits:
            return Verdict.WAITING
        here.waits_at_home.discard(wait_id)
        self.mine.put(ino, _HERE, lock)
        self._wake_here()
        return Verdict.GRANTED

    async def _ask(self, op: Op, *values: object) -> list[int]:
        self.shipped += 1
        _, reply = await self._state.link.ship(op, _ROOT, _ROOT, values, want_lock=True)
        return reply

    # -- waiting ---------------------------------------------------------------------------------------------------

    async def _wait(self, ino: int, lock: Held) -> None:
        """Ask until the lock is granted. Raises OSError, EINTR too: then no waiter stays."""
        self._wait_ids += 1
        wait_id = self._wait_ids
        event = self._waiting[ino, wait_id] = asyncio.Event()
        ended = False
        try:
            while True:
                event.clear()
                # To its end, whatever happens to this task: what the home grants must be in our table.
                verdict = await asyncio.shield(self._attempt(ino, lock, wait_id))
                if verdict is not Verdict.WAITING:
                    ended = True
                    self._check(verdict)
                    return
                if await _interrupted_before(event):
                    raise OSError(errno.EINTR, "interrupted")
        finally:
            del self._waiting[ino, wait_id]
            if not ended:
                self._stop_waiting(ino, wait_id)

    def _stop_waiting(self, ino: int, wait_id: int) -> None:
        self.mine.cancel(ino, _HERE, wait_id)
        self._wake_here()
        here = self._inodes.get(ino)
        if here is not None and wait_id in here.waits_at_home:
            here.waits_at_home.discard(wait_id)
            self._spawn(self._cancel_at_home(ino, here, wait_id))

    async def _cancel_at_home(self, ino: int, here: _Inode, wait_id: int) -> None:
        await self._ship(ino, here, lambda: self._ask(Op.LK_CANCEL, ino, wait_id))

    def _wake_here(self) -> None:
        for wake in self.mine.take_wakes():
            self._wake(wake.ino, wake.wait_id)

    def _wake(self, ino: int, wait_id: int) -> None:
        event = self._waiting.get((ino, wait_id))
        if event is not None:
            event.set()

    def _wake_all(self, ino: int | None = None) -> None:
        for (waited, _wait_id), event in self._waiting.items():
            if ino is None or waited == ino:
                event.set()

    def _spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await work
            except OSError as exc:
                log.debug("file locks: not told to the home", reason=str(exc))

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- the master ------------------------------------------------------------------------------------------------

    async def give_up(self, resource: int) -> None:
        """Another node asks: tell the home what this node holds, before the right to decide goes. Raises OSError."""
        ino = inode_of(resource)
        here = self._inodes.get(ino)
        if here is not None:
            await self._ship(ino, here, _nothing)
            self._wake_all(ino)  # who waits here waits there from now on

    def must_tell(self, resource: int) -> bool:
        """Whether give_up() has something to say."""
        here = self._inodes.get(inode_of(resource))
        return here is not None and (not here.copied or here.busy > 0)

    def on_record(self, record: Record) -> None:
        """Take a record about a file-lock resource that is not the lock cache's: a wake, or a claim denied."""
        if isinstance(record, CacheInval):
            self._wake(inode_of(record.ino), record.offset)
        elif isinstance(record, LockDeny):
            self._lost(inode_of(record.ino))

    def _lost(self, ino: int) -> None:
        """Another node has got what this one held: it was put out, or counted as such. Its processes hear of it."""
        log.error("file locks are lost: another node has them", ino=ino)
        self.mine.drop(ino, _HERE)
        node = self._state.nodes.get(ino)
        if node is not None:
            node.lose(errno.EIO)

    # -- a change of home ------------------------------------------------------------------------------------------

    def reclaim(self) -> list[tuple[int, list[Held]]]:
        """What this node holds, for the home that begins; who decides is new there."""
        self._locks.cache.drop_where(is_resource)
        for here in self._inodes.values():
            here.copied = True
            here.waits_at_home.clear()
        return [(ino, locks) for ino in self.mine.inodes() if (locks := self.mine.locks_of(ino, _HERE))]

    def resumed(self) -> None:
        """A home serves: who waits asks it."""
        self._wake_all()

    def counts(self) -> Iterator[tuple[str, int]]:
        """Figures: decided here, shipped."""
        yield "decided_here", self.decided_here
        yield "shipped", self.shipped


def _wire(lock: Held) -> tuple[int, ...]:
    return lock.owner, lock.start, lock.end, lock.pid, lock.type, int(lock.flock)


def _ends(own: list[Held], lock: Held) -> bool:
    """Whether an unlock leaves its owner with nothing."""
    return not own or (lock.start <= own[0].start and own[-1].end <= lock.end)


async def _nothing() -> None:
    pass


async def _interrupted_before(event: asyncio.Event) -> bool:
    """Wait for *event*, at most a while. True: the caller of this request was interrupted before."""
    signal = interrupt.get()
    if signal is None:
        try:
            await asyncio.wait_for(event.wait(), _ASK_AGAIN_S)
        except TimeoutError:
            pass
        return False
    waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(signal.wait())]
    try:
        await asyncio.wait(waits, timeout=_ASK_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return signal.is_set
