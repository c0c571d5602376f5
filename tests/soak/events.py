"""What is done to the nodes: chosen by a seeded generator, carried out, and finished before the next.

An event's `run` leaves every node up with its load going, or raises Broken.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mxfsd.core.timeouts import Timeouts
from tests.soak.cluster import MARGIN_S, Cluster

SERVE_S = 60.0
WEIGHTS = {
    "kill home": 4,
    "kill client": 3,
    "kill two": 1,
    "kill all": 1,
    "crash daemon": 4,
    "crash heartbeat": 2,
    "crash fuse": 2,
    "cut off": 3,
    "cut off for long": 2,
    "move home": 4,
    "stop and start": 3,
}


@dataclass(slots=True)
class Event:
    """One event. *touched*: nodes for which it excuses a fencing."""

    kind: str
    nodes: list[str]
    began_s: float
    touched: set[str] = field(default_factory=set)
    served_s: float = 0.0
    ended_s: float = 0.0
    note: str = ""
    failover: bool = False
    """Another node had to take the home over."""

    def line(self) -> str:
        """What is printed of it."""
        what = f"{self.kind} {'+'.join(self.nodes)}"
        serving = f"serving again after {self.served_s:5.2f} s" if self.served_s >= 0 else ""
        return f"{self.began_s:8.1f} s  {what:<32} {serving}  {self.note}".rstrip()


class Chooser:
    """Draws events: each kind once in random order, then by weight."""

    def __init__(self, seed: int, only: list[str] | None = None) -> None:
        self.rng = random.Random(f"{seed} events")
        self._kinds = only or list(WEIGHTS)
        self._first = list(self._kinds)
        self.rng.shuffle(self._first)

    def next(self) -> str:
        """The kind of the next event."""
        if self._first:
            return self._first.pop()
        return self.rng.choices(self._kinds, [WEIGHTS[kind] for kind in self._kinds])[0]

    def pause_s(self) -> float:
        """How long everything goes well before it."""
        return self.rng.uniform(1.0, 4.0)


class Actions:
    """Carries events out."""

    def __init__(self, cluster: Cluster, rng: random.Random, timeouts: Timeouts) -> None:
        self._cluster = cluster
        self._rng = rng
        self._dead_s = timeouts.node_dead_ms / 1000

    def run(self, kind: str) -> Event:
        """Do it, wait until all is well again, and return what happened. Raises Broken."""
        cluster = self._cluster
        clients = [node for node in cluster.names if node != cluster.home]
        picks: dict[str, tuple[Callable[[Event], None], list[str]]] = {
            "kill home": (self._kill, [cluster.home]),
            "kill client": (self._kill, [self._rng.choice(clients)]),
            "kill two": (self._kill, self._rng.sample(cluster.names, 2)),
            "kill all": (self._kill, self._rng.sample(cluster.names, 3)),
            "crash daemon": (self._crash_daemon, [self._rng.choice(cluster.names)]),
            "crash heartbeat": (self._crash_heartbeat, [self._rng.choice(cluster.names)]),
            "crash fuse": (self._crash_fuse, [self._rng.choice(cluster.names)]),
            "cut off": (self._cut_off, [self._rng.choice(cluster.names)]),
            "cut off for long": (self._cut_off_for_long, [self._rng.choice(cluster.names)]),
            "move home": (self._move, [self._rng.choice(clients)]),
            "stop and start": (self._stop, [self._rng.choice(cluster.names)]),
        }
        action, nodes = picks[kind]
        event = Event(kind, nodes, cluster.now_s())
        was_home = [node for node in nodes if node == cluster.home]
        event.failover = bool(was_home) and kind not in ("cut off", "cut off for long", "stop and start", "crash fuse")
        if was_home:
            event.note = "(home)"
        action(event)
        for node in cluster.names:
            if node not in cluster.live:
                cluster.begin(node)
        self._wait_serving(event)
        event.ended_s = cluster.now_s()
        return event

    def _wait_serving(self, event: Event) -> None:
        """All nodes serve, and the load has done something on each since."""
        cluster = self._cluster
        cluster.wait(cluster.look, SERVE_S, f"all serve after {event.kind} {event.nodes}")
        self._probed(event, cluster.names)

    def _probed(self, event: Event, nodes: list[str]) -> float:
        """Wait until the load of each of *nodes* had an answer to what it began from now on; return when that was."""
        cluster = self._cluster
        since_ms = int(cluster.now_s() * 1000)

        def answered() -> bool:
            return all(cluster.live[node].table.last_began(0) > since_ms for node in nodes if node in cluster.live)

        cluster.wait(answered, SERVE_S, f"the load goes on after {event.kind} {event.nodes}")
        return cluster.now_s()

    def _survivors_serve(self, event: Event) -> None:
        """Note how long it took until every node that is up was served again."""
        nodes = [node for node in self._cluster.names if node in self._cluster.up and node in self._cluster.live]
        event.served_s = self._probed(event, nodes) - event.began_s if nodes else -1.0

    # -- the events ------------------------------------------------------------------------------------------------

    def _kill(self, event: Event) -> None:
        cluster, home = self._cluster, self._cluster.home
        event.touched.update(event.nodes)
        cluster.dying(*event.nodes)
        cluster.up.difference_update(event.nodes)
        cluster.command(*[("kill", node) for node in event.nodes])
        for node in event.nodes:
            # What a home did for its own applications is as durable as on any XFS: from the next fsync on.
            cluster.end(node, names_kept=node != home)
        if len(event.nodes) < len(cluster.names):
            if self._rng.random() < 0.7 or len(event.nodes) > 1:
                self._survivors_serve(event)
            else:  # it comes back before it is missed
                event.served_s = -1.0
                event.note += " back at once"
            time.sleep(self._rng.choice((0.0, 1.0, 3.0)))
        else:
            event.served_s = -1.0
        self._start(event.nodes)
        if len(event.nodes) == len(cluster.names):
            for node in event.nodes:
                cluster.begin(node)
            event.served_s = self._probed(event, cluster.names) - event.began_s

    def _start(self, nodes: list[str]) -> None:
        self._cluster.command(*[("start", node) for node in nodes])
        self._cluster.up.update(nodes)

    def _crash_daemon(self, event: Event) -> None:
        event.touched.update(event.nodes)
        self._cluster.command(("crash", event.nodes[0], "--process", "daemon"))
        self._survivors_serve(event)

    def _crash_heartbeat(self, event: Event) -> None:
        event.touched.update(event.nodes)
        self._cluster.command(("crash", event.nodes[0], "--process", "heartbeat"))
        self._survivors_serve(event)

    def _crash_fuse(self, event: Event) -> None:
        """The mount ends with it. Data that was not synced may be lost with the FUSE layer of a client, no names."""
        cluster, node = self._cluster, event.nodes[0]
        event.touched.add(node)
        cluster.dying(node)
        cluster.command(("crash", node, "--process", "fuse"))
        cluster.up.discard(node)
        cluster.end(node, names_kept=True)
        self._survivors_serve(event)
        self._again(node)

    def _again(self, node: str) -> None:
        self._cluster.mount_has_ended(node)
        self._start([node])

    def _cut_off(self, event: Event) -> None:
        """Shorter than anybody may be put out for: nobody may see more than a pause."""
        cluster, node = self._cluster, event.nodes[0]
        length_s = self._rng.uniform(0.3, self._dead_s - MARGIN_S)
        began_s = cluster.now_s()
        cluster.lab.partition(node)
        time.sleep(length_s)
        cluster.lab.heal(node)
        lasted_s = cluster.now_s() - began_s
        event.note += f" for {lasted_s:.1f} s"
        if lasted_s > self._dead_s - 0.5:
            event.touched.add(node)  # this machine was too slow to tell
        self._survivors_serve(event)

    def _cut_off_for_long(self, event: Event) -> None:
        """Longer than node_dead_ms: the node is put out, or gives the home up; its mount may be dead then."""
        cluster, node = self._cluster, event.nodes[0]
        was_home = node == cluster.home
        event.touched.add(node)
        cluster.dying(node)
        cluster.lab.partition(node)
        cluster.up.discard(node)
        others = [name for name in cluster.names if name != node]
        time.sleep(self._rng.uniform(1.5, 2.5) * self._dead_s)
        event.served_s = self._probed(event, others) - event.began_s
        cluster.lab.heal(node)
        began_s = cluster.now_s()

        def settled() -> bool:
            return cluster.mount_is_dead(node) or cluster.view(node).get("state") == "serving"

        cluster.wait(settled, SERVE_S, f"{node} goes on, or its mount is dead, after it was cut off")
        if cluster.mount_is_dead(node):
            event.note += " and put out"
            cluster.end(node, names_kept=not was_home)
            self._again(node)
        else:
            cluster.up.add(node)
            cluster.wait(lambda: cluster.look() or cluster.mount_is_dead(node), SERVE_S, f"{node} serves again")
            if cluster.mount_is_dead(node):
                event.note += " and put out"
                cluster.end(node, names_kept=not was_home)
                self._again(node)
            else:
                cluster.survived(node)
                event.note += f", back after {cluster.now_s() - began_s:.1f} s"

    def _move(self, event: Event) -> None:
        self._cluster.command(("move-home", event.nodes[0]))
        self._survivors_serve(event)

    def _stop(self, event: Event) -> None:
        """In good order: nothing at all may be missing afterwards."""
        cluster, node = self._cluster, event.nodes[0]
        cluster.end(node, names_kept=True, data_kept=True, gently=True)
        cluster.up.discard(node)
        cluster.command(("stop", node))
        self._survivors_serve(event)
        time.sleep(self._rng.choice((0.0, 1.0, 3.0)))
        self._start([node])
