"""The FUSE layer of one node in the failover simulator, and the applications on it: real LockCache and ClientLease.

It outlives its daemon. Data that the home has not committed is kept under EX or PW, and goes to the next home before
anything else. What it asked for and got no answer to is asked again when the home serves.
"""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from failover_disk import CELLS
from failover_engine import Link, Steps
from failover_home import DIR, NAMES, before_of, changes_of, entry, registers_of, reply_of
from simcheck import Broken
from simnode import Future

from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode, covers
from mxfsd.core.epochs import first_seq
from mxfsd.core.lockcache import LockCache
from mxfsd.core.lockeffects import CacheEffect, Invalidate, Later, SendCancel, SendRelease, SendRequest, Wake
from mxfsd.core.membership import ClientLease

if TYPE_CHECKING:
    from failover_node import Node

NL, CR, CW, PR, PW, EX = LockMode
MARGIN_MS = 40


class Fuse:
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
        self.kept: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.order: list[tuple[int, int, int]] = []
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
            for ino, index, op in list(self.order):
                answered = self.ship(0, ("replay", ino, index, op))
                while not answered.done:
                    yield 1
                    if link is not self.link or link.broken:
                        return
        for ino in [ino for ino, kept in self.kept.items() if kept]:
            # Without the lock nothing protects the data once the home serves; and a home keeps nothing.
            if here or not covers(self.cache.data_mode(ino), PW):
                self.world.engine.spawn(self.commit(ino), self.fuse_proc)
        while any(kept and (here or not covers(self.cache.data_mode(ino), PW)) for ino, kept in self.kept.items()):
            yield 3
            if link is not self.link or link.broken:
                return
        if link is not self.link:
            return
        self.replayed = epoch
        held = list(self.cache.held())
        for ino, mode, _, opens in held:
            self.send("reclaim", ino, mode, opens)
        for ino in [ino for ino, count in self.counts.items() if count]:
            self.send("reclaim", ino, NL, self.opens_of(ino))
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
            case ("bast", *fields):
                self.run(self.cache.on_bast(now, *fields))

    def invalidate(self, ino: int, target: LockMode) -> Steps:
        """One pass: the kernel drops its copies, and what was written here is committed before the lock goes."""
        if not covers(target, PR):
            self.kernel.pop(ino, None)
            self.changes[ino] += 1
        if self.rules.commit_on_release and not covers(target, PW):
            if self.home_here and self.node.home is not None:
                mount = self.node.home.mount
                # Where that fails the mount is down, and with it all that was held.
                yield from (mount.fsync(ino) if ino != DIR else _wait(mount.force()))
            elif self.kept.get(ino):
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
        opens = frozenset(ino for ino, count in self.counts.items() if count)
        request = (self.serial, seq, min(self.pending) - 1, number, op, opens)
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
        self.kept[ino].append((index, op))
        self.order.append((ino, index, op))

    def commit(self, ino: int) -> Steps:
        """Have the home commit what was answered of a file, and keep it no longer."""
        covered = list(self.kept[ino])
        promised, losses = self.world.ledger.owned(self, ino), self.losses
        yield self.ship(0, ("fsync", ino))
        if losses != self.losses:
            promised = {}  # EIO: the lower mount of this node went down meanwhile, with what was written there
        self.kept[ino] = [piece for piece in self.kept[ino] if piece not in covered]
        gone = {(ino, *piece) for piece in covered}
        self.order = [piece for piece in self.order if piece not in gone]
        return promised

    # -- applications ------------------------------------------------------------------------------------------

    def application(self, thread: int) -> Steps:
        """One thread that does things at random until the world has had enough."""
        world, rng = self.world, self.world.engine.rng
        files: list[int] = []
        acts = (self.stat, self.create, self.unlink, self.rename, self.open_file)
        on_file = (self.read, self.read, self.write, self.write, self.append, self.truncate, self.fsync, self.close)
        while world.engine.now < world.busy_ms:
            yield rng.choice((5, 20, 60, 150))
            if files and rng.random() < 0.7:
                act = rng.choice(on_file)
                self.busy[thread] = act.__name__
                yield from act(files, rng.choice(files))
            elif len(files) < 3 or rng.random() < 0.5:
                named = rng.choices(acts, (3, 2, 1, 1, 4))[0]
                self.busy[thread] = named.__name__
                yield from named(files, rng.choice(NAMES))
            self.busy.pop(thread, None)
        for ino in list(files):
            self.busy[thread] = "last read"
            yield from self.read(files, ino)
            yield from self.close(files, ino)
        self.busy[thread] = "last stat"
        yield from self.stat(files, NAMES[0])
        self.busy.pop(thread, None)

    def cached(self, ino: int) -> bool:
        """Whether the kernel has a copy that may be shown; not while a change of ours is under way."""
        return not self.home_here and ino in self.kernel and not self.changing[ino] and covers(self.cache.mode(ino), PR)

    def names(self) -> Steps:
        """Return {name: (inode, operation)} of the directory, from the cache where that is allowed."""
        while True:
            if self.trusts() and self.cached(DIR):
                return self.kernel[DIR]
            if self.home_here:
                while self.home_here and not covers(self.cache.mode(DIR), PR):
                    yield self.want(DIR, PR)
                home = self.node.home
                if not self.home_here or home is None or not home.may_act():
                    yield 10
                    continue
                return {name: entry(home.mount, name) for name in NAMES}
            change = self.changes[DIR]
            reply, grants = yield self.ship(0, ("lookup",))
            found = {name: (ino, op) for name, ino, op in reply}
            fresh = any(grant == self.cache.seq(DIR) for ino, _, grant in grants if ino == DIR)
            if fresh and covers(self.cache.mode(DIR), PR) and change == self.changes[DIR]:
                self.kernel[DIR] = found
            return found

    def stat(self, files: list[int], name: str) -> Steps:
        floors = self.world.ledger.begin([("n", each) for each in NAMES])
        found = yield from self.names()
        self.world.ledger.saw(self, floors, {("n", each): op for each, (_, op) in found.items()})

    def change(self, *op: Any) -> Steps:
        """Run an operation that changes something, here or at the home. Return (number, reply, durable)."""
        number = self.world.new_op()
        yield from ()
        targets = (DIR,) if op[0] in ("create", "unlink", "rename") else (op[1],)
        while self.home_here:
            home = self.node.home
            if home is None or not home.may_act():
                yield 10
                continue
            if not all(covers(self.cache.mode(ino), EX) for ino in targets):
                yield self.want(next(ino for ino in targets if not covers(self.cache.mode(ino), EX)), EX)
                continue
            victim = entry(home.mount, op[-1 if op[0] == "rename" else 1])[0] if DIR in targets else 0
            if victim and not covers(self.cache.mode(victim), EX) and op[0] != "create":
                yield self.want(victim, EX)
                continue
            return number, self.here(home, number, op), False
        for ino in targets:
            self.changes[ino] += 1
            self.changing[ino] += 1
        reply, _ = yield self.ship(number, op)
        for ino in targets:
            self.changes[ino] += 1
            self.changing[ino] -= 1
            self.kernel.pop(ino, None)
        return number, reply, True

    def here(self, home: Any, number: int, op: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run an operation on the lower mount of this node."""
        mount, ledger = home.mount, self.world.ledger
        self.world.engine.note(f"n{self.number}", f"runs {op} here ({number})")
        before = before_of(mount, op)
        changes = changes_of(mount, op, number, home.is_open)
        if changes:
            mount.txn(*changes, (("did", number), True))
            ledger.executed(number, registers_of(changes), self.serial)
        if op[0] == "append" and before[0] and before[1] < CELLS:
            mount.write(op[1], before[1], number, self.serial)
            ledger.executed(number, [(op[1], before[1])], self.serial)
        return reply_of(mount, op, before)

    def create(self, files: list[int], name: str) -> Steps:
        yield from self.change_name("create", name, self.world.new_ino())

    def unlink(self, files: list[int], name: str) -> Steps:
        yield from self.change_name("unlink", name)

    def rename(self, files: list[int], name: str) -> Steps:
        other = self.world.engine.rng.choice([each for each in NAMES if each != name])
        yield from self.change_name("rename", name, other)

    def change_name(self, *op: Any) -> Steps:
        ledger = self.world.ledger
        register = ("n", op[1])
        floors = ledger.begin([register])
        number, reply, durable = yield from self.change(*op)
        if reply[0] == "done":
            registers = [register] + ([("n", op[2])] if op[0] == "rename" else [])
            ledger.done(self, number, registers, durable, once=True)
        else:
            ledger.saw(self, floors, {register: reply[2]})

    def open_file(self, files: list[int], name: str) -> Steps:
        found = yield from self.names()
        ino = found[name][0]
        if not ino:
            return
        self.counts[ino] += 1
        if not self.home_here and not (self.trusts() and self.cache.may_open(ino, False)):
            yield self.want(ino, PR, LockFlag.OPEN, self.opens_of(ino))
        if self.gone(ino, (yield from self.data(ino))):
            yield from self.close(files, ino)
        else:
            files.append(ino)

    def close(self, files: list[int], ino: int) -> Steps:
        if ino in files:
            files.remove(ino)
        self.counts[ino] -= 1
        self.send("opens", ino, self.opens_of(ino))
        yield 0

    def gone(self, ino: int, reply: tuple[Any, ...]) -> bool:
        return reply[0] == "gone"

    def must_exist(self, ino: int, reply: tuple[Any, ...]) -> None:
        if reply[0] == "gone" and ino not in self.excused:
            raise Broken(f"node {self.number} has inode {ino} open, and it is gone")

    def data(self, ino: int) -> Steps:
        """Return ("data", operations by cell) or ("gone",)."""
        while True:
            if self.trusts() and self.cached(ino):
                return self.kernel[ino]
            if self.home_here:
                while self.home_here and not covers(self.cache.mode(ino), PR):
                    yield self.want(ino, PR)
                home = self.node.home
                if not self.home_here or home is None or not home.may_act():
                    yield 10
                    continue
                mount = home.mount
                if not mount.exists(ino):
                    return ("gone",)
                return ("data", *(mount.cell(ino, index) for index in range(CELLS)))
            change = self.changes[ino]
            reply, grants = yield self.ship(0, ("read", ino))
            fresh = any(grant == self.cache.seq(ino) for at, _, grant in grants if at == ino)
            if fresh and covers(self.cache.mode(ino), PR) and change == self.changes[ino]:
                self.kernel[ino] = reply
            return reply

    def read(self, files: list[int], ino: int) -> Steps:
        floors = self.world.ledger.begin([(ino, index) for index in range(CELLS)])
        reply = yield from self.data(ino)
        self.must_exist(ino, reply)
        if reply[0] == "data":
            self.world.ledger.saw(self, floors, {(ino, index): op for index, op in enumerate(reply[1:])})

    def exclusive(self, ino: int, work: Steps) -> Steps:
        """Run this with the inode locked, as the kernel does for whatever changes a file."""
        while ino in self.writing:
            yield 2
        self.writing.add(ino)
        yield from work
        self.writing.discard(ino)

    def write(self, files: list[int], ino: int) -> Steps:
        yield from self.exclusive(ino, self.write_cell(ino))

    def append(self, files: list[int], ino: int) -> Steps:
        yield from self.exclusive(ino, self.append_cell(ino))

    def truncate(self, files: list[int], ino: int) -> Steps:
        yield from self.exclusive(ino, self.cut(ino))

    def write_cell(self, ino: int) -> Steps:
        """Write a cell: under EX, to be kept until it is committed, or without, durable when it is answered."""
        rng, ledger = self.world.engine.rng, self.world.ledger
        index, number = rng.randrange(CELLS), self.world.new_op()
        cached = rng.random() < 0.7
        while self.home_here or (cached and not covers(self.cache.data_mode(ino), PW)):
            home = self.node.home
            if self.home_here and (home is None or not home.may_act()):
                yield 10
            elif not covers(self.cache.mode(ino), EX):
                yield self.want(ino, EX)
            elif self.home_here and home is not None:
                if home.mount.exists(ino):
                    home.mount.write(ino, index, number, self.serial)
                    ledger.executed(number, [(ino, index)], self.serial)
                    ledger.done(self, number, [(ino, index)], False)
                return
        pin = self.pin(ino) if covers(self.cache.data_mode(ino), PW) else None
        if pin is None:
            # It will not be kept, and what is would undo it.
            yield from self.before_setattr(ino)
        self.changes[ino] += 1
        self.changing[ino] += 1
        (reply, *_), _ = yield self.ship(number, ("write", ino, index, pin is None))
        self.changes[ino] += 1
        self.changing[ino] -= 1
        self.kernel.pop(ino, None)
        self.must_exist(ino, (reply,))
        if reply != "gone":
            if reply == "unstable":
                self.keep(ino, index, number)
            ledger.done(self, number, [(ino, index)], reply == "stable")
            if reply == "unstable" and (self.home_here or not covers(self.cache.data_mode(ino), PW)):
                yield from self.commit(ino)
        if pin is not None:
            self.unpin(*pin)

    def append_cell(self, ino: int) -> Steps:
        yield from self.before_setattr(ino)
        number, reply, durable = yield from self.change("append", ino)
        self.must_exist(ino, reply)
        if reply[0] == "done":
            self.world.ledger.done(self, number, [(ino, reply[1])], durable, once=True)

    def cut(self, ino: int) -> Steps:
        yield from self.before_setattr(ino)
        size = self.world.engine.rng.randrange(CELLS)
        number, reply, durable = yield from self.change("truncate", ino, size)
        self.must_exist(ino, reply)
        if reply[0] == "done":
            registers = [(ino, index) for index in range(size, CELLS)]
            self.world.ledger.done(self, number, registers, durable, once=True)

    def before_setattr(self, ino: int) -> Steps:
        """What is kept would undo the change when it is sent again: it is committed before."""
        if self.kept.get(ino) and self.rules.commit_before_change and not self.home_here:
            yield from self.commit(ino)

    def fsync(self, files: list[int], ino: int) -> Steps:
        ledger = self.world.ledger
        if self.home_here and self.node.home is not None:
            promised = ledger.owned(self, ino)
            home = self.node.home
            if (yield from home.mount.fsync(ino)):
                ledger.synced(self, promised)
        else:
            promised = yield from self.commit(ino)
            ledger.synced(self, promised)


def _wait(future: Future) -> Steps:
    return (yield future)
