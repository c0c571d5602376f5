"""The lock master of a volume: modes, queues, blocking ASTs, opens (pure; see docs/architecture.md, "Locks").

Events come in as method calls with the caller's monotonic milliseconds, effects go out in the order in which they
must be carried out. Grants and BASTs to one node must reach it in that order (one ordered channel); grants that ride
with the reply of an operation may be overtaken, which the sequence numbers make harmless.

**Sequences.** Each grant gets a number that no other grant of this master has. Under one number a node's mode only
falls, so a release can be repeated or come late and never takes away what was granted after it. The home's implicit
EX gets a number too as soon as a record is made, so that no two BASTs for it can be mixed up.

**Queue.** First come first served: only the first waiter is served, and BASTs are sent on its behalf alone. A
conversion by a holder goes ahead of requests by others, but passes each of them a limited number of times. Two
holders of PR that both want EX: the first in the queue is served, and the other loses its PR, not its place.
An operation passes the queue where its node holds a lock that covers it or is being called back, for the node may
need the operation's end before it can give that lock up.

Errors: MisuseError for a call that contradicts the state (nothing is changed then).
"""

from collections.abc import Callable, Iterator
from errno import EAGAIN, EBUSY, ECANCELED, ENOTCONN

from mxfs_proto.errors import MisuseError
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode
from mxfsd.core.lockeffects import (
    Bast,
    BastSilent,
    Deny,
    Grant,
    MasterEffect,
    OpDenied,
    Opens,
    OpGranted,
    WaitLong,
)
from mxfsd.core.lockmodes import COMPATIBLE, COVERS, FLAGS, JOIN
from mxfsd.core.lockrecords import (
    Hold,
    HolderView,
    LockTimeouts,
    Record,
    ResourceView,
    Sent,
    Waiter,
    WaiterView,
)

Effect = MasterEffect

_NL, _PR, _PW, _EX = LockMode.NL, LockMode.PR, LockMode.PW, LockMode.EX
_NOQUEUE, _OPEN, _ALT = int(LockFlag.NOQUEUE), int(LockFlag.OPEN), int(LockFlag.ALT_UNCACHED)
_OTHER_OPEN, _OTHER_WRITER = int(LockFlag.OTHER_OPEN), int(LockFlag.OTHER_WRITER)
_MAY_KEEP, _UNASKED, _RECLAIM = int(LockFlag.MAY_KEEP), int(LockFlag.UNASKED), int(LockFlag.RECLAIM)

PASS_LIMIT = 4
"""So many conversions may go ahead of a waiter that came before them."""
LINGER_BATCH = 500
"""So many resources go back to the home in one tick at most: thousands at once would keep the others waiting."""
_STAMP_MS = 100


def _by_node(hold: Hold) -> int:
    return hold.node


class LockMaster:
    """The master of all resources of a volume."""

    def __init__(self, home: int | None, timeouts: LockTimeouts, *, first_seq: int = 1, linger_ms: int = 0) -> None:
        """Make a master for the home node *home* (None: nobody holds anything implicitly).

        *first_seq* should be above every number of the epochs before, so that late replies of an old home are old
        here too. *linger_ms*: a record that only the home is left of is kept this long before the home gets its EX
        back, so that a series of operations of another node does not call the home back each time.
        """
        self._home = home
        self._bast_ms = timeouts.bast_ms
        self._lock_wait_ms = timeouts.lock_wait_ms
        self._linger_ms = linger_ms
        self._records: dict[int, Record] = {}
        self._waiting: dict[int, Record] = {}
        self._queued: dict[tuple[int, int], Record] = {}
        self._lingering: dict[int, int] = {}
        self._pinned: set[int] = set()
        self._given_up: set[int] = set()
        """Resources whose writer gave its lock up altogether when it was called back; nobody has had one since."""
        self._seq = first_seq - 1
        self._grace = False
        self._served = False
        self._stamped_ms = 0
        self.on_home_alone: Callable[[int], None] = lambda _ino: None
        """Called when a resource's record is dropped: from now on the home uses it without asking."""
        self.held: dict[int, int] = {}
        """How many locks each node has cached, those not counted that the home holds implicitly."""
        self.basts = 0
        """BASTs sent, the repeated ones not counted."""
        self.grants = 0
        """Requests and operations granted, the uncached ones too."""
        self.waits = 0
        """Requests and operations that were queued."""

    # -- cached locks ----------------------------------------------------------------------------------------------

    def request(
        self,
        now_ms: int,
        node: int,
        req_id: int,
        ino: int,
        mode: LockMode,
        flags: LockFlag = LockFlag.NONE,
        opens: Opens | None = None,
    ) -> list[Effect]:
        """A node asks for a cached lock: Grant or Deny now or later, BASTs to those in the way.

        *opens* matter with OPEN only: the node's absolute (readers, writers) counts, descriptors whose request is
        pending included. They count from the grant on; EX means a writable, PR a read-only descriptor. The same
        *req_id* again while it is queued changes nothing but the counts.
        """
        if mode is _NL or req_id <= 0:
            raise MisuseError(f"lock request {req_id} of node {node} for mode {mode.name}")
        out: list[Effect] = []
        bits = int(flags)
        rec = self._records.get(ino)
        waiter = Waiter(node, req_id, 0, mode, bits, opens if bits & _OPEN else None, now_ms)
        if rec is None:
            if node == self._home:
                self._served = True
                self.grants += 1
                out.append(Grant(node, req_id, ino, _EX, self._next(), FLAGS[0]))
                return out
            if bits & _NOQUEUE and self._home is not None:
                out.append(Deny(node, req_id, ino, EAGAIN))
                return out
            rec = self._make(ino, now_ms)
        elif self._queued.get((node, req_id)) is rec:
            if waiter.opens is not None:
                self._set_opens(rec, node, waiter.opens, register=False)
            return out
        if waiter.opens is not None:
            self._set_opens(rec, node, waiter.opens, register=False)
        if bits & _NOQUEUE and (rec.queue or self._blocked(rec, waiter)):
            out.append(Deny(node, req_id, ino, EAGAIN))
            self._maybe_drop(rec, now_ms, out)
            return out
        self._enter(rec, waiter, now_ms, out)
        return out

    def cancel(self, now_ms: int, node: int, req_id: int) -> list[Effect]:
        """Take a request out of its queue: Deny ECANCELED. Nothing happens where it was granted already."""
        out: list[Effect] = []
        rec = self._queued.get((node, req_id))
        if rec is not None and rec.queue:
            for waiter in rec.queue:
                if waiter.node == node and waiter.req_id == req_id:
                    self._unqueue(rec, waiter)
                    out.append(Deny(node, req_id, rec.ino, ECANCELED))
                    break
            self._pump(rec, now_ms, out)
        return out

    def release(self, now_ms: int, node: int, ino: int, seq: int, mode: LockMode, opens: Opens) -> list[Effect]:
        """A node says what it holds of lock *seq*: the answer to a BAST, a lock given back, or a sign of life."""
        out: list[Effect] = []
        rec = self._records.get(ino)
        if rec is None:
            return out
        self._set_opens(rec, node, opens)
        hold = rec.hold_of(node)
        sent = rec.basts.get(node) if rec.basts else None
        if hold is None or hold.seq != seq:
            if hold is not None and sent is not None and sent.seq == hold.seq:
                # It answered an older BAST, or gave back what it held before: ask for the lock it has now.
                sent.sent_ms = sent.sign_ms = now_ms
                out.append(Bast(node, ino, hold.seq, sent.mode, FLAGS[sent.flags]))
        else:
            if mode is _NL:
                if sent is not None and node != self._home and COVERS[hold.mode][_PW]:
                    self._given_up.add(ino)
                self._take(rec, node)
            elif COVERS[hold.mode][mode]:
                hold.mode = mode
            if sent is not None:
                sent.sign_ms = now_ms
                sent.kept = mode is _PW and bool(sent.flags & _MAY_KEEP)
        self._pump(rec, now_ms, out)
        return out

    def opens_update(self, now_ms: int, node: int, ino: int, opens: Opens, pinned: bool = False) -> list[Effect]:
        """A node reports how many descriptors it has open (absolute counts).

        *pinned*, of the home: its kernel may write the file without asking. Until the next report says otherwise no
        other node is given a lock to cache it under, but for the upcalls of a descriptor that is cached for its life:
        such a lock is called back at once. Operations run beside the kernel's writes.
        """
        out: list[Effect] = []
        rec = self._records.get(ino)
        if rec is not None and node == self._home:
            self._pin_file(rec, pinned, out)
        if rec is None:
            if node == self._home or not (opens[0] or opens[1]):
                return out
            rec = self._make(ino, now_ms)
            self._set_opens(rec, node, opens)
            implicit = rec.hold_of(self._home) if self._home is not None else None
            if implicit is not None:  # it would let the home open the file without asking
                self.basts += 1
                out.append(Bast(implicit.node, ino, implicit.seq, _EX, FLAGS[0]))
            return out
        self._set_opens(rec, node, opens)
        self._pump(rec, now_ms, out)
        return out

    def _pin_file(self, rec: Record, pinned: bool, out: list[Effect]) -> None:
        if not pinned:
            self._pinned.discard(rec.ino)
        elif rec.ino not in self._pinned:
            self._pinned.add(rec.ino)
            for hold in rec.held:
                self._call_back_cached(rec, hold, out)

    def _call_back_cached(self, rec: Record, hold: Hold, out: list[Effect]) -> None:
        """Another node may cache a file that the home's kernel writes: not for long."""
        if hold.node != self._home and COVERS[hold.mode][_PR]:
            self.basts += 1
            out.append(Bast(hold.node, rec.ino, hold.seq, _EX, FLAGS[0]))

    def reclaim(self, now_ms: int, node: int, ino: int, mode: LockMode, opens: Opens) -> list[Effect]:
        """A node names a lock it holds: after a change of home, or because its connection was lost.

        Grant with RECLAIM and a new sequence, or Deny EBUSY where others hold what conflicts (the node must then drop
        what it cached). Mode NL registers open descriptors only. Up to the first grace_over() nothing is given to the
        home implicitly from the first reclaim on; requests and operations have to wait outside meanwhile. (A master
        that served anything before its first reclaim has no grace period.)
        """
        out: list[Effect] = []
        self._grace = not self._served
        rec = self._records.get(ino)
        if rec is None:
            if self._served and (mode is _NL or self._home not in (None, node)):
                if mode is not _NL:  # the home holds it
                    out.append(Deny(node, 0, ino, EBUSY))
                return out + self.opens_update(now_ms, node, ino, opens)
            rec = self._make(ino, now_ms)
        self._set_opens(rec, node, opens)
        if mode is _NL:
            self._pump(rec, now_ms, out)
            return out
        waiter = Waiter(node, 0, 0, mode, 0, None, now_ms)
        if self._blocked(rec, waiter):
            out.append(Deny(node, 0, ino, EBUSY))
        else:
            old = rec.hold_of(node)
            hold = self._hold(rec, node, mode if old is None else JOIN[old.mode][mode], now_ms)
            self.grants += 1
            flags = FLAGS[self._others(rec, node) | _RECLAIM]
            out.append(Grant(node, 0, ino, hold.mode, hold.seq, flags))
            if ino in self._pinned:
                self._call_back_cached(rec, hold, out)
        self._pump(rec, now_ms, out)
        return out

    def grace_over(self, now_ms: int) -> list[Effect]:
        """All reclaims are in: the home gets EX back wherever only it is left, and everything else implicitly."""
        self._grace = False
        self._served = True
        out: list[Effect] = []
        for rec in list(self._records.values()):
            self._tell_others(rec, out)
            self._maybe_drop(rec, now_ms, out)
        return out

    # -- operations ------------------------------------------------------------------------------------------------

    def op_request(self, now_ms: int, node: int, op_id: int, ino: int, mode: LockMode) -> list[Effect]:
        """A shipped operation of *node* needs *ino*: OpGranted now or later. *op_id* is unique among all nodes."""
        if mode is _NL or op_id <= 0:
            raise MisuseError(f"operation {op_id} wants {mode.name} on {ino}")
        out: list[Effect] = []
        rec = self._records.get(ino) or self._make(ino, now_ms)
        held = rec.ops.get(op_id) if rec.ops else None
        if held is not None:
            if not COVERS[held[1]][mode]:
                raise MisuseError(f"operation {op_id} holds {held[1].name} on {ino} and wants {mode.name}")
            out.append(OpGranted(op_id, node, ino))
            return out
        self._enter(rec, Waiter(node, 0, op_id, mode, 0, None, now_ms), now_ms, out)
        return out

    def op_release(self, now_ms: int, op_id: int, ino: int) -> list[Effect]:
        """The operation gives *ino* back, or no longer waits for it."""
        out: list[Effect] = []
        rec = self._records.get(ino)
        if rec is None:
            return out
        if rec.ops and op_id in rec.ops:
            del rec.ops[op_id]
            rec.ops = rec.ops or None
        elif rec.queue:
            for waiter in rec.queue:
                if waiter.op_id == op_id:
                    self._unqueue(rec, waiter)
                    break
        self._pump(rec, now_ms, out)
        return out

    def pin(self, now_ms: int, op_id: int, ino: int) -> None:
        """Have an operation of nobody (node 0) hold *ino* in CR from now on, without asking: another one holds it just
        now in a mode beside which CR may be, or the grace period is not over. op_release() ends it."""
        rec = self._records.get(ino)
        if rec is None:
            if self.serving and self._home is not None:
                raise MisuseError(f"pin of {ino}, which the home holds")
            rec = self._records[ino] = Record(ino)
        if rec.ops is None:
            rec.ops = {}
        rec.ops[op_id] = (0, LockMode.CR)

    def grant_with_op(self, now_ms: int, node: int, ino: int, mode: LockMode) -> tuple[LockMode, int]:
        """While an operation of *node* holds *ino*: give the node a cached lock if that delays nobody.

        Return the node's whole mode and its new sequence, or (NL, 0) where another holder, operation or waiter, or
        an open of another node that the mode would have to know about, is in the way.
        """
        rec = self._records.get(ino)
        if rec is None or node == self._home:
            return _NL, 0
        hold = rec.hold_of(node)
        if mode is _PR and self._writes_next(rec, node):
            mode = _EX
        target = mode if hold is None else JOIN[hold.mode][mode]
        waiter = Waiter(node, 0, 0, target, _ALT, None, now_ms)
        if target is _NL or self._blocked(rec, waiter):
            return _NL, 0
        others = self._others(rec, node)
        if others & _OTHER_WRITER or (others and COVERS[target][_PW]):
            return _NL, 0
        for queued in rec.queue or ():
            if queued.node != node and not COMPATIBLE[target][queued.mode]:
                return _NL, 0
        self.grants += 1
        return target, self._hold(rec, node, target, now_ms).seq

    def _writes_next(self, rec: Record, node: int) -> bool:
        """Whether who reads this is taken for the next one to write it: nodes that write in turn read first, and a
        writer called back for that gives up altogether (``LockCache``). Only where EX delays nobody."""
        return (
            rec.ino in self._given_up
            and not (rec.queue or self._others(rec, node))
            and all(other == node for other, _ in (rec.ops or {}).values())
        )

    # -- nodes and time --------------------------------------------------------------------------------------------

    def node_gone(self, now_ms: int, node: int) -> list[Effect]:
        """Forget a node that is fenced and whose lease has ended.

        Its queued requests and operations are denied with ENOTCONN. An operation that *runs* keeps its lock until
        op_release: it is still changing the lower file system.
        """
        out: list[Effect] = []
        for rec in list(self._records.values()):
            touched = self._take(rec, node)
            if rec.opens and rec.opens.pop(node, None) is not None:
                rec.opens = rec.opens or None
                touched = True
            if rec.basts:
                rec.basts.pop(node, None)
            for waiter in [w for w in rec.queue or () if w.node == node]:
                self._unqueue(rec, waiter)
                touched = True
                if waiter.op_id:
                    out.append(OpDenied(waiter.op_id, node, rec.ino, ENOTCONN))
                else:
                    out.append(Deny(node, waiter.req_id, rec.ino, ENOTCONN))
            if touched:
                self._pump(rec, now_ms, out)
        return out

    def tick(self, now_ms: int) -> list[Effect]:
        """Repeat BASTs (each half of bast_ms), report silent holders and long waits, end lingering."""
        out: list[Effect] = []
        for rec in list(self._waiting.values()):
            for node, sent in (rec.basts or {}).items():
                hold = rec.hold_of(node)
                if sent.kept or hold is None or COMPATIBLE[sent.mode][hold.mode]:
                    continue
                if now_ms - sent.sign_ms >= self._bast_ms:
                    sent.sign_ms = now_ms
                    out.append(BastSilent(node, rec.ino))
                if 2 * (now_ms - sent.sent_ms) >= self._bast_ms:
                    sent.sent_ms = now_ms
                    out.append(Bast(node, rec.ino, sent.seq, sent.mode, FLAGS[sent.flags]))
            for waiter in rec.queue or ():
                if now_ms - waiter.log_ms >= self._lock_wait_ms:
                    waiter.log_ms = now_ms
                    out.append(WaitLong(waiter.node, rec.ino, now_ms - waiter.at_ms))
        for _ in range(min(LINGER_BATCH, len(self._lingering))):
            ino, due_ms = next(iter(self._lingering.items()))
            if due_ms > now_ms:
                break
            del self._lingering[ino]
            due = self._records.get(ino)
            if due is not None:
                self._maybe_drop(due, now_ms, out, linger=False)
        return out

    # -- views -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._records)

    def __contains__(self, ino: int) -> bool:
        """Whether the resource has a record; without one the home uses it without asking."""
        return ino in self._records

    @property
    def last_seq(self) -> int:
        """The sequence of the grant given last."""
        return self._seq

    @property
    def home(self) -> int | None:
        """The node whose FUSE layer holds everything implicitly."""
        return self._home

    @property
    def serving(self) -> bool:
        """Whether what is held and open is known of all nodes: not before, and not in, the grace period."""
        return self._served and not self._grace

    def pinned(self, ino: int) -> bool:
        """Whether the home's kernel may write the file without asking, as far as that matters to anybody else."""
        return ino in self._pinned

    def opens_of(self, ino: int) -> dict[int, Opens]:
        """Return the registered (readers, writers) counts of each node that has any."""
        rec = self._records.get(ino)
        return dict(rec.opens) if rec is not None and rec.opens else {}

    def mode_of(self, node: int, ino: int) -> LockMode:
        """Return the cached mode of *node*, the home's implicit EX included."""
        rec = self._records.get(ino)
        if rec is None:
            return _EX if node == self._home else _NL
        hold = rec.hold_of(node)
        return _NL if hold is None else hold.mode

    def seq_of(self, node: int, ino: int) -> int:
        """Return the sequence of the node's recorded lock, 0 where it has none."""
        rec = self._records.get(ino)
        hold = rec.hold_of(node) if rec is not None else None
        return hold.seq if hold is not None else 0

    def holders(self, ino: int) -> dict[int, LockMode]:
        """Return the cached mode of each node that holds more than NL, the home's implicit EX included."""
        rec = self._records.get(ino)
        if rec is None:
            return {} if self._home is None else {self._home: _EX}
        return {hold.node: hold.mode for hold in rec.held}

    def recorded(self) -> list[int]:
        """Return the resources that have a record: those on which the home holds nothing implicitly."""
        return list(self._records)

    def waiting(self) -> dict[int, int]:
        """Return how many requests and operations of each node wait."""
        counts: dict[int, int] = {}
        for rec in self._waiting.values():
            for waiter in rec.queue or ():
                counts[waiter.node] = counts.get(waiter.node, 0) + 1
        return counts

    def snapshot(self, now_ms: int) -> Iterator[ResourceView]:
        """Yield every record as ``mxfs locks`` shows it."""
        for rec in list(self._records.values()):
            holders = [HolderView(h.node, h.mode, h.seq, now_ms - h.at_ms) for h in sorted(rec.held, key=_by_node)]
            holders += [HolderView(node, mode, 0, 0, op) for op, (node, mode) in (rec.ops or {}).items()]
            yield ResourceView(
                rec.ino,
                tuple(holders),
                tuple(WaiterView(w.node, w.mode, now_ms - w.at_ms, w.op_id) for w in rec.queue or ()),
                tuple(sorted((rec.opens or {}).items())),
            )

    # -- the machine -----------------------------------------------------------------------------------------------

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _stamp(self, now_ms: int) -> int:
        """The time for a lock's age, the same number for all of 100 ms: a number each would take memory."""
        if now_ms - self._stamped_ms >= _STAMP_MS:
            self._stamped_ms = now_ms
        return self._stamped_ms

    def _make(self, ino: int, now_ms: int) -> Record:
        rec = self._records[ino] = Record(ino)
        self._served = not self._grace
        if self._home is not None and not self._grace:
            self._put(rec, Hold(self._home, _EX, self._next(), self._stamp(now_ms)))
        return rec

    def _put(self, rec: Record, hold: Hold) -> None:
        rec.put(hold)
        self.held[hold.node] = self.held.get(hold.node, 0) + 1

    def _take(self, rec: Record, node: int) -> bool:
        """Take the node's lock from it; False where it has none."""
        if rec.pop(node) is None:
            return False
        self.held[node] -= 1
        return True

    def _hold(self, rec: Record, node: int, mode: LockMode, now_ms: int) -> Hold:
        self._given_up.discard(rec.ino)
        hold = rec.hold_of(node)
        if hold is None:
            hold = Hold(node, mode, self._next(), self._stamp(now_ms))
            self._put(rec, hold)
        else:
            hold.mode = mode
            hold.seq = self._next()
            hold.at_ms = self._stamp(now_ms)
        return hold

    def _tell_others(self, rec: Record, out: list[Effect]) -> None:
        """Grant EX again on a file that others have open: they may have said so after the holder had its lock, and it
        must not free the file when its last name goes."""
        for hold in rec.held if rec.opens else ():
            others = self._others(rec, hold.node)
            if others and hold.mode is _EX:
                hold.seq = self._next()
                out.append(Grant(hold.node, 0, rec.ino, hold.mode, hold.seq, FLAGS[others | _RECLAIM]))

    def _set_opens(self, rec: Record, node: int, opens: Opens, register: bool = True) -> None:
        """Note counts newer than those of the node's queued OPEN requests, which they replace."""
        for waiter in rec.queue or ():
            if waiter.node == node and waiter.opens is not None:
                waiter.opens = opens
        if not register:
            return
        if opens[0] or opens[1]:
            if rec.opens is None:
                rec.opens = {}
            rec.opens[node] = opens
        elif rec.opens is not None and node in rec.opens:
            del rec.opens[node]
            rec.opens = rec.opens or None

    @staticmethod
    def _others(rec: Record, node: int) -> int:
        """Return OTHER_OPEN and OTHER_WRITER as they are true for *node*."""
        bits = 0
        if rec.opens:
            for other, (readers, writers) in rec.opens.items():
                if other != node:
                    if writers:
                        return _OTHER_OPEN | _OTHER_WRITER
                    if readers:
                        bits = _OTHER_OPEN
        return bits

    @staticmethod
    def _blocked(rec: Record, waiter: Waiter) -> bool:
        """Return whether a lock that is held, cached or by an operation, conflicts with *waiter*."""
        node = waiter.node
        own = rec.hold_of(node)
        mode = waiter.mode if own is None or waiter.op_id else JOIN[own.mode][waiter.mode]
        row = COMPATIBLE[mode]
        for hold in rec.held:
            if hold.node != node and not row[hold.mode]:
                return True
        if rec.ops:
            for other, op_mode in rec.ops.values():
                if not row[op_mode] and (waiter.op_id or other != node):
                    return True
        return False

    def _enter(self, rec: Record, waiter: Waiter, now_ms: int, out: list[Effect]) -> None:
        """Serve *waiter* at once or queue it."""
        if not rec.queue:
            if self._blocked(rec, waiter):
                self._queue(rec, waiter, 0)
                self._pump(rec, now_ms, out)
            else:
                self._serve(rec, waiter, now_ms, out)
                self._maybe_drop(rec, now_ms, out)
            return
        own = rec.hold_of(waiter.node)
        if waiter.op_id:
            called_back = rec.basts is not None and waiter.node in rec.basts
            passes = own is not None and (called_back or COVERS[own.mode][waiter.mode])
            if passes and not self._blocked(rec, waiter):
                self._serve(rec, waiter, now_ms, out)
                return
        place = len(rec.queue)
        if not waiter.op_id and own is not None and not COVERS[own.mode][waiter.mode]:
            # A conversion: the holder keeps others waiting anyway, so it is served first, within limits.
            while place and not self._is_conversion(rec, rec.queue[place - 1]):
                ahead = rec.queue[place - 1]
                if ahead.passed >= PASS_LIMIT:
                    break
                ahead.passed += 1
                place -= 1
        self._queue(rec, waiter, place)
        if place == 0:
            self._pump(rec, now_ms, out)

    @staticmethod
    def _is_conversion(rec: Record, waiter: Waiter) -> bool:
        return not waiter.op_id and rec.hold_of(waiter.node) is not None

    def _queue(self, rec: Record, waiter: Waiter, place: int) -> None:
        if rec.queue is None:
            rec.queue = []
        if place == 0:
            rec.basts = None  # they were sent on behalf of another
        rec.queue.insert(place, waiter)
        self._waiting[rec.ino] = rec
        if waiter.req_id:
            self._queued[waiter.node, waiter.req_id] = rec
        self.waits += 1

    def _unqueue(self, rec: Record, waiter: Waiter) -> None:
        assert rec.queue is not None
        if rec.queue[0] is waiter:
            rec.basts = None
        rec.queue.remove(waiter)
        if waiter.req_id:
            del self._queued[waiter.node, waiter.req_id]
        if not rec.queue:
            rec.queue = rec.basts = None
            del self._waiting[rec.ino]

    def _pump(self, rec: Record, now_ms: int, out: list[Effect]) -> None:
        """Serve waiters from the front until one has to wait; send the BASTs that one needs."""
        while rec.queue:
            waiter = rec.queue[0]
            if not self._blocked(rec, waiter):
                self._unqueue(rec, waiter)
                self._serve(rec, waiter, now_ms, out)
            elif self._call_back(rec, waiter, now_ms, out):
                self._unqueue(rec, waiter)
                self._uncached(rec, waiter, out)
            else:
                return
        self._maybe_drop(rec, now_ms, out)

    def _call_back(self, rec: Record, waiter: Waiter, now_ms: int, out: list[Effect]) -> bool:
        """Send the BASTs that *waiter* needs; return True when it should go uncached instead of waiting."""
        alt = bool(waiter.flags & (_ALT | _OPEN))
        own = rec.hold_of(waiter.node)
        mode = waiter.mode if own is None or waiter.op_id else JOIN[own.mode][waiter.mode]
        flags = _MAY_KEEP if alt or COMPATIBLE[_PW][mode] else 0
        waiting = False
        if rec.basts is None:
            rec.basts = {}
        for hold in rec.held:
            node = hold.node
            if node == waiter.node or COMPATIBLE[mode][hold.mode]:
                continue
            sent = rec.basts.get(node)
            if sent is None or sent.seq != hold.seq or sent.mode is not mode or sent.flags != flags:
                rec.basts[node] = Sent(hold.seq, mode, flags, now_ms)
                self.basts += 1
                out.append(Bast(node, rec.ino, hold.seq, mode, FLAGS[flags]))
                waiting = True
            elif not sent.kept:
                waiting = True
        if waiting or not alt:
            return False
        # What still conflicts is kept, or is an operation: operations end by themselves, so wait for those.
        return not any(
            not COMPATIBLE[mode][op_mode] and node != waiter.node for node, op_mode in (rec.ops or {}).values()
        )

    def _serve(self, rec: Record, waiter: Waiter, now_ms: int, out: list[Effect]) -> None:
        """Grant *waiter* what nothing held conflicts with."""
        node, mode = waiter.node, waiter.mode
        if waiter.op_id:
            if rec.ops is None:
                rec.ops = {}
            rec.ops[waiter.op_id] = (node, mode)
            self.grants += 1
            out.append(OpGranted(waiter.op_id, node, rec.ino))
            return
        others = self._others(rec, node)
        own = rec.hold_of(node)
        whole = mode if own is None else JOIN[own.mode][mode]
        pinned = node != self._home and rec.ino in self._pinned
        if pinned and waiter.flags & (_OPEN | _ALT):
            self._uncached(rec, waiter, out)
            return
        if others and waiter.flags & (_OPEN | _ALT):
            # A writer caches only where no other node has the file open. (For ALT that is said of the whole mode: such
            # a grant may ride with a reply, which has no room for OTHER_OPEN.)
            uncached = COVERS[mode if waiter.flags & _OPEN else whole][_PW]
            if uncached or (others & _OTHER_WRITER and waiter.flags & _OPEN):
                self._uncached(rec, waiter, out)
                return
        mode = whole
        if waiter.opens is not None:
            self._set_opens(rec, node, waiter.opens)
        if own is None and node == self._home and not (rec.held or rec.ops or rec.queue or others):
            mode = _EX
        hold = self._hold(rec, node, mode, now_ms)
        self.grants += 1
        out.append(Grant(node, waiter.req_id, rec.ino, mode, hold.seq, FLAGS[others]))
        if pinned:
            self._call_back_cached(rec, hold, out)

    def _uncached(self, rec: Record, waiter: Waiter, out: list[Effect]) -> None:
        if waiter.opens is not None:
            self._set_opens(rec, waiter.node, waiter.opens)
        self.grants += 1
        flags = FLAGS[self._others(rec, waiter.node)]
        out.append(Grant(waiter.node, waiter.req_id, rec.ino, _NL, 0, flags))

    def _maybe_drop(self, rec: Record, now_ms: int, out: list[Effect], linger: bool = True) -> None:
        """Drop a record of which only the home is left, and give the home its EX back."""
        home = self._home
        if rec.queue or rec.ops or self._grace:
            return
        for hold in rec.held:
            if hold.node != home:
                return
        for node in rec.opens or ():
            if node != home or home is None:
                return
        if home is not None:
            own = rec.hold_of(home)
            if own is None or own.mode is not _EX:
                if linger and self._linger_ms:
                    self._lingering.setdefault(rec.ino, now_ms + self._linger_ms)
                    return
                out.append(Grant(home, 0, rec.ino, _EX, self._next(), FLAGS[_UNASKED]))
        if self._records.pop(rec.ino, None) is not None:
            self._given_up.discard(rec.ino)
            self._pinned.discard(rec.ino)  # the home says so again where its EX is called back
            self._lingering.pop(rec.ino, None)
            if home is not None:
                self._take(rec, home)
            self.on_home_alone(rec.ino)
