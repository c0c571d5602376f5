"""How a node of the failover simulator becomes the home, and puts others out: what executes the real Takeover."""

from typing import Any

from failover_disk import Mount
from failover_engine import Steps
from failover_home import Home

from mxfs_proto.ondisk import LeaseState, SlotRecord, SlotState
from mxfsd.core import takeover as step
from mxfsd.core.keeper import Keeper
from mxfsd.core.lease import GONE, Evidence, HandOver, HeldLease, HeldSlot, LeaseClaim, SlotReclaim
from mxfsd.core.membership import DeclareDead
from mxfsd.core.takeover import Effect, TakeoverState, Verdict, Victim
from mxfsd.core.watch import Snapshot


class Successor:
    """The part of a node (``failover_node.Node``) that acts as home, or is to."""

    # -- the daemon: taking over -------------------------------------------------------------------------------

    def on_beat(self, snap: Snapshot) -> None:
        """The heartbeat process read the lockspace."""
        if self.home is not None:
            self.home.on_slots(snap)
            return
        if self.takeover.state is TakeoverState.FOLLOWING:
            verdict, victim = self.judge(snap)
            if verdict is not Verdict.ALIVE:
                self.takeover.suspect()
        if self.takeover.state is TakeoverState.SUSPECT:
            verdict, victim = self.judge(snap)
            if verdict is Verdict.ALIVE:
                self.takeover.heard()
            elif self.fuse is not None:
                self.go(self.takeover.judged(verdict, victim))

    def judge(self, snap: Snapshot) -> tuple[Verdict, Victim | None]:
        """What the disk says of the owner of the lease."""
        lease, dead = snap.lease, self.world.timeouts.node_dead_ms
        if lease is None:
            return Verdict.ALIVE, None
        if lease.state is LeaseState.FREE or (lease.state is LeaseState.MOVING and lease.target_slot == self.slot):
            return Verdict.NONE, None
        # A record that cannot be read says what it said last: its owner may have died while it wrote.
        owner = snap.slot(lease.owner_slot) or self.known.get(lease.owner_slot)
        silent = self.watch.age_ms(0) >= dead and self.watch.age_ms(lease.owner_slot) >= dead
        same = owner is not None and (owner.node_uuid, owner.incarnation) == (lease.owner_uuid, lease.incarnation)
        if same and lease.owner_slot == self.slot and lease.incarnation == self.incarnation:
            return Verdict.NONE, None  # a claim of ours that was given up
        key = owner.pr_key if owner is not None and same else 0
        if owner is not None and (
            (same and owner.state in GONE) or (not same and owner.state is not SlotState.CLAIMING)
        ):
            return Verdict.FAILED, Victim(lease.owner_slot, lease.incarnation, key, Verdict.FAILED)
        if silent:
            return Verdict.SILENT, Victim(lease.owner_slot, lease.incarnation, key, Verdict.SILENT)
        return Verdict.ALIVE, None

    def go(self, effects: list[Effect]) -> None:
        """Carry out what the takeover wants done."""
        for effect in effects:
            self.note(effect)
            self.world.reached(self, effect)
            if not self.daemon.alive:
                return
            match effect:
                case step.Fence():
                    self.world.engine.spawn(self.fence_home(effect.victim), self.daemon)
                case step.ClaimLease():
                    self.claim_lease(effect.victim)
                case step.Mount():
                    self.world.engine.spawn(self.mount_lower(effect.epoch), self.daemon)
                case step.Settle():
                    self.world.engine.spawn(self.settle(), self.daemon)
                case step.AwaitReclaims():
                    self.tick_now()
                case step.Serve():
                    assert self.home is not None
                    self.home.serve()

    def fence(self, key: int) -> Steps:
        """Fence a key with the volume's agent. Return whether it is confirmed."""
        disk, rng = self.world.disk, self.world.engine.rng
        yield rng.randint(2, 10)
        if not disk.pr or not key or not self.rules.fence:
            return True
        disk.preempt(self.host, key)
        yield rng.randint(2, 10)
        if self.rules.confirm and (self.host.away or key in disk.keys or self.host.key not in disk.keys):
            return False
        disk.fenced.add(key)
        return True

    def fence_home(self, victim: Victim) -> Steps:
        if (yield from self.fence(victim.pr_key)):
            self.go(self.takeover.fenced(victim))
        else:
            yield 100
            self.takeover.fence_failed()

    def claim_lease(self, victim: Victim | None) -> None:
        snap, keeper = self.snap, self.keeper
        assert keeper is not None
        times = self.world.timeouts
        evidence = None
        if not self.rules.mount_after_lease:
            self.mount = Mount(self.world, self.host, self.host.key)
        # A claim of ours that was given up counts as over after that time, by this claim's own watch.
        wait_ms = times.lease_ms + times.claim_wait_ms + 2 * times.heartbeat_ms if victim is None else 0
        if victim is not None and snap is not None and snap.lease is not None and victim.verdict is Verdict.SILENT:
            slot = snap.slot(victim.slot)
            if slot is not None:
                evidence = Evidence(victim.slot, victim.incarnation, slot.counter, snap.lease.sequence)
            else:
                wait_ms = times.node_dead_ms + 4 * times.heartbeat_ms

        def done(action: Any) -> None:
            if not isinstance(action, HeldLease) or keeper is not self.keeper:
                self.note(action)
                self.takeover.refused()
                return
            if keeper.hold(action, self.clock()) is not None:
                self.takeover.refused()
                return
            self.guard_lease()
            self.go(self.takeover.claimed(action.record.epoch))

        claim = LeaseClaim(keeper.record, self.world.timeouts, self.nonce, evidence=evidence, wait_ms=wait_ms)
        self.drive(claim, self.daemon, done)

    def mount_lower(self, epoch: int) -> Steps:
        yield self.world.engine.rng.randint(5, 30)
        while self.host.away:
            yield 50
        if not self.lease_valid():
            self.self_fence("lease over before the mount")
            self.restart_daemon(own=True)
            return
        if self.mount is None or self.rules.mount_after_lease:
            self.mount = Mount(self.world, self.host, self.host.key)
        self.world.ledger.serves(epoch, self.number)
        self.world.takeovers += 1
        self.home = Home(self, epoch, self.mount)
        self.world.engine.at(50, self.write_back, self.mount, proc=self.kernel)
        self.go(self.takeover.mounted())

    def write_back(self, mount: Mount) -> None:
        mount.background()
        if not mount.down:
            self.world.engine.at(self.world.engine.rng.choice((40, 120, 400)), self.write_back, mount, proc=self.kernel)

    def settle(self) -> Steps:
        home = self.home
        assert home is not None
        if not (yield from home.recover()):
            return
        members = set()
        # What cannot be read just now says what it said last: its owner may be alive and hold locks.
        for record in self.known.values():
            if record.slot != self.slot and self.may_hold(record):
                home.membership.expect(self.clock(), record.slot, record.incarnation)
                members.add(record.slot)
        members.add(self.slot)
        self.go(self.takeover.settled(members if self.rules.grace else ()))

    def may_hold(self, record: SlotRecord) -> bool:
        """Whether the node of a slot may hold something from before."""
        if (record.slot, record.incarnation) in self.evicted:
            return False
        return record.state not in (SlotState.FREE, SlotState.LEFT, SlotState.FAILED)

    def tick_now(self) -> None:
        self.look_for_home()
        for node in self.world.nodes.values():
            if node is not self and self.world.net.reaches(self.number, node.number):
                self.world.engine.at(self.world.net.delay(), node.announced, proc=node.daemon)

    def announced(self) -> None:
        """A home says that it is there."""
        if self.keeper is not None and (self.link is None or self.link.broken or self.world.home_at(self.link) is None):
            self.look_for_home()

    # -- the daemon: as home -----------------------------------------------------------------------------------

    def fence_member(self, home: Home, dead: DeclareDead) -> None:
        """A member was declared dead."""

        def work() -> Steps:
            record = self.snap.slot(dead.node) if self.snap is not None else None
            key = record.pr_key if record is not None and record.incarnation == dead.incarnation else 0
            while not (yield from self.fence(key)):
                yield 100
            if not home.over:
                home.decide(home.membership.fenced(self.clock(), dead.node))

        self.world.engine.spawn(work(), self.daemon)

    def free_slot(self, slot: int, incarnation: int) -> None:
        """A node that was put out loses its slot record, so that a later home knows too."""
        record = self.snap.slot(slot) if self.snap is not None else None
        if record is None or record.incarnation != incarnation or record.state in (SlotState.FREE, SlotState.LEFT):
            return

        def done(action: Any) -> None:
            if isinstance(action, HeldSlot):
                free = SlotRecord(slot, incarnation=incarnation, counter=action.record.counter + 1)
                self.world.disk.put(self.host, self.daemon, free, lambda ok: None)

        self.drive(SlotReclaim(record, self.world.timeouts, self.nonce), self.daemon, done)

    def step_down(self) -> None:
        """This home is the one that is cut off: unmount, then give the lease up."""
        home, keeper = self.home, self.keeper
        if home is None or keeper is None or home.over:
            return
        self.world.step_downs += 1
        self.note("steps down")
        home.over = True
        self.world.engine.spawn(self._step_down(home, keeper), self.daemon)

    def _step_down(self, home: Home, keeper: Keeper) -> Steps:
        mount = home.mount
        for future in list(home.ops.values()):
            future.set(False)  # what waits for locks of those that are cut off waits for the next home
        while home.tasks:
            yield 5
            if not self.lease_valid():
                return
        for ino in {ino for ino, _ in mount.dirty}:
            if not (yield mount.flush(ino)):
                return
        if not (yield mount.force()):
            return
        mount.down = True
        while not self.world.disk.idle_lower(self.host):
            yield 5
        until, lease = keeper.lease_until_ms, keeper.let_go()
        fuse = self.fuse
        if fuse is not None:
            fuse.leave_home()
        if lease is None or until is None:
            return
        for link in home.links.values():
            self.world.net.lose(link)
        self.home = self.mount = None
        self.drop_link()
        self.takeover.gave_up()
        self.drive(HandOver(lease, until, 0, self.world.timeouts), self.daemon, lambda action: self.note(action))
