"""The faults of the failover simulator, and how a seed chooses among them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from failover import World
    from failover_home import Home
    from failover_node import Node

PARTITIONS = (
    ((1,), (2, 3)),
    ((2,), (1, 3)),
    ((3,), (1, 2)),
    ((1,), (2,), (3,)),
)


class Faults:
    """What can go wrong in one world, and when it ends."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.engine = world.engine

    def home(self) -> "Node":
        """Return the node that is home, or the one that was first."""
        return next((node for node in self.world.nodes.values() if node.home is not None), self.world.nodes[1])

    def some(self) -> "Node":
        rng = self.engine.rng
        return self.home() if rng.random() < 0.65 else rng.choice(list(self.world.nodes.values()))

    def away(self, delay: int) -> int:
        """Return *delay*, but not beyond the time at which every fault ends."""
        return max(1, min(delay, self.world.calm_ms - self.engine.now))

    # -- machines and processes --------------------------------------------------------------------------------

    def power(self) -> None:
        node = self.some()
        node.power_off()
        self.engine.at(self.away(self.engine.rng.choice((300, 1500, 3000))), node.power_on)

    def daemon(self) -> None:
        self.some().crash_daemon()

    def heart(self) -> None:
        self.some().crash_heart()

    def fuse(self) -> None:
        self.some().crash_fuse()

    def pause(self) -> None:
        """A machine stops. Where only deadlines fence, a hardware watchdog resets a home that stops for too long."""
        node, ms = self.some(), self.engine.rng.choice((200, 900, 1800, 4000))
        ms = self.away(ms)
        if self.world.agent == "lease" and node.mount is not None and ms > 300:
            self.engine.at(600, node.power_off)
            self.engine.at(self.away(2000), node.power_on)
        node.pause(ms)

    # -- network -----------------------------------------------------------------------------------------------

    def heal(self) -> None:
        self.world.net.cut.clear()

    def partition(self) -> None:
        groups = self.engine.rng.choice(PARTITIONS)
        of = {number: index for index, group in enumerate(groups) for number in group}
        self.cut({(a, b) for a in of for b in of if of[a] != of[b]})

    def one_way(self) -> None:
        rng, nodes = self.engine.rng, list(self.world.nodes)
        source = rng.choice(nodes)
        targets = [node for node in nodes if node != source]
        self.cut({(source, target) for target in rng.sample(targets, rng.randint(1, len(targets)))})

    def cut(self, pairs: set[tuple[int, int]]) -> None:
        self.world.net.cut |= pairs
        self.engine.at(self.away(self.engine.rng.choice((100, 700, 2000, 3000))), self.heal)

    def connection(self) -> None:
        """A connection breaks."""
        node = self.engine.rng.choice(list(self.world.nodes.values()))
        if node.link is not None:
            self.world.net.lose(node.link)

    # -- disk --------------------------------------------------------------------------------------------------

    def slow(self) -> None:
        rng = self.engine.rng
        hosts = [node.host for node in self.world.nodes.values()] if rng.random() < 0.3 else [self.some().host]
        for host in hosts:
            host.slow = rng.choice((30, 150, 600))
            self.engine.at(self.away(rng.choice((300, 1500))), self._fast, host)

    @staticmethod
    def _fast(host: "object") -> None:
        host.slow = 0  # type: ignore[attr-defined]

    def disk_away(self) -> None:
        rng = self.engine.rng
        hosts = [node.host for node in self.world.nodes.values()] if rng.random() < 0.5 else [self.some().host]
        ms = self.away(rng.choice((200, 900, 1800, 3000)))
        for host in hosts:
            host.away = True
            self.engine.at(ms, self._back, host.number)

    def _back(self, number: int) -> None:
        self.world.nodes[number].host.away = False

    def flip(self) -> None:
        rng = self.engine.rng
        # With both copies of the lease unreadable nobody can be the home any more, until an operator helps.
        lease = rng.random() < 0.4 and not self.world.disk.tears
        self.world.disk.flip(lease, rng.randrange(2) if lease else rng.randrange(len(self.world.disk.slots)))

    def flaky(self) -> None:
        self.world.disk.flaky = 0.4
        self.engine.at(self.away(2000), self._steady)

    def _steady(self) -> None:
        self.world.disk.flaky = 0.0

    def target(self) -> None:
        """The target forgets its registrations. (A node fenced before, which still lives, could write again then.)"""
        if self.world.disk.pr and not self.world.disk.fenced:
            self.world.disk.restart_target()


KINDS = {
    "power": 6,
    "daemon": 4,
    "heart": 2,
    "fuse": 2,
    "pause": 4,
    "partition": 4,
    "one_way": 2,
    "connection": 2,
    "slow": 2,
    "disk_away": 2,
    "flip": 2,
    "flaky": 1,
    "target": 1,
}


def plan(world: "World", kinds: dict[str, int] = KINDS) -> None:
    """Choose one to three faults."""
    rng = world.engine.rng
    faults = Faults(world)
    for kind in rng.choices(list(kinds), list(kinds.values()), k=rng.choice((1, 1, 2, 2, 3))):
        at = rng.randrange(150, 2200)
        world.faults.append(f"{kind}@{at}")
        world.engine.at(at, getattr(faults, kind))


def only(*kinds: str) -> Callable[["World"], None]:
    """Return a plan with these kinds of faults alone."""
    return lambda world: plan(world, dict.fromkeys(kinds, 1))


def breaking_connections(world: "World") -> None:
    """Connections break all the time: locks are granted while a node names, over a new one, what it holds."""
    world.faults.append("breaking connections")
    for when in range(200, 2500, 35):
        world.engine.at(when, Faults(world).connection)


def frozen_home(world: "World") -> None:
    """The home stops for longer than its lease, and goes on; commands of others get lost meanwhile."""
    node = world.nodes[1]
    world.faults.append("frozen home")
    world.engine.at(world.engine.rng.randrange(200, 500), node.pause, 3000)
    world.disk.flaky = world.engine.rng.choice((0.0, 0.9))
    world.engine.at(3500, setattr, world.disk, "flaky", 0.0)


def between_change_and_outcome(world: "World") -> None:
    """The home loses power when a change of its is durable, and its outcome is not."""
    left = world.engine.rng.randrange(1, 12)
    world.faults.append(f"crash at change {left}")

    def crash(home: "Home") -> None:
        nonlocal left
        left -= 1
        if left == 0:
            for changes in home.mount.pending:
                for key, value in changes:
                    if value is None:
                        world.volume.meta.pop(key, None)
                    else:
                        world.volume.meta[key] = value
            home.node.power_off()
            world.engine.at(1500, home.node.power_on)

    world.between = crash
