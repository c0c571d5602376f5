"""Seeded simulation of locks, sessions and membership: the real core of every node over a fake network.

One number decides everything: the delays, the losses, who is paused, cut off or crashes, when the home moves and what
the applications do. Replay a seed with ``.venv/bin/python tests/sim/simulator.py --seed N -v``.

Faults that the code must bear: messages of the two channels overtake each other; operations and replies are lost and
sent again; connections break; lock messages between daemon and FUSE layer are lost (a full netlink buffer), which is
noticed; nodes pause, crash, come back, are cut off for longer than their lease. Not simulated here: the death of the
home, the disk.
"""

import argparse
import heapq
import random
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from simcheck import Broken, Checker
from simhome import Home
from simnode import Future, Node

from mxfs_proto.lockflags import LockFlag
from mxfsd.core.dlm import LockMaster
from mxfsd.core.lockcache import LockCache
from mxfsd.core.membership import ClientLease, Membership, MemberState
from mxfsd.core.sessions import SessionTable


@dataclass(frozen=True, slots=True)
class SimTimeouts:
    """Short deadlines, in milliseconds."""

    lease_ms: int = 100
    renewal_ms: int = 30
    node_dead_ms: int = 250
    lock_wait_ms: int = 200
    bast_ms: int = 120
    min_hold_ms: int = 1


@dataclass(frozen=True, slots=True)
class Mutants:
    """The classes under test; a test may put broken ones here."""

    master: Callable[..., Any] = LockMaster
    cache: Callable[..., Any] = LockCache
    sessions: Callable[..., Any] = SessionTable
    membership: Callable[..., Any] = Membership


class World:
    """Nodes, their network and their faults."""

    def __init__(self, seed: int, mutants: Mutants | None = None, verbose: bool = False) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.mutants = mutants or Mutants()
        self.verbose = verbose
        self.now = 0
        self.events: list[Any] = []
        self.event: Any = None
        self.serial = 0
        self.timeouts = SimTimeouts(min_hold_ms=rng.choice((1, 1, 5)))
        self.linger_ms = rng.choice((0, 0, 20))
        self.alt = LockFlag.ALT_UNCACHED
        self.busy_ms = rng.choice((150, 300))
        self.inos = list(range(1, rng.choice((1, 2, 3)) + 1))
        self.store = dict.fromkeys(self.inos, 0)
        self.running: dict[int, dict[int, tuple[int, Any]]] = {}
        self.silences = self.long_waits = self.deaths = self.moves = self.losses = self.unlinks = self.steps = 0
        self.fifo: dict[tuple[int, str], int] = {}
        self.cut_until: dict[int, int] = {}
        self.slot_moved: dict[int, int] = {}
        self.loss = rng.choice((0.0, 0.0, 0.02, 0.1))
        self.nl_loss = rng.choice((0.0, 0.0, 0.02))
        self.slow = rng.choice((0.0, 0.05))
        self.moving = False
        self.check = Checker(self)
        self.home: Home = None  # type: ignore[assignment]
        self.nodes: dict[int, Node] = {}
        for number in range(1, rng.choice((2, 3, 3)) + 1):
            self.nodes[number] = Node(self, number)
        self.home = Home(self, 1, 1)
        self.home.run(self.home.master.grace_over(0))
        self.check.serves(1, 1)
        self.nodes[1].is_home = True
        self.nodes[1].cache.set_implicit(True)
        for node in self.nodes.values():
            self.boot(node)
        self.later(10, self.tick)
        self.plan_faults()

    @staticmethod
    def first_seq(epoch: int) -> int:
        return epoch << 32

    # -- time --------------------------------------------------------------------------------------------------

    def at(self, when: int, what: Callable[..., None], *args: Any, node: Node | None = None) -> None:
        """Call *what* then; with *node*, only while that node lives in this incarnation and is not paused."""
        self.serial += 1
        life = node.incarnation if node is not None else 0
        heapq.heappush(self.events, (max(when, self.now), self.serial, what, args, node, life))

    def defer(self, until: int) -> None:
        """Let the present event happen then, in its old place among those of that time."""
        _, serial, *rest = self.event
        heapq.heappush(self.events, (until, serial, *rest))

    def later(self, delay: int, what: Callable[..., None], *args: Any, node: Node | None = None) -> None:
        self.at(self.now + delay, what, *args, node=node)

    def run(self) -> None:
        """Run until well after the last fault; raise Broken where an invariant does not hold."""
        end_ms = self.busy_ms + 1500
        while self.events:
            self.event = heapq.heappop(self.events)
            when, _, what, args, node, life = self.event
            if when > end_ms or (self.now > self.busy_ms + 700 and self.idle()):
                break
            self.now = when
            if node is not None:
                if not node.alive or node.incarnation != life:
                    continue
                if node.paused_until > when:
                    self.defer(node.paused_until)
                    continue
            self.steps += 1
            what(*args)
            self.check.step()
        self.check.finish()

    def idle(self) -> bool:
        return not self.moving and not any(
            node.busy or node.cache.pending or node.cache.revoking for node in self.nodes.values() if node.alive
        )

    def spawn(self, steps: Generator[Any, Any, Any], node: Node) -> None:
        """Run a task on *node*: it yields milliseconds to sleep or a Future."""
        waiting: list[Future] = []

        def resume() -> None:
            value = waiting.pop().value if waiting else None
            try:
                what = steps.send(value)
            except StopIteration:
                return
            if not isinstance(what, Future):
                self.later(what, resume, node=node)
                return
            waiting.append(what)
            what.task = lambda: self.later(0, resume, node=node)
            if what.done:
                what.task()

        self.later(0, resume, node=node)

    def note(self, who: int, what: Any) -> None:
        if self.verbose:
            print(f"{self.now:6d} {'home' if who == 0 else f'n{who}'}: {what}")

    # -- network -----------------------------------------------------------------------------------------------

    def delay(self) -> int:
        return self.rng.randrange(20, 60) if self.rng.random() < self.slow else self.rng.choice((0, 1, 1, 2, 4))

    def in_order(self, node: int, way: str) -> int:
        """Return when the next message of a lock channel arrives: in order, and after a cut heals."""
        start = max(self.now, self.cut_until.get(node, 0))
        when = max(start + (0 if node == self.home.number else self.delay()), self.fifo.get((node, way), 0))
        self.fifo[node, way] = when
        return when

    def lost(self, node: Node, message: tuple[Any, ...]) -> bool:
        """Whether netlink loses this message; it says so, and the FUSE layer asks again."""
        kinds = ("grant", "bast", "deny", "request", "release", "opens", "cancel")
        if self.now < self.busy_ms and message[0] in kinds and self.rng.random() < self.nl_loss:
            self.losses += 1
            self.later(20, node.resync, node=node)
            return True
        return False

    def to_home(self, node: Node, incarnation: int, epoch: int, message: tuple[Any, ...]) -> None:
        if node.linked and not self.lost(node, message):
            when = self.in_order(node.number, "up")
            self.at(when, self.arrive, node.number, incarnation, node.link, epoch, message)

    def arrive(self, number: int, incarnation: int, link: int, epoch: int, message: tuple[Any, ...]) -> None:
        host = self.nodes[self.home.number]
        if host.paused_until > self.now:
            self.defer(host.paused_until)
        elif self.nodes[number].link == link:
            self.home.on_lock(number, incarnation, epoch, message)

    def to_node(self, number: int, epoch: int, message: tuple[Any, ...]) -> None:
        node = self.nodes[number]
        if node.alive and node.linked and not self.lost(node, message):
            self.at(self.in_order(number, "down"), node.on_message, epoch, node.link, message, node=node)

    def drops(self, number: int) -> bool:
        """Whether the operation channel loses a message of this node."""
        if number == self.home.number:
            return False
        faulty = self.now < self.busy_ms and self.rng.random() < self.loss
        return faulty or self.cut_until.get(number, 0) > self.now or not self.nodes[number].linked

    def op_to_home(self, node: Node, epoch: int, request: tuple[Any, ...]) -> None:
        if not self.drops(node.number):
            self.later(self.delay(), self.op_arrives, node.number, node.incarnation, epoch, request, node=self.host())

    def op_arrives(self, number: int, incarnation: int, epoch: int, request: tuple[Any, ...]) -> None:
        self.home.on_op(number, incarnation, epoch, request)

    def reply(self, number: int, incarnation: int, seq: int, reply: Any) -> None:
        node = self.nodes[number]
        if not self.drops(number) and node.alive:
            self.later(self.delay(), node.on_reply, incarnation, seq, reply, node=node)

    def host(self) -> Node:
        return self.nodes[self.home.number]

    # -- membership --------------------------------------------------------------------------------------------

    def boot(self, node: Node) -> None:
        """Applications start on a node."""
        for name in range(2):
            self.spawn(node.application(name), node)
        self.beat(node)

    def beat(self, node: Node) -> None:
        """A node renews its lease, or asks to join."""
        self.slot_moved[node.number] = self.now
        if node.lease.expired(self.now) and not node.is_home:
            self.note(node.number, "lease expired")
            node.drop_all()
        node.tick()
        if node.is_home:
            node.joined = True
        elif not self.drops(node.number):
            what = self.renewal if node.joined else self.hello
            self.later(self.delay(), what, self.home, node, node.incarnation, self.now, node=self.host())
        self.later(5 if node.joined and node.lease.until_ms() else 20, self.beat, node, node=node)

    def renewal(self, home: Home, node: Node, incarnation: int, sent_ms: int) -> None:
        if (
            home is self.home
            and not home.frozen
            and home.renew(node.number, incarnation)
            and not self.drops(node.number)
        ):
            self.later(self.delay(), self.renewed, node, sent_ms, node=node)

    def renewed(self, node: Node, sent_ms: int) -> None:
        node.lease.renewed(self.now, sent_ms)

    def hello(self, home: Home, node: Node, incarnation: int, sent_ms: int) -> None:
        if home is self.home and not home.frozen:
            home.decide(home.membership.on_connected(self.now, node.number, incarnation))
            if home.membership.state(node.number) is MemberState.ACTIVE:
                self.welcome(node.number, home.membership.incarnation(node.number))

    def welcome(self, number: int, incarnation: int) -> None:
        node, epoch = self.nodes[number], self.home.epoch

        def joined() -> None:
            if node.incarnation == incarnation and node.linked and not node.joined:
                node.joined = True
                node.epoch = max(node.epoch, epoch)
                node.resync()

        if node.alive:
            self.at(self.in_order(number, "down"), joined, node=node)

    def refuse(self, number: int, incarnation: int) -> None:
        """The node hears that it is out: it begins anew."""
        node = self.nodes[number]

        def refused() -> None:
            if node.incarnation == incarnation:
                self.note(number, "refused: restarts")
                node.start()
                self.boot(node)

        if node.alive:
            self.later(self.delay(), refused, node=node)

    def slot_age(self, node: Node) -> int:
        return self.now - self.slot_moved[node.number]

    def change(self, ino: int) -> int:
        """The lower file system writes."""
        self.check.written[ino] += 1
        self.store[ino] = self.check.written[ino]
        return self.store[ino]

    def tick(self) -> None:
        if self.host().paused_until <= self.now:
            self.home.tick()
        self.later(10, self.tick)

    # -- faults ------------------------------------------------------------------------------------------------

    def plan_faults(self) -> None:
        rng = self.rng
        for _ in range(rng.choice((0, 0, 1, 2))):
            self.at(rng.randrange(20, self.busy_ms), self.pause)
        for _ in range(rng.choice((0, 0, 1, 1))):
            self.at(rng.randrange(20, self.busy_ms), rng.choice((self.crash, self.cut)))
        for _ in range(rng.choice((0, 0, 1, 2))):
            self.at(rng.randrange(20, self.busy_ms), self.unlink)
        for _ in range(rng.choice((0, 0, 1, 2))):
            self.at(rng.randrange(20, self.busy_ms), self.move)

    def victim(self) -> Node | None:
        others = [node for node in self.nodes.values() if node.alive and node.number != self.home.number]
        return self.rng.choice(others) if others and not self.moving else None

    def pause(self) -> None:
        node = self.rng.choice(list(self.nodes.values()))
        node.paused_until = self.now + self.rng.choice((20, 80, 200))
        self.note(node.number, f"paused until {node.paused_until}")

    def cut(self) -> None:
        node = self.victim()
        if node is not None:
            self.cut_until[node.number] = self.now + self.rng.choice((50, 150, 400))
            self.note(node.number, f"cut off until {self.cut_until[node.number]}")

    def unlink(self) -> None:
        """The connection between a node and the home breaks, with everything in it, and is made again."""
        node = self.victim()
        if node is None or not node.joined or self.home.grace:
            return
        self.unlinks += 1
        node.linked = False
        node.link += 1
        self.note(node.number, "loses its connection")
        self.later(self.rng.choice((1, 10, 50)), self.relink, node, node.incarnation)

    def relink(self, node: Node, incarnation: int) -> None:
        if node.alive and node.incarnation == incarnation and not node.linked:
            node.linked = True
            node.reclaim()

    def crash(self) -> None:
        node = self.victim()
        if node is not None:
            node.alive = False
            self.note(node.number, "crashes")
            self.later(self.rng.choice((30, 150, 400)), self.restart, node)

    def restart(self, node: Node) -> None:
        self.note(node.number, "restarts")
        self.cut_until.pop(node.number, None)
        node.start()
        self.boot(node)

    def move(self) -> None:
        """Move the home to another node, as planned."""
        target = self.victim()
        if target is None or not target.joined or not target.trusts() or self.home.grace:
            return
        self.moving = True
        self.note(0, f"moves to node {target.number}")
        self.home.freeze()
        self.host().gate = True
        self.drain(target)

    def drain(self, target: Node) -> None:
        old = self.host()
        if self.home.tasks or old.cache.pinned or old.paused_until > self.now:
            self.later(2, self.drain, target)
            return
        old.drop_all()
        old.cache.set_implicit(False)
        old.is_home = old.gate = False
        old.lease = ClientLease(self.timeouts.lease_ms, 10)
        self.later(self.rng.choice((1, 10)), self.arrived, target, self.home.sessions.kept())

    def arrived(self, target: Node, replies: list[tuple[int, int, bytes]]) -> None:
        """The next home serves."""
        old, epoch = self.home, self.home.epoch + 1
        self.moves += 1
        self.running.clear()
        self.home = Home(self, target.number, epoch)
        self.check.serves(epoch, target.number)
        for reply in replies:
            self.home.sessions.restore(*reply)
        target.is_home = True
        target.paused_until = 0
        gone = (MemberState.ABSENT, MemberState.EVICTED, MemberState.LEFT, MemberState.JOINING)
        self.home.grace.add(target.number)
        for node in self.nodes.values():
            if node.number == target.number:
                continue
            known = node.incarnation if node.number == old.number else old.membership.incarnation(node.number)
            if node.number == old.number or old.membership.state(node.number) not in gone:
                self.home.membership.expect(self.now, node.number, known)
                self.home.grace.add(node.number)
        for node in self.nodes.values():
            if node.alive:
                when = self.in_order(node.number, "down")
                node.linked = True
                self.at(when, node.new_home, epoch, self.first_seq(epoch), node=node)
        self.moving = False


def simulate(seed: int, mutants: Mutants | None = None, verbose: bool = False) -> World:
    """Run one seed. Raises Broken, with the seed and the command that replays it in the message."""
    world = World(seed, mutants, verbose)
    try:
        world.run()
    except Exception as exc:
        replay = f".venv/bin/python tests/sim/simulator.py --seed {seed} -v"
        raise Broken(f"seed {seed} at {world.now} ms: {type(exc).__name__}: {exc}\n  replay: {replay}") from exc
    return world


def main() -> int:
    """Run seeds from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--runs", type=int, default=1, help="so many seeds from there")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every message and effect")
    options = parser.parse_args()
    failed = 0
    for seed in range(options.seed, options.seed + options.runs):
        try:
            world = simulate(seed, verbose=options.verbose)
        except Broken as exc:
            failed += 1
            print(exc)
        else:
            if options.verbose or options.runs == 1:
                check = world.check
                print(f"seed {seed}: {world.steps} steps, {check.reads} reads, {check.writes} writes, holds")
    print(f"{options.runs - failed} of {options.runs} seeds hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
