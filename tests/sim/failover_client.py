"""The FUSE layer of one node in the failover simulator: real LockCache and ClientLease.

It outlives its daemon. Data that the home has not committed is kept under EX or PW, and goes to the next home before
anything else. What it asked for and got no answer to is asked again when the home serves.
"""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from failover_apps import Applications
from failover_engine import Link, Steps
from failover_locks import Locks, bast_first, drive, record_of, tables_of
from failover_ops import DIR
from simnode import Future

from mxfs_proto.filelocks import is_resource
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode, covers
from mxfs_proto.ops import Fid
from mxfsd.core.epochs import first_seq
from mxfsd.core.lockcache import LockCache
from mxfsd.core.lockeffects import CacheEffect, Invalidate, Later, SendCancel, SendRelease, SendRequest, Wake
from mxfsd.core.membership import ClientLease
from mxfsd.core.unstable import UnstableData

if TYPE_CHECKING:
    from failover_node import Node

NL, CR, CW, PR, PW, EX = LockMode
MARGIN_MS = 40
VALUE = 8
"""Bytes of a cell, which hold the number of the operation that wrote it."""


class Fuse(Applications):
    """One FUSE layer, from mount to its end."""

    def __init__(self, node: "Node", serial: int) -> None:
        self.node = node
        self.world = world = node.world
        self.rules = world.rules
        self.number = node.number
        self.serial = serial
        self.fuse_proc = node.fuse_proc
        self.cache = self.rules.cache(
            False,
            opens_of=self.opens_of,
            has_cached_writer=lambda ino: False,
            min_hold_ms=1,
            lock_wait_ms=world.timeouts.lock_wait_ms,
        )
        assert isinstance(self.cache, LockCache)
        self.lease = ClientLease(world.timeouts.lease_ms, MARGIN_MS)
        self.epoch = self.replayed = 0
        self.link: Link | None = None
        self.served = False
        self.home_here = False
        self.kernel: dict[int, Any] = {}
        self.unstable: UnstableData = self.rules.unstable()
        assert isinstance(self.unstable, UnstableData)
        self.changes: dict[int, int] = defaultdict(int)
        self.changing: dict[int, int] = defaultdict(int)
        self.counts: dict[int, int] = defaultdict(int)
        self.wakes: dict[int, list[Future]] = defaultdict(list)
        self.seq = 0
        self.pending: dict[int, tuple[Future, int, tuple[Any, ...]]] = {}
        self.pins: set[tuple[int, int]] = set()
        self.busy: dict[int, str] = {}
        self.excused: set[int] = set()
        self.writing: set[int] = set()
        self.losses = 0
        self.locks: Locks = self.rules.locks(self)

    def opens_of(self, ino: int) -> tuple[int, int]:
        return (self.counts[ino], 0) if ino in self.counts else (0, 0)

    def trusts(self) -> bool:
        """Whether applications here may be served from what is cached."""
        if self.home_here:
            return self.node.acts_as_home()
        return self.node.clock() < self.lease.until_ms()

    # -- the connection ----------------------------------------------------------------------------------------

    def on_home(self, link: Link, epoch: int, what: str, *args: Any) -> None:
        """News from the home's daemon."""
        if link is not self.link:
            return
        match what:
            case "welcome":
                self.served = False
                self.world.engine.spawn(self.resume(link, epoch), self.fuse_proc)
            case "serve":
                self.served = True
                if link.client == link.home and self.node.home is not None:
                    self.home_here = True
                    self.kernel.clear()
                    self.cache.set_implicit(True, self.node.home.master.recorded())
                self.run(self.cache.resend(self.world.engine.now))
                for seq in list(self.pending):
                    self.transmit(seq)
                self.locks.state.frozen = False
                self.locks.resumed()
            case "renewed":
                self.lease.renewed(self.node.clock(), args[0])
            case "refused":
                self.node.refused(args[0])

    def connected(self, link: Link | None) -> None:
        """Our daemon has, or has lost, a connection."""
        self.link = link
        self.served = False

    def resume(self, link: Link, epoch: int) -> Steps:
        """Tell a home what is held here; kept data first, if it is another one."""
        moved, self.epoch = epoch != self.epoch, epoch
        if moved:
            self.cache.new_epoch(first_seq(epoch))
        self.check_lease()
        here = link.client == link.home
        for seq in [seq for seq, (_, _, op) in self.pending.items() if op[0] == "replay"]:
            del self.pending[seq]  # of a resumption that was broken off: too late, they would undo what comes now
        if self.replayed != epoch and self.rules.replay:
            # One after the other: the home keeps no order among operations that are under way together.
            for ino, index, op in self.kept():
                answered = self.ship(0, ("replay", ino, index, op))
                while not answered.done:
                    yield 1
                    if link is not self.link or link.broken:
                        return
        for ino, _ in self.unstable.files():
            # Without the lock nothing protects the data once the home serves; and a home keeps nothing.
            if here or not covers(self.cache.data_mode(ino), PW):
                self.world.engine.spawn(self.commit(ino), self.fuse_proc)
        while any(here or not covers(self.cache.data_mode(ino), PW) for ino, _ in self.unstable.files()):
            yield 3
            if link is not self.link or link.broken:
                return
        if link is not self.link:
            return
        self.replayed = epoch
        self.locks.state.frozen = True
        tables = tables_of(self.locks)
        held = list(self.cache.held())
        for ino, mode, _, opens in held:
            self.send("reclaim", ino, mode, opens)
        for ino in [ino for ino, count in self.counts.items() if count]:
            self.send("reclaim", ino, NL, self.opens_of(ino))
        if tables and self.rules.name_locks:
            self.send("reclaim_locks", tables)
        self.send("reclaimed")

    def check_lease(self) -> None:
        """Drop what is cached when the lease comes to its end."""
        if not self.home_here and self.lease.expired(self.node.clock()):
            self.drop_all()

    def leave_home(self) -> None:
        """The lower mount of this node is gone: nothing is held implicitly any more."""
        if self.home_here:
            self.home_here = False
            self.cache.set_implicit(False)
            self.lease = ClientLease(self.world.timeouts.lease_ms, MARGIN_MS)
        self.drop_all()

    def drop_all(self) -> None:
        self.cache.drop_all()
        self.kernel.clear()
        for ino, pin in list(self.pins):
            self.unpin(ino, pin)
        for ino in list(self.changes):
            self.changes[ino] += 1

    def tick(self) -> None:
        self.check_lease()
        self.run(self.cache.tick(self.world.engine.now))

    # -- locks -------------------------------------------------------------------------------------------------

    def send(self, *message: Any) -> None:
        link, home = self.link, self.world.home_at(self.link)
        if link is not None and home is not None and not link.broken:
            slot = self.node.slot
            self.world.net.send(
                link, self.number, "lock", home.node.daemon, home.on_lock, link, slot, self.epoch, message
            )

    def run(self, effects: list[CacheEffect]) -> None:
        engine = self.world.engine
        for effect in effects:
            engine.note(f"n{self.number}", effect)
            match effect:
                case SendRequest():
                    if self.served:
                        self.send("request", effect.req_id, effect.ino, effect.mode, effect.flags, effect.opens)
                case SendRelease():
                    self.send("release", effect.ino, effect.seq, effect.mode, effect.opens)
                case SendCancel():
                    self.send("cancel", effect.req_id)
                case Wake():
                    for future in self.wakes.pop(effect.req_id, ()):
                        future.set(effect)
                case Invalidate():
                    engine.spawn(self.invalidate(effect.ino, effect.target), self.fuse_proc, engine.rng.choice((0, 1)))
                case Later():
                    engine.at(1, self.tick, proc=self.fuse_proc)

    def on_lock(self, link: Link, epoch: int, message: tuple[Any, ...]) -> None:
        """A lock message of the home."""
        if link is not self.link or (epoch != self.epoch and self.rules.epoch):
            return
        now = self.world.engine.now
        match message:
            case ("grant", *fields):
                self.run(self.cache.on_grant(now, *fields))
            case ("deny", *fields):
                self.run(self.cache.on_deny(now, *fields))
            case ("bast", ino, *_) if bast_first(self, ino):
                self.world.engine.spawn(self.tell_first(message[1:]), self.fuse_proc)
            case ("bast", *fields):
                self.run(self.cache.on_bast(now, *fields))
            case (("wake" | "denied") as what, ino, wait_id):
                self.locks.on_record(record_of(what, ino, wait_id))

    def tell_first(self, bast: tuple[Any, ...]) -> Steps:
        """What was decided about file locks is told to the home before it takes the right to decide back."""
        yield from drive(self.locks.give_up(bast[0]))
        self.run(self.cache.on_bast(self.world.engine.now, *bast))

    def invalidate(self, ino: int, target: LockMode) -> Steps:
        """One pass: the kernel drops its copies, and what was written here is committed before the lock goes."""
        if is_resource(ino):
            yield from drive(self.locks.give_up(ino))
            if ino in self.cache._revokes and self.cache._revokes[ino].passing:
                self.run(self.cache.invalidated(self.world.engine.now, ino))
            return
        if not covers(target, PR):
            self.kernel.pop(ino, None)
            self.changes[ino] += 1
        if self.rules.commit_on_release and not covers(target, PW):
            if self.home_here and self.node.home is not None:
                mount = self.node.home.mount
                # Where that fails the mount is down, and with it all that was held.
                yield from (mount.fsync(ino) if ino != DIR else _wait(mount.force()))
            elif self.keeps(ino):
                yield from self.commit(ino)
        if not covers(target, PR):
            self.kernel.pop(ino, None)
            self.changes[ino] += 1
        if ino in self.cache._revokes and self.cache._revokes[ino].passing:
            self.run(self.cache.invalidated(self.world.engine.now, ino))

    def want(self, ino: int, mode: LockMode, flags: LockFlag = LockFlag.NONE, opens: Any = None) -> Future:
        future = Future()
        req_id, effects = self.cache.want(self.world.engine.now, ino, mode, flags, opens)
        self.wakes[req_id].append(future)
        self.run(effects)
        return future

    def pin(self, ino: int) -> tuple[int, int]:
        self.cache.pin(ino, data=True)
        pin = (ino, self.world.engine.serial())
        self.pins.add(pin)
        return pin

    def unpin(self, ino: int, number: int) -> None:
        if (ino, number) in self.pins:
            self.pins.discard((ino, number))
            self.run(self.cache.unpin(self.world.engine.now, ino, data=True))

    # -- shipped operations ------------------------------------------------------------------------------------

    def ship(self, number: int, op: tuple[Any, ...]) -> Future:
        self.seq += 1
        future = Future()
        self.pending[self.seq] = (future, number, op)
        self.transmit(self.seq)
        return future

    def transmit(self, seq: int) -> None:
        _, number, op = self.pending[seq]
        link, home = self.link, self.world.home_at(self.link)
        if link is None or home is None or not (self.served or op[0] in ("replay", "fsync")):
            return
        request = (self.serial, seq, min(self.pending) - 1, number, op)
        self.world.net.send(
            link, self.number, "op", home.node.daemon, home.on_op, link, self.node.slot, self.epoch, request
        )

    def on_reply(self, link: Link, epoch: int, seq: int, answer: Any) -> None:
        if link is not self.link or epoch != self.epoch or seq not in self.pending:
            return
        future, _, _ = self.pending.pop(seq)
        reply, grants = answer
        for ino, mode, grant in grants:
            self.run(self.cache.adopt(self.world.engine.now, ino, LockMode(mode), grant))
        future.set((reply, grants))

    def keep(self, ino: int, index: int, op: int) -> None:
        """The home answered a write that is not durable yet."""
        piece = (index * VALUE, op.to_bytes(VALUE, "little"))
        self.unstable.answered(self.unstable.sent(self.world.engine.now, Fid(ino, 1), 0, [piece]), VALUE)

    def keeps(self, ino: int) -> bool:
        return self.unstable.holds(Fid(ino, 1))

    def kept(self) -> list[tuple[int, int, int]]:
        """Return what is to be sent again: inode, cell, operation."""
        pieces = [
            (fid.ino, *piece) for fid in self.unstable.files() for e in self.unstable.entries(fid) for piece in e.pieces
        ]
        return [(ino, offset // VALUE, int.from_bytes(data, "little")) for ino, offset, data in pieces]

    def commit(self, ino: int) -> Steps:
        """Have the home commit what was answered of a file, and keep it no longer."""
        ticket = self.unstable.ticket(Fid(ino, 1))
        promised, losses = self.world.ledger.owned(self, ino), self.losses
        yield self.ship(0, ("fsync", ino))
        if losses != self.losses:
            promised = {}  # EIO: the lower mount of this node went down meanwhile, with what was written there
        self.unstable.committed(Fid(ino, 1), ticket)
        return promised


def _wait(future: Future) -> Steps:
    return (yield future)
