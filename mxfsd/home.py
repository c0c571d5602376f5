"""Shipped operations at the home: locks, execution on the lower XFS, durability, reply.

An operation has three parts. First it takes operation locks, in the order of inode numbers. Then it runs, in one piece:
no other operation of this process comes in between. Then, its locks given back, it waits until everything that it
changed or saw is durable (the XFS log forced, in groups), and is answered. DESIGN.md sections 5 and 6.

An operation that must not run twice writes its intent before it changes anything and its outcome behind it, still under
its locks and in the same piece (mxfsd/core/outcomes.py). The force makes both durable with the change.
"""

import asyncio
import errno
import os
import stat
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from mxfs_proto.errors import PeerError
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode, covers
from mxfs_proto.ops import (
    MAX_DATA,
    NO_FID,
    Attr,
    Fid,
    Grant,
    Op,
    OpFlag,
    Request,
    Valid,
    WriteFlag,
    pack_attr,
    pack_entries,
    pack_error,
    pack_reply,
    unpack_writes,
)
from mxfsd.core.dlm import Effect, LockMaster
from mxfsd.core.outcomes import Before, BeforeFlag, takes_intent
from mxfsd.figures import Figures
from mxfsd.io.lower import Lower, errno_of, kill_priv
from mxfsd.lockops import FileLockOps
from mxfsd.oprecords import Key, OpRecords, Slot
from mxfsd.rangeops import RangeOps

INTERNAL_REQ = 1 << 63
"""Set in the request id of a cached lock that the home asks for on a node's behalf, to send it with a reply."""
_READDIR_MAX = 4096


class Frozen(Exception):
    """The home is being moved: the operation was not executed, the client sends it again to the next home."""


class LowerFailed(Exception):
    """The lower XFS has shut down, or its log cannot be forced. The operation must not be answered: whether it was
    executed is for the next home to say."""


class LogForcer:
    """Forces the XFS log in groups: one fsync covers every change made before it began.

    fsync of an inode forces the log up to its last change (xfs_file_fsync), and the log is written in order: so
    fsync of the inode that changed last makes all earlier changes durable too.
    """

    def __init__(self, lower: Lower) -> None:
        self._lower = lower
        self._ticket = 0
        self._forced = 0
        self._last = lower.root
        self._tickets: dict[int, int] = {}
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._thread = ThreadPoolExecutor(1, "log-force")
        self._forcing = False
        self._error: Exception | None = None
        self.forces = 0

    def changed(self, fid: Fid, *also: int) -> int:
        """Note that *fid* changed just now, and the inodes *also* before it; return the ticket of the force."""
        self._ticket += 1
        self._last = fid
        self._tickets[fid.ino] = self._ticket
        for ino in also:
            self._tickets[ino] = self._ticket
        return self._ticket

    def ticket(self, inos: Iterable[int]) -> int:
        """The force that must be over before a reply about these inodes goes out (0: none)."""
        if not self._tickets:
            return 0
        return max((self._tickets.get(ino, 0) for ino in inos), default=0)

    def begin(self) -> None:
        """Begin to force what has changed, for who will wait() for it."""
        if not self._forcing and self._ticket > self._forced and self._error is None:
            self._forcing = True
            # Not by way of an executor's future that the loop waits for: that takes longer than the rest of the hop.
            self._thread.submit(self._force, asyncio.get_running_loop(), self._ticket, self._last)

    async def wait(self, ticket: int) -> None:
        """Wait for the force of *ticket*. Raises OSError where one failed: nothing may be answered as done any more."""
        if self._error is not None:
            raise self._error
        if ticket <= self._forced:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((ticket, future))
        self.begin()
        await future

    def _force(self, loop: asyncio.AbstractEventLoop, ticket: int, last: Fid) -> None:
        """Runs in the thread."""
        error: Exception | None = None
        try:
            self._lower.sync(last)
        except Exception as exc:  # noqa: BLE001 (whatever it is, it was not forced)
            error = exc
        with suppress(RuntimeError):  # the loop has ended, and with it who waits
            loop.call_soon_threadsafe(self._ended, ticket, error)

    def _ended(self, ticket: int, error: Exception | None) -> None:
        self._forcing = False
        if error is not None:
            self._error = error
        else:
            self._forced = ticket
            self.forces += 1
            if ticket == self._ticket:
                self._tickets.clear()
        waiting = self._waiters
        self._waiters = [pair for pair in waiting if pair[0] > ticket and error is None]
        for wanted, future in waiting:
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            elif wanted <= ticket:
                future.set_result(None)
        if self._waiters:
            self.begin()


class _Unstable(NamedTuple):
    """Data of a file that shipped writes left in the lower page cache."""

    fid: Fid
    writer: int
    """The one node that wrote it (DESIGN.md section 6)."""
    serial: int
    """Differs after each write, so that a commit that began before the last write does not count for it."""


class _Context:
    """One running operation."""

    __slots__ = (
        "beside", "executed", "gid", "grants", "held", "home", "intent", "key", "node", "op_id", "request", "seen",
        "ticket", "uid", "want_lock",
    )  # fmt: skip

    def __init__(self, home: "HomeService", node: int, op_id: int, request: Request, key: Key | None) -> None:
        self.home = home
        self.node = node
        self.op_id = op_id
        self.uid = request.uid
        self.gid = request.gid
        self.want_lock = bool(request.flags & OpFlag.WANT_LOCK)
        self.held: list[int] = []
        self.seen: list[int] = []
        self.grants: list[Grant] = []
        self.executed = False
        self.beside: list[Fid] = []
        """Files of which it has seen what the home's own programs wrote beside it, durable or not."""
        self.request = request
        self.key = key
        self.intent: Slot | None = None
        """Where its intent stands, until its outcome is written."""
        self.ticket = 0
        """The force that it must wait for besides those of what it has seen."""

    async def lock(self, *wants: tuple[int, LockMode]) -> None:
        """Take operation locks in inode order (all that an operation holds at once are taken in one call)."""
        for ino, mode in sorted(set(wants)):
            await self.home.op_lock(self, ino, mode)
            self.seen.append(ino)
            self.held.append(ino)

    def unlock(self) -> None:
        for ino in self.held:
            self.home.op_unlock(self, ino)
        self.held.clear()

    def grant(self, ino: int, mode: LockMode) -> None:
        """Give the node a cached lock on what this operation has locked, where nothing conflicts."""
        if self.want_lock:
            got, seq = self.home.master.grant_with_op(self.home.now(), self.node, ino, mode)
            if got != LockMode.NL:
                self.grants.append(Grant(ino, int(got), seq))


class Outcome(NamedTuple):
    """How an operation ended."""

    op: Op
    errno: int
    grants: list[Grant]
    values: list[Any]

    def parts(self) -> list[bytes]:
        """The reply, in parts."""
        if self.errno:
            return pack_error(self.errno, self.grants)
        return pack_reply(self.op, self.grants, self.values)

    def to_keep(self) -> bytes:
        """The reply for a repetition. It carries no locks: they would be grants of another time; and of RENAME not what
        is good under a lock only: such an outcome would not fit its inode any more."""
        values = [*self.values[:5], b"", *self.values[6:]] if self.op is Op.RENAME and self.values else self.values
        return b"".join(self._replace(grants=[], values=values).parts())


class HomeService:
    """Runs shipped operations. *run_effects* carries out what the lock master decides (sends, wake-ups).

    *records*: where intents and outcomes go (none on a read-only mount).
    """

    def __init__(
        self,
        lower: Lower,
        master: LockMaster,
        now: Callable[[], int],
        run_effects: Callable[[list[Effect]], None],
        readonly: bool = False,
        records: OpRecords | None = None,
        figures: Figures | None = None,
    ) -> None:
        self.figures = figures if figures is not None else Figures()
        self.lower = lower
        self.master = master
        self.now = now
        self._run_effects = run_effects
        self.records = records
        self.forcer = LogForcer(lower)
        self._op_ids = 0
        self._serial = 0
        self._op_waits: dict[tuple[int, int], asyncio.Future[None]] = {}
        self._req_waits: dict[int, asyncio.Future[tuple[LockMode, int]]] = {}
        self._running: dict[asyncio.Task[Any], _Context] = {}
        self._unstable: dict[int, _Unstable] = {}
        self._appending: set[int] = set()
        self._orphans: dict[int, Fid] = {} if readonly else {fid.ino: fid for fid in lower.orphans()}
        self.frozen = False
        self.executed = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.file_locks = FileLockOps(self, master)
        master.on_home_alone = self.keep_no_descriptor
        self._handlers: dict[Op, Callable[..., Awaitable[list[Any]]]] = {
            **self.file_locks.handlers(),
            **RangeOps(self).handlers(),
        }
        for op in Op:
            if op not in self._handlers:
                self._handlers[op] = getattr(self, "_" + op.name.lower())

    # -- running ---------------------------------------------------------------------------------------------------

    async def execute(self, node: int, request: Request, key: Key | None = None) -> Outcome:
        """Run one operation of *node*; *key*: it must be executed once even if this home dies.

        Raises Frozen where it was not executed, LowerFailed where it must not be answered.
        """
        if self.frozen:
            raise Frozen
        self._op_ids += 1
        context = _Context(self, node, self._op_ids, request, key)
        task = asyncio.current_task()
        assert task is not None
        self._running[task] = context
        code = 0
        values: list[Any] = []
        try:
            try:
                values = await self._handlers[request.op](context, *request.values)
            except OSError as exc:
                code = errno_of(exc)
            except (ValueError, OverflowError):  # a number or a string that no system call takes
                code = errno.EINVAL
            except PeerError as exc:
                code = exc.errno
            except LowerFailed:
                context.held.clear()  # they stay: nobody may touch what has been changed without an outcome
                raise
            finally:
                if code:
                    self._failed(context, code)
                context.unlock()
            for fid in context.beside:
                await self._seen_durable(fid)
            # An error tells of what was seen too: that a name is there, or is gone.
            await self.forced(max(context.ticket, self.forcer.ticket(context.seen)))
        except asyncio.CancelledError:
            if self.frozen and not context.executed:
                raise Frozen from None
            raise
        finally:
            del self._running[task]
        if code:
            return Outcome(request.op, code, context.grants, [])
        self.executed += 1
        return Outcome(request.op, 0, context.grants, values)

    def saw(self, c: _Context, fid: Fid) -> None:
        """An operation of another node is looking at a file, under its locks. What programs of the home write to it
        just now, under PW or because the kernel asks nobody, must be durable before the reply."""
        home = self.master.home
        if home is None or c.node in (home, 0):
            return
        if self.master.pinned(fid.ino) or self.held_by(home, fid.ino, LockMode.PW):
            c.beside.append(fid)

    async def _seen_durable(self, fid: Fid) -> None:
        """Make a file durable that was seen. Raises LowerFailed: what was seen may not be answered then."""
        try:
            await asyncio.get_running_loop().run_in_executor(None, self.lower.sync, fid)
        except OSError as exc:
            raise LowerFailed(f"data that was seen cannot be made durable: {exc}") from exc

    async def forced(self, ticket: int) -> None:
        """Wait for a force of the log. Raises LowerFailed."""
        try:
            await self.forcer.wait(ticket)
        except OSError as exc:
            raise LowerFailed(f"the log cannot be forced: {exc}") from exc

    # -- intents and outcomes --------------------------------------------------------------------------------------

    def begin(self, c: _Context, before: Before = Before()) -> None:  # noqa: B008 (immutable)
        """The operation is about to change something: write its intent."""
        c.executed = True
        if self.records is not None and c.key is not None and takes_intent(c.request):
            c.intent = self.records.intend(c.key, c.request, before)

    async def intent_durable(self, c: _Context) -> None:
        """Data is about to be overwritten, and may reach the disk before the log does: first make the intent durable,
        so that the next home knows that this was begun."""
        if c.intent is not None:
            await self.forced(self.forcer.changed(c.intent.fid))

    def end(self, c: _Context, values: list[Any], fid: Fid, *also: int) -> list[Any]:
        """It has changed *fid* and *also*: write its outcome, under the locks that it has. Return *values*."""
        if self.records is not None and c.key is not None:
            self._record(c, Outcome(c.request.op, 0, [], values), fid.ino, *also)
        else:
            self.forcer.changed(fid, *also)
        return values

    def _failed(self, c: _Context, code: int) -> None:
        """It failed. An intent must not stay without outcome: it may have been done in part, or not at all."""
        if self.lower.is_shut_down():
            raise LowerFailed("the lower XFS has shut down")
        if c.intent is not None:
            self._record(c, Outcome(c.request.op, code, [], []))

    def _record(self, c: _Context, outcome: Outcome, *inos: int) -> None:
        assert self.records is not None and c.key is not None
        try:
            slot = self.records.outcome(c.key, c.intent, outcome.to_keep())
        except OSError as exc:
            raise LowerFailed(f"an outcome cannot be written: {exc}") from exc
        c.intent = None
        # The log is written in order: forced up to the outcome, it holds the change too.
        c.ticket = self.forcer.changed(slot.fid, *inos)

    async def freeze(self) -> None:
        """Begin a change of home: operations that still wait for locks are dropped, the others end."""
        self.frozen = True
        for task, context in list(self._running.items()):
            if not context.executed:
                task.cancel()
        # Those that only wait for a lock to send with their reply go without: its holder may be dead.
        for future in self._req_waits.values():
            if not future.done():
                future.set_result((LockMode.NL, 0))
        while self._running:
            await asyncio.wait(list(self._running))

    def replace_lower(self, lower: Lower) -> None:
        """Serve again over another mount (the change of home was called off)."""
        self.lower = lower
        if self.records is not None:
            self.records.lower = lower
        forces = self.forcer.forces
        self.forcer = LogForcer(lower)
        self.forcer.forces = forces
        self.frozen = False

    # -- locks -----------------------------------------------------------------------------------------------------

    async def op_lock(self, context: _Context, ino: int, mode: LockMode) -> None:
        """Take an operation lock; cancelled, it leaves nothing behind."""
        key = (context.op_id, ino)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._op_waits[key] = future
        try:
            self._run_effects(self.master.op_request(self.now(), context.node, context.op_id, ino, mode))
            await future
        except asyncio.CancelledError:
            self._run_effects(self.master.op_release(self.now(), context.op_id, ino))
            raise
        finally:
            del self._op_waits[key]

    def op_unlock(self, context: _Context, ino: int) -> None:
        """Give an operation lock back."""
        self._run_effects(self.master.op_release(self.now(), context.op_id, ino))

    def release_pin(self, op_id: int, ino: int) -> None:
        """End what LockMaster.pin() began."""
        self._run_effects(self.master.op_release(self.now(), op_id, ino))

    def op_granted(self, op_id: int, ino: int) -> None:
        """The master granted an operation lock."""
        future = self._op_waits.get((op_id, ino))
        if future is not None and not future.done():
            future.set_result(None)

    def op_denied(self, op_id: int, ino: int, code: int) -> None:
        """The operation's node is gone: nobody waits for its end."""
        future = self._op_waits.get((op_id, ino))
        if future is not None and not future.done():
            future.set_exception(OSError(code, os.strerror(code)))

    def internal_grant(self, req_id: int, mode: LockMode, seq: int) -> None:
        """The master answered a request with INTERNAL_REQ set."""
        future = self._req_waits.get(req_id)
        if future is not None and not future.done():
            future.set_result((mode, seq))

    def internal_denied(self, req_id: int, code: int) -> None:
        """A request with INTERNAL_REQ set ended without a lock: its node is gone."""
        future = self._req_waits.get(req_id)
        if future is not None and not future.done():
            future.set_exception(OSError(code, os.strerror(code)))

    async def _cached_lock(self, context: _Context, ino: int, mode: LockMode) -> bool:
        """Get the node a cached lock to send with the reply; False where a holder keeps what conflicts."""
        if self.frozen:
            return False
        self._op_ids += 1
        req_id = self._op_ids | INTERNAL_REQ
        future: asyncio.Future[tuple[LockMode, int]] = asyncio.get_running_loop().create_future()
        self._req_waits[req_id] = future
        try:
            self._run_effects(self.master.request(self.now(), context.node, req_id, ino, mode, LockFlag.ALT_UNCACHED))
            got, seq = await future
        except asyncio.CancelledError:
            self._run_effects(self.master.cancel(self.now(), context.node, req_id))
            raise
        finally:
            del self._req_waits[req_id]
        if got == LockMode.NL:
            if self.frozen:
                self._run_effects(self.master.cancel(self.now(), context.node, req_id))
            return False
        await self.commit_before(ino, context.node)
        context.grants.append(Grant(ino, int(got), seq))
        return True

    def held_by(self, node: int, ino: int, mode: LockMode) -> bool:
        """Whether *node* holds a cached lock on the inode that covers *mode*."""
        return covers(self.master.mode_of(node, ino), mode)

    # -- durability of data ----------------------------------------------------------------------------------------

    async def commit_before(self, ino: int, node: int) -> None:
        """Commit another node's unstable data of the inode, before *node* sees or changes it."""
        while True:  # a third node may have written while the commit ran
            entry = self._unstable.get(ino)
            if entry is None or entry.writer == node:
                return
            await asyncio.get_running_loop().run_in_executor(None, self.lower.sync, entry.fid)
            if self._unstable.get(ino) == entry:
                del self._unstable[ino]

    def _note_unstable(self, fid: Fid, node: int) -> None:
        self._serial += 1
        self._unstable[fid.ino] = _Unstable(fid, node, self._serial)

    def must_commit(self, ino: int, node: int) -> bool:
        """Whether commit_before() has work to do."""
        entry = self._unstable.get(ino)
        return entry is not None and entry.writer != node

    def unstable_files(self) -> dict[int, int]:
        """Return of how many files each node has written data that is not durable yet: it keeps that until it is."""
        counts: dict[int, int] = {}
        for entry in self._unstable.values():
            counts[entry.writer] = counts.get(entry.writer, 0) + 1
        return counts

    # -- objects ---------------------------------------------------------------------------------------------------

    def _live_attr(self, fid: Fid) -> Attr:
        return self._shown(fid, self.lower.getattr(fid))

    def _shown(self, fid: Fid, attr: Attr) -> Attr:
        """Attributes as applications see them: the name among the orphans is none."""
        if self._orphans.get(fid.ino) == fid or (
            attr.nlink == 1 and stat.S_ISREG(attr.mode) and self.lower.is_orphan(fid)
        ):
            return attr._replace(nlink=0)
        return attr

    async def _attr_with_lock(self, context: _Context, fid: Fid) -> Attr:
        """Attributes, with a PR lock for the node where it wants one and nobody keeps it away."""
        context.seen.append(fid.ino)
        if context.want_lock and await self._cached_lock(context, fid.ino, LockMode.PR):
            return self._live_attr(fid)
        await context.lock((fid.ino, LockMode.CR))
        await self.commit_before(fid.ino, context.node)
        self.saw(context, fid)
        return self._live_attr(fid)

    def _victim(self, context: _Context, attr: Attr, known: Fid) -> Fid | None:
        """The object that loses its last name, where it must be kept because it is, or may be, open somewhere."""
        if attr.nlink != 1 or stat.S_ISDIR(attr.mode):
            return None
        fid = Fid(attr.ino, attr.gen)
        opens = self.master.opens_of(attr.ino)
        promised = known == fid
        for node, (readers, writers) in opens.items():
            if (readers or writers) and not (promised and node == context.node):
                return fid
        if not promised and self.master.mode_of(context.node, attr.ino) != LockMode.NL:
            return fid  # it may have it open under that lock without having said so
        return None

    def reap_if_closed(self, ino: int) -> None:
        """Free an orphan once no node has it open (called when a node reported that it closed its last descriptor).

        Not in the grace period: nodes that have it open may not have said so yet.
        """
        fid = self._orphans.get(ino)
        if fid is not None and not self.frozen and self.master.serving:
            task = asyncio.get_running_loop().create_task(self.execute(0, Request(Op.REAP, 0, 0, 0, 0, [*fid])))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def reap_all(self) -> None:
        """Try every orphan: after recovery, when all nodes have said what they have open."""
        for ino in list(self._orphans):
            self.reap_if_closed(ino)

    def _kept(self, fid: Fid | None) -> list[Any]:
        if fid is None:
            return [*NO_FID]
        self._orphans[fid.ino] = fid
        return [*fid]

    # -- handlers: one an operation, in the order of Op ------------------------------------------------------------

    async def _lookup(self, c: _Context, ino: int, gen: int, name: bytes) -> list[Any]:
        parent = Fid(ino, gen)
        while True:
            await c.lock((ino, LockMode.PR))
            try:
                attr = self.lower.lookup(parent, name)
            except FileNotFoundError:
                c.grant(ino, LockMode.PR)
                raise
            c.grant(ino, LockMode.PR)
            c.unlock()
            try:
                return [await self._attr_with_lock(c, Fid(attr.ino, attr.gen))]
            except OSError as exc:
                if exc.errno != errno.ESTALE:
                    raise
            c.unlock()
            c.grants.clear()  # removed between the two steps: look again

    async def _getattr(self, c: _Context, ino: int, gen: int) -> list[Any]:
        return [await self._attr_with_lock(c, Fid(ino, gen))]

    async def _setattr(self, c: _Context, ino: int, gen: int, valid: int, *rest: int) -> list[Any]:
        await c.lock((ino, LockMode.EX))
        await self.commit_before(ino, c.node)
        fid = Fid(ino, gen)
        self.begin(c)
        if c.intent is not None and valid & Valid.SIZE and 0 < rest[3] < self.lower.getattr(fid).size:
            # XFS zeroes the rest of the last block on the disk before the transaction that makes the file shorter: the
            # next home must know that this was begun.
            await self.intent_durable(c)
        attr = self._shown(fid, self.lower.setattr(fid, valid, *rest))
        self.saw(c, fid)
        if valid & Valid.SIZE:
            self._note_unstable(fid, c.node)
        return self.end(c, [attr], fid)

    async def _readlink(self, c: _Context, ino: int, gen: int) -> list[Any]:
        c.seen.append(ino)
        return [self.lower.readlink(Fid(ino, gen))]

    def _free_name(self, parent: Fid, name: bytes) -> None:
        """EEXIST where the name is taken. Looked at before the intent, which says that it is free."""
        if self._peek(parent, name) is not None:
            raise FileExistsError(errno.EEXIST, "the name is taken")

    async def _made(self, c: _Context, parent: Fid, attr: Attr, mode: LockMode, values: list[Any]) -> list[Any]:
        """After a creation: the parent's lock back, the force begun, and a lock on the new object meanwhile."""
        self.end(c, values, parent, attr.ino)
        c.seen.append(attr.ino)
        c.grant(parent.ino, LockMode.PR)
        c.unlock()
        if c.want_lock:
            self.forcer.begin()
            await self._cached_lock(c, attr.ino, mode)
        return values

    async def _mknod(self, c: _Context, ino: int, gen: int, name: bytes, mode: int, rdev: int) -> list[Any]:
        await c.lock((ino, LockMode.EX))
        parent = Fid(ino, gen)
        self._free_name(parent, name)
        self.begin(c)
        attr = self.lower.mknod(parent, name, mode, rdev, c.uid, c.gid)
        return await self._made(c, parent, attr, LockMode.PR, [attr, self.lower.getattr(parent)])

    async def _mkdir(self, c: _Context, ino: int, gen: int, name: bytes, mode: int) -> list[Any]:
        await c.lock((ino, LockMode.EX))
        parent = Fid(ino, gen)
        self._free_name(parent, name)
        self.begin(c)
        attr = self.lower.mkdir(parent, name, mode, c.uid, c.gid)
        return await self._made(c, parent, attr, LockMode.PR, [attr, self.lower.getattr(parent)])

    async def _symlink(self, c: _Context, ino: int, gen: int, name: bytes, target: bytes) -> list[Any]:
        await c.lock((ino, LockMode.EX))
        parent = Fid(ino, gen)
        self._free_name(parent, name)
        self.begin(c)
        attr = self.lower.symlink(parent, name, target, c.uid, c.gid)
        return await self._made(c, parent, attr, LockMode.PR, [attr, self.lower.getattr(parent)])

    async def _link(self, c: _Context, ino: int, gen: int, parent_ino: int, parent_gen: int, name: bytes) -> list[Any]:
        await c.lock((ino, LockMode.EX), (parent_ino, LockMode.EX))
        if self._orphans.get(ino) == (ino, gen):
            raise FileNotFoundError(errno.ENOENT, "it has no name any more")
        parent = Fid(parent_ino, parent_gen)
        self._free_name(parent, name)
        self.begin(c)
        attr = self.lower.link(Fid(ino, gen), parent, name)
        self.end(c, values := [attr, self.lower.getattr(parent)], parent, ino)
        c.grant(parent_ino, LockMode.PR)
        return values

    async def _tmpfile(self, c: _Context, ino: int, gen: int, mode: int) -> list[Any]:
        """Needs no record: nobody but its node hears of the file. One that was not answered is freed by the next home,
        since nobody has it open, and its node makes another one."""
        await c.lock((ino, LockMode.PR))
        c.executed = True
        fd, attr = self.lower.tmpfile(Fid(ino, gen), mode, c.uid, c.gid)
        os.close(fd)
        fid = self._orphans[attr.ino] = Fid(attr.ino, attr.gen)
        self.forcer.changed(fid)
        c.seen.append(attr.ino)
        c.unlock()
        if c.want_lock:
            await self._cached_lock(c, attr.ino, LockMode.EX)
        return [attr]

    async def _link_unnamed(
        self, c: _Context, ino: int, gen: int, parent_ino: int, parent_gen: int, name: bytes
    ) -> list[Any]:
        """LINK of what TMPFILE made: its node alone knows it, and says that it may have a name."""
        await c.lock((ino, LockMode.EX), (parent_ino, LockMode.EX))
        fid, parent = Fid(ino, gen), Fid(parent_ino, parent_gen)
        if not self.lower.is_orphan(fid):
            raise FileNotFoundError(errno.ENOENT, "it has a name, or is gone")
        self._free_name(parent, name)
        self.begin(c)
        attr = self.lower.name_orphan(fid, parent, name)
        self._orphans.pop(ino, None)
        self.end(c, values := [attr, self.lower.getattr(parent)], parent, ino)
        c.grant(parent_ino, LockMode.PR)
        return values

    async def _lock_named(
        self, c: _Context, dirs: tuple[Fid, ...], names: tuple[tuple[Fid, bytes], ...]
    ) -> list[Attr | None]:
        """Lock *dirs* and what stands under *names* in EX, in inode order: look, lock, look again until it agrees."""
        while True:
            before = [self._peek(parent, name) for parent, name in names]
            wants = {fid.ino for fid in dirs} | {attr.ino for attr in before if attr is not None}
            await c.lock(*((ino, LockMode.EX) for ino in wants))
            after = [self._peek(parent, name) for parent, name in names]
            if [a and (a.ino, a.gen) for a in before] == [a and (a.ino, a.gen) for a in after]:
                return after
            c.unlock()

    def _peek(self, parent: Fid, name: bytes) -> Attr | None:
        try:
            return self.lower.lookup(parent, name)
        except FileNotFoundError:
            return None

    async def _unlink(self, c: _Context, ino: int, gen: int, name: bytes, v_ino: int, v_gen: int) -> list[Any]:
        parent = Fid(ino, gen)
        (attr,) = await self._lock_named(c, (parent,), ((parent, name),))
        if attr is None:
            raise FileNotFoundError(errno.ENOENT, "no such file")
        keep = self._victim(c, attr, Fid(v_ino, v_gen))
        self.begin(c, Before(Fid(attr.ino, attr.gen), NO_FID, attr.nlink, _kept_flag(keep)))
        self.lower.unlink(parent, name, keep)
        self._gone(attr, keep)
        self.end(c, values := [*self._kept(keep), attr.ino, attr.nlink, self.lower.getattr(parent)], parent, attr.ino)
        c.grant(ino, LockMode.PR)
        return values

    def _gone(self, attr: Attr, keep: Fid | None) -> None:
        """An object lost a name: where that was its last, close what this process has of it."""
        if keep is None and (attr.nlink == 1 or stat.S_ISDIR(attr.mode)):
            self.lower.forget(attr.ino)
            self._unstable.pop(attr.ino, None)

    async def _rmdir(self, c: _Context, ino: int, gen: int, name: bytes) -> list[Any]:
        parent = Fid(ino, gen)
        (attr,) = await self._lock_named(c, (parent,), ((parent, name),))
        if attr is None:
            raise FileNotFoundError(errno.ENOENT, "no such directory")
        self.begin(c, Before(Fid(attr.ino, attr.gen)))
        self.lower.rmdir(parent, name)
        self._gone(attr, None)
        self.end(c, values := [self.lower.getattr(parent)], parent, attr.ino)
        c.grant(ino, LockMode.PR)
        return values

    async def _rename(
        self, c: _Context, o_ino: int, o_gen: int, o_name: bytes, n_ino: int, n_gen: int, n_name: bytes, flags: int,
        v_ino: int, v_gen: int,
    ) -> list[Any]:  # fmt: skip
        old, new = Fid(o_ino, o_gen), Fid(n_ino, n_gen)
        source, target = await self._lock_named(c, (old, new), ((old, o_name), (new, n_name)))
        if source is None:
            raise FileNotFoundError(errno.ENOENT, "no such file")
        replaced = target if target is not None and not flags and target.ino != source.ino else None
        keep = self._victim(c, replaced, Fid(v_ino, v_gen)) if replaced is not None else None
        lost = (target.ino, target.nlink) if target is not None else (0, 0)
        second = Fid(target.ino, target.gen) if target is not None else NO_FID
        self.begin(c, Before(Fid(source.ino, source.gen), second, lost[1], _kept_flag(keep)))
        self.lower.rename(old, o_name, new, n_name, flags, keep)
        if replaced is not None:
            self._gone(replaced, keep)
        also = [attr.ino for attr in (source, target) if attr is not None]
        moved = pack_attr(self.lower.getattr(Fid(source.ino, source.gen))) if c.want_lock else b""
        after = [self.lower.getattr(old), self.lower.getattr(new)]
        values = self.end(c, [*self._kept(keep), source.ino, *lost, moved, *after], new, old.ino, *also)
        for ino in sorted({o_ino, n_ino, source.ino}):
            c.grant(ino, LockMode.PR)
        return values

    async def _create(self, c: _Context, ino: int, gen: int, name: bytes, mode: int, flags: int) -> list[Any]:
        await c.lock((ino, LockMode.EX))
        parent = Fid(ino, gen)
        found = self._peek(parent, name)
        if found is not None:
            if flags & os.O_EXCL or not stat.S_ISREG(found.mode):
                raise FileExistsError(errno.EEXIST, "the name is taken")
            directory = self.lower.getattr(parent)
            c.unlock()
            return [1, await self._attr_with_lock(c, Fid(found.ino, found.gen)), directory]
        self.begin(c)
        fd, attr = self.lower.create(parent, name, mode, c.uid, c.gid)
        os.close(fd)
        return await self._made(c, parent, attr, LockMode.EX, [0, attr, self.lower.getattr(parent)])

    async def _read(self, c: _Context, ino: int, gen: int, offset: int, size: int) -> list[Any]:
        # A lock that the node is about to be told of covers nothing before the commit that its grant waits for.
        if not self.held_by(c.node, ino, LockMode.PR) or self.must_commit(ino, c.node):
            await c.lock((ino, LockMode.CR))
            await self.commit_before(ino, c.node)
        c.seen.append(ino)
        self.saw(c, Fid(ino, gen))
        data = os.pread(self.lower.file_fd(Fid(ino, gen)), min(size, MAX_DATA), offset)
        self.bytes_read += len(data)
        self.keep_no_descriptor(ino)
        self.figures.of(c.node).bytes_read += len(data)
        return [data]

    def keep_no_descriptor(self, ino: int) -> None:
        """The home's own FUSE layer may free what nobody else has a lock on, and nobody would hear of it."""
        if ino not in self.master or self.master.pinned(ino):  # (of a pinned one: it asks who has it open for writing)
            self.lower.forget(ino)

    async def _write(self, c: _Context, ino: int, gen: int, offset: int, flags: int, data: bytes) -> list[Any]:
        return [*await self._put(c, Fid(ino, gen), flags, [(offset, data)])]

    async def _put(
        self, c: _Context, fid: Fid, flags: int, pieces: Sequence[tuple[int, bytes | memoryview]]
    ) -> tuple[int, int]:
        """Write the pieces in order, up to the first that does not fit: where the last one went, and bytes in all."""
        append = bool(flags & WriteFlag.APPEND)
        stable = append or bool(flags & WriteFlag.STABLE)
        free = self.held_by(c.node, fid.ino, LockMode.PW) and fid.ino not in self._appending
        if stable or not free or self.must_commit(fid.ino, c.node):
            await c.lock((fid.ino, LockMode.EX if stable else LockMode.CW))
            await self.commit_before(fid.ino, c.node)
        if append and (self.master.pinned(fid.ino) or flags & WriteFlag.BESIDE):
            return await self._append_beside(c, fid, flags, [data for _, data in pieces])
        fd = self.lower.file_fd(fid)
        if append:
            self.begin(c, Before(number=os.fstat(fd).st_size))
        c.executed = True
        placed = total = 0
        try:
            for offset, data in pieces:
                placed = os.fstat(fd).st_size if append else offset
                done = os.pwrite(fd, data, placed)
                total += done
                if done < len(data):
                    break
        finally:
            if total:
                self._wrote(c, fid, total)
        if flags & WriteFlag.KILL_PRIV:
            kill_priv(fd)
        self.keep_no_descriptor(fid.ino)
        if stable:
            await self.commit_stable(c, fid)
            self.end(c, [placed, total] if c.request.op is Op.WRITE else [total], fid)
        return placed, total

    def _wrote(self, c: _Context, fid: Fid, total: int) -> None:
        """So many bytes are in the page cache of the lower mount."""
        self._note_unstable(fid, c.node)
        self.bytes_written += total
        self.figures.of(c.node).bytes_written += total

    async def _append_beside(
        self, c: _Context, fid: Fid, flags: int, pieces: Sequence[bytes | memoryview]
    ) -> tuple[int, int]:
        """Append to a file that the home's kernel may write, and make longer, at the same time.

        XFS finds the place, and the intent is written again when that is known: the next home must not cut off what
        others have written behind it.
        """
        self.begin(c, Before(flags=BeforeFlag.BESIDE))
        c.executed = True
        fd = self.lower.open(fid, os.O_RDWR | os.O_APPEND)
        try:
            total = os.write(fd, pieces[0] if len(pieces) == 1 else b"".join(pieces))
            end = os.lseek(fd, 0, os.SEEK_CUR)
            if c.intent is not None and self.records is not None and c.key is not None:
                before = Before(Fid(end, 0), NO_FID, end - total, BeforeFlag.BESIDE | BeforeFlag.PLACED)
                self.records.intend_again(c.key, c.intent, c.request, before)
            self._wrote(c, fid, total)
            if flags & WriteFlag.KILL_PRIV:
                kill_priv(fd)
        finally:
            os.close(fd)
        await self.commit_stable(c, fid)
        self.end(c, [end - total, total] if c.request.op is Op.WRITE else [total], fid)
        return end - total, total

    async def commit_stable(self, c: _Context, fid: Fid) -> None:
        """Make data durable before its outcome is written, with the lock held, so that nobody sees it before. A crash
        before that is settled by writing it again or, where it was appended, by cutting the file back: nothing may be
        built on the new size meanwhile, not by this node either."""
        self._appending.add(fid.ino)
        try:
            entry = self._unstable.get(fid.ino)
            await asyncio.get_running_loop().run_in_executor(None, self.lower.sync, fid)
            if entry is not None and self._unstable.get(fid.ino) == entry:
                del self._unstable[fid.ino]
        finally:
            self._appending.discard(fid.ino)

    async def _fsync(self, c: _Context, ino: int, gen: int, datasync: int) -> list[Any]:
        c.executed = True
        fid = Fid(ino, gen)
        self.lower.getattr(fid)  # ESTALE where it is gone
        entry = self._unstable.get(ino)
        await asyncio.get_running_loop().run_in_executor(None, self.lower.sync, fid)
        if entry is not None and self._unstable.get(ino) == entry:
            del self._unstable[ino]
        return []

    async def _readdir(self, c: _Context, ino: int, gen: int, after: bytes, limit: int) -> list[Any]:
        await c.lock((ino, LockMode.PR))
        entries, whole = self.lower.readdir(Fid(ino, gen), after, min(limit or _READDIR_MAX, _READDIR_MAX))
        c.grant(ino, LockMode.PR)
        return [int(whole), pack_entries(entries)]

    async def _statfs(self, c: _Context) -> list[Any]:
        return [*self.lower.statfs()]

    async def _setxattr(self, c: _Context, ino: int, gen: int, name: bytes, value: bytes, flags: int) -> list[Any]:
        await c.lock((ino, LockMode.EX))
        fid = Fid(ino, gen)
        self.begin(c)
        self.lower.setxattr(fid, name, value, flags)
        return self.end(c, [], fid)

    async def _getxattr(self, c: _Context, ino: int, gen: int, name: bytes) -> list[Any]:
        await c.lock((ino, LockMode.CR))
        return [self.lower.getxattr(Fid(ino, gen), name)]

    async def _listxattr(self, c: _Context, ino: int, gen: int) -> list[Any]:
        await c.lock((ino, LockMode.CR))
        return [b"".join(name + b"\0" for name in self.lower.listxattr(Fid(ino, gen)))]

    async def _removexattr(self, c: _Context, ino: int, gen: int, name: bytes) -> list[Any]:
        await c.lock((ino, LockMode.EX))
        fid = Fid(ino, gen)
        there = name in self.lower.listxattr(fid)
        self.begin(c, Before(flags=BeforeFlag.PRESENT if there else BeforeFlag.NONE))
        self.lower.removexattr(fid, name)
        return self.end(c, [], fid)

    async def _reap(self, c: _Context, ino: int, gen: int) -> list[Any]:
        fid = Fid(ino, gen)
        if self._orphans.get(ino) != fid and not self.lower.is_orphan(fid):
            return []
        await c.lock((ino, LockMode.EX))
        for node, (readers, writers) in self.master.opens_of(ino).items():
            if node != c.node and (readers or writers):
                return []
        c.executed = True
        self.lower.reap(fid)
        self._orphans.pop(ino, None)
        self._unstable.pop(ino, None)
        return []

    async def _writes(self, c: _Context, ino: int, gen: int, flags: int, blob: bytes) -> list[Any]:
        return [(await self._put(c, Fid(ino, gen), flags, unpack_writes(blob)))[1]]

    async def _sync(self, c: _Context) -> list[Any]:
        c.executed = True
        before = dict(self._unstable)
        await asyncio.get_running_loop().run_in_executor(None, self.lower.syncfs)
        for ino, entry in before.items():
            if self._unstable.get(ino) == entry:  # not written again since
                del self._unstable[ino]
        return []


def _kept_flag(keep: Fid | None) -> BeforeFlag:
    return BeforeFlag.NONE if keep is None else BeforeFlag.KEPT


_NAMES = {
    Op.LOOKUP: (2,),
    Op.MKNOD: (2,),
    Op.MKDIR: (2,),
    Op.SYMLINK: (2,),
    Op.LINK: (4,),
    Op.LINK_UNNAMED: (4,),
    Op.UNLINK: (2,),
    Op.RMDIR: (2,),
    Op.RENAME: (2, 5),
    Op.CREATE: (2,),
}
"""Which values of a request are names in a directory."""


def check_request(request: Request) -> None:
    """Refuse what no client of ours sends: names that lead out of their directory or are none, data beyond the cap."""
    for value in request.values:
        if isinstance(value, bytes) and len(value) > MAX_DATA:
            raise PeerError(f"operation {request.op.name} carries {len(value)} bytes, more than {MAX_DATA}")
    for index in _NAMES.get(request.op, ()):
        name = request.values[index]
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise PeerError(f"operation {request.op.name} has {name[:64]!r} for a name")
