"""The home of one epoch in the failover simulator: real LockMaster, SessionTable and Membership over a fake XFS.

Each operation that must not be done twice runs in one piece: intent, change, outcome; then the log is forced, then it
is answered. A new home settles an intent that is left without outcome by comparing what it says with what is there.
"""

import pickle
from typing import TYPE_CHECKING, Any

from failover_disk import CELLS, Mount
from failover_engine import Link, Steps
from failover_locks import HomeLocks
from failover_ops import (
    DIR,
    ONCE,
    before_of,
    changes_of,
    entry,
    judged,
    locks_of,
    registers_of,
    reply_of,
    seen,
    taken_back,
)
from simnode import Future

from mxfs_proto.modes import LockMode, covers
from mxfsd.core.dlm import LockMaster
from mxfsd.core.epochs import first_seq
from mxfsd.core.lockeffects import Bast, Deny, Grant, MasterEffect, OpDenied, OpGranted
from mxfsd.core.membership import (
    DeclareDead,
    Freeze,
    LeaseEnded,
    Left,
    Membership,
    MembershipEffect,
    MemberState,
    Refused,
    SlotReport,
    StepDown,
    Thaw,
    says,
)
from mxfsd.core.outcomes import Step
from mxfsd.core.sessions import Replay, SessionTable, Verdict
from mxfsd.core.takeover import TakeoverState
from mxfsd.core.watch import Snapshot

if TYPE_CHECKING:
    from failover_node import Node

NL, CR, CW, PR, PW, EX = LockMode


class Home:
    """One home, from the mount on."""

    def __init__(self, node: "Node", epoch: int, mount: Mount) -> None:
        self.node = node
        self.world = world = node.world
        self.rules = world.rules
        self.me = node.slot
        self.epoch = epoch
        self.mount = mount
        self.master = self.rules.master(self.me, world.timeouts, first_seq=first_seq(epoch), linger_ms=world.linger_ms)
        assert isinstance(self.master, LockMaster)
        self.sessions: SessionTable = self.rules.sessions()
        self.membership = self.rules.membership(self.me, world.timeouts, must_fence=True)
        assert isinstance(self.membership, Membership)
        self.links: dict[int, Link] = {}
        self.session_of: dict[int, int] = {}
        self.serving = False
        self.frozen = False
        self.over = False
        self.tasks = 0
        self.ops: dict[int, Future] = {}
        self.op_ids = 0
        self.queues: dict[int, list[tuple[int, tuple[Any, ...]]]] = {}
        self.named: dict[int, set[int]] = {}
        self.greeted: dict[int, int] = {}
        self.reaping: set[int] = set()
        self.connections: dict[int, int] = {}
        self.locks: HomeLocks = self.rules.home_locks(self)
        self.locks.connection_of = lambda slot: self.connections.get(slot, 0)

    # -- recovery ----------------------------------------------------------------------------------------------

    def recover(self) -> Steps:
        """Settle what has no outcome, read the outcomes, make that durable. Return whether it worked."""
        meta = self.mount.meta
        if self.rules.settle:
            for key in [key for key in meta if key[0] == "intent"]:
                self.settle(key, *meta[key])
            for key, reply in list(meta.items()):
                if key[0] == "out":
                    self.sessions.restore(key[1], key[2], reply)
        for key in [key for key in meta if key[0] == "i"]:
            ino = key[1]
            if ("o", ino) not in meta and not any(k[0] == "n" and v[0] == ino for k, v in meta.items()):
                self.mount.txn((("i", ino), None), (("s", ino), None))
        return (yield self.mount.force())

    def settle(self, key: tuple[Any, ...], op: tuple[Any, ...], before: tuple[Any, ...], number: int) -> None:
        """Do what the real code says about one operation without outcome."""
        mount, out = self.mount, ("out", *key[1:])
        step = judged(mount, op, before)
        changes: tuple[Any, ...] = ()
        if step is Step.UNDO:
            changes = taken_back(mount, op, before, number)
        elif step is Step.REDO and before[0]:
            changes = changes_of(mount, op, number, self.is_open)
            if changes:
                self.world.ledger.applies(mount.meta, number)
                self.world.ledger.executed(number, registers_of(changes), key[1])
                changes = (*changes, (("did", number), True))
        if changes:
            mount.txn(*changes)
        if step in (Step.KEEP, Step.REDO):
            mount.txn((out, pickle.dumps((reply_of(mount, op, before), ()))), (key, None))
        else:
            mount.txn((key, None))

    # -- effects -----------------------------------------------------------------------------------------------

    def may_act(self) -> bool:
        """Whether this node is the home still, for all it knows."""
        return not self.over and not self.mount.down and (self.node.lease_valid() or not self.rules.lease_check)

    def run(self, effects: list[MasterEffect]) -> None:
        for effect in effects:
            self.world.engine.note(f"home{self.epoch}", effect)
            match effect:
                case Grant():
                    fields = (effect.req_id, effect.ino, effect.mode, effect.seq, effect.flags)
                    self.send(effect.node, "grant", *fields)
                case Deny():
                    self.send(effect.node, "deny", effect.req_id, effect.ino, effect.errno)
                case Bast():
                    self.send(effect.node, "bast", effect.ino, effect.seq, effect.mode, effect.flags)
                case OpGranted() | OpDenied():
                    future = self.ops.pop(effect.op_id, None)
                    if future is not None:
                        future.set(isinstance(effect, OpGranted))

    def send(self, slot: int, *message: Any) -> None:
        """Send a lock message in its order; a grant waits until what it would show is durable."""
        queue = self.queues.setdefault(slot, [])
        ino = message[2] if message[0] == "grant" and slot != self.me else 0
        queue.append((ino, message))
        if len(queue) == 1:
            if ino and self.uncommitted(ino):
                self.world.engine.spawn(self._drain(slot, queue, self.links.get(slot)), self.node.daemon)
            else:
                self._pass(slot, message)
                queue.clear()

    def _drain(self, slot: int, queue: list[tuple[int, tuple[Any, ...]]], link: Link | None) -> Steps:
        while queue:
            ino, message = queue[0]
            if ino and self.uncommitted(ino) and not (yield from self.mount.fsync(ino)):
                return
            if self.links.get(slot) is link or not self.rules.late_by_link:
                self._pass(slot, message)  # over another connection the node has said, or says now, what it holds
            queue.pop(0)

    def uncommitted(self, ino: int) -> bool:
        return self.rules.force and (ino in self.mount.writer or self.mount.durable_lsn < self.mount.lsn)

    def _pass(self, slot: int, message: tuple[Any, ...]) -> None:
        link = self.links.get(slot)
        client = self.world.client_of(link) if link is not None else None
        if link is not None and client is not None and self.may_act():
            self.world.net.send(
                link, self.node.number, "lock", client.fuse_proc, client.on_lock, link, self.epoch, message
            )

    def tell(self, slot: int, what: str, *args: Any) -> None:
        """Send a client's daemon something that is not a lock message."""
        link = self.links.get(slot)
        client = self.world.client_of(link) if link is not None else None
        if link is not None and client is not None:
            self.world.net.send(
                link, self.node.number, "lock", client.fuse_proc, client.on_home, link, self.epoch, what, *args
            )

    # -- membership --------------------------------------------------------------------------------------------

    def decide(self, effects: list[MembershipEffect]) -> None:
        for effect in effects:
            self.world.engine.note(f"home{self.epoch}", effect)
            match effect:
                case Refused():
                    self.tell(effect.node, "refused", effect.incarnation)
                case DeclareDead():
                    self.world.deaths += 1
                    self.node.fence_member(self, effect)
                case LeaseEnded() | Left():
                    self.out(effect.node, effect.incarnation)
                case Freeze():
                    self.frozen = True
                case Thaw():
                    self.frozen = False
                case StepDown():
                    self.node.step_down()

    def out(self, slot: int, incarnation: int) -> None:
        """A node is out for good: what it held ends here, and its slot on the disk too."""
        session = self.session_of.pop(slot, None)
        if session is not None:
            self.sessions.drop(session)
            self.world.ledger.lost(session)
            self.world.claims.gone(session)
        self.connections[slot] = self.connections.get(slot, 0) + 1
        link = self.links.pop(slot, None)
        if link is not None:
            link.broken = True
        self.queues.pop(slot, None)
        self.world.put_out(slot, incarnation)
        self.node.evicted.add((slot, incarnation))
        self.locks.node_gone(slot)
        self.run(self.master.node_gone(self.world.engine.now, slot))
        self.node.free_slot(slot, incarnation)
        self.node.go(self.node.takeover.out(slot))

    def on_slots(self, snap: Snapshot) -> None:
        """The heartbeat process read the slots."""
        now = self.node.clock()
        reports = []
        for record in snap.slots:
            if record is not None:
                age = self.node.watch.age_ms(record.slot)
                reports.append(SlotReport(record.slot, record.incarnation, says(record.state), age))
        self.decide(self.membership.on_slots(now, reports))
        if self.serving and not self.over:
            self.run(self.master.tick(self.world.engine.now))
            self.reap()

    def on_hello(self, link: Link, fuse: Any, incarnation: int, continues: int, slot: int) -> None:
        """A client's daemon connected."""
        ready = self.node.takeover.state in (TakeoverState.GRACE, TakeoverState.SERVING)
        if self.over or self.frozen or not ready or not self.may_act():
            self.world.net.lose(link)
            return
        client = self.world.nodes[link.client]
        if (slot, incarnation) in self.node.evicted or (continues and (slot, continues) in self.node.evicted):
            self.world.net.send(link, self.node.number, "lock", client.daemon, client.refused, incarnation)
            return
        old = self.links.get(slot)
        if old is link:
            return
        if old is not None:
            self.world.net.lose(old)
        if continues and slot != self.me and not self.membership.incarnation(slot):
            # It was put out by a home before this one, or comes back in another slot: what it held is not its own.
            self.world.net.send(link, self.node.number, "lock", client.daemon, client.refused, incarnation)
            return
        if slot != self.me:
            effects = self.membership.on_connected(self.node.clock(), slot, incarnation, continues)
            if any(isinstance(effect, Refused) for effect in effects):
                self.world.net.send(link, self.node.number, "lock", client.daemon, client.refused, incarnation)
                effects = [effect for effect in effects if not isinstance(effect, Refused)]
            self.decide(effects)
            if self.membership.state(slot) is not MemberState.ACTIVE:
                return
            if self.membership.incarnation(slot) != incarnation:
                return
        if self.session_of.get(slot, fuse.serial) != fuse.serial:
            self.world.ledger.lost(self.session_of[slot])
            self.sessions.drop(self.session_of[slot])
        self.session_of[slot] = fuse.serial
        self.links[slot] = link
        self.connections[slot] = self.connections.get(slot, 0) + 1
        self.greeted[slot] = self.master.last_seq
        self.queues.pop(slot, None)
        self.tell(slot, "welcome", self.serving)

    def on_renewal(self, link: Link, slot: int, incarnation: int, sent_ms: int) -> None:
        """A client's lease is to be renewed."""
        if self.links.get(slot) is not link or not self.may_act() or self.frozen:
            return
        effects = [] if slot == self.me else self.membership.on_contact(self.node.clock(), slot, incarnation)
        self.decide(effects)
        if not any(isinstance(effect, Refused) for effect in effects):
            self.tell(slot, "renewed", sent_ms)

    # -- locks -------------------------------------------------------------------------------------------------

    def on_lock(self, link: Link, slot: int, epoch: int, message: tuple[Any, ...]) -> None:
        if self.links.get(slot) is not link or not self.may_act() or self.frozen:
            return
        now, master = self.world.engine.now, self.master
        if not self.serving and message[0] not in ("reclaim", "reclaim_locks", "reclaimed"):
            return
        match message:
            case ("request", req_id, ino, mode, flags, opens):
                self.run(master.request(now, slot, req_id, ino, mode, flags, opens))
            case ("release", *fields):
                self.run(master.release(now, slot, *fields))
            case ("cancel", req_id):
                self.run(master.cancel(now, slot, req_id))
            case ("opens", ino, opens):
                self.run(master.opens_update(now, slot, ino, opens))
            case ("reclaim", ino, mode, opens):
                self.named.setdefault(slot, set()).add(ino)
                self.run(master.reclaim(now, slot, ino, mode, opens))
            case ("reclaim_locks", tables):
                self.locks.name(self, slot, tables)
            case ("reclaimed",):
                self.locks.reclaimed(slot)
                named = self.named.pop(slot, set())
                for ino in set(master.recorded()) - named:
                    seq = master.seq_of(slot, ino)
                    if seq <= self.greeted[slot]:  # else granted over this connection
                        self.run(master.release(now, slot, ino, seq, NL, (0, 0)))
                self.node.go(self.node.takeover.reclaimed(slot))
                if self.serving:
                    self.tell(slot, "serve")

    def serve(self) -> None:
        """The grace period is over."""
        self.world.ledger.recovered(self.mount.meta)
        self.serving = True
        self.locks.grace_over()
        self.run(self.master.grace_over(self.world.engine.now))
        keep = set(self.session_of.values())
        for session in self.sessions.sessions():
            if session not in keep:
                self.sessions.drop(session)
        for slot in self.links:
            self.tell(slot, "serve")

    # -- shipped operations ------------------------------------------------------------------------------------

    def on_op(self, link: Link, slot: int, epoch: int, request: tuple[Any, ...]) -> None:
        if self.links.get(slot) is not link or not self.may_act() or self.frozen:
            return
        if epoch != self.epoch and self.rules.epoch:
            return
        session, seq, ack, number, op = request
        if not self.serving and op[0] not in ("replay", "fsync"):
            return
        if op[0] == "lk":
            self.tasks += 1
            self.world.engine.spawn(self.on_file_lock(link, slot, session, seq, op), self.node.daemon)
            return
        verdict = self.sessions.begin(session, seq, ack)
        if isinstance(verdict, Replay):
            self.reply(link, slot, session, seq, pickle.loads(verdict.reply))
        elif verdict is Verdict.NEW:
            self.tasks += 1
            self.world.engine.spawn(self.execute(link, slot, session, seq, ack, number, op), self.node.daemon)

    def on_file_lock(self, link: Link, slot: int, session: int, seq: int, op: tuple[Any, ...]) -> Steps:
        """An operation on file locks, which may run twice: its reply is not kept."""
        answer = yield from self.locks.execute(self, slot, op[1], op[2:])
        self.tasks -= 1
        if answer is not None and self.links.get(slot) is link:
            self.reply(link, slot, session, seq, answer)

    def tell_locks(self, slot: int, *record: Any) -> None:
        """A wake, or the denial of a claim."""
        self._pass(slot, record)

    def reply(self, asked: Link, slot: int, session: int, seq: int, reply: Any) -> None:
        link = self.links.get(slot)
        if link is not asked and self.rules.grants_by_link:
            reply = (reply[0], ())  # over another connection the node has said, or says now, what it holds
        client = self.world.client_of(link) if link is not None else None
        if link is not None and client is not None and self.may_act() and client.serial == session:
            self.world.net.send(
                link, self.node.number, "op", client.fuse_proc, client.on_reply, link, self.epoch, seq, reply
            )

    def lock(self, slot: int, op: tuple[Any, ...], held: list[tuple[int, int]]) -> Steps:
        """Take the operation's locks; return whether they were granted."""
        wanted = locks_of(op)
        while wanted:
            ino, mode = wanted.pop(0)
            if not covers(self.master.mode_of(slot, ino) if op[0] == "write" else NL, PW):
                op_id = self.op_ids = self.op_ids + 1
                future = self.ops[op_id] = Future()
                held.append((op_id, ino))
                self.run(self.master.op_request(self.world.engine.now, slot, op_id, ino, mode))
                if not (yield future):
                    return False
            if ino == DIR and op[0] in ("unlink", "rename"):
                victim = entry(self.mount, op[1 if op[0] == "unlink" else 2])[0]
                if victim:  # whoever has it open has to say so
                    wanted.append((victim, EX))
        return True

    def execute(
        self, link: Link, slot: int, session: int, seq: int, ack: int, number: int, op: tuple[Any, ...]
    ) -> Steps:
        """Run an operation under its locks, and answer it."""
        held: list[tuple[int, int]] = []
        grants: list[tuple[int, int, int]] = []
        reply, durable = None, False
        # No "finally" here: a task of a dead process is collected at any moment, and must not do anything then.
        if (yield from self.lock(slot, op, held)):
            yield self.world.engine.rng.choice((0, 0, 1))
            ino = op[1] if op[0] in ("truncate", "append", "write", "read") else 0
            if ino and self.mount.writer.get(ino, session) != session and self.rules.commit_others:
                yield from self.mount.fsync(ino)
            if self.may_act():
                reply, durable = yield from self.perform(slot, session, seq, ack, number, op, grants)
        else:
            self.sessions.abandon(session, seq)
        for op_id, held_ino in held:
            self.ops.pop(op_id, None)
            self.run(self.master.op_release(self.world.engine.now, op_id, held_ino))
        self.tasks -= 1
        if reply is None or (durable and self.rules.force and not (yield self.mount.force())):
            return  # not answered: whether it happened is for the next home to say
        answer = (reply, tuple(grants))
        self.sessions.done(session, seq, pickle.dumps(answer), repeatable=op[0] not in (*ONCE, "write"))
        self.reply(link, slot, session, seq, answer)

    def perform(
        self, slot: int, session: int, seq: int, ack: int, number: int, op: tuple[Any, ...], grants: list[Any]
    ) -> Steps:
        """Run one operation. Return its reply, and whether that waits for the log."""
        self.world.engine.note(f"home{self.epoch}", f"runs {op} of {session}/{seq} ({number})")
        mount, kind = self.mount, op[0]
        unstable = kind == "write" and covers(self.master.mode_of(slot, op[1]), PW) and not op[3]
        if kind == "replay":
            _, ino, index, value = op
            if mount.exists(ino):
                mount.write(ino, index, value, session)
            return (mount.exists(ino),), False
        if kind == "fsync":
            ok = yield from mount.fsync(op[1])
            return ((True,) if ok else None), False
        if kind == "write":
            if not mount.exists(op[1]):
                return ("gone",), True
            mount.write(op[1], op[2], number, session)
            self.world.ledger.executed(number, [(op[1], op[2])], session)
            if unstable:
                return ("unstable",), False
            if not (yield mount.flush(op[1])):
                return None, True
            if self.rules.outcome:
                mount.txn((("out", session, seq), pickle.dumps((("stable",), ()))))
            return ("stable",), True
        if kind in ONCE:
            return (yield from self.once(slot, session, seq, ack, number, op)), True
        target = DIR if kind == "lookup" else op[1]
        reply = seen(mount, op)
        mode, grant = self.master.grant_with_op(self.world.engine.now, slot, target, PR)
        if mode != NL:
            grants.append((target, int(mode), grant))
        return reply, self.rules.force_reads

    def once(self, slot: int, session: int, seq: int, ack: int, number: int, op: tuple[Any, ...]) -> Steps:
        """Intent, change, outcome, in one piece."""
        mount, rules, ledger = self.mount, self.rules, self.world.ledger
        before = before_of(mount, op)
        acked = tuple(
            (key, None) for key in list(mount.meta) if key[0] == "out" and key[1] == session and key[2] <= ack
        )
        appends = op[0] == "append" and mount.exists(op[1]) and mount.size(op[1]) < CELLS

        def may_be_open(ino: int) -> bool:
            # The asking node keeps its own lock, under which it may have opened the file without saying so.
            return self.is_open(ino) or self.master.mode_of(slot, ino) != NL

        changes = changes_of(mount, op, number, may_be_open)
        if changes or appends:
            ledger.applies(mount.meta, number)
            if rules.intent:
                mount.txn((("intent", session, seq), (op, before, number)), *acked)
        if changes:
            mount.txn(*changes, (("did", number), True))
            ledger.executed(number, registers_of(changes), session)
        reply = reply_of(mount, op, before)
        if appends:
            # Appended data is durable before its outcome: the size on the disk tells whether it happened.
            mount.write(op[1], before[1], number, session)
            mount.appended[op[1], before[1]] = number
            ledger.executed(number, [(op[1], before[1])], session)
            if not (yield mount.flush(op[1])):
                return None
        if self.world.between is not None:
            self.world.between(self)
        if rules.outcome:
            mount.txn((("out", session, seq), pickle.dumps((reply, ()))), (("intent", session, seq), None))
        return reply

    # -- open files --------------------------------------------------------------------------------------------

    def is_open(self, ino: int) -> bool:
        fuse = self.node.fuse
        here = fuse is not None and any(fuse.opens_of(ino))
        return here or any(readers or writers for readers, writers in self.master.opens_of(ino).values())

    def reap(self) -> None:
        """Free files that were unlinked while they were open, and are not any more."""
        if self.master.serving and self.may_act():
            for key in [key for key in self.mount.meta if key[0] == "o" and key[1] not in self.reaping]:
                if not self.is_open(key[1]):
                    self.reaping.add(key[1])
                    self.world.engine.spawn(self._reap(key[1]), self.node.daemon)

    def _reap(self, ino: int) -> Steps:
        """Under EX: whoever has it open under a lock of its own says so when that is called back."""
        held: list[tuple[int, int]] = []
        yield from self.lock(0, ("reap", ino), held)
        if self.may_act() and not self.is_open(ino):
            self.world.engine.note(f"home{self.epoch}", f"frees inode {ino}")
            self.mount.txn((("o", ino), None), (("i", ino), None), (("s", ino), None))
        for op_id, _ in held:
            self.run(self.master.op_release(self.world.engine.now, op_id, ino))
        self.reaping.discard(ino)
