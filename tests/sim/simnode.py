"""One simulated node: the real LockCache, and just enough of a FUSE layer and a kernel around it.

The kernel keeps one value an inode (its version) and serves it without asking anybody, until it is invalidated or its
timeout, which is shorter than the lease, has passed.
"""

from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mxfs_proto.lockflags import LockFlag
from mxfs_proto.modes import LockMode, covers
from mxfsd.core.lockcache import LockCache
from mxfsd.core.lockeffects import CacheEffect, Invalidate, Later, SendCancel, SendRelease, SendRequest, Wake
from mxfsd.core.membership import ClientLease

if TYPE_CHECKING:
    from simulator import World

NL, CR, CW, PR, PW, EX = LockMode
Steps = Generator[Any, Any, Any]
RETRY_MS = 60


class Future:
    """A value that one simulated task waits for."""

    __slots__ = ("done", "task", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.task: Any = None

    def set(self, value: Any) -> None:
        if not self.done:
            self.done = True
            self.value = value
            if self.task is not None:
                self.task()


@dataclass(eq=False)
class Descriptor:
    writable: bool
    cached: bool


@dataclass(eq=False)
class Pin:
    ino: int


class Node:
    """A node in one incarnation after the other."""

    def __init__(self, world: "World", number: int) -> None:
        self.world = world
        self.number = number
        self.incarnation = 0
        self.link = 0
        self.alive = False
        self.paused_until = 0
        self.busy: dict[int, str] = {}
        self.start()

    def start(self) -> None:
        """Begin a new incarnation with nothing cached."""
        world = self.world
        self.alive = True
        self.incarnation += 1
        self.link += 1
        self.session = self.number << 32 | self.incarnation
        self.epoch = world.home.epoch if world.home else 1
        self.is_home = False
        self.gate = False
        self.joined = False
        self.linked = True
        self.cache = world.mutants.cache(
            False,
            opens_of=self.opens_of,
            has_cached_writer=lambda ino: any(d.cached and d.writable for d in self.descriptors[ino]),
            min_hold_ms=world.timeouts.min_hold_ms,
            lock_wait_ms=world.timeouts.lock_wait_ms,
        )
        assert isinstance(self.cache, LockCache)
        self.cache.new_epoch(world.first_seq(self.epoch))
        self.lease = ClientLease(world.timeouts.lease_ms, 10)
        self.kernel: dict[int, int] = {}
        self.changes: dict[int, int] = defaultdict(int)
        self.pins: set[Pin] = set()
        self.changing: dict[int, int] = defaultdict(int)
        self.counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        self.descriptors: dict[int, list[Descriptor]] = defaultdict(list)
        self.wakes: dict[int, list[Future]] = defaultdict(list)
        self.op_seq = 0
        self.outstanding: dict[int, tuple[Future, tuple[Any, ...]]] = {}
        self.busy.clear()

    def opens_of(self, ino: int) -> tuple[int, int]:
        readers, writers = self.counts[ino]
        return readers, writers

    def trusts(self) -> bool:
        """Whether this node may serve from what it caches."""
        return self.alive and (self.is_home or self.world.now < self.lease.until_ms())

    # -- the lock channel --------------------------------------------------------------------------------------

    def run(self, effects: list[CacheEffect]) -> None:
        world = self.world
        for effect in effects:
            world.note(self.number, effect)
            match effect:
                case SendRequest():
                    fields = (effect.req_id, effect.ino, effect.mode, effect.flags, effect.opens)
                    self.send("request", *fields)
                case SendRelease():
                    self.send("release", effect.ino, effect.seq, effect.mode, effect.opens)
                case SendCancel():
                    self.send("cancel", effect.req_id)
                case Wake():
                    for future in self.wakes.pop(effect.req_id, ()):
                        future.set(effect)
                case Invalidate():
                    world.later(world.rng.choice((0, 0, 1, 4)), self.invalidate, effect.ino, effect.target, node=self)
                case Later():
                    world.at(effect.at_ms, self.tick, node=self)

    def send(self, *message: Any) -> None:
        if self.joined or self.is_home:
            self.world.to_home(self, self.incarnation, self.epoch, message)

    def on_message(self, epoch: int, link: int, message: tuple[Any, ...]) -> None:
        """A message of the home came over the lock channel."""
        if epoch != self.epoch or link != self.link:
            return
        now = self.world.now
        self.world.note(self.number, message)
        match message:
            case ("grant", *fields):
                self.run(self.cache.on_grant(now, *fields))
            case ("deny", *fields):
                self.run(self.cache.on_deny(now, *fields))
            case ("bast", *fields):
                self.run(self.cache.on_bast(now, *fields))
            case ("implicit", inos):
                self.cache.set_implicit(True, inos)

    def invalidate(self, ino: int, target: LockMode) -> None:
        """One pass: the kernel drops its copy, unless it may keep reading."""
        if not covers(target, PR):
            self.kernel.pop(ino, None)
        self.run(self.cache.invalidated(self.world.now, ino))

    def tick(self) -> None:
        self.run(self.cache.tick(self.world.now))

    def resync(self) -> None:
        """Lock messages were lost between daemon and FUSE layer: ask again, and report the counts again."""
        self.run(self.cache.resend(self.world.now))
        for ino in self.world.inos:
            self.send("opens", ino, self.opens_of(ino))

    def drop_all(self) -> None:
        """The lease ends, or the home moves: nothing may be served from caches."""
        self.cache.drop_all()
        self.kernel.clear()
        for pin in list(self.pins):
            self.unpin_data(pin)
        for ino in self.world.inos:
            self.changes[ino] += 1

    def pin_data(self, ino: int) -> "Pin":
        """Note that an upcall is answered under the lock; drop_all() ends that too."""
        self.cache.pin(ino, data=True)
        pin = Pin(ino)
        self.pins.add(pin)
        return pin

    def unpin_data(self, pin: "Pin") -> None:
        if pin in self.pins:
            self.pins.discard(pin)
            self.run(self.cache.unpin(self.world.now, pin.ino, data=True))

    def new_home(self, epoch: int, first_seq: int) -> None:
        """Another home serves: tell it what is held and what is open, then ask again."""
        self.epoch = epoch
        self.cache.new_epoch(first_seq)
        self.reclaim()

    def reclaim(self) -> None:
        """Name all that is held and open, then ask again."""
        if not self.trusts():
            self.drop_all()
        for ino, mode, _, opens in list(self.cache.held()):
            self.send("reclaim", ino, mode, opens)
        for ino in self.world.inos:
            self.send("reclaim", ino, NL, self.opens_of(ino))
        self.send("reclaimed")
        self.run(self.cache.resend(self.world.now))

    # -- shipped operations ------------------------------------------------------------------------------------

    def ship(self, kind: str, *args: Any) -> Future:
        self.op_seq += 1
        future = Future()
        self.outstanding[self.op_seq] = (future, (kind, *args))
        self.transmit(self.op_seq, self.incarnation)
        return future

    def transmit(self, seq: int, incarnation: int) -> None:
        """Send an operation, and again until its reply comes."""
        if seq in self.outstanding and incarnation == self.incarnation:
            ack = min(self.outstanding) - 1
            request = (self.session, seq, ack, self.outstanding[seq][1])
            if self.joined:
                self.world.op_to_home(self, self.epoch, request)
            self.world.later(RETRY_MS, self.transmit, seq, incarnation, node=self)

    def on_reply(self, incarnation: int, seq: int, reply: Any) -> None:
        if incarnation == self.incarnation and seq in self.outstanding:
            future, _ = self.outstanding.pop(seq)
            for ino, mode, grant in reply[1]:
                self.run(self.cache.adopt(self.world.now, ino, LockMode(mode), grant))
            future.set(reply)

    # -- what applications do ----------------------------------------------------------------------------------

    def want(self, ino: int, mode: LockMode, flags: LockFlag = LockFlag.NONE, opens: Any = None) -> Future:
        future = Future()
        req_id, effects = self.cache.want(self.world.now, ino, mode, flags, opens)
        self.wakes[req_id].append(future)
        self.run(effects)
        return future

    def application(self, name: int) -> Steps:
        """One thread that does things at random until the world has had enough."""
        world, rng = self.world, self.world.rng
        while world.now < world.busy_ms:
            yield rng.choice((0, 1, 3, 10))
            ino = rng.choice(world.inos)
            act, label = (
                rng.choices(
                    (self.read, self.write, self.write_two, self.open, self.close, self.forget),
                    (8, 4, 1, 3, 3, 1),
                )[0],
                f"{name}",
            )
            while self.gate:
                yield 2
            self.busy[name] = f"{act.__name__} {ino} {label}"
            yield from act(ino)
            del self.busy[name]
        for ino in world.inos:
            while self.descriptors[ino]:
                yield from self.close(ino)

    def read(self, ino: int) -> Steps:
        check = self.world.check
        floors = check.begin((ino,), changing=self.changing[ino] > 0)
        if self.trusts() and ino in self.kernel:
            version = self.kernel[ino]
        elif self.is_home:
            version = yield from self.read_here(ino)
        elif any(d.cached for d in self.descriptors[ino]) and self.world.rng.random() < 0.5:
            version = yield from self.read_upcall(ino)
        else:
            version = yield from self.read_shipped(ino)
        check.reads += 1
        check.end(f"node {self.number}", floors, {ino: version})

    def read_here(self, ino: int) -> Steps:
        while not covers(self.cache.mode(ino), PR):
            if not self.is_home:
                return (yield from self.read_shipped(ino))
            yield self.want(ino, PR)
        self.cache.pin(ino)
        yield self.world.rng.choice((0, 1))
        version = self.kernel[ino] = self.world.store[ino]
        self.run(self.cache.unpin(self.world.now, ino))
        return version

    def read_shipped(self, ino: int) -> Steps:
        """As getattr: the lock comes with the reply; it counts only if nothing changed here meanwhile."""
        change = self.changes[ino]
        kind = self.world.rng.choice(("getattr", "getattr_lock", "read"))
        (version,), grants = yield self.ship(kind, ino)
        held = self.cache.seq(ino)
        fresh = any(grant == held for _, _, grant in grants) and covers(self.cache.mode(ino), PR)
        if fresh and change == self.changes[ino]:
            self.kernel[ino] = version
        return version

    def read_upcall(self, ino: int) -> Steps:
        """A READ of a cached descriptor: the kernel keeps what it gets, so a lock must be held."""
        while not covers(self.cache.data_mode(ino), PR):
            if self.is_home:
                return (yield from self.read_here(ino))
            yield self.want(ino, PR)
        change = self.changes[ino]
        pin = self.pin_data(ino)
        (version,), _ = yield self.ship("read", ino)
        if change == self.changes[ino]:
            self.kernel[ino] = version
        self.unpin_data(pin)
        return version

    def write(self, ino: int) -> Steps:
        check = self.world.check
        floors = check.begin((ino,))
        cached = any(d.cached and d.writable for d in self.descriptors[ino])
        if self.is_home:
            version = yield from self.write_here(ino, PW if cached else EX)
        else:
            if cached:
                while not covers(self.cache.data_mode(ino), PW) and not self.is_home:
                    yield self.want(ino, PW)
            version = (yield from self.write_shipped((ino,), "write" if cached else None))[0]
        check.writes += 1
        check.end(f"node {self.number}", floors, {ino: version}, wrote=True)

    def write_here(self, ino: int, mode: LockMode) -> Steps:
        while not covers(self.cache.mode(ino), mode):
            if not self.is_home:
                return (yield from self.write_shipped((ino,), None))[0]
            yield self.want(ino, mode)
        self.cache.pin(ino)
        yield self.world.rng.choice((0, 1))
        self.changes[ino] += 1
        self.kernel[ino] = self.world.change(ino)
        version = self.kernel[ino]
        self.run(self.cache.unpin(self.world.now, ino))
        return version

    def write_shipped(self, inos: tuple[int, ...], kind: str | None) -> Steps:
        """The reply of a change makes this node's own copies old: they go before the application hears of it."""
        kind = kind or self.world.rng.choice(("setattr", "write"))
        pinned = kind == "write" and covers(self.cache.data_mode(inos[0]), PW)
        pin = self.pin_data(inos[0]) if pinned else None
        for ino in inos:
            self.changes[ino] += 1
            self.changing[ino] += 1
        versions, _ = yield self.ship(kind, *inos)
        for ino in inos:
            self.changes[ino] += 1
            self.changing[ino] -= 1
            self.kernel.pop(ino, None)
        if pin is not None:
            self.unpin_data(pin)
        return versions

    def write_two(self, ino: int) -> Steps:
        """As rename: one operation on two inodes, on the home under its own locks taken in order."""
        check = self.world.check
        inos = tuple(sorted({ino, self.world.rng.choice(self.world.inos)}))
        floors = check.begin(inos)
        if self.is_home:
            versions = []
            for each in inos:
                versions.append((yield from self.write_here(each, EX)))
        else:
            versions = yield from self.write_shipped(inos, "setattr")
        check.end(f"node {self.number}", floors, dict(zip(inos, versions, strict=True)), wrote=True)

    def open(self, ino: int) -> Steps:
        writable = self.world.rng.random() < 0.5
        if len(self.descriptors[ino]) > 3:
            return
        self.counts[ino][writable] += 1
        if self.cache.may_open(ino, writable) and self.trusts():
            cached = True
        else:
            wake = yield self.want(ino, EX if writable else PR, LockFlag.OPEN, self.opens_of(ino))
            cached = covers(wake.mode, EX if writable else PR)
        self.world.check.opens += 1
        self.descriptors[ino].append(Descriptor(writable, cached))

    def close(self, ino: int) -> Steps:
        if not self.descriptors[ino]:
            return
        descriptor = self.descriptors[ino].pop(self.world.rng.randrange(len(self.descriptors[ino])))
        self.counts[ino][descriptor.writable] -= 1
        hidden = self.cache.mode(ino) == EX or (not descriptor.writable and self.cache.mode(ino) == PR)
        if not hidden:
            self.send("opens", ino, self.opens_of(ino))
        yield 0

    def forget(self, ino: int) -> Steps:
        """The kernel drops an inode that nobody uses."""
        unused = not self.descriptors[ino] and not any(self.counts[ino]) and not self.is_home
        if unused and all(str(ino) not in what for what in self.busy.values() if not what.startswith("forget")):
            self.kernel.pop(ino, None)
            self.changes[ino] += 1
            self.run(self.cache.forget(self.world.now, ino))
        yield 0
