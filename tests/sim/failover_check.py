"""What must hold whatever fails, checked without help from the code under test.

Everything an application can see is a register: a cell of a file (``(ino, index)``) or a name (``("n", name)``). A
register shows the number of the operation that changed it last. Operations are numbered in the order in which they were
executed for the last time before they were answered; from then on their place does not change. A floor says what must
at least be seen:

* ``shared``: what was durable when it was answered, or was seen by another node. It survives everything.
* ``own``: what one node's applications were told but did not sync. It is lost with that node, with nothing else.
"""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from simcheck import CONFLICTS, Broken

from mxfs_proto.modes import LockMode

if TYPE_CHECKING:
    from failover import World
    from failover_client import Fuse

Register = Any


class Ledger:
    """What was done, answered and seen."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.place: dict[tuple[Register, int], int] = {}
        self.writer: dict[int, int] = {}
        self.shared: dict[Register, int] = defaultdict(int)
        self.own: dict[int, dict[Register, int]] = defaultdict(dict)
        self.answered: set[int] = set()
        self.durable: set[int] = set()
        self.homes: dict[int, int] = {}
        self.counts: dict[str, int] = defaultdict(int)

    # -- what the homes do -------------------------------------------------------------------------------------

    def executed(self, op: int, registers: list[Register], fuse: int) -> None:
        """Operation *op* of *fuse* changed these registers."""
        self.counts["executed"] += 1
        self.writer[op] = fuse
        if op not in self.answered:
            for register in registers:
                self.place[register, op] = self.world.engine.serial()

    def applies(self, meta: dict[Any, Any], op: int) -> None:
        """A change that may happen once is about to be made to this state of the name space."""
        if ("did", op) in meta:
            raise Broken(f"operation {op} is executed twice")

    def serves(self, epoch: int, home: int) -> None:
        """*home* acts as home of *epoch*."""
        if self.homes.setdefault(epoch, home) != home:
            raise Broken(f"nodes {self.homes[epoch]} and {home} are both home in epoch {epoch}")

    def recovered(self, meta: dict[Any, Any]) -> None:
        """A new home is about to serve from this state: what was answered as done must be in it."""
        lost = [op for op in self.durable if ("did", op) not in meta]
        if lost:
            raise Broken(f"operations {lost} were answered and are lost")

    # -- what applications are told ----------------------------------------------------------------------------

    def begin(self, registers: list[Register]) -> list[tuple[Register, int, int]]:
        """A call begins: what it must at least see, and whose word that is (0: everybody's)."""
        floors = []
        for register in registers:
            if self.shared[register]:
                floors.append((register, 0, self.shared[register]))
            for fuse, own in self.own.items():
                if register in own:
                    floors.append((register, fuse, own[register]))
        return floors

    def saw(self, fuse: "Fuse", floors: list[tuple[Register, int, int]], seen: dict[Register, int]) -> None:
        """The call returned these operations' values."""
        self.counts["seen"] += 1
        at = self.world.engine.now
        places = {}
        for register, op in seen.items():
            place = 0 if op == 0 else self.place.get((register, op), -1)
            if place < 0:
                raise Broken(f"node {fuse.number} saw {register} = {op}, which was never executed, at {at}")
            places[register] = place
        for register, whose, floor in floors:
            if whose and self.own.get(whose, {}).get(register, 0) < floor:
                continue  # that node is gone, and nobody else had seen it
            if places.get(register, floor) < floor:
                by = next(op for (reg, op), place in self.place.items() if reg == register and place == floor)
                raise Broken(
                    f"node {fuse.number} saw {register} = {seen[register]} ({places[register]}) although "
                    f"operation {by} ({floor}) was {'seen or durable' if not whose else f'done by fuse {whose}'} before"
                )
        for register, op in seen.items():
            if fuse.home_here or self.writer.get(op) == fuse.serial:
                self._raise(self.own[fuse.serial], register, places[register])
            else:
                self._raise(self.shared, register, places[register])

    def done(self, fuse: "Fuse", op: int, registers: list[Register], durable: bool, once: bool = False) -> None:
        """A change was answered; *durable*: it must survive the home. *once*: it was one of the name space."""
        self.counts["done"] += 1
        self.answered.add(op)
        if once and durable:
            self.durable.add(op)
        for register in registers:
            place = self.place.get((register, op))
            if place is None:
                raise Broken(f"operation {op} was answered and never executed on {register}")
            self._raise(self.shared if durable else self.own[fuse.serial], register, place)

    def synced(self, fuse: "Fuse", what: dict[Register, int]) -> None:
        """fsync returned: what this node was told before it began is durable."""
        self.counts["synced"] += 1
        for register, place in what.items():
            self._raise(self.shared, register, place)

    def owned(self, fuse: "Fuse", ino: int) -> dict[Register, int]:
        """Return what an fsync of *ino* that begins now will promise."""
        return {register: place for register, place in self.own[fuse.serial].items() if register[0] == ino}

    def lost(self, fuse: int) -> None:
        """This FUSE layer is gone, or was put out; what only its applications knew may be lost."""
        self.own.pop(fuse, None)

    @staticmethod
    def _raise(floors: dict[Register, int], register: Register, place: int) -> None:
        if place > floors.get(register, 0):
            floors[register] = place

    # -- what nodes believe ------------------------------------------------------------------------------------

    def step(self) -> None:
        """No two homes, and no two conflicting locks that are trusted."""
        world = self.world
        serving = [node for node in world.nodes.values() if node.acts_as_home()]
        if len(serving) > 1:
            raise Broken(f"nodes {[node.number for node in serving]} act as home at once")
        beliefs: dict[int, list[tuple[int, LockMode]]] = {}
        for node in world.nodes.values():
            fuse = node.fuse
            if fuse is None or not fuse.trusts():
                continue
            for ino, lock in fuse.cache._locks.items():
                if lock.mode is not LockMode.NL:
                    beliefs.setdefault(ino, []).append((fuse.number, lock.mode))
        for ino, held in beliefs.items():
            for index, (number, mode) in enumerate(held):
                for other, other_mode in held[:index]:
                    if frozenset({mode, other_mode}) in CONFLICTS:
                        raise Broken(f"inode {ino}: node {number} holds {mode.name}, node {other} {other_mode.name}")

    def finish(self) -> None:
        """Faults stopped long ago: every request has ended and somebody serves."""
        world = self.world
        for node in world.nodes.values():
            if node.fuse is not None and node.fuse.busy:
                raise Broken(f"node {node.number} still waits for: {sorted(node.fuse.busy.values())}")
        if not any(node.acts_as_home() for node in world.nodes.values()):
            raise Broken("nobody serves at the end")
