"""What must hold in a simulated volume, checked without any help from the code under test.

The checker knows what each node *believes* (its cache's mode, its kernel's copies, its descriptors) and what
applications were told; it knows nothing of queues, sequences or BASTs.
"""

from collections import defaultdict
from typing import TYPE_CHECKING

from mxfs_proto.modes import LockMode

if TYPE_CHECKING:
    from simnode import Node
    from simulator import World

CONFLICTS = {
    frozenset({a, b})
    for a, b in [
        (LockMode.EX, LockMode.EX),
        (LockMode.EX, LockMode.PW),
        (LockMode.EX, LockMode.PR),
        (LockMode.EX, LockMode.CW),
        (LockMode.EX, LockMode.CR),
        (LockMode.PW, LockMode.PW),
        (LockMode.PW, LockMode.PR),
        (LockMode.PW, LockMode.CW),
        (LockMode.PR, LockMode.CW),
    ]
}
"""Written out once more, from the VMS matrix, rather than taken from the code under test."""


class Broken(AssertionError):
    """An invariant does not hold."""


class Checker:
    """Watches one world."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.written: dict[int, int] = defaultdict(int)
        self.floor: dict[int, int] = defaultdict(int)
        self.acked: dict[int, int] = defaultdict(int)
        self.executed: set[tuple[int, int]] = set()
        self.homes: dict[int, int] = {}
        self.reads = 0
        self.writes = 0
        self.opens = 0

    # -- what applications see: one register an inode, whose versions the execution order numbers ---------------

    def begin(self, inos: tuple[int, ...], changing: bool = False) -> dict[int, int]:
        """An application's call begins: what it must at least see.

        *changing*: a change of this inode by another thread of the same node is under way. The home calls back every
        lock but the requester's own, so until the reply comes that node may still show the version before, although
        other nodes may have seen the new one: then only changes that were answered count.
        """
        floors = self.acked if changing else self.floor
        return {ino: floors[ino] for ino in inos}

    def end(self, who: str, floors: dict[int, int], seen: dict[int, int], wrote: bool = False) -> None:
        """It returned these versions."""
        for ino, version in seen.items():
            if version < floors[ino]:
                raise Broken(
                    f"{who} got version {version} of inode {ino} after version {floors[ino]} had been returned"
                )
            if version > self.written[ino]:
                raise Broken(f"{who} got version {version} of inode {ino}, which was never written")
            self.floor[ino] = max(self.floor[ino], version)
            if wrote:
                self.acked[ino] = max(self.acked[ino], version)

    def execute(self, session: int, seq: int, epoch: int, home: int) -> None:
        """A shipped change is executed at *home*."""
        if (session, seq) in self.executed:
            raise Broken(f"operation {seq} of session {session} is executed twice")
        self.executed.add((session, seq))
        self.serves(epoch, home)

    def serves(self, epoch: int, home: int) -> None:
        """*home* acts as the home of *epoch*."""
        if self.homes.setdefault(epoch, home) != home:
            raise Broken(f"nodes {self.homes[epoch]} and {home} are both home in epoch {epoch}")
        if epoch != max(self.homes):
            raise Broken(f"node {home} acts as home of epoch {epoch} after epoch {max(self.homes)} began")

    # -- what nodes believe ------------------------------------------------------------------------------------

    def step(self) -> None:
        """Check every belief against every other one."""
        world = self.world
        nodes = [node for node in world.nodes.values() if node.trusts()]
        for ino in world.inos:
            self._locks(nodes, ino)
            self._writers(nodes, ino)

    def _locks(self, nodes: "list[Node]", ino: int) -> None:
        beliefs = [(f"node {node.number}", node.number, node.cache.data_mode(ino)) for node in nodes]
        for index, (who, number, mode) in enumerate(beliefs):
            if mode == LockMode.NL:
                continue
            for other, other_number, other_mode in beliefs[:index]:
                if number != other_number and frozenset({mode, other_mode}) in CONFLICTS:
                    raise Broken(f"inode {ino}: {who} holds {mode.name}, {other} holds {other_mode.name}")
        running = list(self.world.running.get(ino, {}).items())
        for index, (op_id, (owner, mode)) in enumerate(running):
            for who, number, held in beliefs:
                if number != owner and frozenset({mode, held}) in CONFLICTS:
                    raise Broken(f"inode {ino}: operation {op_id} of {owner} in {mode.name}, {who} holds {held.name}")
            for other, (_, other_mode) in running[:index]:
                if frozenset({mode, other_mode}) in CONFLICTS:
                    raise Broken(
                        f"inode {ino}: operations {op_id} and {other} run in {mode.name} and {other_mode.name}"
                    )

    def _writers(self, nodes: "list[Node]", ino: int) -> None:
        writers = {node.number for node in nodes if any(d.writable and d.cached for d in node.descriptors[ino])}
        if len(writers) > 1:
            raise Broken(f"inode {ino}: nodes {sorted(writers)} have writable descriptors that are not direct")

    # -- the end -----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Faults stopped long ago: nothing may be under way any more."""
        world = self.world
        for node in world.nodes.values():
            if not node.alive:
                continue
            if node.busy:
                raise Broken(f"node {node.number} still waits for: {sorted(node.busy.values())}")
            if node.cache.pending or node.cache.revoking:
                raise Broken(f"node {node.number}: {node.cache.pending} requests, {node.cache.revoking} revocations")
        held: dict[int, int] = defaultdict(int)
        for view in world.home.master.snapshot(world.now):
            if view.waiters:
                raise Broken(f"inode {view.ino}: the master still queues {view.waiters}")
            for holder in view.holders:
                held[holder.node] += not holder.op_id
        counted = {node: count for node, count in world.home.master.held.items() if count}
        if counted != {node: count for node, count in held.items() if count}:
            raise Broken(f"the master counts {counted} locks and has {dict(held)}")
