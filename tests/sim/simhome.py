"""The home of a simulated volume: the real LockMaster, SessionTable and Membership; the store has a value an inode.

Its processes run on one node, and stop when that node is paused.
"""

import pickle
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simnode import Future

from mxfs_proto.modes import LockMode, covers
from mxfsd.core.lockeffects import Bast, BastSilent, Deny, Grant, MasterEffect, OpDenied, OpGranted, WaitLong
from mxfsd.core.membership import (
    DeclareDead,
    Joined,
    LeaseEnded,
    MembershipEffect,
    MemberState,
    Refused,
    SlotReport,
    SlotSays,
)
from mxfsd.core.sessions import Replay, Verdict

if TYPE_CHECKING:
    from simulator import World

NL, CR, CW, PR, PW, EX = LockMode
INTERNAL = 1 << 63
Steps = Generator[Any, Any, Any]


class Home:
    """The home of one epoch."""

    def __init__(self, world: "World", number: int, epoch: int) -> None:
        self.world = world
        self.number = number
        self.epoch = epoch
        self.master = world.mutants.master(
            number, world.timeouts, first_seq=world.first_seq(epoch), linger_ms=world.linger_ms
        )
        self.sessions = world.mutants.sessions()
        self.membership = world.mutants.membership(number, world.timeouts)
        self.frozen = False
        self.grace: set[int] = set()
        self.named: dict[int, set[int]] = {}
        self.held_back: list[tuple[Any, ...]] = []
        self.ops: dict[int, Future] = {}
        self.modes: dict[int, LockMode] = {}
        self.tasks = 0
        self.op_ids = 0

    # -- effects -----------------------------------------------------------------------------------------------

    def run(self, effects: list[MasterEffect]) -> None:
        world = self.world
        for effect in effects:
            world.note(0, effect)
            match effect:
                case Grant(req_id=req_id) if req_id & INTERNAL:
                    self.answer(req_id, (effect.mode, effect.seq))
                case Deny(req_id=req_id) if req_id & INTERNAL:
                    self.answer(req_id, None)
                case Grant():
                    fields = (effect.req_id, effect.ino, effect.mode, effect.seq, effect.flags)
                    self.send(effect.node, "grant", *fields)
                case Deny():
                    self.send(effect.node, "deny", effect.req_id, effect.ino, effect.errno)
                case Bast():
                    self.send(effect.node, "bast", effect.ino, effect.seq, effect.mode, effect.flags)
                case OpGranted():
                    self.world.running.setdefault(effect.ino, {})[effect.op_id] = (
                        effect.node,
                        self.modes[effect.op_id],
                    )
                    self.answer(effect.op_id, True)
                case OpDenied():
                    self.answer(effect.op_id, None)
                case BastSilent():
                    world.silences += 1
                case WaitLong():
                    world.long_waits += 1

    def answer(self, op_id: int, value: Any) -> None:
        future = self.ops.pop(op_id, None)
        if future is not None:
            future.set(value)

    def send(self, node: int, *message: Any) -> None:
        if node == self.number or self.membership.incarnation(node) == self.world.nodes[node].incarnation:
            self.world.to_node(node, self.epoch, message)

    def decide(self, effects: list[MembershipEffect]) -> None:
        """Carry out what membership decided."""
        world = self.world
        for effect in effects:
            world.note(0, effect)
            match effect:
                case Joined():
                    world.welcome(effect.node, effect.incarnation)
                case Refused():
                    world.refuse(effect.node, effect.incarnation)
                case DeclareDead():
                    world.deaths += 1
                case LeaseEnded():
                    self.sessions.drop(effect.node << 32 | effect.incarnation)
                    self.run(self.master.node_gone(world.now, effect.node))
                    self.reclaimed(effect.node)

    # -- what arrives ------------------------------------------------------------------------------------------

    def accepts(self, node: int, incarnation: int, epoch: int) -> bool:
        if epoch != self.epoch or self.frozen:
            return False
        if node == self.number:
            return True
        states = (MemberState.ACTIVE, MemberState.SUSPECT)
        return self.membership.incarnation(node) == incarnation and self.membership.state(node) in states

    def on_lock(self, node: int, incarnation: int, epoch: int, message: tuple[Any, ...]) -> None:
        """A message came over the lock channel."""
        if not self.accepts(node, incarnation, epoch):
            return
        if self.grace and message[0] not in ("reclaim", "reclaimed"):
            self.held_back.append((node, incarnation, epoch, message))
            return
        now, master = self.world.now, self.master
        self.world.note(node, message)
        match message:
            case ("request", req_id, ino, mode, flags, opens):
                self.run(master.request(now, node, req_id, ino, mode, flags, opens))
            case ("release", *fields):
                self.run(master.release(now, node, *fields))
            case ("cancel", req_id):
                self.run(master.cancel(now, node, req_id))
            case ("opens", ino, opens):
                self.run(master.opens_update(now, node, ino, opens))
            case ("reclaim", ino, mode, opens):
                self.named.setdefault(node, set()).add(ino)
                self.run(master.reclaim(now, node, ino, mode, opens))
            case ("reclaimed",):
                named = self.named.pop(node, set())
                for ino in set(master.recorded()) - named:
                    self.run(master.release(now, node, ino, master.seq_of(node, ino), NL, (0, 0)))
                self.reclaimed(node)

    def reclaimed(self, node: int) -> None:
        """A node has reclaimed all, or is gone: the last one ends the grace period."""
        if node not in self.grace:
            return
        self.grace.discard(node)
        if not self.grace:
            self.run(self.master.grace_over(self.world.now))
            self.send(self.number, "implicit", self.master.recorded())
            held_back, self.held_back = self.held_back, []
            for fields in held_back:
                self.on_lock(*fields)

    def renew(self, node: int, incarnation: int) -> bool:
        """A renewal arrived; return whether it is answered."""
        effects = self.membership.on_contact(self.world.now, node, incarnation)
        self.decide(effects)
        return not any(isinstance(effect, Refused) for effect in effects)

    def tick(self) -> None:
        world = self.world
        if self.frozen:
            return
        if not self.grace:
            self.run(self.master.tick(world.now))
        reports = [
            SlotReport(n.number, n.incarnation, SlotSays.CLAIMED, world.slot_age(n)) for n in world.nodes.values()
        ]
        self.decide(self.membership.on_slots(world.now, reports))

    # -- shipped operations ------------------------------------------------------------------------------------

    def on_op(self, node: int, incarnation: int, epoch: int, request: tuple[Any, ...]) -> None:
        """A shipped operation arrived, perhaps not for the first time."""
        if not self.accepts(node, incarnation, epoch) or self.grace:
            return
        session, seq, ack, op = request
        verdict = self.sessions.begin(session, seq, ack)
        if isinstance(verdict, Replay):
            self.world.reply(node, incarnation, seq, pickle.loads(verdict.reply))
        elif verdict is Verdict.NEW:
            self.tasks += 1
            self.world.spawn(self.execute(node, incarnation, session, seq, op), self.world.nodes[self.number])

    def execute(self, node: int, incarnation: int, session: int, seq: int, op: tuple[Any, ...]) -> Steps:
        kind, *inos = op
        grants: list[tuple[int, int, int]] = []
        held: list[tuple[int, int]] = []
        try:
            yield self.world.rng.choice((0, 0, 1))
            versions = yield from self.handle(node, session, seq, kind, inos, held, grants)
        finally:
            for op_id, ino in held:
                self.op_release(op_id, ino)
        if versions is None:
            self.sessions.abandon(session, seq)
        else:
            yield self.world.rng.choice((0, 1, 2))  # the log is forced
            reply = (versions, grants)
            self.sessions.done(session, seq, pickle.dumps(reply), repeatable=kind.startswith("get"))
            self.world.reply(node, incarnation, seq, reply)
        self.tasks -= 1

    def handle(
        self, node: int, session: int, seq: int, kind: str, inos: list[int], held: list[Any], grants: list[Any]
    ) -> Steps:
        """Return the versions seen or written; None if the operation was not executed."""
        world, master, ino = self.world, self.master, inos[0]
        if kind == "getattr_lock":
            got = yield from self.internal_lock(node, ino)
            if got is None:
                return None
            if got[0] != NL:
                grants.append((ino, int(got[0]), got[1]))
                return [world.store[ino]]
        mode = {"getattr": PR, "getattr_lock": CR, "read": CR, "write": CW, "setattr": EX}[kind]
        under = {"read": PR, "write": PW}.get(kind)
        if under is None or not covers(master.mode_of(node, ino), under):
            for each in inos:
                if not (yield from self.op_lock(node, each, mode, held)):
                    return None
            yield world.rng.choice((0, 0, 2))
        if kind in ("write", "setattr"):
            world.check.execute(session, seq, self.epoch, self.number)
            versions = [world.change(each) for each in inos]
        else:
            versions = [world.store[ino]]
        if kind in ("getattr", "setattr"):
            for each in inos:
                got_mode, grant = master.grant_with_op(world.now, node, each, PR)
                if got_mode != NL:
                    grants.append((each, int(got_mode), grant))
        return versions

    def op_lock(self, node: int, ino: int, mode: LockMode, held: list[Any]) -> Steps:
        if self.frozen:
            return None
        self.op_ids += 1
        op_id = self.op_ids
        self.modes[op_id] = mode
        future = self.ops[op_id] = Future()
        held.append((op_id, ino))
        self.run(self.master.op_request(self.world.now, node, op_id, ino, mode))
        return (yield future)

    def op_release(self, op_id: int, ino: int) -> None:
        self.world.running.get(ino, {}).pop(op_id, None)
        self.run(self.master.op_release(self.world.now, op_id, ino))

    def internal_lock(self, node: int, ino: int) -> Steps:
        if self.frozen:
            return None
        self.op_ids += 1
        req_id = self.op_ids | INTERNAL
        future = self.ops[req_id] = Future()
        self.run(self.master.request(self.world.now, node, req_id, ino, PR, self.world.alt))
        return (yield future)

    def freeze(self) -> None:
        """The home is to move: operations that wait for locks are dropped, those that run end."""
        self.frozen = True
        for op_id in list(self.ops):
            self.answer(op_id, None)
