"""What a node does while it is the home: master of the locks, shipped operations, and the nodes it serves."""

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import structlog

from mxfs_proto.errors import MxfsError, PeerError
from mxfs_proto.filelocks import resource_of, unpack_tables
from mxfs_proto.frames import Frame, FrameType, unpack_reclaim
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Op, Request, unpack_request
from mxfs_proto.records import CacheInval, LockBast, LockDeny, LockGrant, LockRecord, LockRelease, LockReq, Opens
from mxfsd.core.dlm import Effect, LockMaster
from mxfsd.core.epochs import first_seq
from mxfsd.core.lockeffects import Bast, BastSilent, Deny, Grant, OpDenied, OpGranted, WaitLong
from mxfsd.core.sessions import Replay, SessionTable, Verdict
from mxfsd.core.timeouts import Timeouts
from mxfsd.figures import Figures
from mxfsd.home import INTERNAL_REQ, Frozen, HomeService, LowerFailed, check_request
from mxfsd.io.clock import now_ms
from mxfsd.io.lower import Lower
from mxfsd.oprecords import Key, OpRecords

log = structlog.get_logger(__name__)

_REPEATABLE = frozenset(
    {Op.LOOKUP, Op.GETATTR, Op.READLINK, Op.READ, Op.READDIR, Op.STATFS, Op.GETXATTR, Op.LISTXATTR, Op.FSYNC, Op.SYNC}
    | {Op.REAP, Op.LK_SET, Op.LK_TEST, Op.LK_ADOPT, Op.LK_CANCEL, Op.LSEEK, Op.BTIME}
)
"""Operations that may run twice: their replies are not kept."""

LINGER_MS = 5000
"""So long the home's FUSE layer asks for what another node has used: that node uses it again, more often than not, and
would have it called back each time."""


async def _not_fenced() -> bool:
    return False


class HomeRole:
    """The home's half of the protocol. *send_lock* and *send_frame* reach a node, the home's own FUSE layer too."""

    def __init__(
        self,
        slot: int,
        epoch: int,
        lower: Lower,
        timeouts: Timeouts,
        sessions: SessionTable,
        readonly: bool,
        send_lock: Callable[[int, LockRecord], None],
        send_frame: Callable[[int, FrameType, list[bytes], int, int], None],
        on_silent: Callable[[int], None],
        records: OpRecords | None = None,
        on_failed: Callable[[str], None] = lambda _reason: None,
        figures: Figures | None = None,
        is_fenced: Callable[[], Awaitable[bool]] = _not_fenced,
    ) -> None:
        """*records*: from recover_sessions() (none on a read-only mount). *on_failed* is called, once, when the lower
        mount can be relied on no more: from then on nothing is answered, and this node must fence itself. *figures*:
        where operations and BASTs are counted, by node. *is_fenced*: whether the disk refuses this node; asked before
        an operation is answered with EIO."""
        self.slot = slot
        self.epoch = epoch
        self.lower = lower
        self.sessions = sessions
        self._send_lock = send_lock
        self._send_frame = send_frame
        self._on_silent = on_silent
        self._on_failed = on_failed
        self._is_fenced = is_fenced
        self.failed = False
        self.master = LockMaster(slot, timeouts, first_seq=first_seq(epoch), linger_ms=LINGER_MS)
        self.figures = figures if figures is not None else Figures()
        self.service = HomeService(lower, self.master, now_ms, self.run, readonly, records, self.figures)
        self.service.file_locks.on_wake = self._wake
        self.service.file_locks.connection_of = lambda node: self._connections.get(node, 0)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ordered: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._sessions_of: dict[int, set[int]] = {}
        self._reclaims: dict[int, set[int]] = {}
        self._incarnations: dict[int, int] = {}
        self._connections: dict[int, int] = {}
        """How often each node has greeted."""
        self._greeted_at: dict[int, int] = {}
        """The sequence of the last grant when it did so last."""
        self.shipped = 0

    # -- operations ------------------------------------------------------------------------------------------------

    def on_operation(self, node: int, frame: Frame) -> None:
        """Take an OP_REQ of *node*; the reply goes out when it is done. Raises PeerError."""
        if frame.epoch != self.epoch or self.failed:
            return  # sent before the node knew of this home: it sends it again
        came_s = time.monotonic()
        request = unpack_request(frame.payload)
        check_request(request)
        if request.op in _REPEATABLE:
            self._spawn(self._run_operation(node, frame.session, frame.seq, request, came_s, keep=False))
            return
        self.claim_session(node, frame.session)
        answer = self.sessions.begin(frame.session, frame.seq, request.ack)
        if answer is Verdict.NEW:
            self._spawn(self._run_operation(node, frame.session, frame.seq, request, came_s, keep=True))
        elif isinstance(answer, Replay):
            self._send_frame(node, FrameType.OP_REPLY, [answer.reply], frame.session, frame.seq)
        elif answer is Verdict.STALE:
            log.warning("operation of a settled sequence ignored", peer=node, seq=frame.seq)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_operation(
        self, node: int, session: int, seq: int, request: Request, came_s: float, keep: bool
    ) -> None:
        self.shipped += 1
        connection = self._connections.get(node, 0)
        try:
            outcome = await self.service.execute(node, request, Key(session, seq) if keep else None)
        except Frozen:
            if keep:
                self.sessions.abandon(session, seq)
            return
        except LowerFailed as exc:
            self._fail(str(exc))
            return
        except MxfsError as exc:
            log.error("operation failed", peer=node, op=request.op.name, reason=str(exc))
            raise
        if outcome.errno == errno.EIO and not self.failed and await self._is_fenced():
            self._fail("another node has fenced this one")  # the next home has the answer
        if self.failed:
            return
        if outcome.errno and request.op is Op.READ:
            # It reads what it has open, so this should not be.
            ino = request.values[0]
            name, opens = errno.errorcode.get(outcome.errno, str(outcome.errno)), self.master.opens_of(ino)
            log.warning(
                "a read failed", peer=node, ino=ino, error=name, mode=self.master.mode_of(node, ino).name, opens=opens
            )
        self.figures.of(node).ended(request.op, time.monotonic() - came_s)
        if keep:
            self.sessions.done(session, seq, outcome.to_keep())
        parts = outcome.parts()
        if connection != self._connections.get(node, 0):
            # It has connected anew, and named its locks without those of this reply. It asks again: what may run twice
            # does so, but for what was under way still this is the only answer.
            if not keep:
                return
            parts = [outcome.to_keep()]
        self._send_frame(node, FrameType.OP_REPLY, parts, session, seq)

    def _fail(self, reason: str) -> None:
        if not self.failed:
            self.failed = True
            log.error("the home cannot go on", reason=reason)
            self._on_failed(reason)

    # -- locks -----------------------------------------------------------------------------------------------------

    def on_lock(self, node: int, record: LockRecord) -> None:
        """Take a lock message of *node*."""
        now = now_ms()
        if isinstance(record, LockReq):
            if record.req_id & INTERNAL_REQ:
                raise PeerError(f"node {node} used request id {record.req_id:#x}, which is the home's own")
            opens = (record.opens_r, record.opens_w)
            self.run(self.master.request(now, node, record.req_id, record.ino, record.mode, record.flags, opens))
        elif isinstance(record, LockRelease):
            opens = (record.opens_r, record.opens_w)
            self.run(self.master.release(now, node, record.ino, record.seq, record.mode, opens))
            self._maybe_reap(record.ino, opens)
        elif isinstance(record, Opens):
            opens = (record.opens_r, record.opens_w)
            pinned = bool(record.flags & LockFlag.KERNEL_WRITER)
            self.run(self.master.opens_update(now, node, record.ino, opens, pinned))
            self.service.keep_no_descriptor(record.ino)
            self._maybe_reap(record.ino, opens)
        else:
            raise PeerError(f"node {node} sent {type(record).__name__}, which only the home sends")

    def _maybe_reap(self, ino: int, opens: tuple[int, int]) -> None:
        if opens == (0, 0):
            self.service.reap_if_closed(ino)

    def run(self, effects: list[Effect]) -> None:
        """Carry out what the master decided, in order."""
        for effect in effects:
            if isinstance(effect, OpGranted):
                self.service.op_granted(effect.op_id, effect.ino)
            elif isinstance(effect, Grant):
                self._grant(effect)
            elif isinstance(effect, Bast):
                self.figures.of(effect.node).basts += 1
                self._to_node(effect.node, effect.ino, LockBast(effect.ino, effect.seq, effect.mode, effect.flags))
            elif isinstance(effect, Deny):
                if effect.req_id & INTERNAL_REQ:
                    self.service.internal_denied(effect.req_id, effect.errno)
                else:
                    self._to_node(effect.node, effect.ino, LockDeny(effect.req_id, effect.ino, effect.errno))
            elif isinstance(effect, OpDenied):
                self.service.op_denied(effect.op_id, effect.ino, effect.errno)
            elif isinstance(effect, BastSilent):
                log.warning("no answer to a blocking AST", peer=effect.node, ino=effect.ino)
                self._on_silent(effect.node)
            elif isinstance(effect, WaitLong):
                log.warning("lock wait", peer=effect.node, ino=effect.ino, waited_ms=effect.waited_ms)

    def _grant(self, effect: Grant) -> None:
        if effect.req_id & INTERNAL_REQ:
            self.service.internal_grant(effect.req_id, effect.mode, effect.seq)
            return
        record = LockGrant(effect.req_id, effect.ino, effect.mode, effect.seq, effect.flags)
        if effect.mode != LockMode.NL and self.service.must_commit(effect.ino, effect.node):
            # Another node's unstable data becomes visible with this grant: it is committed first.
            key = (effect.node, effect.ino)
            before = self._ordered.get(key)
            connection = self._connections.get(effect.node, 0)
            task = asyncio.get_running_loop().create_task(self._commit_and_send(effect, record, before, connection))
            self._ordered[key] = task
            task.add_done_callback(lambda done: self._ordered.pop(key) if self._ordered.get(key) is done else None)
            return
        self._to_node(effect.node, effect.ino, record)

    def _to_node(self, node: int, ino: int, record: LockRecord) -> None:
        """Send a lock message; one for an inode whose grant waits for a commit goes out behind it."""
        before = self._ordered.get((node, ino))
        if before is None:
            self._send_lock(node, record)
        else:
            connection = self._connections.get(node, 0)
            before.add_done_callback(lambda _done: self._send_late(node, record, connection))

    def _send_late(self, node: int, record: LockRecord, connection: int) -> None:
        """Send what had to wait, unless the node has connected anew: then it names what it holds, and asks again."""
        if connection == self._connections.get(node, 0):
            self._send_lock(node, record)

    async def _commit_and_send(
        self, effect: Grant, record: LockGrant, before: asyncio.Task[None] | None, connection: int
    ) -> None:
        if before is not None:
            await asyncio.wait((before,))
        try:
            await self.service.commit_before(effect.ino, effect.node)
        except OSError as exc:
            # Pages that were not written count as clean now: nobody may be shown them, and the next home has the data
            # from the node that wrote it.
            self._fail(f"data of inode {effect.ino} cannot be made durable: {exc}")
            return
        if not self.failed:
            self._send_late(effect.node, record, connection)

    # -- nodes -----------------------------------------------------------------------------------------------------

    def reclaim(self, node: int, frame: Frame) -> None:
        """Register again what a node held under the home before."""
        now = now_ms()
        named = self._reclaims.setdefault(node, set())
        for row in unpack_reclaim(frame.payload):
            named.add(row.ino)
            self.run(self.master.reclaim(now, node, row.ino, row.mode, (row.opens_r, row.opens_w)))

    def reclaim_locks(self, node: int, frame: Frame) -> None:
        """Register again the file locks that a node holds, all of each inode that it names."""
        for ino, locks in unpack_tables(frame.payload):
            if not self.service.file_locks.reclaim(node, ino, locks):
                log.error("file locks of a node are lost: another one has them", peer=node, ino=ino)
                resource = resource_of(ino)
                self._to_node(node, resource, LockDeny(0, resource, errno.EBUSY))

    def reclaimed_locks(self, node: int) -> None:
        """The node has named all its file locks."""
        self.service.file_locks.reclaimed(node)

    def grace_over(self) -> None:
        """All nodes have named what they hold: serve."""
        self.service.file_locks.grace_over()
        self.run(self.master.grace_over(now_ms()))

    def _wake(self, node: int, ino: int, wait_id: int) -> None:
        self._send_lock(node, CacheInval(resource_of(ino), wait_id, 0))

    def claim_session(self, node: int, session: int) -> None:
        """The node goes on with this session (0: it has none)."""
        if session:
            self._sessions_of.setdefault(node, set()).add(session)

    def reclaimed(self, node: int, session: int = 0) -> None:
        """The node has named everything: what it held before (a connection ago) and did not name, it holds no more.

        What it was granted over this connection stays: it may have named what it holds before that reached it.
        """
        self.claim_session(node, session)
        self.reclaimed_locks(node)
        named = self._reclaims.pop(node, set())
        now = now_ms()
        for ino in self.master.recorded():
            if ino in named:
                continue
            seq = self.master.seq_of(node, ino)
            if seq > self._greeted_at.get(node, 0):
                continue
            if seq:
                self.run(self.master.release(now, node, ino, seq, LockMode.NL, (0, 0)))
            elif node in self.master.opens_of(ino):
                self.run(self.master.opens_update(now, node, ino, (0, 0)))
            else:
                continue
            self.service.reap_if_closed(ino)

    def greet(self, node: int, incarnation: int, continues: int = 0) -> None:
        """A node connected. An earlier incarnation of it is gone, with all it held, unless this one *continues* it, or
        one that it continued: then its FUSE layer is the same, and names what it holds again. The membership has found
        that to be true."""
        self._connections[node] = self._connections.get(node, 0) + 1
        self._greeted_at[node] = self.master.last_seq
        before = self._incarnations.get(node)
        if before is not None and before != incarnation and not continues:
            self.node_gone(node)
        self._incarnations[node] = incarnation

    def replace_lower(self, lower: Lower) -> None:
        """Serve on over a new mount: a move of the home was called off."""
        self.lower = lower
        self.service.replace_lower(lower)

    def lock_counts(self) -> dict[str, int]:
        """Figures for ``mxfs status``."""
        held, waiting = self.master.held, self.master.waiting()
        return {"held": sum(held.values()), "cached": len(self.master), "waiting": sum(waiting.values())}

    def operation_counts(self) -> dict[str, int]:
        """Figures for ``mxfs status``."""
        service = self.service
        return {
            "shipped": self.shipped,
            "executed": service.executed,
            "bytes_read": service.bytes_read,
            "bytes_written": service.bytes_written,
            "log_forces": service.forcer.forces,
        }

    def totals(self) -> dict[str, int]:
        """What was counted of all nodes together while this node is the home (``mxfsd.figures.TOTALS``)."""
        return {
            "executed": self.service.executed,
            "grants": self.master.grants,
            "waits": self.master.waits,
            "log_forces": self.service.forcer.forces,
        }

    @property
    def running(self) -> int:
        """How many operations are under way."""
        return len(self._tasks)

    def node_gone(self, node: int) -> None:
        """A node left, or was evicted (after its lease ended): its locks, requests, opens and sessions end."""
        self._connections[node] = self._connections.get(node, 0) + 1
        self.service.file_locks.node_gone(node)
        self.run(self.master.node_gone(now_ms(), node))
        for session in self._sessions_of.pop(node, ()):
            self.sessions.drop(session)
        self.service.reap_all()

    def forget_sessions(self, keep: Iterable[int] | None = None) -> None:
        """Drop the sessions that no member goes on with: all but *keep* (None: those that a node has claimed here, by a
        reclaim or an operation). Called when the grace period is over."""
        claimed = set(keep) if keep is not None else {s for of in self._sessions_of.values() for s in of}
        for session in self.sessions.sessions():
            if session not in claimed:
                self.sessions.drop(session)

    def tick(self) -> None:
        """Once in a while: time-outs of BASTs and waits."""
        self.run(self.master.tick(now_ms()))

    async def freeze(self) -> None:
        """End or drop every operation; afterwards nothing runs and every reply was sent."""
        await self.service.freeze()
        while self._tasks or self._ordered:
            await asyncio.wait([*self._tasks, *self._ordered.values()])
