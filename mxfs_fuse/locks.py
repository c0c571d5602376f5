"""Runs the lock cache of this node: its effects become netlink messages, wake-ups and invalidations."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import structlog

from mxfs_fuse.kernel import KernelNotifier
from mxfs_fuse.nodes import Node, Revocation, Span
from mxfs_proto.filelocks import is_resource
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode, covers
from mxfs_proto.records import CacheInval, LockBast, LockDeny, LockGrant, LockRelease, LockReq, Opens, Record
from mxfsd.core.lockcache import LockCache
from mxfsd.core.lockeffects import CacheEffect, Invalidate, Later, SendRelease, SendRequest, Wake
from mxfsd.io.clock import now_ms

log = structlog.get_logger(__name__)

PAGE = 4096
_THREADS = 256
_STUCK_S = 0.002


class FileLockHolder(Protocol):
    """What the lock client asks of the file locks."""

    async def give_up(self, resource: int) -> None:
        """Tell the home what was decided here. Raises OSError."""

    def must_tell(self, resource: int) -> bool:
        """Whether give_up() has something to say."""

    def on_record(self, record: Record) -> None:
        """Take a wake, or the denial of a claim."""


class LockClient:
    """This node's locks. *send* puts a record on the netlink channel; *sync* makes local changes of an inode durable.

    *nodeid_of* maps a lower inode number to the kernel's (the root is 1 there).
    """

    def __init__(
        self,
        nodes: dict[int, Node],
        send: Callable[[Record], None],
        sync: Callable[[int], Callable[[], None] | None],
        in_lower: Callable[[Callable[[], None]], Awaitable[None]],
        nodeid_of: Callable[[int], int],
        on_released: Callable[[int], None],
    ) -> None:
        self._nodes = nodes
        self._send = send
        self._sync = sync
        self._in_lower = in_lower
        self._nodeid_of = nodeid_of
        self._on_released = on_released
        self.cache = LockCache(False, opens_of=self._opens_of, has_cached_writer=self._has_cached_writer)
        self.mode = self.cache.mode
        self.seq = self.cache.seq
        self._waits: dict[int, list[asyncio.Future[LockMode]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="invalidate")
        self.kernel: KernelNotifier | None = None
        self.waits = 0
        self.basts = 0
        self.suspended = False
        self.reclaiming = False
        self.settle: Callable[[Node], Awaitable[None]] = _nothing
        """Wait until the home has answered what was written so far."""
        self.before_release: Callable[[Node, LockMode], Awaitable[None]] = _nothing
        """Awaited before a lock goes down to a mode: what was written under it must be durable first."""
        self.holds_data: Callable[[Node], bool] = lambda node: bool(node.behind)
        """Whether before_release() has something to do."""
        self.file_locks: FileLockHolder | None = None
        """Who looks after the resources that stand for file locks (mxfs_fuse/filelocks.py)."""
        self.claim_denied: Callable[[int], None] = lambda _ino: None
        """Called where a reclaim was denied: another node has the lock."""

    def close(self) -> None:
        """End the invalidation threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- what the cache asks about this node -----------------------------------------------------------------------

    def _opens_of(self, ino: int) -> tuple[int, int]:
        node = self._nodes.get(ino)
        return node.opens if node is not None else (0, 0)

    def _has_cached_writer(self, ino: int) -> bool:
        node = self._nodes.get(ino)
        return node is not None and (node.cached_writers > 0 or node.pinned)

    # -- asking ----------------------------------------------------------------------------------------------------

    async def want(
        self, ino: int, mode: LockMode, flags: LockFlag = LockFlag.NONE, opens: tuple[int, int] | None = None
    ) -> LockMode:
        """Ask for a lock and wait for the answer; NL: granted uncached (only with ALT_UNCACHED)."""
        req_id, effects = self.cache.want(now_ms(), ino, mode, flags, opens)
        future: asyncio.Future[LockMode] = asyncio.get_running_loop().create_future()
        self._waits.setdefault(req_id, []).append(future)
        self.waits += 1
        self.run(effects)
        return await future

    def report_opens(self, node: Node) -> None:
        """Tell the master the open counts of a file on which this node holds no lock that hides them.

        Not while a home is told all (resume() makes up for it): the two would come in any order.
        """
        if not self.reclaiming and node.opens != node.registered:
            self._send_opens(node, node.opens)

    def tell_pin(self, node: Node) -> None:
        """The kernel may write a file by itself from now on, or no longer. Where this node holds it in EX without the
        master's knowing, that need not be said before the lock is called back: see run()."""
        if not self.reclaiming and self.cache.seq(node.fid.ino) > 0:
            self._send_opens(node, node.opens)

    def _send_opens(self, node: Node, opens: tuple[int, int]) -> None:
        node.pin_told = node.pinned
        node.registered = opens
        self._send(Opens(node.fid.ino, *opens, LockFlag.KERNEL_WRITER if node.pinned else LockFlag.NONE))

    # -- effects ---------------------------------------------------------------------------------------------------

    def run(self, effects: list[CacheEffect]) -> None:
        """Carry out what the cache decided, in order."""
        for effect in effects:
            if isinstance(effect, SendRequest):
                opens = effect.opens or (0, 0)
                if not self.suspended:
                    self._send(LockReq(effect.req_id, effect.ino, effect.mode, effect.flags, *opens))
            elif isinstance(effect, SendRelease):
                node = self._nodes.get(effect.ino)
                if node is not None:
                    node.registered = effect.opens
                if not self.reclaiming:
                    if node is not None and (node.pinned or node.pin_told):
                        self._send_opens(node, effect.opens)  # first, so that nobody is granted what it rules out
                    self._send(LockRelease(effect.ino, effect.seq, effect.mode, *effect.opens))
            elif isinstance(effect, Wake):
                for future in self._waits.pop(effect.req_id, ()):
                    if not future.done():
                        if effect.errno:
                            future.set_exception(OSError(effect.errno, os.strerror(effect.errno)))
                        else:
                            future.set_result(effect.mode)
            elif isinstance(effect, Invalidate):
                self._start_invalidation(effect)
            elif isinstance(effect, Later):
                delay = max(0, effect.at_ms - now_ms()) / 1000
                asyncio.get_running_loop().call_later(delay, self.tick)

    def tick(self) -> None:
        """Once a second, and when a minimum hold time ends."""
        self.run(self.cache.tick(now_ms()))

    def on_record(self, record: Record) -> None:
        """Take a lock message from the master."""
        now = now_ms()
        if self._on_file_lock(record):
            return
        if isinstance(record, LockGrant):
            with self.granting(record.ino, carries=LockFlag.RECLAIM not in record.flags):
                self.run(self.cache.on_grant(now, record.req_id, record.ino, record.mode, record.seq, record.flags))
        elif isinstance(record, LockBast):
            self.basts += 1
            node = self._nodes.get(record.ino)
            ino = node.fid.ino if node is not None else record.ino  # one number for all: each takes 32 bytes
            if node is not None and self.cache.data_mode(record.ino) < LockMode.PW and self.holds_data(node):
                # Dropped with the lease, but answered writes may still be on their way to the home: they come first.
                task = asyncio.get_running_loop().create_task(self._bast_after(node, record))
                self._tasks.add(task)
                task.add_done_callback(self._revoked)
                return
            self.run(self.cache.on_bast(now, ino, record.seq, record.mode, record.flags))
        elif isinstance(record, LockDeny):
            if record.req_id == 0:
                self.claim_denied(record.ino)
            self.run(self.cache.on_deny(now, record.req_id, record.ino, record.errno))

    @contextmanager
    def granting(self, ino: int, *, carries: bool = True) -> Iterator[None]:
        """A grant is taken: what is known under a lock that is held before and after stays known, for nobody else has
        changed the inode meanwhile. Not where it *carries* nothing: the next home may have been sent writes anew."""
        node = self._nodes.get(ino)
        before = self.seq(ino) if node is not None and self.mode(ino) >= LockMode.PR else -1
        yield
        if node is not None and carries and before >= 0 and self.mode(ino) >= LockMode.PR:
            node.granted_again(before, self.seq(ino))

    def _on_file_lock(self, record: Record) -> bool:
        """Take a record about a resource that stands for file locks. False: it is the lock cache's."""
        holder = self.file_locks
        if holder is None or not isinstance(record, LockBast | LockDeny | CacheInval) or not is_resource(record.ino):
            return False
        if not isinstance(record, LockBast):
            holder.on_record(record)
            return True
        if self.cache.data_mode(record.ino) is not LockMode.NL or not holder.must_tell(record.ino):
            return False
        # Dropped with the lease: what was decided under it must be told all the same before the master lets it go.
        self.basts += 1
        task = asyncio.get_running_loop().create_task(self._bast_after_telling(holder, record))
        self._tasks.add(task)
        task.add_done_callback(self._revoked)
        return True

    async def _bast_after_telling(self, holder: FileLockHolder, record: LockBast) -> None:
        await holder.give_up(record.ino)
        self.run(self.cache.on_bast(now_ms(), record.ino, record.seq, record.mode, record.flags))

    def fail_all(self, code: int) -> None:
        """End every wait for a lock with an error: the mount is dead."""
        for futures in self._waits.values():
            for future in futures:
                if not future.done():
                    future.set_exception(OSError(code, os.strerror(code)))
        self._waits.clear()

    # -- a change of home ------------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """Ask the home that is going for nothing more; its BASTs are still answered."""
        self.suspended = True

    def reclaim(self) -> None:
        """What is held has been named to the next home: say nothing until it serves."""
        self.suspended = self.reclaiming = True

    def resume(self) -> None:
        """Ask the new home for everything that is still wanted."""
        self.suspended = self.reclaiming = False
        self.run(self.cache.resend(now_ms()))
        for node in self._nodes.values():
            hidden = covers(self.mode(node.fid.ino), LockMode.PR) and node.opens != (0, 0)
            if node.opens != node.registered and not hidden:
                self.report_opens(node)

    # -- invalidation ----------------------------------------------------------------------------------------------

    async def _bast_after(self, node: Node, record: LockBast) -> None:
        await self.before_release(node, LockMode.NL)
        self.run(self.cache.on_bast(now_ms(), record.ino, record.seq, record.mode, record.flags))

    def _start_invalidation(self, effect: Invalidate) -> None:
        node = self._nodes.get(effect.ino)
        revocation = None
        if node is not None and node.may_have_pages and not covers(effect.target, LockMode.PR):
            # From now on, not from when the task begins: every upcall that comes waits for it, or is served by it.
            revocation = node.revocation = Revocation(self.cache.data_mode(effect.ino))
        task = asyncio.get_running_loop().create_task(self._revoke(effect.ino, effect.target, revocation))
        self._tasks.add(task)
        task.add_done_callback(self._revoked)

    def _revoked(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # The lock stays ours: what could not be invalidated or made durable must not be seen by another node.
            log.error("a lock could not be given up", exc_info=task.exception())

    async def _revoke(self, ino: int, target: LockMode, revocation: Revocation | None) -> None:
        """Make the kernel drop what *target* does not cover, make local changes durable, then release."""
        if is_resource(ino):
            if self.file_locks is not None:
                await self.file_locks.give_up(ino)
            self.run(self.cache.invalidated(now_ms(), ino))
            return
        node = self._nodes.get(ino)
        keeps = covers(target, LockMode.PR)
        if node is not None and node.behind:
            await self.settle(node)
        if not keeps:
            self._on_released(ino)
        if node is not None and not keeps:
            node.forget_cached()
            if revocation is not None:
                await self._drop_pages(node, revocation)
            else:
                await self._in_thread(self._drop_attributes, ino)
        if node is not None:
            await self.before_release(node, target)
        while (sync := self._sync(ino)) is not None:
            # What cannot be made durable must not be seen by another node: an error here keeps the lock.
            pinned = node is not None and node.pinned
            await self._in_lower(sync)
            if node is None or not pinned or node.pinned:
                break  # (of what is pinned the home makes durable what is written from now on, before others see it)
        self.run(self.cache.invalidated(now_ms(), ino))
        if ino not in self._nodes:
            self.run(self.cache.forget(now_ms(), ino))  # the kernel forgot it meanwhile: nothing would give it back
        if node is not None and revocation is not None:
            if node.revocation is revocation:  # and not that of a pass which has just begun
                node.revocation = None
            revocation.wake()

    async def _drop_pages(self, node: Node, revocation: Revocation) -> None:
        """Invalidate all pages, repeated until no upcall was answered during a pass.

        Upcalls that arrive now are held back, so the number of passes is bounded by the threads that use the file.
        Only where a pass gets stuck, on a folio that one of them has locked, are they answered, under the lock still
        held.
        """
        ino = node.fid.ino
        while True:
            while node.serving:
                await asyncio.sleep(_STUCK_S / 4)
            revocation.again = False
            gaps = self._gaps_beside(node, revocation.held)
            passes = {self._pass(ino, gaps)}
            ended: set[asyncio.Task[None]] = set()
            while not ended:
                ended, _ = await asyncio.wait(passes, timeout=_STUCK_S, return_when=asyncio.FIRST_COMPLETED)
                if ended:
                    break
                revocation.serve = True
                revocation.wake()
                now = self._gaps_beside(node, revocation.held)
                if node.cached_writers and revocation.held < LockMode.PW and now != gaps:
                    # A WRITE came during the pass and cannot be answered under what is held: a pass that leaves its
                    # folio out does the work. The one that waits for the folio ends when the WRITE is answered.
                    gaps = now
                    passes.add(self._pass(ino, gaps))
            for task in ended:
                task.result()
            # From here to the release none may begin; one still on its way to its answer needs another pass too.
            revocation.serve = False
            if not revocation.again and not node.serving:
                break
        node.pages_dropped()
        for task in passes:
            if not task.done():
                task.add_done_callback(lambda _done: node.expect_old_write())
        if not node.in_flight and not node.opens_r and not node.opens_w:
            node.may_have_pages = False

    @staticmethod
    def _gaps_beside(node: Node, held: LockMode) -> list[tuple[int, int]]:
        """What a pass invalidates. Under a lock for writing a WRITE that has come too late for it may have folios that
        were up to date (and are not locked): they must go. Where they are locked, the WRITE is answered. One that has
        waited for a lock since before has none that are up to date."""
        if held < LockMode.PW:
            return _gaps(node.in_flight)
        return _gaps({serial: span for serial, span in node.in_flight.items() if serial not in node.late})

    async def drop_written(self, node: Node, offset: int, length: int) -> None:
        """Drop the pages of a WRITE that is executed and not answered yet; those that it has locked are not waited for:
        they are not up to date."""
        late = (await asyncio.wait({self._pass(node.fid.ino, [(offset, length)])}, timeout=_STUCK_S))[1]
        for task in late:
            task.add_done_callback(lambda _done: node.expect_old_write())

    def _pass(self, ino: int, ranges: list[tuple[int, int]]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._in_thread(self._invalidate_ranges, ino, ranges))
        self._tasks.add(task)
        task.add_done_callback(self._revoked)
        return task

    def may_be_readable(self, node: Node) -> bool:
        """Whether the kernel may have pages that can be read: it has none left of a file whose lock was given up.

        Dropping such a one again would do harm: the kernel ignores the answer of a GETATTR that was asked before, and
        goes on reading with the size that it knew before that.
        """
        busy = node.revocation is not None or bool(node.serving)
        return node.may_have_pages and (busy or self.cache.data_mode(node.fid.ino) is not LockMode.NL)

    async def drop_pages_of(self, node: Node) -> None:
        """Drop all pages of a file but those that upcalls have locked (the lock is lost already).

        The gate is closed, so none that comes meanwhile is answered; one that was under way to a home that died is
        answered only when the lock is held again. Either may have locked what a pass waits for; what lies behind that
        is dropped by another pass, which leaves it out.
        """
        gaps: list[tuple[int, int]] | None = None
        passes: set[asyncio.Task[None]] = set()
        while True:
            now = _gaps({**node.in_flight, **node.serving})
            if now != gaps:
                gaps = now
                node.leave_out_served()
                passes.add(self._pass(node.fid.ino, gaps))
            ended, _ = await asyncio.wait(passes, timeout=_STUCK_S, return_when=asyncio.FIRST_COMPLETED)
            if ended:
                for task in ended:
                    task.result()
                node.pages_dropped()
                return

    async def drop_pages_of_many(self, nodes: Sequence[Node]) -> None:
        """As ``drop_pages_of`` for each of them, in one thread: of files that no upcall is under way for.

        One that the thread does not get past (an upcall has come) is left to ``drop_pages_of``, and another thread goes
        on behind it.
        """
        alone: list[asyncio.Task[None]] = []
        begin = 0
        while begin < len(nodes):
            sweep = _Sweep(nodes, begin)
            work = asyncio.ensure_future(self._in_thread(self._drop_swept, sweep))
            while True:
                before = sweep.at
                ended, _ = await asyncio.wait({work}, timeout=_STUCK_S)
                at = sweep.at
                for node in nodes[begin:at]:
                    node.pages_dropped()
                begin = at
                if ended or at == before:
                    break
            if ended and work.exception() is None:
                break
            # Stuck, or the kernel could not: that one again, by itself, which tells what is the matter.
            sweep.stopped = True
            work.add_done_callback(_seen)
            alone.append(asyncio.ensure_future(self.drop_pages_of(nodes[begin])))
            begin += 1
        await asyncio.gather(*alone)

    def _drop_swept(self, sweep: "_Sweep") -> None:
        while sweep.at < len(sweep.nodes) and not sweep.stopped:
            self._invalidate_ranges(sweep.nodes[sweep.at].fid.ino, [(0, 0)])
            sweep.at += 1

    def drop_attributes(self, inos: list[int]) -> asyncio.Future[None]:
        """Drop every directory entry and the attributes of these inodes."""
        return asyncio.ensure_future(self._in_thread(self._drop_all_attributes, inos))

    def _drop_all_attributes(self, inos: list[int]) -> None:
        if self.kernel is not None:
            if self.kernel.has_epoch:
                self.kernel.inc_epoch()
            for ino in inos:
                _check(self.kernel.inval_attributes(self._nodeid_of(ino)))

    async def _in_thread(self, work: Callable[..., None], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    def _drop_attributes(self, ino: int) -> None:
        if self.kernel is not None:
            node = self._nodes.get(ino)
            if self.kernel.has_epoch and (node is None or node.is_dir):
                self.kernel.inc_epoch()  # every name in the mount goes, so not for what has none in it
            _check(self.kernel.inval_attributes(self._nodeid_of(ino)))

    def _invalidate_ranges(self, ino: int, ranges: list[tuple[int, int]]) -> None:
        if self.kernel is not None:
            for offset, length in ranges:
                _check(self.kernel.inval_pages(self._nodeid_of(ino), offset, length))


class _Sweep:
    """How far a thread has come that drops the pages of many files."""

    __slots__ = ("at", "nodes", "stopped")

    def __init__(self, nodes: Sequence[Node], at: int) -> None:
        self.nodes = nodes
        self.at = at
        self.stopped = False


def _seen(work: asyncio.Future[None]) -> None:
    """Its error is told by whoever does that again."""
    if not work.cancelled():
        work.exception()


async def _nothing(*_about: object) -> None:
    pass


def _check(code: int) -> None:
    """What the kernel did not drop is still read: the lock must stay. A mount that is gone caches nothing."""
    if code not in (0, errno.ENODEV, errno.ENOTCONN):
        raise OSError(code, f"invalidating kernel caches: {os.strerror(code)}")


def _gaps(in_flight: Mapping[int, Span]) -> list[tuple[int, int]]:
    """The page ranges (offset, length; length 0: to the end) that no waiting upcall has locked.

    Folios of a waiting READ are locked and not up to date: nobody reads stale data from them, and waiting for them here
    could wait for ever. A WRITE waits only where this node's lock was not one for writing, and then nothing but that
    WRITE's own data is in its folios (a node with a cached writer fills pages under PW only).
    """
    if not in_flight:
        return [(0, 0)]
    gaps = []
    at = 0
    for start, end in sorted(in_flight.values()):
        start = start // PAGE * PAGE
        if start > at:
            gaps.append((at, start - at))
        at = max(at, -(-end // PAGE) * PAGE)
    gaps.append((at, 0))
    return gaps
