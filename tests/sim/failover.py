"""Seeded simulation of failovers: the real core of every node over a fake disk, XFS and network, with every fault.

One number decides everything: latencies, who loses power, crashes, is paused, cut off or slow, what tears, and what the
applications do. Replay a seed with ``.venv/bin/python tests/sim/failover.py --seed N -v``.

Real: Keeper, Watch, slot and lease claims, Takeover, Membership, ClientLease, LockMaster, LockCache, SessionTable,
UnstableData, FileLocks, FileLockOps, the settling of operations without outcome, the codec of the lockspace.
Modelled: the device, XFS, the network, and what executes the core's effects.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from failover_check import Ledger
from failover_client import Fuse
from failover_disk import Disk, Volume
from failover_engine import Engine, Link, Network
from failover_faults import plan
from failover_home import Home
from failover_locks import Claims, HomeLocks, Locks, enter, leave
from failover_node import Node, adopt
from simcheck import Broken

from mxfs_proto.ondisk import LeaseRecord, LeaseState, SlotRecord, SlotState
from mxfsd.core.dlm import LockMaster
from mxfsd.core.keeper import Keeper
from mxfsd.core.lease import HeldLease, renewed
from mxfsd.core.lockcache import LockCache
from mxfsd.core.membership import Membership
from mxfsd.core.sessions import SessionTable
from mxfsd.core.takeover import Takeover, Verdict
from mxfsd.core.timeouts import Timeouts
from mxfsd.core.unstable import UnstableData

TIMEOUTS = Timeouts.derive(heartbeat_ms=200, lease_ms=1000, node_dead_ms=2500, claim_wait_ms=90)
BUSY_MS = 4200
"""Applications begin nothing new after this."""
CALM_MS = 3600
"""Every fault has ended by then."""
END_MS = 16000


@dataclass(frozen=True, slots=True)
class Rules:
    """What safety rests on; a test takes one away and sees it found."""

    fence: bool = True
    confirm: bool = True
    lease_check: bool = True
    settle: bool = True
    grace: bool = True
    force: bool = True
    force_reads: bool = True
    intent: bool = True
    outcome: bool = True
    replay: bool = True
    commit_on_release: bool = True
    commit_before_change: bool = True
    commit_others: bool = True
    failed_after_shutdown: bool = True
    self_fence: bool = True
    epoch: bool = True
    grants_by_link: bool = True
    late_by_link: bool = True
    mount_after_lease: bool = True
    master: Callable[..., Any] = LockMaster
    cache: Callable[..., Any] = LockCache
    sessions: Callable[..., Any] = SessionTable
    membership: Callable[..., Any] = Membership
    takeover: Callable[..., Any] = Takeover
    keeper: Callable[..., Any] = Keeper
    unstable: Callable[..., Any] = UnstableData
    locks: Callable[..., Any] = Locks
    home_locks: Callable[..., Any] = HomeLocks
    name_locks: bool = True


class World:
    """Nodes, disk, network, and what is known of them all."""

    def __init__(
        self,
        seed: int,
        rules: Rules | None = None,
        verbose: bool = False,
        *,
        agent: str | None = None,
        faults: Callable[["World"], None] | None = plan,
        nodes: int = 3,
        threads: int | None = None,
        late: float | None = None,
        lockers: int = 0,
    ) -> None:
        """*lockers*: so many processes of each node lock and unlock files (failover_locks.py)."""
        self.seed = seed
        self.rules = rules or Rules()
        self.engine = engine = Engine(seed, verbose)
        rng = engine.rng
        self.timeouts = TIMEOUTS
        self.agent = agent or rng.choice(("pr", "pr", "lease"))
        self.late = rng.choice((0.0, 0.01, 0.05)) if late is None else late
        self.threads = rng.choice((1, 2)) if threads is None else threads
        self.linger_ms = rng.choice((0, 20))
        self.lockers = lockers
        self.claims = Claims()
        enter(self)
        self.busy_ms = BUSY_MS
        self.calm_ms = CALM_MS
        self.disk = Disk(self, nodes + 1)
        self.volume = Volume(self)
        self.net = Network(engine)
        self.net.on_break = self.link_broke
        self.ledger = Ledger(self)
        self.takeovers = self.deaths = self.step_downs = self.ops = self.sessions = 0
        self.inos = 1
        self.faults: list[str] = []
        self.between: Callable[[Home], None] | None = None
        self.watchers: list[Callable[[Node, Any], None]] = []
        for name in ("a", "b"):
            ino = self.new_ino()
            self.volume.meta |= {("n", name): (ino, 0), ("i", ino): True, ("s", ino): 2}
        self.nodes = {number: Node(self, number) for number in range(1, nodes + 1)}
        self.start()
        if faults is not None:
            faults(self)

    def start(self) -> None:
        """Every node has its slot, and node 1 the lease."""
        rng, lease = self.engine.rng, None
        for node in self.nodes.values():
            node.host.key = 0
            if self.agent == "pr":
                self.disk.register(node.host, node.nonce())
            record = SlotRecord(
                node.number,
                SlotState.ACTIVE,
                node.uuid,
                f"n{node.number}",
                1,
                1,
                rng.getrandbits(64),
                node.host.key,
                1,
                self.timeouts.heartbeat_ms,
                self.timeouts.lease_ms,
                self.timeouts.node_dead_ms,
            )
            self.disk.place(record)
            if node.number == 1:
                lease = LeaseRecord(2, 1, LeaseState.HELD, 1, node.uuid, 1, 0, 0, rng.getrandbits(64))
                self.disk.place(lease)
                lease = renewed(lease)
                self.disk.place(lease)
            self.engine.at(0, adopt, node, record)
        self.engine.at(1, self.first_home, lease)

    def first_home(self, lease: LeaseRecord) -> None:
        node = self.nodes[1]
        keeper = node.keeper
        assert isinstance(keeper, Keeper)
        keeper.hold(HeldLease(lease, node.clock()), node.clock())
        node.guard_lease()
        node.takeover.suspect()
        effects = node.takeover.judged(Verdict.NONE)
        assert effects
        node.snap = None
        node.go(node.takeover.claimed(1))

    # -- what the parts ask ------------------------------------------------------------------------------------

    def new_op(self) -> int:
        self.ops += 1
        return self.ops

    def new_ino(self) -> int:
        self.inos += 1
        return self.inos

    def new_session(self) -> int:
        self.sessions += 1
        return self.sessions

    def home_at(self, link: Link | None) -> Home | None:
        """Return the home at the end of a connection."""
        if link is None or link.broken:
            return None
        node = self.nodes[link.home]
        return node.home if node.daemon.alive else None

    def client_of(self, link: Link) -> Fuse | None:
        node = self.nodes[link.client]
        return node.fuse if node.link is link else None

    def link_broke(self, link: Link) -> None:
        node = self.nodes[link.client]
        self.engine.at(self.engine.rng.choice((1, 50)), node.link_lost, link, proc=node.daemon)

    def put_out(self, slot: int, incarnation: int) -> None:
        """A home ended what this incarnation held."""
        for node in self.nodes.values():
            if node.slot == slot and incarnation in (node.incarnation, node.continues) and node.fuse is not None:
                self.ledger.lost(node.fuse.serial)
                self.claims.gone(node.fuse.serial)

    def reached(self, node: Node, effect: Any) -> None:
        """A node is about to carry out a step of a takeover."""
        for watcher in list(self.watchers):
            watcher(node, effect)

    # -- running -----------------------------------------------------------------------------------------------

    def settled(self) -> bool:
        """Whether nothing is under way any more."""
        return (
            all(node.fuse is not None and not node.fuse.busy and node.link for node in self.nodes.values())
            and any(node.acts_as_home() for node in self.nodes.values())
            and self.engine.now > self.busy_ms + 300
        )

    def run(self) -> None:
        """Run to the end; raise Broken where something does not hold."""
        engine, last = self.engine, -1
        while engine.now < END_MS and engine.step():
            if engine.now != last:
                last = engine.now
                self.ledger.step()
                if last > self.calm_ms and self.settled():
                    break
        self.ledger.finish()


def simulate(seed: int, rules: Rules | None = None, verbose: bool = False, **more: Any) -> World:
    """Run one seed. Raises Broken, with the seed and the command that replays it in the message."""
    world = World(seed, rules, verbose, **more)
    try:
        world.run()
    except Exception as exc:
        lockers = f" --lockers {world.lockers}" if world.lockers else ""
        replay = f"python tests/sim/failover.py --seed {seed} -v{lockers}"
        what = f"seed {seed} ({world.agent}, {', '.join(world.faults)}) at {world.engine.now} ms"
        raise Broken(f"{what}: {type(exc).__name__}: {exc}\n  replay: {replay}") from exc
    finally:
        world.engine.close()
        leave()
    return world


def main() -> int:
    """Run seeds from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--runs", type=int, default=1, help="so many seeds from there")
    parser.add_argument("--lockers", type=int, default=0, help="processes of each node that lock files")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every message and effect")
    options = parser.parse_args()
    failed = 0
    for seed in range(options.seed, options.seed + options.runs):
        try:
            world = simulate(seed, verbose=options.verbose, lockers=options.lockers)
        except Broken as exc:
            failed += 1
            print(exc)
        else:
            if options.runs == 1:
                counts = dict(world.ledger.counts)
                print(f"seed {seed}: {world.agent}, {world.faults}, {world.takeovers} homes, {counts}")
                print(f"  ended at {world.engine.now} ms after {world.engine.steps} steps")
    print(f"{options.runs - failed} of {options.runs} seeds hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
