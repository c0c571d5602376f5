"""Seeded simulation of slot and lease claims: real core, fake disk with delays, pauses, crashes and torn writes.

The checker knows nothing of the claims' reasoning: it only compares what the nodes believe at each moment.
A failing seed is printed; run it alone with ``run_seed(N)``.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest

from mxfs_proto.ondisk import LeaseRecord, SlotRecord, SlotState
from mxfsd.core.keeper import Duty, Keeper, LeaseLost, SlotLost, Stalled
from mxfsd.core.lease import (
    Action,
    Claim,
    HandOver,
    HeldLease,
    HeldSlot,
    Joiner,
    LeaseClaim,
    Read,
    Refused,
    Sleep,
    SlotClaim,
    SlotReclaim,
    WriteLease,
    WriteSlot,
)
from mxfsd.core.timeouts import Timeouts
from mxfsd.core.watch import Snapshot

SLOTS = 4
NODES = 4
RUN_MS = 40_000
TIMEOUTS = Timeouts.named("fast")
SHARDS = 10
SEEDS_PER_SHARD = 60


class Broken(AssertionError):
    """An invariant does not hold."""


class Disk:
    """Records that writes reach at a moment between their start and their end; a torn one reads as None."""

    def __init__(self) -> None:
        self.leases: list[LeaseRecord | None] = [LeaseRecord(), LeaseRecord(1)]
        self.slots: list[SlotRecord | None] = [SlotRecord(n) for n in range(1, SLOTS + 1)]

    def land(self, record: SlotRecord | LeaseRecord, torn: bool = False) -> None:
        if isinstance(record, LeaseRecord):
            self.leases[record.sequence % 2] = None if torn else record
        else:
            self.slots[record.slot - 1] = None if torn else record

    def lease(self) -> LeaseRecord | None:
        return max((r for r in self.leases if r is not None), key=lambda r: r.order, default=None)


@dataclass
class Node:
    """One node: a task at a time (a claim or a beat), as the executors have it."""

    number: int
    uuid: bytes
    life: int = 0
    incarnation: int = 0
    slot: HeldSlot | None = None
    keeper: Keeper | None = None
    beating: bool = False
    busy: bool = False
    paused_until: int = 0
    writing: list[SlotRecord | LeaseRecord] = field(default_factory=list)
    proof: dict[str, int] = field(default_factory=dict)
    """When the beats began that last wrote the slot, and the lease, in time: what the checker knows by itself."""


class World:
    """The event queue, the nodes and the checker."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0
        self.queue: list[tuple[int, int, Callable[[], None]]] = []
        self.count = 0
        self.disk = Disk()
        self.nodes = [Node(n, bytes([n] * 16)) for n in range(1, NODES + 1)]
        self.epochs: dict[int, tuple[int, int]] = {}
        self.slot_claims = self.lease_claims = 0
        self.slow = self.rng.choice((0.0, 0.02, 0.1))

    # --- time ---------------------------------------------------------------------------------------------

    def at(self, delay: int, call: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.queue, (self.now + delay, self.count, call))

    def for_node(self, node: Node, delay: int, call: Callable[[], None]) -> None:
        """Run *call* unless the node crashed meanwhile; later if it is paused (SIGSTOP)."""
        life = node.life

        def run() -> None:
            if node.life != life:
                return
            if node.paused_until > self.now:
                self.at(node.paused_until - self.now, run)
                return
            call()

        self.at(delay, run)

    def latency(self) -> int:
        if self.rng.random() < self.slow:
            return self.rng.choice((90, 160, 290, 310, 500, 1200, 3000))
        return self.rng.randint(1, 25)

    def run(self) -> None:
        for node in self.nodes:
            self.for_node(node, self.rng.randint(0, 400), partial(self.join, node))
        self.at(self.rng.randint(500, 1500), self.chaos)
        while self.queue and self.now < RUN_MS:
            self.now, _, call = heapq.heappop(self.queue)
            call()
            self.check()

    # --- I/O ----------------------------------------------------------------------------------------------

    def read(self, node: Node, then: Callable[[Snapshot], None]) -> None:
        """Sample lease and slots at different moments of the read."""
        began, length = self.now, self.latency()
        seen: dict[str, LeaseRecord | None] = {}
        slots: list[SlotRecord | None] = []
        moments = sorted(self.rng.randint(0, length) for _ in range(2))
        first = self.rng.random() < 0.5

        def sample(which: bool) -> None:
            if which:
                seen["lease"] = self.disk.lease()
            else:
                slots.extend(self.disk.slots)

        self.at(moments[0], lambda: sample(first))
        self.at(moments[1], lambda: sample(not first))
        self.for_node(node, length, lambda: then(Snapshot(began, self.now, seen["lease"], tuple(slots))))

    def write(self, node: Node, record: SlotRecord | LeaseRecord, then: Callable[[int], None]) -> None:
        """Land the write at some moment, even if the node is paused; a crash may tear it or drop it."""
        length, life = self.latency(), node.life
        fate = self.rng.random()

        def land() -> None:
            if node.life == life:
                self.disk.land(record)
            elif fate < 0.3:
                self.disk.land(record, torn=True)
            elif fate < 0.6:
                self.disk.land(record)

        self.at(self.rng.randint(0, length), land)
        self.for_node(node, length, lambda: then(self.now))

    # --- executors ----------------------------------------------------------------------------------------

    def drive(self, node: Node, claim: Claim, action: Action, done: Callable[[Action], None]) -> None:
        def go(next_action: Action) -> None:
            self.drive(node, claim, next_action, done)

        if isinstance(action, Read):
            self.read(node, lambda snap: go(claim.on_read(snap)))
        elif isinstance(action, WriteSlot | WriteLease):
            # A process may lose the processor between its decision and its write.
            stop = self.rng.choice((0, 0, 0, 0, 0, 140, 400)) if self.slow else 0
            record = action.record
            self.for_node(node, stop, lambda: self.write(node, record, lambda now: go(claim.on_written(now))))
        elif isinstance(action, Sleep):
            self.for_node(node, action.ms, lambda: go(claim.on_slept(self.now)))
        else:
            done(action)

    def nonce(self) -> int:
        return self.rng.getrandbits(64)

    def join(self, node: Node) -> None:
        claim = SlotClaim(Joiner(node.uuid, f"n{node.number}", last_incarnation=node.incarnation), TIMEOUTS, self.nonce)

        def done(action: Action) -> None:
            if isinstance(action, Refused):
                self.for_node(node, 1000, lambda: self.join(node))
                return
            assert isinstance(action, HeldSlot)
            self.slot_claims += 1
            record = action.record
            if record.incarnation <= node.incarnation:
                raise Broken(f"node {node.number} had incarnation {record.incarnation} before")
            node.incarnation = record.incarnation
            node.keeper = Keeper(action, TIMEOUTS)
            node.proof = {"slot": action.since_ms}
            node.keeper.set_state(SlotState.ACTIVE)
            self.beat(node)

        self.drive(node, claim, claim.begin(), done)

    def beat(self, node: Node) -> None:
        keeper = node.keeper
        assert keeper is not None
        node.beating = True

        def after(snap: Snapshot) -> None:
            if node.keeper is keeper:
                self.perform(node, keeper, keeper.on_read(snap), snap)

        self.read(node, after)

    def perform(self, node: Node, keeper: Keeper, duties: list[Duty], snap: Snapshot) -> None:
        if not duties:
            node.beating = False
            self.for_node(node, TIMEOUTS.heartbeat_ms, lambda: self.beat(node))
            return
        duty, rest = duties[0], duties[1:]
        if isinstance(duty, SlotLost):
            node.keeper, node.beating = None, False
            self.for_node(node, 700, lambda: self.join(node))
        elif isinstance(duty, Stalled):
            self.reclaim(node, keeper, duty.late)
        elif isinstance(duty, LeaseLost):
            self.perform(node, keeper, rest, snap)
        else:
            written = duty

            def after(now: int) -> None:
                self.written(node, "lease" if isinstance(written, WriteLease) else "slot", snap.began_ms)
                result = keeper.on_written(written, snap.began_ms, now)
                self.guard(node, keeper)
                self.perform(node, keeper, ([result] if result else []) + rest, snap)

            self.write(node, written.record, after)

    def written(self, node: Node, what: str, began_ms: int) -> None:
        """Note a write that returned, unless it came too late to count."""
        length = TIMEOUTS.lease_ms if what == "lease" else TIMEOUTS.self_fence_ms
        if self.now <= node.proof.get(what, -length) + length:
            node.proof[what] = began_ms

    def guard(self, node: Node, keeper: Keeper) -> None:
        """Look at the time when the lease ends, whatever I/O hangs then, as the heartbeat process does."""
        at = keeper.fence_at_ms

        def look() -> None:
            if node.keeper is keeper:
                keeper.expire(self.now)

        if at is not None:
            self.for_node(node, max(0, at - self.now), look)

    def reclaim(self, node: Node, keeper: Keeper, late: bool) -> None:
        claim = SlotReclaim(keeper.record, TIMEOUTS, self.nonce, late=late)

        def done(action: Action) -> None:
            if isinstance(action, HeldSlot):
                keeper.resume(action)
                node.proof["slot"] = action.since_ms
                self.beat(node)
            else:
                node.keeper, node.beating = None, False
                self.for_node(node, 700, lambda: self.join(node))

        self.drive(node, claim, claim.begin(), done)

    def claim_lease(self, node: Node) -> None:
        keeper = node.keeper
        if keeper is None or keeper.lease is not None or node.busy:
            return
        node.busy = True
        claim = LeaseClaim(keeper.record, TIMEOUTS, self.nonce, wait_ms=self.rng.choice((0, 3000, 9000)))

        def done(action: Action) -> None:
            node.busy = False
            if node.keeper is not keeper or not isinstance(action, HeldLease):
                return
            self.lease_claims += 1
            owner = self.epochs.setdefault(action.record.epoch, (node.number, node.life))
            if owner != (node.number, node.life):
                raise Broken(f"epoch {action.record.epoch} given twice: {owner} and {node.number}")
            node.proof["lease"] = action.since_ms
            keeper.hold(action, self.now)
            self.guard(node, keeper)

        self.drive(node, claim, claim.begin(), done)

    def give_away(self, node: Node) -> None:
        """Release or move the lease, between two beats: the daemon waits until the heartbeat process let it go."""
        keeper = node.keeper
        if node.beating:
            self.for_node(node, 10, lambda: self.give_away(node))
            return
        if keeper is None or keeper.lease is None or node.busy:
            return
        until = keeper.lease_until_ms
        lease = keeper.let_go()
        assert lease is not None and until is not None
        node.busy = True
        claim = HandOver(lease, until, self.rng.choice((0, *range(1, SLOTS + 1))), TIMEOUTS)

        def done(_: Action) -> None:
            node.busy = False

        self.drive(node, claim, claim.begin(), done)

    # --- faults -------------------------------------------------------------------------------------------

    def chaos(self) -> None:
        node = self.rng.choice(self.nodes)
        dice = self.rng.random()
        if dice < 0.55:
            self.for_node(node, 0, lambda: self.claim_lease(node))
        elif dice < 0.7:
            self.for_node(node, 0, lambda: self.give_away(node))
        elif dice < 0.8:
            node.paused_until = max(node.paused_until, self.now + self.rng.choice((300, 1500, 2500, 5000, 9000)))
        elif dice < 0.9:
            self.crash(node)
        elif node.keeper is not None and not node.busy and not node.beating and node.paused_until <= self.now:
            self.leave(node, node.keeper)
        self.at(self.rng.randint(100, 1200), self.chaos)

    def crash(self, node: Node) -> None:
        node.life += 1
        node.keeper, node.busy, node.beating, node.paused_until = None, False, False, 0
        self.for_node(node, self.rng.choice((100, 1000, 6000)), lambda: self.join(node))

    def leave(self, node: Node, keeper: Keeper) -> None:
        """The heartbeat process ends its beats first; it checks that the slot is ours before it writes LEFT."""
        if keeper.lease is not None:
            return
        node.life += 1
        node.keeper = None
        self.read(node, lambda snap: self.left(node, keeper, snap))

    def left(self, node: Node, keeper: Keeper, snap: Snapshot) -> None:
        def again(_: int) -> None:
            self.for_node(node, 100, lambda: self.join(node))

        found = snap.slot(keeper.record.slot)
        if found is not None and found.same_claim(keeper.record) and snap.ended_ms <= keeper.slot_until_ms:
            self.write(node, keeper.last(SlotState.LEFT), again)
        else:
            again(0)

    # --- the checker --------------------------------------------------------------------------------------

    def check(self) -> None:
        slots: dict[int, int] = {}
        homes: list[tuple[int, int]] = []
        for node in self.nodes:
            keeper = node.keeper
            if keeper is None:
                continue
            if self.now <= keeper.slot_until_ms:
                other = slots.setdefault(keeper.record.slot, node.number)
                if other != node.number:
                    raise Broken(f"slot {keeper.record.slot} belongs to nodes {other} and {node.number}")
            until = keeper.lease_until_ms
            if keeper.lease is not None and until is not None and self.now <= until:
                homes.append((node.number, keeper.lease.epoch))
            if keeper.lease is not None and node.paused_until < self.now:
                proven = node.proof["lease"] + TIMEOUTS.lease_ms
                if self.now > min(proven, node.proof["slot"] + TIMEOUTS.self_fence_ms):
                    raise Broken(f"node {node.number} is home still, but nothing was renewed: {node.proof}")
        if len(homes) > 1:
            raise Broken(f"two homes: {homes}")


def run_seed(seed: int) -> World:
    world = World(seed)
    try:
        world.run()
    except Exception as error:
        raise AssertionError(f"seed {seed} at {world.now} ms: {error}") from error
    return world


@pytest.mark.parametrize("shard", range(SHARDS))
def test_never_two_owners(shard: int) -> None:
    """No two owners of a slot, of the lease, or of an epoch, at any moment of 600 runs."""
    slots = leases = 0
    for seed in range(shard * SEEDS_PER_SHARD, (shard + 1) * SEEDS_PER_SHARD):
        world = run_seed(seed)
        slots += world.slot_claims
        leases += world.lease_claims
    # A simulation in which nothing happens proves nothing.
    assert slots > 5 * SEEDS_PER_SHARD
    assert leases > 2 * SEEDS_PER_SHARD


class NeverEnds(Keeper):
    """Its lease does not expire."""

    def expire(self, now_ms: int) -> LeaseLost | None:
        return None


class OutlivesItsSlot(Keeper):
    """Its lease lasts for its own time, however long ago the slot was written."""

    @property
    def lease_until_ms(self) -> int | None:
        return None if self.lease is None else self._lease_ms + self.timeouts.lease_ms


@pytest.mark.parametrize("keeper", [NeverEnds, OutlivesItsSlot])
def test_a_lease_that_lasts_too_long_is_noticed(monkeypatch: pytest.MonkeyPatch, keeper: type[Keeper]) -> None:
    monkeypatch.setitem(globals(), "Keeper", keeper)
    with pytest.raises(AssertionError, match="nothing was renewed"):
        for seed in range(3000):
            run_seed(seed)


@pytest.mark.parametrize(("cls", "name"), [(SlotClaim, "holds"), (LeaseClaim, "holds")], ids=["slot", "lease"])
def test_a_broken_rule_is_noticed(monkeypatch: pytest.MonkeyPatch, cls: type[Claim], name: str) -> None:
    """Claims that skip the read after the wait must make the checker complain."""
    monkeypatch.setattr(cls, name, lambda claim, snap, intent: True)
    with pytest.raises(AssertionError, match="given twice|belongs to nodes|two homes"):
        for seed in range(300):
            run_seed(seed)
