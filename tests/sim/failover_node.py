"""One machine of the failover simulator: heartbeat process, daemon, FUSE layer; real Keeper, Watch and claims."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from failover_client import Fuse
from failover_disk import Host, Mount
from failover_engine import Link, Proc, Steps
from failover_home import Home
from failover_locks import application as locker
from failover_takeover import Successor
from simnode import Future

from mxfs_proto.ondisk import SlotRecord, SlotState
from mxfsd.core.keeper import Keeper, LeaseLost, SlotLost, Stalled
from mxfsd.core.lease import (
    Claim,
    HeldSlot,
    Joiner,
    Read,
    Refused,
    Sleep,
    SlotClaim,
    SlotReclaim,
    WriteLease,
    WriteSlot,
)
from mxfsd.core.takeover import Takeover
from mxfsd.core.watch import Snapshot, Watch

if TYPE_CHECKING:
    from failover import World


class Node(Successor):
    """A machine."""

    def __init__(self, world: "World", number: int) -> None:
        self.world = world
        self.rules = world.rules
        self.number = number
        self.uuid = bytes([number] * 16)
        self.host = Host(number)
        self.heart, self.daemon = Proc(f"heartbeat {number}"), Proc(f"daemon {number}")
        self.fuse_proc, self.kernel = Proc(f"fuse {number}"), Proc(f"kernel {number}")
        self.drift = world.engine.rng.randint(-300, 300)
        self.offset = world.engine.rng.randint(0, 100_000)
        self.incarnation = 0
        self.continues = 0
        self.slot = number
        self.keeper: Keeper | None = None
        self.watch = Watch(world.timeouts.lease_ms)
        self.snap: Snapshot | None = None
        self.takeover: Takeover = self.rules.takeover()
        self.home: Home | None = None
        self.mount: Mount | None = None
        self.link: Link | None = None
        self.heard_ms = 0
        self.fuse: Fuse | None = None
        self.evicted: set[tuple[int, int]] = set()
        self.known: dict[int, SlotRecord] = {}
        self.target_generation = 0

    def procs(self) -> tuple[Proc, ...]:
        return self.heart, self.daemon, self.fuse_proc, self.kernel

    def clock(self) -> int:
        """Return this machine's monotonic milliseconds."""
        now = self.world.engine.now
        return self.offset + now + now * self.drift // 1_000_000

    def note(self, what: Any) -> None:
        self.world.engine.note(f"n{self.number}", what)

    def nonce(self) -> int:
        return self.world.engine.rng.getrandbits(64)

    def acts_as_home(self) -> bool:
        return self.home is not None and self.home.serving and self.home.may_act() and self.daemon.alive

    def lease_valid(self) -> bool:
        until = self.keeper.lease_until_ms if self.keeper is not None else None
        return until is not None and self.clock() <= until

    # -- claims ------------------------------------------------------------------------------------------------

    def drive(self, claim: Claim, proc: Proc, done: Callable[[Any], None]) -> None:
        """Run a claim to its end."""
        disk = self.world.disk

        def go(action: Any) -> None:
            match action:
                case Read():
                    disk.read(self.host, proc, self.clock, read)
                case WriteSlot() | WriteLease():
                    disk.put(self.host, proc, action.record, lambda ok: written(ok, action))
                case Sleep():
                    self.world.engine.at(action.ms, lambda: go(claim.on_slept(self.clock())), proc=proc)
                case _:
                    done(action)

        def read(snap: Snapshot | None) -> None:
            if snap is None and disk.refuses(self.host.key):
                done(Refused("the reservation shuts this node out", 0))
            elif snap is None:
                disk.read(self.host, proc, self.clock, read)
            else:
                go(claim.on_read(snap))

        def written(ok: bool, action: Any) -> None:
            if ok:
                go(claim.on_written(self.clock()))
            elif disk.refuses(self.host.key):
                done(Refused("the reservation shuts this node out", 0))
            else:
                disk.put(self.host, proc, action.record, lambda again: written(again, action))

        go(claim.begin())

    def join(self) -> None:
        """The daemon starts: registers, then claims a slot."""
        world = self.world
        if self.host.away:
            world.engine.at(200, self.join, proc=self.daemon)
            return
        self.takeover = self.rules.takeover()
        if world.disk.pr:
            world.disk.register(self.host, self.nonce())
        joiner = Joiner(self.uuid, f"n{self.number}", self.host.key, last_incarnation=self.incarnation)

        def done(action: Any) -> None:
            if isinstance(action, Refused):
                self.note(action)
                world.engine.at(700, self.join, proc=self.daemon)
                return
            self.holds(action)

        self.drive(SlotClaim(joiner, world.timeouts, self.nonce), self.daemon, done)

    def holds(self, held: HeldSlot) -> None:
        """A slot is ours: the heartbeat process starts."""
        self.slot, self.incarnation = held.record.slot, held.record.incarnation
        self.note(f"slot {self.slot}, incarnation {self.incarnation}, goes on from {self.continues}")
        keeper = self.keeper = self.rules.keeper(held, self.world.timeouts)
        assert isinstance(keeper, Keeper)
        keeper.set_state(SlotState.ACTIVE)
        self.watch = Watch(self.world.timeouts.lease_ms)
        self.snap = None
        self.heart.start()
        self.heart.paused_until = self.daemon.paused_until
        self.beat()
        self.tick()
        if self.fuse is None:
            self.remount()

    def remount(self) -> None:
        """A new FUSE layer, and applications on it."""
        self.fuse_proc.start()
        self.fuse_proc.paused_until = self.daemon.paused_until
        self.fuse = Fuse(self, self.world.new_session())
        for thread in range(self.world.threads):
            self.world.engine.spawn(self.fuse.application(thread), self.fuse_proc)
        for owner in range(1, self.world.lockers + 1):
            self.world.engine.spawn(locker(self.fuse, owner), self.fuse_proc)

    # -- the heartbeat process ---------------------------------------------------------------------------------

    def beat(self) -> None:
        keeper = self.keeper
        assert keeper is not None
        if self.world.disk.pr and not self.host.away:
            self.look_at_keys()

        def read(snap: Snapshot | None) -> None:
            if keeper is not self.keeper:
                return
            if snap is None:
                self.world.engine.at(self.world.timeouts.heartbeat_ms // 4, self.beat, proc=self.heart)
                return
            self.watch.observe(snap)
            self.known |= {record.slot: record for record in snap.slots if record is not None}
            self.perform(keeper, keeper.on_read(snap), snap)

        self.world.disk.read(self.host, self.heart, self.clock, read)

    def look_at_keys(self) -> None:
        """A target that starts anew has no reservation: establish it again. A node that was preempted does not."""
        disk = self.world.disk
        if disk.generation < self.target_generation and self.host.key not in disk.keys:
            self.note("the target forgot its registrations")
            disk.register(self.host, self.host.key)
        self.target_generation = disk.generation

    def perform(self, keeper: Keeper, duties: list[Any], snap: Snapshot) -> None:
        """Carry out the duties of one beat in their order."""
        engine = self.world.engine
        if not duties:
            self.snap = snap
            self.guard_lease()
            engine.at(0, self.on_beat, snap, proc=self.daemon)
            engine.at(self.world.timeouts.heartbeat_ms, self.beat, proc=self.heart)
            return
        duty, rest = duties[0], duties[1:]
        match duty:
            case SlotLost():
                self.note(duty)
                self.self_fence("slot lost")
                self.put_out()
            case LeaseLost():
                self.note(duty)
                self.self_fence("lease lost")
                self.restart_daemon(own=True)
            case Stalled():
                self.note(duty)
                self.self_fence("stalled")
                self.reclaim(keeper, duty.late)
            case _:
                record = duty.record

                def written(ok: bool) -> None:
                    if keeper is not self.keeper:
                        return
                    if not ok:
                        engine.at(self.world.timeouts.heartbeat_ms // 4, self.beat, proc=self.heart)
                        return
                    more = keeper.on_written(duty, snap.began_ms, self.clock())
                    self.perform(keeper, ([more] if more else []) + rest, snap)

                self.world.disk.put(self.host, self.heart, record, written)

    def reclaim(self, keeper: Keeper, late: bool) -> None:
        def done(action: Any) -> None:
            if keeper is not self.keeper:
                return
            if isinstance(action, HeldSlot):
                keeper.resume(action)
                self.beat()
            else:
                self.put_out()

        self.drive(SlotReclaim(keeper.record, self.world.timeouts, self.nonce, late=late), self.heart, done)

    def guard_lease(self) -> None:
        """Look again shortly before the lease would end."""
        at = self.keeper.fence_at_ms if self.keeper is not None else None
        if at is not None:
            self.world.engine.at(at - self.clock(), self.check_lease, at, proc=self.heart)

    def check_lease(self, at: int) -> None:
        keeper = self.keeper
        if keeper is None or keeper.lease is None or keeper.fence_at_ms != at:
            return
        if keeper.overdue(self.clock()):
            self.self_fence("not renewed in time")
            keeper.let_go()
            self.restart_daemon(own=True)

    def self_fence(self, why: str) -> None:
        """GOINGDOWN without a log flush."""
        if self.mount is not None and not self.mount.down and self.rules.self_fence:
            self.mount.shut_down(why)
            self.local_loss()

    def lower_failed(self, mount: Mount) -> None:
        """The lower file system shut itself down: this daemon cannot be the home any more."""
        if self.mount is mount and self.home is not None and not self.home.over:
            self.restart_daemon(own=True)

    def local_loss(self) -> None:
        """What was written here and not synced is gone with the lower mount."""
        if self.fuse is not None:
            self.world.ledger.lost(self.fuse.serial)
            self.fuse.losses += 1
            self.fuse.excused |= {ino for ino, count in self.fuse.counts.items() if count}

    # -- ends of processes -------------------------------------------------------------------------------------

    def end_role(self) -> None:
        """The daemon is gone, with all that it held."""
        self.daemon.kill()
        if self.home is not None:
            self.home.over = True
            for link in self.home.links.values():
                self.world.net.lose(link)
            self.home = None
        self.drop_link()
        if self.fuse is not None:
            self.fuse.leave_home()

    def drop_link(self) -> None:
        if self.link is not None:
            self.world.net.lose(self.link)
            self.link = None
        if self.fuse is not None:
            self.fuse.connected(None)

    def crash_daemon(self) -> None:
        """The daemon dies; the heartbeat process sees to the rest."""
        if self.daemon.alive and self.keeper is not None:
            self.note("daemon crashes")
            self.restart_daemon(own=False)

    def restart_daemon(self, own: bool) -> None:
        """The daemon ends; the lower file system is shut down, the slot says so, the next daemon starts.

        *own*: the heartbeat process ended it, and shut the lower file system down before.
        """
        keeper = self.keeper
        if self.rules.failed_after_shutdown:
            self.world.engine.spawn(self._shut_and_restart(keeper, own), self.heart)
        else:
            self.world.engine.spawn(self._gasp(keeper), self.heart)
        self.continues = self.incarnation if self.fuse is not None else 0
        keep = self.mount
        self.end_role()
        self.mount = keep

    def _shut_and_restart(self, keeper: Keeper | None, own: bool) -> Steps:
        """GOINGDOWN with a log flush while the lease allows it, then without; then the last gasp."""
        mount, engine = self.mount, self.world.engine
        until = keeper.fence_at_ms if keeper is not None else None
        if keeper is not None:
            keeper.let_go()  # what its daemon does not hold any more is not renewed
        if mount is not None and not mount.down and not own and until is not None:
            flushed = Future()
            engine.spawn(self._flush(mount, flushed), self.kernel)
            while not flushed.done and not mount.down and self.clock() < until:
                yield 10
            if not flushed.done:
                self.local_loss()
        if mount is not None:
            mount.shut_down("its daemon ended")
            while not self.world.disk.idle_lower(self.host):
                yield 5
        self.mount = None
        yield from self._gasp(keeper)

    def _flush(self, mount: Mount, flushed: Future) -> Steps:
        for ino in {ino for ino, _ in mount.dirty}:
            yield mount.flush(ino)
        if (yield mount.force()):
            flushed.set(True)

    def _gasp(self, keeper: Keeper | None) -> Steps:
        """The last record of this claim, if the slot is ours for sure; then the next daemon."""
        if keeper is not None and self.clock() < keeper.slot_until_ms - self.world.timeouts.fence_margin_ms:
            state = SlotState.RESTARTING if self.fuse is not None else SlotState.FAILED
            written = Future()
            self.world.disk.put(self.host, self.heart, keeper.last(state), written.set)
            yield written
        self.keeper = None
        self.daemon.start()
        self.daemon.paused_until = self.heart.paused_until
        self.world.engine.at(self.world.engine.rng.choice((20, 200, 600)), self.join, proc=self.daemon)
        self.heart.kill()

    def put_out(self) -> None:
        """Somebody else has our slot: the mount is dead; it is mounted anew later."""
        self.note("is out")
        self.self_fence("put out")
        self.end_fuse()
        self.end_role()
        self.mount, self.keeper, self.continues = None, None, 0
        self.daemon.start()
        self.daemon.paused_until = self.heart.paused_until
        self.world.engine.at(300, self.join, proc=self.daemon)
        self.heart.kill()

    def end_fuse(self) -> None:
        if self.fuse is not None:
            self.world.ledger.lost(self.fuse.serial)
            self.world.claims.gone(self.fuse.serial)
            self.fuse = None
            self.fuse_proc.kill()

    def refused(self, incarnation: int) -> None:
        """A home says that this incarnation is out."""
        if incarnation == self.incarnation and self.keeper is not None:
            self.put_out()

    def crash_fuse(self) -> None:
        """The FUSE server dies; its daemon ends too, and the node mounts anew as another incarnation."""
        if self.fuse is not None and self.keeper is not None:
            self.note("FUSE server crashes")
            if self.mount is not None:
                self.local_loss()
            self.end_fuse()
            self.restart_daemon(own=False)

    def crash_heart(self) -> None:
        """The heartbeat process dies: the daemon does not live a moment longer."""
        if self.keeper is not None and self.heart.alive:
            self.note("heartbeat process crashes")
            self.self_fence("the heartbeat process died")
            keep, self.continues = self.mount, (self.incarnation if self.fuse is not None else 0)
            self.end_role()
            self.mount = keep if not self.rules.self_fence else None
            self.keeper = None
            self.heart.kill()
            self.daemon.start()
            self.world.engine.at(100, self.join, proc=self.daemon)

    def power_off(self) -> None:
        if not self.host.alive:
            return
        self.note("power lost")
        self.host.alive = False
        self.end_fuse()
        self.end_role()
        if self.mount is not None:
            self.mount.down = True
        self.mount, self.keeper, self.continues = None, None, 0
        for proc in self.procs():
            proc.kill()
            proc.paused_until = 0

    def power_on(self) -> None:
        if self.host.alive:
            return
        self.note("starts")
        old, self.host = self.host, Host(self.number)
        self.host.away = old.away
        self.kernel.start()
        self.daemon.start()
        self.join()

    def pause(self, ms: int) -> None:
        """All of the machine stops for a while (not what is under way on the disk)."""
        self.note(f"paused for {ms} ms")
        for proc in self.procs():
            proc.paused_until = self.world.engine.now + ms

    # -- the daemon: following a home --------------------------------------------------------------------------

    def tick(self) -> None:
        """Renew our lease with the home, or look for it."""
        engine = self.world.engine
        if self.keeper is None:
            return
        if self.fuse is not None:
            engine.at(0, self.fuse.tick, proc=self.fuse_proc)
        link, home = self.link, self.world.home_at(self.link)
        if link is not None and not link.broken and home is not None:
            send = (home.on_renewal, link, self.slot, self.incarnation, self.clock())
            self.world.net.send(link, self.number, "lock", home.node.daemon, *send)
            if self.fuse is not None and self.fuse.epoch != home.epoch:
                self.hello(home)
        else:
            self.look_for_home()
        engine.at(self.world.timeouts.heartbeat_ms, self.tick, proc=self.daemon)

    def look_for_home(self) -> None:
        for node in self.world.nodes.values():
            if node.home is not None and not node.home.over and node.daemon.alive and self.fuse is not None:
                both = self.world.net.reaches(self.number, node.number) and self.world.net.reaches(
                    node.number, self.number
                )
                if node is self or both:
                    self.drop_link()
                    self.link = Link(self.number, node.number)
                    self.fuse.connected(self.link)
                    self.hello(node.home)
                    return

    def hello(self, home: Home) -> None:
        link = self.link
        assert link is not None and self.fuse is not None
        self.world.net.send(
            link,
            self.number,
            "lock",
            home.node.daemon,
            home.on_hello,
            link,
            self.fuse,
            self.incarnation,
            self.continues,
            self.slot,
        )

    def link_lost(self, link: Link) -> None:
        if self.link is link:
            self.link = None
            if self.fuse is not None:
                self.fuse.connected(None)


def adopt(node: Node, record: SlotRecord) -> None:
    """Begin with this slot held."""
    node.slot, node.incarnation = record.slot, record.incarnation
    node.holds(HeldSlot(replace(record), node.clock()))
